"""Image files: finding them in folders and tar files, and reading them."""

import io
import math
import os
import struct
import zlib
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


def list_images(root: str | os.PathLike) -> list[str]:
    """Sorted paths of all images below `root`. Symbolic links are followed; hidden files and folders are skipped.

    `root` may also be tar files, or a folder of tar files (shards.py): the images in them, in the order of the tar files.
    Raises InputError if the folder is missing or contains no images.
    """
    root = os.fspath(root)
    if tar_files := find_shards(root, IMAGE_SUFFIXES):
        return [path for path, _ in list_members(tar_files, IMAGE_SUFFIXES)]
    return _find_images(root, [root])[0]


def labelled_samples(root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """Class names (the sub-folders, sorted) and (path, index of the class) for every image at any depth below them.

    In tar files (shards.py), the classes are the numbers of the labels.
    Raises InputError if the folder is missing, contains no class folders, or contains a class folder without images, or if an
    image in a tar file has no label.
    """
    root = os.fspath(root)
    if tar_files := find_shards(root, IMAGE_SUFFIXES):
        members = list_members(tar_files, IMAGE_SUFFIXES)
        if unlabelled := [path for path, label in members if label is None]:
            raise InputError(f"image {unlabelled[0]}: has no label; expected a .cls or .json file of the same name beside it")
        numbers = sorted({label for _, label in members})
        index = {number: i for i, number in enumerate(numbers)}
        return [str(number) for number in numbers], [(path, index[label]) for path, label in members]
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name))
    if not classes:
        raise InputError(f"image folder {root}: has no class folders (expected <class>/<image> below it)")
    found = _find_images(root, [os.path.join(root, name) for name in classes])
    return classes, [(path, label) for label, paths in enumerate(found) for path in paths]


def _find_images(root: str, folders: list[str]) -> list[list[str]]:
    """The images below each of these folders of `root`, sorted. A folder that several links lead to is listed once.

    What is passed over is counted and printed. Raises InputError if a folder has no images.
    """
    found, other_files, other_links = [], 0, 0
    for top in folders:
        paths = []
        seen = set(map(str, Path(top).resolve().parents))  # a link to one of them would lead in a circle
        for folder, subfolders, files in os.walk(top, onerror=_raise, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                other_links += 1
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
            files = [name for name in files if not name.startswith(".")]
            images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
            other_files += len(files) - len(images)
            paths += [os.path.join(folder, name) for name in images]
        if not paths:
            raise InputError(f"image folder {top}: has no images ({' '.join(IMAGE_SUFFIXES)})")
        found.append(sorted(paths))
    if (other_files or other_links) and is_main_process():
        print(f"left out below {root}: other files {other_files}, links to folders listed already {other_links}", flush=True)
    return found


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(folder_name: str) -> bool:
    """True for hidden folders, and for those that operating systems and network drives make."""
    return folder_name.startswith(".") or folder_name in SYSTEM_FOLDERS


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
