"""Image datasets from folders: for pretraining (labels unused) and for classification (one sub-folder per class)."""

import hashlib
import mmap
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clever.data.augmentations import Views
from clever.data.codes import encode
from clever.data.files import Sample, decode_error, labelled_samples, read_pixels
from clever.data.rendering import render_batch
from clever.data.shards import file_of
from clever.distributed import all_gather_objects, get_rank, get_world_size
from clever.progress import progress
from clever.signals import ignore_signals
from clever.utils import InputError, atomic_file

UNLABELLED = -1
EXTRA = 1  # stream of the extra views
DARK = 64  # of 255: no pixel is brighter in files of 16 bits of which at most 14 are used
TIMEOUT = 1800.0  # seconds to wait for a batch; a worker that needs longer hangs, or its storage does


class ImageDataset(Dataset):
    """Views of images, drawn and rendered for whole batches.

    The views of an image are a function of (seed, epoch, index). They do not depend on the number of workers or processes,
    nor on the extra views, and a resumed run repeats them.

    Args:
        samples: (path, label) of every image.
        views: what is drawn of every image, from `seed`.
        classes: their names.
        renderer: torchvision or cpp.
        extra: E more views, of one size; they may be none. With them, batches have codes (codes.py) in place of labels.
        images_per_draw: so many consecutive images of a batch have equal random numbers in the extra views, which then depend
            on the batches, too.
    """

    def __init__(
        self, samples: Sequence[Sample], views: Views, seed: int = 0, classes: Sequence[str] = (),
        renderer: str = "torchvision", extra: Views | None = None, images_per_draw: int = 1,
    ) -> None:  # fmt: skip
        # Arrays, which forked workers share; counting references to a million Python objects would copy their pages.
        self._paths = np.array([os.fsencode(path) for path, _ in samples], np.bytes_)
        self._labels = np.array([label for _, label in samples], np.int64)
        self.views, self.seed, self.classes, self.renderer = views, seed, list(classes), renderer
        self.extra, self.images_per_draw = extra, images_per_draw
        self._epoch = torch.frombuffer(mmap.mmap(-1, 8), dtype=torch.int64)  # shared with workers, without /dev/shm

    @property
    def samples(self) -> list[Sample]:
        """(path, label) of every image, as a new list."""
        return [(os.fsdecode(path), label) for path, label in zip(self._paths, self._labels.tolist(), strict=True)]

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], Tensor]:
        """The batch of one image, without its dimension B."""
        tensors, (told,) = self.__getitems__([index])
        return (tensors[0] if isinstance(tensors, Tensor) else [tensor[:, 0] for tensor in tensors]), told

    def __getitems__(self, indices: list[int]) -> tuple[Tensor | list[Tensor], Tensor]:
        """Views of B images and their labels [B]: one tensor uint8 [V', B, 3, S, S] per resolution, or [B, 3, S, S] if V is 1.

        With extra views, one more tensor [E, B, 3, S, S] if there are any, and in place of labels the codes float32
        [B, 2+E, P] of the first two views and the extra ones. Raises InputError if a file cannot be decoded.
        """
        epoch, n = int(self._epoch), self.images_per_draw
        images, sizes = read_batch([os.fsdecode(self._paths[index]) for index in indices])
        base = self.views.draw_seeded([image_seed(self.seed, epoch, index) for index in indices], *sizes)  # B, V
        tensors = render_batch(images, base, self.renderer)
        if self.extra is None:
            return (tensors[0][0] if len(self.views) == 1 else tensors), torch.from_numpy(self._labels[indices])
        seeds = [image_seed(self.seed, epoch, indices[place - place % n], EXTRA) for place in range(len(indices))]
        extra = self.extra.draw_seeded(seeds, *sizes)  # B, E
        told = Views(self.views.distributions[:2] + self.extra.distributions)
        codes = encode(np.concatenate([base[:, :2], extra], axis=1), *sizes, told)
        return tensors + render_batch(images, extra, self.renderer), torch.from_numpy(codes)


