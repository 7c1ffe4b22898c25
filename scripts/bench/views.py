"""Images per second and core: decoding and all training views of an image, by recipe, renderer and size of the images.

    python -m scripts.bench.views                               # photographs that come with scikit-learn
    python -m scripts.bench.views --images /data/imagenet/val --number 64 --output results/bench_views.json

Beside our renderers (cpp, torchvision): the original's pipeline of Pillow images written plainly (`pillow`), torchvision's
transforms v2 on tensors (`v2`), and, where it is installed, lightly's DINO transform.
Everything runs in one process on one thread, alternately, on the same files; the table shows the fastest of --rounds.

`photos` are JPEG files of 500 x 375 pixels with 2 views of 224 and 8 of 96 pixels, `small` PNG files of 28 x 28 pixels with 2
views of 24 pixels.
"""

import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import v2

from clever.arguments import ArgumentParser, check_positive
from clever.data.augmentations import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RECIPES,
    MultiCropAugmentation,
)
from clever.data.datasets import ImageDataset
from clever.data.files import list_images
from clever.data.rendering import RENDERERS
from clever.data.rendering_cpp import unavailable_reason
from clever.entry import run_entry_point
from clever.utils import InputError, save_json

SETS = {"photos": (224, 96, 8), "small": (24, 0, 0)}  # sides of global and local views, number of local views
Pipeline = Callable[[str], object]  # path of an image -> its views


# --- the pipelines to compare with ---------------------------------------------------------------------------------------


class PillowBlur:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if random.random() < self.p else image


class PillowSolarize:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


def composed(t, aug: str, size: int, scale: tuple[float, float], blur, solarize, last: list) -> Callable:
    """A view by torchvision's transforms `t` (v1 or v2), as DINO's and CLeVER's scripts compose it."""
    steps = [t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC), t.RandomHorizontalFlip(0.5)]
    if RECIPES[aug].get("rotation"):
        steps.append(t.RandomRotation(90))
    if RECIPES[aug].get("elastic_p"):
        steps.append(t.RandomApply([t.ElasticTransform(alpha=100.0)], p=0.5))
    steps += [t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), t.RandomGrayscale(0.2), blur, solarize]
    return t.Compose([*steps, *last])


def original(aug: str, large: int, small: int, number: int) -> Pipeline:
    """The original's pipeline: every view from the Pillow image, normalised in the worker."""
    last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    first = composed(transforms, aug, large, (0.4, 1.0), PillowBlur(1.0), PillowSolarize(0.0), last)
    second = composed(transforms, aug, large, (0.4, 1.0), PillowBlur(0.1), PillowSolarize(0.2), last)
    local = composed(transforms, aug, small or 8, (0.05, 0.4), PillowBlur(0.5), PillowSolarize(0.0), last)

    def run(path: str) -> list[torch.Tensor]:
        image = Image.open(path).convert("RGB")
        return [first(image), second(image), *(local(image) for _ in range(number))]

    return run


def tensors_v2(aug: str, large: int, small: int, number: int) -> Pipeline:
    """torchvision's transforms v2 on uint8 tensors."""
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

    def view(size: int, scale: tuple[float, float], blur_p: float, solarize_p: float) -> Callable:
        blur = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur_p)
        return composed(v2, aug, size, scale, blur, v2.RandomSolarize(128, solarize_p), last)

    first, second = view(large, (0.4, 1.0), 1.0, 0.0), view(large, (0.4, 1.0), 0.1, 0.2)
    local = view(small or 8, (0.05, 0.4), 0.5, 0.0)

    def run(path: str) -> list[torch.Tensor]:
        image = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
        return [first(image), second(image), *(local(image) for _ in range(number))]

    return run


