"""Image files: finding them in folders and tar files, and reading them."""

import io
import math
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from clever.data.shards import find_shards, list_members, read_file
from clever.distributed import is_main_process
from clever.utils import InputError, describe_error

try:
    import simplejpeg
except ImportError:  # optional
    simplejpeg = None

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".gif", ".tif", ".tiff",
)  # fmt: skip
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

Sample = tuple[str, int]  # path, label

# What Pillow raises for files that are missing, truncated, damaged or not images.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


# --- finding images --------------------------------------------------------------------------------------------------


def list_images(root: str | os.PathLike) -> list[str]:
    """Sorted paths of all images below `root`. Symbolic links are followed; hidden files and folders are skipped.

    `root` may also be tar files, or a folder of tar files (shards.py): the images in them, in the order of the tar files.
    Raises InputError if the folder is missing or contains no images.
    """
    root = os.fspath(root)
    if tar_files := find_shards(root, IMAGE_SUFFIXES):
        return [member.path for member in list_members(tar_files, IMAGE_SUFFIXES)]
    _check_is_folder(root)
    left_out: Counter[str] = Counter()
    paths = _find_images(root, left_out)
    _print_left_out(root, left_out)
    return paths


def labelled_samples(root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """Class names (the sub-folders, sorted) and (path, index of the class) for every image at any depth below them.

    In tar files (shards.py), the classes are the numbers of the labels.
    Raises InputError if the folder is missing, contains no class folders, or contains a class folder without images, or if an
    image in a tar file has no label.
    """
    root = os.fspath(root)
    if tar_files := find_shards(root, IMAGE_SUFFIXES):
        return _labelled_members(tar_files)
    _check_is_folder(root)
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name))
    if not classes:
        raise InputError(f"image folder {root}: has no class folders (expected <class>/<image> below it)")
    left_out: Counter[str] = Counter()
    found = [_find_images(os.path.join(root, name), left_out) for name in classes]
    _print_left_out(root, left_out)
    return classes, [(path, label) for label, paths in enumerate(found) for path in paths]


def _labelled_members(tar_files: list[str]) -> tuple[list[str], list[Sample]]:
    members = list_members(tar_files, IMAGE_SUFFIXES)
    for member in members:
        if member.label is None:
            raise InputError(f"image {member.path}: has no label; expected a .cls or .json file of the same name beside it")
    numbers = sorted({member.label for member in members})
    index = {number: i for i, number in enumerate(numbers)}
    return [str(number) for number in numbers], [(member.path, index[member.label]) for member in members]


def _check_is_folder(root: str) -> None:
    if not os.path.isdir(root):
        raise InputError(f"image folder {root}: {'is not a folder' if os.path.exists(root) else 'does not exist'}")


def _find_images(root: str, left_out: Counter[str]) -> list[str]:
    """The images below a folder, sorted; what is passed over is counted. A folder that several links lead to is listed once."""
    paths = []
    seen = set(map(str, Path(root).resolve().parents))  # a link to one of them would lead in a circle
    for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            left_out["links to folders listed already"] += 1
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        files = [name for name in files if not name.startswith(".")]
        images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
        left_out["other files"] += len(files) - len(images)
        paths += [os.path.join(folder, name) for name in images]
    if not paths:
        raise InputError(f"image folder {root}: has no images ({' '.join(IMAGE_SUFFIXES)})")
    return sorted(paths)


def _print_left_out(root: str, left_out: Counter[str]) -> None:
    counts = ", ".join(f"{what} {count}" for what, count in left_out.items() if count)
    if counts and is_main_process():
        print(f"left out below {root}: {counts}", flush=True)


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(folder_name: str) -> bool:
    """True for hidden folders, and for those that operating systems and network drives make."""
    return folder_name.startswith(".") or folder_name in SYSTEM_FOLDERS


# --- reading images --------------------------------------------------------------------------------------------------


def read_image(path: str | os.PathLike, content: bytes | None = None) -> Image.Image:
    """Decode an image of any mode to RGB; `content` is the file's, if it has been read already.

    Raises InputError naming the file and the reason if decoding fails.
    """
    try:
        with Image.open(io.BytesIO(read_file(path) if content is None else content)) as image:
            return to_rgb(image)
    except DECODE_ERRORS as error:
        raise InputError(f"image {path}: cannot be read ({_reason(error)})") from error


def read_pixels(path: str | os.PathLike) -> np.ndarray:
    """The pixels of `read_image`, uint8 [H, W, 3].

    JPEG files are decoded by simplejpeg where it is installed: the same pixels in half the time, since it calls the same
    library (libjpeg-turbo) more directly. Raises InputError naming the file and the reason if decoding fails.
    """
    content = None
    try:
        content = read_file(path)
        if simplejpeg is not None and content.startswith(b"\xff\xd8"):
            height, width, colorspace = simplejpeg.decode_jpeg_header(content)[:3]
            if colorspace in ("YCbCr", "RGB", "Gray") and height * width <= 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
                return simplejpeg.decode_jpeg(content, "RGB")
    except (OSError, ValueError):
        pass  # missing, damaged or unusual: Pillow reads it after all, or gives the reason
    return np.array(read_image(path, content))  # writable, as torch.from_numpy wants it


def decode_error(path: str) -> str | None:
    """Why an image cannot be decoded, in one line; None if it can. Quicker than decoding all pixels."""
    try:
        with Image.open(io.BytesIO(read_file(path))) as image:  # fails without pixels, too
            image.draft("L", (1, 1))  # JPEG: reads the whole stream, but decodes at an eighth of the resolution
            image.load()
            if image.mode not in ("L", "RGB"):
                to_rgb(image)
    except DECODE_ERRORS as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else describe_error(error)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: drops transparency without blending, scales 16-bit grey to 8 bits (Pillow would clip it).

    Raises ValueError for pixels that are floats or 32-bit integers, and for colours that Pillow cannot convert.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # mode I of other formats has 16 bits
        raise ValueError(f"pixels of mode {image.mode}, whose range is not known; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
