"""Image datasets from folders: for pretraining (labels unused) and for classification (one sub-folder per class)."""

import hashlib
import mmap
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from clever.data.augmentations import Views
from clever.data.files import Sample, decode_error, labelled_samples, list_images, read_pixels
from clever.data.rendering import render_batch
from clever.data.shards import file_of
from clever.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from clever.progress import progress
from clever.signals import ignore_signals
from clever.utils import InputError, atomic_file

UNLABELLED = -1
TIMEOUT = 1800.0  # seconds to wait for a batch; a worker that needs longer hangs, or its storage does


class ImageDataset(Dataset):
    """Views of images, drawn and rendered for whole batches.

    The views of an image are a function of (seed, epoch, index). They do not depend on the number of workers or processes,
    and a resumed run repeats them.

    Args:
        samples: (path, label) of every image.
        views: what is drawn of every image, from `seed`.
        classes: their names.
        renderer: torchvision or cpp.
    """

    def __init__(
        self, samples: Sequence[Sample], views: Views, seed: int = 0, classes: Sequence[str] = (), renderer: str = "torchvision"
    ) -> None:
        # Arrays, which forked workers share; counting references to a million Python objects would copy their pages.
        self._paths = np.array([os.fsencode(path) for path, _ in samples], np.bytes_)
        self._labels = np.array([label for _, label in samples], np.int64)
        self.views, self.seed, self.classes, self.renderer = views, seed, list(classes), renderer
        self._epoch = torch.frombuffer(mmap.mmap(-1, 8), dtype=torch.int64)  # shared with workers, without /dev/shm

    @property
    def samples(self) -> list[Sample]:
        """(path, label) of every image, as a new list."""
        return [(os.fsdecode(path), label) for path, label in zip(self._paths, self._labels.tolist(), strict=True)]

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._labels)

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
        paths = [os.fsdecode(self._paths[index]) for index in indices]
        seeds = [image_seed(self.seed, int(self._epoch), index) for index in indices]
        tensors, _, _ = draw_views(paths, seeds, self.views, self.renderer)
        labels = torch.from_numpy(self._labels[indices])
        return (tensors[0][0] if len(self.views) == 1 else tensors), labels


def draw_views(
    paths: Sequence[str], seeds: Sequence[int], views: Views, renderer: str
) -> tuple[list[Tensor], np.ndarray, tuple[Sequence[int], Sequence[int]]]:
    """Reads B images, draws their V views from a seed for each image, and renders them.

    Returns uint8 [V', B, 3, S, S] for each resolution, the parameters VIEW [B, V], and the images' heights and widths [B].
    Raises InputError if a file cannot be decoded.
    """
    images = [read_pixels(path) for path in paths]
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
        dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=unchanged, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(), **worker_options(worker_count(num_workers)),
    )  # fmt: skip


def unchanged(batch: Any) -> Any:
    """collate_fn for batches that are already made, or for examples without batches."""
    return batch