def lightly_dino(aug: str, large: int, small: int, number: int) -> Pipeline:
    """lightly's DINOTransform; it has no elastic distortion."""
    from lightly.transforms import DINOTransform

    rotation = {"rr_prob": 1.0, "rr_degrees": 90.0} if RECIPES[aug].get("rotation") else {}
    transform = DINOTransform(
        global_crop_size=large, local_crop_size=small or 8, n_local_views=number, cj_strength=0.5, **rotation
    )
    return lambda path: transform(Image.open(path).convert("RGB"))


def other_pipelines(aug: str, sizes: tuple[int, int, int]) -> dict[str, Pipeline]:
    """What is installed, by name."""
    found = {"pillow": original(aug, *sizes), "v2": tensors_v2(aug, *sizes)}
    if importlib.util.find_spec("lightly") and not RECIPES[aug].get("elastic_p"):
        found["lightly"] = lightly_dino(aug, *sizes)
    return found


# --- images and timing ---------------------------------------------------------------------------------------------------


def write_images(kind: str, folder: Path, number: int) -> list[str]:
    """`number` files cut at random out of the two photographs of scikit-learn."""
    from sklearn.datasets import load_sample_images

    photographs, rng = [Image.fromarray(image) for image in load_sample_images().images], random.Random(0)
    for i in range(number):
        left, top = rng.randrange(100), rng.randrange(50)
        picture = photographs[i % 2].crop((left, top, left + 540, top + 377))
        if kind == "photos":
            picture.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=94)
        else:
            picture.resize((28, 28), Image.Resampling.BICUBIC).save(folder / f"{i:03}.png")
    return list_images(folder)


def milliseconds(run: Callable[[], object], images: int) -> float:
    """CPU time of this thread per image."""
    start = time.thread_time()
    run()
    return 1000 * (time.thread_time() - start) / images


def measure(paths: list[str], aug: str, sizes: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Milliseconds per image of every pipeline, the fastest of the rounds."""
    large, small, number = sizes
    views = MultiCropAugmentation(aug, (0.4, 1.0), (0.05, 0.4), number, large, small or 8)
    samples = [(path, 0) for path in paths]
    names = [name for name in RENDERERS if name != "cpp" or unavailable_reason() is None]
    ours = {name: ImageDataset(samples, views, renderer=name) for name in names}
    runs = {name: (lambda dataset=dataset: dataset.__getitems__(list(range(len(paths))))) for name, dataset in ours.items()}
    for name, pipeline in other_pipelines(aug, sizes).items():
        runs[name] = lambda pipeline=pipeline: [pipeline(path) for path in paths]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, len(paths)))
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--images", help="folder of images to use instead of scikit-learn's")
    parser.add_argument("--number", type=int, default=64, help="images per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the fastest counts")
    parser.add_argument("--aug", nargs="+", default=list(RECIPES), help="recipes")
    parser.add_argument("--output", help="also write the table there, as JSON")
    args = parser.parse_args()
    check_positive(args, "number", "rounds")
    if unknown := [aug for aug in args.aug if aug not in RECIPES]:
        raise InputError(f"--aug {unknown[0]!r}: must be one of {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind, sizes in SETS.items():
            folder = Path(scratch) / kind
            folder.mkdir()
            paths = list_images(args.images)[: args.number] if args.images else write_images(kind, folder, args.number)
            kilobytes = np.mean([Path(path).stat().st_size for path in paths]) / 1024
            for aug in args.aug:
                found = measure(paths, aug, sizes, args.rounds)
                rows.append({"images": kind, "kilobytes": round(float(kilobytes), 1), "aug": aug, "milliseconds": found})
                rates = "  ".join(f"{name} {1000 / ms:.0f}" for name, ms in found.items())
                factor = f"  cpp / pillow {found['pillow'] / found['cpp']:.1f} x" if "cpp" in found else ""
                print(f"{kind} ({kilobytes:.0f} KB) {aug}: images/s and core: {rates}{factor}", flush=True)
    if args.output:
        save_json({"kind": "bench_views", "torch": torch.__version__, "rows": rows}, args.output)
    print(json.dumps({"torch": torch.__version__}))


if __name__ == "__main__":
    run_entry_point(main)
