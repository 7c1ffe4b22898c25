"""Image datasets from folders: for pretraining (labels unused) and for classification (one sub-folder per class)."""

import hashlib
import io
import mmap
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from clever.data.augmentations import Views
from clever.data.files import (
    DECODE_ERRORS,
    Sample,
    decode_reason,
    labelled_samples,
    list_images,
    read_pixels,
    to_rgb,
)
from clever.data.rendering import render_batch
from clever.data.shards import file_of, read_file
from clever.distributed import (
    all_gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
)
from clever.progress import Progress
from clever.signals import ignore_signals
from clever.utils import InputError, atomic_file

UNLABELLED = -1
TIMEOUT = 1800.0  # seconds to wait for a batch; a worker that needs longer hangs, or its storage does


# --- datasets --------------------------------------------------------------------------------------------------------


class SampleList(Sequence):
    """(path, label) of every image, in a few arrays instead of a million Python objects.

    Processes that are forked share the arrays; counting references to Python objects would copy their pages.
    """

    def __init__(self, samples: Iterable[Sample]) -> None:
        paths, labels = zip(*samples, strict=True) if samples else ((), ())
        encoded = [os.fsencode(path) for path in paths]
        self.text = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        self.ends = torch.tensor([len(path) for path in encoded], dtype=torch.int64).cumsum(0)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        text, ends, labels = self.text.numpy(), self.ends.numpy(), self.labels.numpy()  # quicker to index than tensors
        start = ends[index - 1] if index else 0
        return os.fsdecode(text[start : ends[index]].tobytes()), int(labels[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class ImageDataset(Dataset):
    """Views of images, drawn and rendered for whole batches.

    The views of an image are a function of (seed, epoch, index). They do not depend on the number of workers or processes,
    and a resumed run repeats them.

    Args:
        samples: (path, label) of every image.
        views: what is drawn of every image.
        seed: of the draws.
        classes: names of the classes.
        renderer: torchvision or cpp, see rendering.py.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        views: Views,
        seed: int = 0,
        classes: Sequence[str] = (),
        renderer: str = "torchvision",
    ) -> None:
        self.samples = SampleList(samples)
        self.views, self.seed, self.classes, self.renderer = views, seed, list(classes), renderer
        self._epoch = torch.frombuffer(mmap.mmap(-1, 8), dtype=torch.int64)  # shared with workers, without /dev/shm

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int]:
        """The batch of one image, without its dimension B."""
        tensors, labels = self.__getitems__([index])
        if isinstance(tensors, Tensor):
            return tensors[0], int(labels)
        return [tensor[:, 0] for tensor in tensors], int(labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor | list[Tensor], Tensor]:
        """Views of B images and their labels [B]: one tensor uint8 [V', B, 3, S, S] per resolution, or [B, 3, S, S] if V is 1.

        Raises InputError if a file cannot be decoded.
        """
        samples = [self.samples[index] for index in indices]
        seeds = [image_seed(self.seed, int(self._epoch), index) for index in indices]
        tensors, _, _ = draw_views([path for path, _ in samples], seeds, self.views, self.renderer)
        labels = torch.tensor([label for _, label in samples])
        return (tensors[0][0] if len(self.views) == 1 else tensors), labels


def draw_views(
    paths: Sequence[str], seeds: Sequence[int], views: Views, renderer: str
) -> tuple[list[Tensor], np.ndarray, tuple[Sequence[int], Sequence[int]]]:
    """Reads B images, draws their V views from a seed for each image, and renders them.

    Returns uint8 [V', B, 3, S, S] for each resolution, the parameters VIEW [B, V], and the images' heights and widths [B].
    Raises InputError if a file cannot be decoded.
    """
    try:
        images = [read_pixels(path) for path in paths]
    except InputError as error:
        raise InputError(f"{error} (--skip_bad_images true leaves such images out)") from error
    heights, widths = zip(*(image.shape[:2] for image in images), strict=True)
    parameters = views.draw_seeded(seeds, heights, widths)  # B, V
    return render_batch(images, parameters, renderer), parameters, (heights, widths)


def image_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of the views of one image in one epoch."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0])


def shard(dataset: Dataset, rank: int, world_size: int) -> Subset:
    """Every `world_size`-th image, starting at `rank`: all ranks together have each image once, without padding."""
    return Subset(dataset, range(rank, len(dataset), world_size))


def make_loader(
    dataset: Dataset, batch_size: int, sampler: Sampler | None = None, num_workers: int = 0, drop_last: bool = False
) -> DataLoader:
    """Batches that an ImageDataset has rendered, in the order of the sampler or else of the dataset.

    Workers stay alive from epoch to epoch. The loader has a random generator of its own, since workers that start would
    otherwise change the global one, and a resumed run starts them in another epoch.
    """
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=unchanged,
        pin_memory=torch.cuda.is_available(),
        drop_last=drop_last,
        generator=torch.Generator(),
        **worker_options(worker_count(num_workers)),
    )


def unchanged(batch: Any) -> Any:
    """collate_fn for batches that are already made, or for examples without batches."""
    return batch


def worker_count(num_workers: int) -> int:
    """Number of data loading workers: `num_workers`, but at most this process's share of the machine's cores."""
    return min(num_workers, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def worker_options(workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader with that many workers, which may be none; they stay alive from epoch to epoch.

    Its iterator raises RuntimeError if no batch comes within TIMEOUT.
    """
    if workers == 0:
        return {}
    return {
        "num_workers": workers, "persistent_workers": True, "worker_init_fn": ignore_signals, "timeout": TIMEOUT,
    }  # fmt: skip


def available_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those of its affinity mask, and no more than the CPU quota of its container.

    The arguments are the folders in which Linux shows control groups, and the file that names this process's own.
    """
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on; obeys PYTHON_CPU_COUNT
        cores = os.process_cpu_count() or 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """CPU quotas, in cores, of this process's control group and of all that it lies in; version 1 or 2."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers if controllers else cgroups
        folder = Path(path.lstrip("/"))
        for group in {folder, *folder.parents}:  # in a container, the path may be the one outside, of which only "." exists
            found += _quota(root / group)
    return found


def _quota(folder: Path) -> list[float]:
    """The quota of one control group, in cores; none if it has no limit or does not exist."""
    try:
        if (folder / "cpu.max").exists():  # version 2: "max 100000" or "150000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return [float(quota) / float(period)] if quota != "max" and float(quota) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):
        return []


# --- checking images -------------------------------------------------------------------------------------------------


class CheckRecord:
    """Which files were found readable before, by path, size and time of change, so that a second start need not decode them.

    Args:
        path: the file of the record, which need not exist; None: no record.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        self.known = self._read()
        self.readable: list[np.ndarray] = []  # keys of this start

    def _read(self) -> np.ndarray:
        none = np.empty(0, np.uint64)
        try:
            keys = np.load(self.path, allow_pickle=False) if self.path else none
        except Exception:  # none yet, or damaged, of which numpy has many errors: the images are decoded again
            return none
        return keys if isinstance(keys, np.ndarray) and keys.dtype == np.uint64 and keys.ndim == 1 else none

    @staticmethod
    def keys(paths: Sequence[str]) -> np.ndarray:
        """64 bits for each file, which change when the file does; 0 for a file that cannot be seen.

        The processes of a group share the work: all must call it, and all get the same result.
        """

        def key(path: str) -> int:
            try:
                stat = os.stat(file_of(path))
            except OSError:
                return 0
            text = os.fsencode(path) + f"|{stat.st_size}|{stat.st_mtime_ns}".encode()
            return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

        world, own = get_world_size(), paths[get_rank() :: get_world_size()]
        keys = np.empty(len(paths), np.uint64)
        for rank, share in enumerate(all_gather_objects(np.fromiter(map(key, own), np.uint64, len(own)))):
            keys[rank::world] = share
        return keys

    def knows(self, keys: np.ndarray) -> np.ndarray:
        """Which of the files were found readable before, and have not changed since; bool."""
        return np.isin(keys, self.known) & (keys != 0)

    def add(self, keys: np.ndarray) -> None:
        """Note files that can be read, by their keys from before they were decoded."""
        self.readable.append(keys)

    def save(self) -> None:
        """Write the record, if a check has changed it."""
        readable = np.unique(np.concatenate([*self.readable, np.empty(0, np.uint64)]))
        if self.path is not None and len(readable) and not np.array_equal(readable, self.known):
            with atomic_file(self.path) as temporary, open(temporary, "wb") as file:
                np.save(file, readable)


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
        with Image.open(io.BytesIO(read_file(path))) as image:  # fails without pixels, too
            image.draft("L", (1, 1))  # JPEG: reads the whole stream, but decodes at an eighth of the resolution
            image.load()
            if image.mode not in ("L", "RGB"):
                to_rgb(image)
    except DECODE_ERRORS as error:
        return decode_reason(error)
    return None


def keep_readable(
    samples: Sequence[Sample], skip_bad_images: bool = False, threads: int = 8, record: CheckRecord | None = None
) -> list[Sample]:
    """Decode all images once, and return the samples if all can be read; with `skip_bad_images` only the readable ones.

    Files that the `record` knows are not decoded again. Raises InputError naming the first unreadable images, or if no image
    can be read.
    """
    paths = [path for path, _ in samples]
    keys = record.keys(paths) if record else None
    bad = check_images(paths if record is None else [paths[i] for i in np.flatnonzero(~record.knows(keys))], threads)
    if record is not None:
        record.add(keys[[path not in bad for path in paths]])
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


# --- building datasets -----------------------------------------------------------------------------------------------


def dataset_of(
    classes: Sequence[str],
    samples: Sequence[Sample],
    views: Views,
    seed: int = 0,
    renderer: str = "torchvision",
    skip_bad_images: bool = False,
    threads: int = 8,
    check: bool = True,
    record: CheckRecord | None = None,
) -> ImageDataset:
    """A dataset of these samples, after every image was decoded once with `threads` threads (unless `check` is false).

    Raises InputError for unreadable images; with `skip_bad_images` they are left out.
    """
    if skip_bad_images and not check:
        raise InputError("--skip_bad_images true with --check_images false: unreadable images are found by the check")
    samples = keep_readable(samples, skip_bad_images, threads, record) if check else samples
    return ImageDataset(samples, views, seed, classes, renderer)


def pretraining_dataset(root: str | os.PathLike, views: Views, seed: int = 0, **options: Any) -> ImageDataset:
    """All images below `root`, flat or nested, with label -1. `options`: further arguments of dataset_of.

    Raises InputError as list_images and dataset_of do.
    """
    return dataset_of((), [(path, UNLABELLED) for path in list_images(root)], views, seed, **options)


def labelled_dataset(root: str | os.PathLike, views: Views, seed: int = 0, **options: Any) -> ImageDataset:
    """Images of <root>/<class>/ with their classes. `options`: further arguments of dataset_of.

    Raises InputError as labelled_samples and dataset_of do.
    """
    return dataset_of(*labelled_samples(root), views, seed, **options)


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise InputError unless both have the same class folders: a label must mean the same class in both."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise InputError(f"train/ and val/ must contain the same class folders; found in only one of them: {shown}")
