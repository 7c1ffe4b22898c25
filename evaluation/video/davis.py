"""Videos with label images in the layout of DAVIS 2017: finding, checking and reading them, and writing masks.

Letters: H W size of a video's frames in pixels, h w the size that a network sees them in, p patch size, n number of objects.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datasets import DECODE_ERRORS, read_image
from evaluation.video.metrics import VOID, Scores, score_frame
from utils import InputError, error_prefix

SHORT_SIDE, STEP = 480, 64  # of the original: short side, and what the long side is a multiple of
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class Video:
    """Files of one video, in order of their names. Without `scored`, `annotations` holds that of the first frame only."""

    name: str
    frames: list[Path]
    annotations: list[Path]
    size: tuple[int, int]  # H, W

    @property
    def mask_names(self) -> list[str]:
        return [f"{frame.stem}.png" for frame in self.frames]

    def fingerprint(self) -> str:
        """Changes when a frame or the first annotation does: names, sizes and times of the files."""
        digest = hashlib.sha256()
        for path in [*self.frames, self.annotations[0]]:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]


# --- finding videos ----------------------------------------------------------------------------------------------------


def list_videos(root: str | os.PathLike, subset: str) -> list[str]:
    """Names in <root>/ImageSets/2017/<subset>.txt, one a line.

    Raises InputError if the folder is not laid out as DAVIS, or if the list is missing, empty, or holds no plain, unique names.
    """
    root = Path(root)
    for folder in (root, root / "JPEGImages/480p", root / "Annotations/480p", root / "ImageSets/2017"):
        if not folder.is_dir():
            raise InputError(f"--data_path {root}: no folder {folder} (expected: JPEGImages, Annotations, ImageSets of DAVIS)")
    path = root / "ImageSets/2017" / f"{subset}.txt"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        raise InputError(f"--subset {subset}: no list {path} (lists there: {there})")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not names:
        raise InputError(f"list of videos {path}: is empty")
    for name in names:
        if name in (".", "..") or "/" in name or os.sep in name or names.count(name) > 1:
            raise InputError(f"list of videos {path}: {name!r} is no folder's name, or stands in it twice")
    return names


def open_video(root: str | os.PathLike, name: str, scored: bool = True) -> Video:
    """The files of a video, checked without decoding them.

    Raises InputError if frames or the first annotation are missing, or if their sizes differ; with `scored` also unless every
    frame has an annotation and every annotation a frame.
    """
    folders = [Path(root) / kind / "480p" / name for kind in ("JPEGImages", "Annotations")]
    frames = _files(folders[0], FRAME_SUFFIXES)
    annotations = _files(folders[1], (".png",))
    first = next(iter(frames))
    lonely = [f"frame {stem} has no annotation" for stem in frames if stem not in annotations]
    lonely += [f"annotation {stem} has no frame" for stem in annotations if stem not in frames]
    if first not in annotations:
        raise InputError(f"{folders[1]}: no annotation {first}.png of the first frame")
    if scored and lonely:
        raise InputError(f"{folders[1]}: {lonely[0]} ({len(lonely)} such in all)")
    used = list(annotations.values()) if scored else [annotations[first]]
    size = _header_size(frames[first])
    for path in [*frames.values(), *used]:
        if _header_size(path) != size:
            raise InputError(f"{path}: is of size {_text(_header_size(path))}, the first frame of {_text(size)}")
    return Video(name, list(frames.values()), used, size)


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """{stem: path} of the files with these suffixes, hidden ones left out, in order of their names."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise InputError(f"{folder}: both {found[path.stem].name} and {path.name}")
            found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: has no files {', '.join(suffixes)}")
    return found


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


# --- reading frames and labels ------------------------------------------------------------------------------------------


