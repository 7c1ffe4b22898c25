"""Image folders: pretraining (labels unused) and classification (one sub-folder per class), and small built-in data."""

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from telemetry import Progress
from utils import InputError, describe_error

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
UNLABELLED = -1

Sample = tuple[str, int]  # path, label

# What Pillow raises on files that are missing, cut short, damaged or no images.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


# --- finding images --------------------------------------------------------------------------------------------------


def list_images(root: str | os.PathLike) -> list[str]:
    """Paths of all images below `root`, sorted; symbolic links are followed, hidden files and folders left out.

    Raises InputError if the folder is missing, cannot be read, or has no images.
    """
    root = os.fspath(root)
    _check_is_folder(root)
    paths = []
    try:
        for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
            subfolders[:] = [name for name in subfolders if _leads_on(folder, name)]
            paths += [os.path.join(folder, name) for name in files if _is_image(name)]
    except OSError as error:
        raise InputError(f"image folder {root}: cannot be read ({error})") from error
    if not paths:
        raise InputError(f"image folder {root}: has no images ({' '.join(IMAGE_SUFFIXES)})")
    return sorted(paths)


def labelled_samples(root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """Class names (the sub-folders, sorted) and (path, index of the class) for every image at any depth below them.

    Raises InputError if the folder is missing, has no class folders, or has a class folder without images.
    """
    root = os.fspath(root)
    _check_is_folder(root)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"image folder {root}: has no class folders (expected <class>/<image> below it)")
    samples = [(path, label) for label, name in enumerate(classes) for path in list_images(os.path.join(root, name))]
    return classes, samples


def _check_is_folder(root):
    if not os.path.isdir(root):
        raise InputError(f"image folder {root}: {'is not a folder' if os.path.exists(root) else 'does not exist'}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise InputError(f"image folder {root}: may not be read by this user")


def _raise(error):
    raise error


def _is_image(name):
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _leads_on(folder, name):
    """False for hidden folders and for links back to a folder above, which would never end."""
    path = os.path.join(folder, name)
    loops = os.path.islink(path) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))
    return not loops and not name.startswith(".")


# --- reading images --------------------------------------------------------------------------------------------------


def read_image(path: str | os.PathLike) -> Image.Image:
    """Decode an image of any mode to RGB. Raises InputError naming the file and the reason if that fails."""
    try:
        with Image.open(path) as image:
            return _to_rgb(image)
    except DECODE_ERRORS as error:
        raise InputError(f"image {path}: cannot be read ({describe_error(error)})") from error


