"""Videos in the layout of DAVIS 2017: finding and reading their files, and scoring masks.

Shapes: h w size in pixels of the frames that the network sees.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from clever.data.files import read_image
from clever.evaluation.images import images_by_name
from clever.evaluation.video.masks import read_labels
from clever.evaluation.video.metrics import VideoScores, score_frame
from clever.utils import InputError, error_prefix, read_lines

SHORT_SIDE = 480  # pixels, as in DINO's evaluation
LONG_SIDE_MULTIPLE = 64  # the long side is a multiple of it, as there


@dataclass
class Video:
    """Files of a video, in natural order of their names."""

    name: str
    frames: list[Path]
    annotations: list[Path]  # of all frames, or of the first frame only
    size: tuple[int, int]  # H, W

    @property
    def mask_names(self) -> list[str]:
        return [f"{frame.stem}.png" for frame in self.frames]

    def fingerprint(self) -> str:
        """Hash of the names, sizes and modification times of the frames and the first annotation."""
        digest = hashlib.sha256()
        for path in [*self.frames, self.annotations[0]]:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def list_videos(root: str | os.PathLike, subset: str) -> list[str]:
    """Names of the videos in <root>/ImageSets/2017/<subset>.txt, one per line. Raises InputError if there are none."""
    path = Path(root, "ImageSets/2017", f"{subset}.txt")
    names = read_lines(path) if path.is_file() else []
    if not names:
        raise InputError(f"--subset {subset}: no list {path} (expected: ImageSets, JPEGImages and Annotations of DAVIS 2017)")
    return list(dict.fromkeys(names))


def open_video(root: str | os.PathLike, name: str, all_annotations: bool = True) -> Video:
    """The files of a video. With `all_annotations` false, only the first annotation is used.

    Raises InputError if frames or the first annotation are missing; with `all_annotations` also if a frame has no annotation
    or an annotation no frame.
    """
    frames = images_by_name(Path(root, "JPEGImages/480p", name))
    annotations = images_by_name(Path(root, "Annotations/480p", name))
    first = next(iter(frames))
    unmatched = sorted(frames.keys() ^ annotations.keys() if all_annotations else {first} - annotations.keys())
    if unmatched:
        raise InputError(f"video {name}: {len(unmatched)} frames and annotations have no counterpart, such as {unmatched[0]}")
    used = list(frames) if all_annotations else [first]
    size = read_image(frames[first]).size[::-1]
    return Video(name, [Path(path) for path in frames.values()], [Path(annotations[stem]) for stem in used], size)


# --- frames as the network sees them -----------------------------------------------------------------------------------


def network_size(size: tuple[int, int], patch_size: int, short_side: int = SHORT_SIDE) -> tuple[int, int]:
    """Size (h, w) that frames of `size` (H, W) are resized to: multiples of the patch size.

    The long side keeps the proportion and is rounded down to a multiple of 64, as in DINO's evaluation: 854x480 becomes
    832x480, and a square 448x480. (Of the patch size, if it does not divide 64 or if the short side is below 64.)
    """
    H, W = size
    short_side = max(short_side // patch_size, 1) * patch_size
    multiple = patch_size
    if LONG_SIDE_MULTIPLE % patch_size == 0 and short_side >= LONG_SIDE_MULTIPLE:
        multiple = LONG_SIDE_MULTIPLE
    if H > W:
        return short_side * H // W // multiple * multiple, short_side
    return short_side, short_side * W // H // multiple * multiple


def read_frame(path: Path, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """A normalised frame [3, h, w], resized to `size` (bilinear, without antialiasing, rounded to whole grey levels)."""
    pixels = rearrange(torch.tensor(np.asarray(read_image(path))), "H W channels -> 1 channels H W").float()
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0].round() / 255  # 3, h, w
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def score_video(video: Video, folder: Path) -> VideoScores:
    """J&F of the masks in a folder, over all frames except the first and the last, whose masks need not exist.

    Objects are the labels of the first annotation, which need not be 1..n. Raises InputError if a mask is missing or does not
    fit its annotation.
    """
    labels = np.unique(read_labels(video.annotations[0]))
    labels = labels[labels > 0].tolist()
    j, f = np.empty((2, max(len(video.frames) - 2, 0), len(labels)))  # T, n
    for t, (name, annotation) in enumerate(list(zip(video.mask_names, video.annotations, strict=True))[1:-1]):
        predicted, truth = read_labels(folder / name), read_labels(annotation)
        with error_prefix(str(folder / name)):
            j[t], f[t] = score_frame(predicted, truth, labels)
    return VideoScores(video.name, j, f, labels)