def read_batch(paths: Sequence[str]) -> tuple[list[np.ndarray], tuple[Sequence[int], Sequence[int]]]:
    """The pixels of B images, uint8 [H, W, 3] each, and their heights and widths. Raises InputError for unreadable files."""
    images = [read_pixels(path) for path in paths]
    heights, widths = zip(*(image.shape[:2] for image in images), strict=True)
    return images, (heights, widths)


def image_seed(seed: int, epoch: int, index: int, *stream: int) -> int:
    """Seed of what is drawn for one image in one epoch; `stream` sets other draws apart from those of the views."""
    return int(np.random.SeedSequence((seed, epoch, index, *stream)).generate_state(1)[0])


def make_loader(
    dataset: Dataset, batch_size: int | None, sampler: Sampler | None = None, num_workers: int = 0, drop_last: bool = False
) -> DataLoader:
    """Batches that the data set makes, or its items one by one (`batch_size` None), in the sampler's order or else in its own.

    There are at most `num_workers` workers, as many as this process's share of the cores, and fewer than items; they stay alive
    from epoch to epoch. The iterator raises RuntimeError if no batch comes within TIMEOUT. The loader has a random generator of
    its own, since workers that start would otherwise change the global one, and a resumed run starts them in another epoch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own_cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = max(0, min(num_workers, own_cores, len(dataset) - 1))
    of_workers = {"persistent_workers": True, "worker_init_fn": ignore_signals, "timeout": TIMEOUT} if workers else {}
    return DataLoader(
        dataset, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=_unchanged, generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(), num_workers=workers, **of_workers,
    )  # fmt: skip


def _unchanged(batch: Any) -> Any:
    """collate_fn for batches that are already made, and for items."""
    return batch


# --- checking images -------------------------------------------------------------------------------------------------


class CheckRecord:
    """Keys of the files that former starts have found readable, kept in a file, which need not exist; None: no record."""

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = path
        # Not by np.load, which fails in many ways if the file is damaged: the few numbers of the header match no image.
        self.known = np.fromfile(path, np.uint64) if path and os.path.isfile(path) else np.empty(0, np.uint64)
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
    samples: Sequence[Sample], skip_bad_images: bool = False, check: bool = True, threads: int = 8,
    record: CheckRecord | None = None,
) -> list[Sample]:  # fmt: skip
    """The samples if all images can be decoded, which is tried if `check`; with `skip_bad_images` the readable ones.

    Raises InputError naming the first unreadable images, or if no image can be read.
    """
    if skip_bad_images and not check:
        raise InputError("--skip_bad_images true with --check_images false: unreadable images are found by the check")
    bad = check_images([path for path, _ in samples], threads, record) if check else {}
    kept = [sample for sample in samples if sample[0] not in bad]
    if bad:
        first = "; ".join(f"{path} ({reason})" for path, reason in sorted(bad.items())[:3])
        summary = f"{len(bad)} of {len(samples)} images cannot be read: {first}{'; ...' if len(bad) > 3 else ''}"
        if not skip_bad_images or not kept:
            raise InputError(summary if skip_bad_images else f"{summary} (--skip_bad_images true leaves them out)")
        print(f"left out: {summary}", flush=True)
    few = kept[:: 1 + len(kept) // 8]
    if few and (peak := max(read_pixels(path).max() for path, _ in few)) <= DARK:
        print(f"dark: the brightest pixel of {len(few)} images is {peak} of 255, {few[0][0]} among them; 16-bit files that use "
              "fewer bits must be scaled first (docs/pretraining.md, Images)", flush=True)  # fmt: skip
    return kept


def labelled_dataset(
    root: str | os.PathLike, views: Views, seed: int = 0, renderer: str = "torchvision", **checks: Any
) -> ImageDataset:
    """Images of <root>/<class>/ with their classes; `checks` are options of keep_readable."""
    classes, samples = labelled_samples(root)
    return ImageDataset(keep_readable(samples, **checks), views, seed, classes, renderer)
