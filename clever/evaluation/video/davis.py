"""Videos in the layout of DAVIS 2017: finding, checking and reading their files, and scoring masks.

Shapes: h w size in pixels of the frames that the network sees.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from clever.data.files import DECODE_ERRORS, read_image
from clever.evaluation.video.masks import read_labels
from clever.evaluation.video.metrics import VOID, VideoScores, score_frame
from clever.utils import InputError, error_prefix, read_lines

SHORT_SIDE = 480  # pixels, as in DINO's evaluation
LONG_SIDE_MULTIPLE = 64  # the long side is a multiple of it, as there
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class Video:
    """Files of a video, sorted by name."""

    name: str
    frames: list[Path]
    annotations: list[Path]  # of all frames, or of the first frame only
    size: tuple[int, int]  # H, W

    @cached_property
    def void(self) -> int:
        """Label of the pixels marked 255: 0, or 1 if the first annotation has no other label, as in DAVIS 2016."""
        labels = read_labels(self.annotations[0], void=VOID)
        return int((labels[labels > 0] == VOID).all() and labels.any())

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


# --- finding videos ----------------------------------------------------------------------------------------------------


def list_videos(root: str | os.PathLike, subset: str) -> list[str]:
    """Names of the videos in <root>/ImageSets/2017/<subset>.txt, one per line.

    Raises InputError if the folder does not have the layout of DAVIS, or if the list is missing, is empty, or contains a name
    twice or one that is not the name of a folder.
    """
    root = Path(root)
    for folder in (root, root / "JPEGImages/480p", root / "Annotations/480p", root / "ImageSets/2017"):
        if not folder.is_dir():
            raise InputError(f"--data_path {root}: no folder {folder} (expected: JPEGImages, Annotations, ImageSets of DAVIS)")
    path = root / "ImageSets/2017" / f"{subset}.txt"
    if not path.is_file():
        lists = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        raise InputError(f"--subset {subset}: no list {path} (available: {lists})")
    names = read_lines(path)
    if not names:
        raise InputError(f"list of videos {path}: is empty")
    for name in names:
        if name in (".", "..") or "/" in name or os.sep in name or names.count(name) > 1:
            raise InputError(f"list of videos {path}: {name!r} is not the name of a folder, or is listed twice")
    return names


def open_video(root: str | os.PathLike, name: str, all_annotations: bool = True) -> Video:
    """The files of a video, checked without decoding them. With `all_annotations` false, only the first annotation is used.

    Raises InputError if frames or the first annotation are missing, or if their sizes differ; with `all_annotations` also if
    a frame has no annotation or an annotation no frame.
    """
    folders = [Path(root) / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
    frames = _files(folders[0], FRAME_SUFFIXES)
    annotations = _files(folders[1], (".png",))
    first = next(iter(frames))
    unmatched = [f"frame {stem} has no annotation" for stem in frames if stem not in annotations]
    unmatched += [f"annotation {stem} has no frame" for stem in annotations if stem not in frames]
    if first not in annotations:
        raise InputError(f"{folders[1]}: no annotation {first}.png of the first frame")
    if all_annotations and unmatched:
        raise InputError(f"{folders[1]}: {unmatched[0]} ({len(unmatched)} files without a counterpart)")
    used = list(annotations.values()) if all_annotations else [annotations[first]]
    size = _header_size(frames[first])
    for path in [*frames.values(), *used]:
        if _header_size(path) != size:
            raise InputError(f"{path}: is of size {_text(_header_size(path))}, the first frame of {_text(size)}")
    return Video(name, list(frames.values()), used, size)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """{stem: path} of the files with these suffixes except hidden ones, sorted by name."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in files:
                raise InputError(f"{folder}: both {files[path.stem].name} and {path.name}")
            files[path.stem] = path
    if not files:
        raise InputError(f"{folder}: has no files {', '.join(suffixes)}")
    return files


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


# --- frames as the network sees them -----------------------------------------------------------------------------------


def check_short_side(short_side: int, patch_size: int) -> None:
    """Raise InputError unless the short side is a multiple of the patch size."""
    if short_side % patch_size:
        valid = max(short_side // patch_size, 1) * patch_size
        raise InputError(f"--short_side {short_side}: must be a multiple of the patch size {patch_size}, such as {valid}")


def network_size(size: tuple[int, int], patch_size: int, short_side: int = SHORT_SIDE) -> tuple[int, int]:
    """Size (h, w) that frames of `size` (H, W) are resized to.

    The long side keeps the proportion and is rounded down to a multiple of 64, as in DINO's evaluation: 854x480 becomes
    832x480, and a square 448x480. (Of the patch size, if it does not divide 64 or if the short side is below 64.)
    Raises InputError if a frame is smaller than a patch.
    """
    H, W = size
    if min(size) < patch_size:
        raise InputError(f"frames of {_text(size)} pixels are smaller than a patch ({patch_size}x{patch_size})")
    multiple = patch_size
    if LONG_SIDE_MULTIPLE % patch_size == 0 and short_side >= LONG_SIDE_MULTIPLE:
        multiple = LONG_SIDE_MULTIPLE
    if H > W:
        return short_side * H // W // multiple * multiple, short_side
    return short_side, short_side * W // H // multiple * multiple


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in a frame of `size` pixels."""
    return size[0] // patch_size, size[1] // patch_size


def read_frame(path: Path, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """A normalised frame [3, h, w], resized to `size` (bilinear, without antialiasing, rounded to whole grey levels)."""
    pixels = rearrange(torch.tensor(np.asarray(read_image(path))), "H W channels -> 1 channels H W").float()
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0].round() / 255  # 3, h, w
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def score_video(video: Video, folder: Path) -> VideoScores:
    """J&F of the masks in a folder, over all frames except the first and the last, whose masks need not exist.

    Objects are the labels of the first annotation, which need not be 1..n.

    Raises InputError if a mask is missing or does not fit its annotation.
    """
    first = read_labels(video.annotations[0], video.void)
    objects, labels = int(first.max()), np.unique(first[first > 0])
    values = []
    for name, annotation in list(zip(video.mask_names, video.annotations, strict=True))[1:-1]:
        predicted = read_labels(folder / name, void=video.void or VOID)  # a mask with void pixels is an error
        with error_prefix(str(folder / name)):
            values.append(score_frame(predicted, read_labels(annotation, video.void), objects))
    j, f = np.array(values).reshape(len(values), 2, objects).transpose(1, 0, 2)  # T, largest label
    return VideoScores(video.name, j[:, labels - 1], f[:, labels - 1], labels.tolist())