def _to_rgb(image):
    """Transparency is dropped, not blended; 16-bit grey is scaled to 8 bits (Pillow would clip it)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class ImageDataset(Dataset):
    """(transform(RGB image), label) for each (path, label) of `samples`.

    The transform's random draws are a function of (seed, epoch, index): they depend on neither the number of workers
    nor that of processes, a resumed run draws what an uninterrupted one would, and torch's generator is left as it was.
    """

    def __init__(self, samples: Sequence[Sample], transform: Callable, seed: int = 0, classes: Sequence[str] = ()) -> None:
        self.samples, self.transform, self.seed, self.classes = list(samples), transform, seed, list(classes)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: persistent workers must see it

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | list[torch.Tensor], int]:
        """Raises InputError if the file cannot be decoded."""
        path, label = self.samples[index]
        image = read_image(path)
        draw = np.random.SeedSequence((self.seed, int(self._epoch), index)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(draw))  # torch.manual_seed would seed GPUs as well
            return self.transform(image), label


def shard(dataset: Dataset, rank: int, world_size: int) -> Subset:
    """Every world_size-th image from `rank` on: over all ranks each image once, without padding."""
    return Subset(dataset, range(rank, len(dataset), world_size))


# --- checking images -------------------------------------------------------------------------------------------------


def check_images(paths: Sequence[str], threads: int = 8) -> dict[str, str]:
    """Decode every image once, the processes sharing the work; {path: reason} of those that cannot be used.

    Prints the progress about every five seconds. All processes must call it, and all get the same answer.
    """
    own = paths[get_rank() :: get_world_size()]
    bad: dict[str, str] = {}
    meter = Progress("checking images", len(own), silent_if_quick=True)
    block = 512  # a pool's queue of a million images would fill the memory
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for first in range(0, len(own), block):
            names = own[first : first + block]
            bad |= {name: why for name, why in zip(names, pool.map(_why_unusable, names), strict=True) if why}
            meter.advance(len(names))
    return {path: why for share in all_gather_objects(bad) for path, why in share.items()}


def _why_unusable(path):
    try:
        with Image.open(path) as image:  # refuses images without pixels, too
            image.draft("L", (1, 1))  # JPEG: the whole stream is read, but an eighth of the pixels computed
            image.load()
    except DECODE_ERRORS as error:
        return describe_error(error)
    return None


def keep_readable(samples: Sequence[Sample], skip_bad_images: bool = False, threads: int = 8) -> list[Sample]:
    """The samples whose images can be decoded.

    Raises InputError naming the first that cannot, unless `skip_bad_images`, which drops them, and if none can.
    """
    bad = check_images([path for path, _ in samples], threads)
    if not bad:
        return list(samples)
    first = "; ".join(f"{path} ({why})" for path, why in sorted(bad.items())[:3])
    summary = f"{len(bad)} of {len(samples)} images cannot be read: {first}{'; ...' if len(bad) > 3 else ''}"
    if len(bad) == len(samples):
        raise InputError(summary)
    if not skip_bad_images:
        raise InputError(f"{summary} (--skip_bad_images true leaves them out)")
    if is_main_process():
        print(f"left out: {summary}", flush=True)
    return [(path, label) for path, label in samples if path not in bad]


def _check(samples, skip_bad_images, threads, check):
    if skip_bad_images and not check:
        raise InputError("--skip_bad_images true with --check_images false: only the check finds the images to skip")
    return keep_readable(list(samples), skip_bad_images, threads) if check else list(samples)


def pretraining_dataset(
    root: str | os.PathLike,
    transform: Callable,
    seed: int = 0,
    skip_bad_images: bool = False,
    threads: int = 8,
    check: bool = True,
) -> ImageDataset:
    """All images below `root`, flat or nested, labelled -1. Raises InputError as list_images and keep_readable do."""
    samples = _check(((path, UNLABELLED) for path in list_images(root)), skip_bad_images, threads, check)
    return ImageDataset(samples, transform, seed)


def labelled_dataset(
    root: str | os.PathLike,
    transform: Callable,
    seed: int = 0,
    skip_bad_images: bool = False,
    threads: int = 8,
    check: bool = True,
) -> ImageDataset:
    """Images of <root>/<class>/ with their classes. Raises InputError as labelled_samples and keep_readable do."""
    return dataset_of(*labelled_samples(root), transform, seed, skip_bad_images, threads, check)


def dataset_of(
    classes: Sequence[str],
    samples: Sequence[Sample],
    transform: Callable,
    seed: int = 0,
    skip_bad_images: bool = False,
    threads: int = 8,
    check: bool = True,
) -> ImageDataset:
    """A data set of these images, once they are checked. Raises InputError as keep_readable does."""
    return ImageDataset(_check(samples, skip_bad_images, threads, check), transform, seed, classes)


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise InputError unless both hold the same class folders: otherwise one number means two classes."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise InputError(f"train/ and val/ must hold the same class folders: only in one of them: {shown}")


# --- downstream data -------------------------------------------------------------------------------------------------

# torchvision's data sets: folder below the root, number of classes, attributes of the images and of their classes.
TORCHVISION = {
    "Flowers102": ("flowers-102", 102, "_image_files", "_labels"),
    "Food101": ("food-101", 101, "_image_files", "_labels"),
    "OxfordIIITPet": ("oxford-iiit-pet", 37, "_images", "_labels"),
}


def torchvision_samples(
    name: str, root: str | os.PathLike, split: str, download: bool = False
) -> tuple[list[str], list[Sample]]:
    """Classes (their numbers) and samples of one split of a data set of torchvision; the network only with `download`.

    Raises InputError if the data are missing or damaged, or if a class has no image.
    """
    from torchvision import datasets

    folder, count, images, labels = TORCHVISION[name]
    where = Path(root) / folder
    if not where.is_dir() and not download:
        raise InputError(f"{name}: no folder {where} (torchvision's layout); --download true fetches it")
    try:
        data = getattr(datasets, name)(root, split=split, download=download)
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{name} in {where}: cannot be read ({describe_error(error)})") from error
    samples = [(os.fspath(path), int(label)) for path, label in zip(getattr(data, images), getattr(data, labels), strict=True)]
    found = {label for _, label in samples}
    if found != set(range(count)):
        raise InputError(f"{name} in {where}: its split {split} has images of {len(found)} classes, not of {count}")
    return [str(label) for label in range(count)], samples


def read_semi_list(path: str | os.PathLike) -> dict[str, str]:
    """{<class>/<image>: class} of a list of images, one a line: <class>_<rest>, as in ImageNet, or <class>/<image>.

    Raises InputError if there is no such list, if it is empty, or if it names an image twice.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list of images {path}: cannot be read ({describe_error(error)})") from error
    if not lines:
        raise InputError(f"list of images {path}: is empty")
    classes = {}
    for line in lines:
        name, slash, _ = line.partition("/")
        place, name = (line, name) if slash else (f"{line.split('_')[0]}/{line}", line.split("_")[0])
        if place in classes:
            raise InputError(f"list of images {path}: {line} stands in it twice")
        classes[place] = name
    return classes


def listed_samples(path: str | os.PathLike, root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """Classes of the folder `root`, and of its images those in the list, in the list's order.

    Raises InputError if a listed class or image is not there, or if a class has no image in the list.
    """
    listed = read_semi_list(path)
    classes, samples = labelled_samples(root)
    start = len(os.path.join(root, ""))
    found = {file[start:].replace(os.sep, "/"): (file, label) for file, label in samples}
    for problem, names in (
        (f"{root} lacks its class folders", sorted(set(listed.values()) - set(classes))),
        (f"{root} lacks its images", [place for place in listed if place not in found]),
        (f"it has no image of the class folders of {root}", sorted(set(classes) - set(listed.values()))),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"list of images {path}: {problem}: {shown} ({len(names)} in all)")
    return classes, [found[place] for place in listed]