def worker_count(num_workers: int) -> int:
    """Number of data loading workers: `num_workers`, but at most this process's share of the cores it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_workers, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def worker_options(workers: int) -> dict[str, Any]:
    """Arguments of a DataLoader with that many workers, which may be none; they stay alive from epoch to epoch.

    Its iterator raises RuntimeError if no batch comes within TIMEOUT.
    """
    if workers == 0:
        return {}
    return {"num_workers": workers, "persistent_workers": True, "worker_init_fn": ignore_signals, "timeout": TIMEOUT}


# --- checking images -------------------------------------------------------------------------------------------------


class CheckRecord:
    """Keys of the files that were found readable before, so that a second start need not decode them.

    Args:
        path: the file of the record, which need not exist; None: no record.
    """

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        # Not by np.load, which fails in many ways if the file is damaged: the few numbers of the header match no image.
        self.known = np.fromfile(self.path, np.uint64) if self.path and self.path.is_file() else np.empty(0, np.uint64)
        self.readable = np.empty(0, np.uint64)  # keys of this start, from before the files were decoded

    @staticmethod
    def key(path: str) -> int:
        """64 bits that change when the file does; 0 for a file that cannot be seen."""
        try:
            stat = os.stat(file_of(path))
        except OSError:
            return 0
        text = os.fsencode(path) + f"|{stat.st_size}|{stat.st_mtime_ns}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    def save(self) -> None:
        """Write the record, if a check has found new files."""
        if self.path is not None and not np.isin(self.readable, self.known).all():
            with atomic_file(self.path) as temporary, open(temporary, "wb") as file:
                np.save(file, self.readable)


def check_images(paths: Sequence[str], threads: int = 8, record: CheckRecord | None = None) -> dict[str, str]:
    """Decode every image once that the record does not know, and return {path: reason} for the unreadable ones.

    The processes of a group share the work: all must call it, and all get the same result.
    """
    record = record or CheckRecord(None)
    own = paths[get_rank() :: get_world_size()]
    keys = np.array([record.key(path) for path in own], np.uint64)
    new = [own[i] for i in np.flatnonzero(~np.isin(keys, record.known))]
    bad: dict[str, str] = {}
    with ThreadPool(max(1, threads)) as pool, progress("checking images", len(new), silent_if_quick=True) as bar:
        for path, reason in zip(new, pool.imap(decode_error, new, chunksize=16), strict=True):
            if reason:
                bad[path] = reason
            bar.update()
    shares = all_gather_objects((bad, keys[[path not in bad for path in own]]))
    record.readable = np.unique(np.concatenate([record.readable, *(readable for _, readable in shares)]))
    return {path: reason for share, _ in shares for path, reason in share.items()}


def keep_readable(
    samples: Sequence[Sample], skip_bad_images: bool = False, threads: int = 8, record: CheckRecord | None = None
) -> list[Sample]:
    """Decode all images once, and return the samples if all can be read; with `skip_bad_images` only the readable ones.

    Raises InputError naming the first unreadable images, or if no image can be read.
    """
    bad = check_images([path for path, _ in samples], threads, record)
    if not bad:
        return list(samples)
    first = "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items())[:3])
    summary = f"{len(bad)} of {len(samples)} images cannot be read: {first}{'; ...' if len(bad) > 3 else ''}"
    if not skip_bad_images or len(bad) == len(samples):
        raise InputError(summary if skip_bad_images else f"{summary} (--skip_bad_images true leaves them out)")
    if is_main_process():
        print(f"left out: {summary}", flush=True)
    return [(path, label) for path, label in samples if path not in bad]


def dataset_of(
    classes: Sequence[str], samples: Sequence[Sample], views: Views, seed: int = 0, renderer: str = "torchvision",
    skip_bad_images: bool = False, threads: int = 8, check: bool = True, record: CheckRecord | None = None,
) -> ImageDataset:  # fmt: skip
    """A dataset of these samples, after every image was decoded once with `threads` threads (unless `check` is false).

    Raises InputError for unreadable images; with `skip_bad_images` they are left out.
    """
    if skip_bad_images and not check:
        raise InputError("--skip_bad_images true with --check_images false: unreadable images are found by the check")
    samples = keep_readable(samples, skip_bad_images, threads, record) if check else samples
    return ImageDataset(samples, views, seed, classes, renderer)


def pretraining_dataset(root: str | os.PathLike, views: Views, seed: int = 0, **options: Any) -> ImageDataset:
    """All images below `root`, flat or nested, with label -1; options and errors are those of dataset_of and list_images."""
    return dataset_of((), [(path, UNLABELLED) for path in list_images(root)], views, seed, **options)


def labelled_dataset(root: str | os.PathLike, views: Views, seed: int = 0, **options: Any) -> ImageDataset:
    """Images of <root>/<class>/ with their classes; options and errors are those of dataset_of and labelled_samples."""
    return dataset_of(*labelled_samples(root), views, seed, **options)


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise InputError unless both have the same class folders: a label must mean the same class in both."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        names = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise InputError(f"train/ and val/ must contain the same class folders; found in only one of them: {names}")
