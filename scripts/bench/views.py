"""Images per second and core: decoding and all training views of an image, by recipe, renderer and size of the images.

    python -m scripts.bench.views --output results/bench_views.json   # photographs that come with scikit-learn

Beside our renderers (cpp, torchvision): the original's pipeline of Pillow images written plainly (`pillow`), and, where it is
installed, lightly's DINO transform. Everything runs on one thread, alternately, on the same files; the fastest of --rounds
counts. `photos` are JPEG files of 500 x 375 pixels with 2 views of 224 and 8 of 96 pixels, `small` PNG files of 28 x 28 pixels
with 2 views of 24 pixels.
"""

import importlib.util
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torchvision import transforms as v1

from clever.arguments import ArgumentParser, check_positive
from clever.data.augmentations import RECIPES, MultiCropAugmentation
from clever.data.datasets import ImageDataset
from clever.data.files import list_images
from clever.data.rendering import RENDERERS
from clever.data.rendering_cpp import unavailable_reason
from clever.entry import run_entry_point
from clever.utils import IMAGENET_MEAN, IMAGENET_STD, save_json

SETS = {"photos": (224, 96, 8), "small": (24, 0, 0)}  # sides of global and local views, number of local views
Pipeline = Callable[[str], object]  # path of an image -> its views


def original(aug: str, large: int, small: int, number: int) -> Pipeline:
    """The original's pipeline: every view from the Pillow image by torchvision's transforms, normalised in the worker."""

    def view(size: int, scale: tuple[float, float], blur_p: float, solarize_p: float = 0.0) -> Callable:
        blur = v1.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
        steps = [v1.RandomResizedCrop(size, scale, interpolation=v1.InterpolationMode.BICUBIC), v1.RandomHorizontalFlip(0.5)]
        if RECIPES[aug].get("rotation"):
            steps.append(v1.RandomRotation(90))
        if RECIPES[aug].get("elastic_p"):
            steps.append(v1.RandomApply([v1.ElasticTransform(alpha=100.0)], p=0.5))
        steps += [v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v1.RandomGrayscale(0.2)]
        steps += [v1.RandomApply([blur], blur_p), v1.RandomSolarize(128, solarize_p)]
        return v1.Compose([*steps, v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    first, second = view(large, (0.4, 1.0), 1.0), view(large, (0.4, 1.0), 0.1, 0.2)
    local = view(small or 8, (0.05, 0.4), 0.5)

    def run(path: str) -> list[torch.Tensor]:
        image = Image.open(path).convert("RGB")
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
    others = {"pillow": original(aug, *sizes)}
    if importlib.util.find_spec("lightly") and not RECIPES[aug].get("elastic_p"):
        others["lightly"] = lightly_dino(aug, *sizes)
    for name, pipeline in others.items():
        runs[name] = lambda pipeline=pipeline: [pipeline(path) for path in paths]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(milliseconds(run, len(paths)))
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=64, help="images per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the fastest counts")
    parser.add_argument("--aug", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--output", help="also write the table there, as JSON")
    args = parser.parse_args()
    check_positive(args, "number", "rounds")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind, sizes in SETS.items():
            folder = Path(scratch) / kind
            folder.mkdir()
            paths = write_images(kind, folder, args.number)
            for aug in args.aug:
                found = measure(paths, aug, sizes, args.rounds)
                rows.append({"images": kind, "aug": aug, "milliseconds": found})
                rates = "  ".join(f"{name} {1000 / ms:.0f}" for name, ms in found.items())
                factor = f"  cpp / pillow {found['pillow'] / found['cpp']:.1f} x" if "cpp" in found else ""
                print(f"{kind} {aug}: images/s and core: {rates}{factor}", flush=True)
    if args.output:
        save_json({"kind": "bench_views", "torch": torch.__version__, "rows": rows}, args.output)


if __name__ == "__main__":
    run_entry_point(main)