def check_short_side(short_side: int, patch_size: int) -> None:
    """Raise InputError unless patches divide the short side."""
    if short_side % patch_size:
        fits = max(short_side // patch_size, 1) * patch_size
        raise InputError(f"--short_side {short_side}: must be a multiple of the patch size {patch_size}, such as {fits}")


def network_size(size: tuple[int, int], patch_size: int, short_side: int = SHORT_SIDE) -> tuple[int, int]:
    """Size (h, w) that frames of `size` (H, W) are scaled to: the short side as asked, the long one in proportion.

    The long side is cut to a multiple of 64, as in the original: 854x480 becomes 832x480, and a square 448x480.
    (Of the patch size, if patches do not divide 64 or if the short side is below 64.)
    Raises InputError if a frame is smaller than a patch.
    """
    H, W = size
    if min(size) < patch_size:
        raise InputError(f"frames of {_text(size)} pixels are smaller than a patch ({patch_size}x{patch_size})")
    step = STEP if STEP % patch_size == 0 and short_side >= STEP else patch_size
    if H > W:
        return short_side * H // W // step * step, short_side
    return short_side, short_side * W // H // step * step


def read_frame(path: Path, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """A frame scaled to `size` (bilinear, without antialiasing, to whole grey levels) and normalised, [3, h, w]."""
    pixels = torch.from_numpy(np.asarray(read_image(path)).copy()).permute(2, 0, 1).float()  # 3, H, W
    pixels = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0].round() / 255  # 3, h, w
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def read_labels(path: Path, void: int = 0) -> np.ndarray:
    """The label of each pixel [H, W] of an index PNG; those marked as void (255) become `void`.

    Raises InputError if the file is damaged, or if it holds colours instead of indices.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise InputError(f"{path}: is an image of mode {image.mode}; labels are palette or 8-bit grey images")
            labels = np.array(image, dtype=np.uint8)
    except InputError:
        raise
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    labels[labels == VOID] = void
    return labels


def one_hot_labels(labels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Labels [H, W] sampled (nearest) at a grid of patches and one-hot: [rows, columns, 1 + n].

    n is the largest label before sampling: an object that falls between the samples keeps its channel.
    """
    sampled = np.asarray(Image.fromarray(labels).resize(grid[::-1], Image.Resampling.NEAREST))
    return F.one_hot(torch.from_numpy(sampled.astype(np.int64)), int(labels.max()) + 1).float()


# --- writing masks ------------------------------------------------------------------------------------------------------


def palette(entries: int = 256) -> np.ndarray:
    """Colours of labels [entries, 3] as in PASCAL VOC and DAVIS: red, green and blue take the label's bits in turn."""
    labels, colours = np.arange(entries), np.zeros((entries, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours


def soft_labels_to_mask(soft: Tensor, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """Label of each pixel [H, W] from the soft labels of patches [rows, columns, 1 + n], as the original finds it.

    Upsampled to pixels of the network's frame (bilinear); each channel stretched to 0..1 over the frame, unless it is
    constant or has nothing positive; the strongest channel; resized to `size` (nearest).
    """
    maps = F.interpolate(soft.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False)[
        0
    ]  # 1+n, h, w
    low, high = maps.flatten(1).aminmax(dim=1)
    stretch = (high > 0) & (high > low)
    low, span = torch.where(stretch, low, 0), torch.where(stretch, high - low, 1)
    labels = ((maps - low[:, None, None]) / span[:, None, None]).argmax(0).to(torch.uint8)  # h, w
    return np.asarray(Image.fromarray(labels.cpu().numpy()).resize(size[::-1], Image.Resampling.NEAREST))


def write_mask(labels: np.ndarray, path: Path) -> None:
    """Labels [H, W] as a palette PNG."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    image.save(path)


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    return size[0] // patch_size, size[1] // patch_size


# --- scores ------------------------------------------------------------------------------------------------------------


def score_video(video: Video, folder: Path) -> Scores:
    """J&F of the masks in the folder over all frames but the first and the last, for which no mask is needed.

    Raises InputError as read_labels and score_frame do, naming the mask.
    """
    objects = int(read_labels(video.annotations[0]).max())
    values = []
    for name, annotation in list(zip(video.mask_names, video.annotations, strict=True))[1:-1]:
        predicted, truth = read_labels(folder / name, void=VOID), read_labels(annotation)  # to predict void is a fault
        with error_prefix(str(folder / name)):
            values.append(score_frame(predicted, truth, objects))
    j, f = np.array(values).reshape(len(values), 2, objects).transpose(1, 0, 2)  # T, n
    return Scores(video.name, j, f)


# --- contact sheet ------------------------------------------------------------------------------------------------------


def draw_mask(frame: Image.Image, labels: np.ndarray, opacity: float = 0.5) -> Image.Image:
    """A frame with its objects in their palette colours, each inside a white line."""
    pixels, colours = np.asarray(frame).astype(np.float32), palette()[labels]
    drawn = np.where((labels > 0)[..., None], (1 - opacity) * pixels + opacity * colours, pixels)
    inside = np.pad(labels, 1, mode="edge")
    neighbours = np.stack([inside[:-2, 1:-1], inside[2:, 1:-1], inside[1:-1, :-2], inside[1:-1, 2:]])
    drawn[(labels > 0) & (neighbours != labels).any(0)] = 255
    return Image.fromarray(drawn.round().astype(np.uint8))


def contact_sheet(
    videos: list[tuple[Video, Path, str]], columns: int = 6, height: int = 120, font_size: int = 14
) -> Image.Image:
    """One row per video: evenly spaced frames, first and last included, with the masks of its folder, below a caption.

    Raises InputError if a frame or mask cannot be read.
    """
    font, gap, rows = ImageFont.load_default(font_size), 4, []
    for video, folder, caption in videos:
        chosen = np.unique(np.linspace(0, len(video.frames) - 1, columns).round().astype(int))
        cells = []
        for i in chosen:
            frame = read_image(video.frames[i])
            size = max(1, round(frame.width * height / frame.height)), height
            labels = Image.fromarray(read_labels(folder / video.mask_names[i])).resize(size, Image.Resampling.NEAREST)
            cells.append((draw_mask(frame.resize(size), np.asarray(labels)), video.frames[i].stem))
        rows.append((caption, cells))
    caption_height = font_size + 2 * gap
    width = max(sum(cell.width + gap for cell, _ in cells) for _, cells in rows) + gap
    sheet = Image.new("RGB", (width, len(rows) * (caption_height + height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, cells) in enumerate(rows):
        left, top = gap, row * (caption_height + height + gap)
        draw.text((left, top + gap), caption, "black", font)
        for cell, name in cells:
            sheet.paste(cell, (left, top + caption_height))
            corner = left + gap, top + caption_height + height - gap
            draw.text(corner, name, "white", font, anchor="ls", stroke_width=1, stroke_fill="black")
            left += cell.width + gap
    return sheet
