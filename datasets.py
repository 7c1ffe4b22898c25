"""Image datasets from folders: for pretraining (labels unused) and for classification (one sub-folder per class)."""

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

# What Pillow raises for files that are missing, truncated, damaged or not images.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


# --- finding images --------------------------------------------------------------------------------------------------


def list_images(root: str | os.PathLike) -> list[str]:
    """Sorted paths of all images below `root`. Symbolic links are followed; hidden files and folders are skipped.

    Raises InputError if the folder is missing, cannot be read, or contains no images.
    """
    root = os.fspath(root)
    _check_is_folder(root)
    paths = []
    try:
        for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
            subfolders[:] = [name for name in subfolders if _should_enter(folder, name)]
            paths += [os.path.join(folder, name) for name in files if _is_image(name)]
    except OSError as error:
        raise InputError(f"image folder {root}: cannot be read ({error})") from error
    if not paths:
        raise InputError(f"image folder {root}: has no images ({' '.join(IMAGE_SUFFIXES)})")
    return sorted(paths)


def labelled_samples(root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """Class names (the sub-folders, sorted) and (path, index of the class) for every image at any depth below them.

    Raises InputError if the folder is missing, contains no class folders, or contains a class folder without images.
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
        raise InputError(f"image folder {root}: is not readable by this user")


def _raise(error):
    raise error


def _is_image(name):
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _should_enter(folder, name):
    """False for hidden folders and for links to a parent folder, which would be followed forever."""
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
    """Drops transparency without blending, and scales 16-bit grey to 8 bits (Pillow would clip it)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class ImageDataset(Dataset):
    """(transform(RGB image), label) for each (path, label) of `samples`.

    The transform's random draws are a function of (seed, epoch, index). They do not depend on the number of workers or
    processes, a resumed run repeats them, and torch's global generator is left unchanged.
    """

    def __init__(self, samples: Sequence[Sample], transform: Callable, seed: int = 0, classes: Sequence[str] = ()) -> None:
        self.samples, self.transform, self.seed, self.classes = list(samples), transform, seed, list(classes)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # in shared memory, where persistent workers see it

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | list[torch.Tensor], int]:
        """Raises InputError if the file cannot be decoded."""
        path, label = self.samples[index]
        image = read_image(path)
        image_seed = np.random.SeedSequence((self.seed, int(self._epoch), index)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(image_seed))  # torch.manual_seed would seed GPUs as well
            return self.transform(image), label


def shard(dataset: Dataset, rank: int, world_size: int) -> Subset:
    """Every `world_size`-th image, starting at `rank`: all ranks together have each image once, without padding."""
    return Subset(dataset, range(rank, len(dataset), world_size))


# --- checking images -------------------------------------------------------------------------------------------------


def check_images(paths: Sequence[str], threads: int = 8) -> dict[str, str]:
    """Decode every image once, and return {path: reason} for the unreadable ones.

    The processes of a group share the work: all must call it, and all get the same result. Prints the progress about
    every five seconds.
    """
    own = paths[get_rank() :: get_world_size()]
    bad: dict[str, str] = {}
    meter = Progress("checking images", len(own), silent_if_quick=True)
    block = 512  # the queue of a pool must not hold a million images at once
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for first in range(0, len(own), block):
            names = own[first : first + block]
            bad |= {name: why for name, why in zip(names, pool.map(_read_error, names), strict=True) if why}
            meter.advance(len(names))
    return {path: why for share in all_gather_objects(bad) for path, why in share.items()}


def _read_error(path):
    try:
        with Image.open(path) as image:  # also fails for images without pixels
            image.draft("L", (1, 1))  # JPEG: reads the whole stream, but decodes at an eighth of the resolution
            image.load()
    except DECODE_ERRORS as error:
        return describe_error(error)
    return None


def keep_readable(samples: Sequence[Sample], skip_bad_images: bool = False, threads: int = 8) -> list[Sample]:
    """Decode all images once, and return the samples if all can be read; with `skip_bad_images` only the readable ones.

    Raises InputError naming the first unreadable images, or if no image can be read.
    """
    bad = check_images([path for path, _ in samples], threads)
    if not bad:
        return list(samples)
    first = "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items())[:3])
    summary = f"{len(bad)} of {len(samples)} images cannot be read: {first}{'; ...' if len(bad) > 3 else ''}"
    if len(bad) == len(samples):
        raise InputError(summary)
    if not skip_bad_images:
        raise InputError(f"{summary} (--skip_bad_images true leaves them out)")
    if is_main_process():
        print(f"left out: {summary}", flush=True)
    return [(path, label) for path, label in samples if path not in bad]


# --- datasets --------------------------------------------------------------------------------------------------------


def dataset_of(
    classes: Sequence[str],
    samples: Sequence[Sample],
    transform: Callable,
    seed: int = 0,
    skip_bad_images: bool = False,
    threads: int = 8,
    check: bool = True,
) -> ImageDataset:
    """A dataset of these samples, after every image was decoded once with `threads` threads (unless `check` is false).

    Raises InputError for unreadable images; with `skip_bad_images` they are left out.
    """
    if skip_bad_images and not check:
        raise InputError("--skip_bad_images true with --check_images false: unreadable images are found by the check")
    samples = keep_readable(samples, skip_bad_images, threads) if check else samples
    return ImageDataset(samples, transform, seed, classes)


def pretraining_dataset(root: str | os.PathLike, transform: Callable, seed: int = 0, **checks) -> ImageDataset:
    """All images below `root`, flat or nested, with label -1. `checks`: skip_bad_images, threads, check of dataset_of.

    Raises InputError as list_images and dataset_of do.
    """
    return dataset_of((), [(path, UNLABELLED) for path in list_images(root)], transform, seed, **checks)


def labelled_dataset(root: str | os.PathLike, transform: Callable, seed: int = 0, **checks) -> ImageDataset:
    """Images of <root>/<class>/ with their classes. `checks`: skip_bad_images, threads, check of dataset_of.

    Raises InputError as labelled_samples and dataset_of do.
    """
    return dataset_of(*labelled_samples(root), transform, seed, **checks)


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise InputError unless both have the same class folders: a label must mean the same class in both."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise InputError(f"train/ and val/ must contain the same class folders; found in only one of them: {shown}")
