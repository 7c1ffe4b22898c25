"""Image files: finding them in folders and tar files, and reading them."""

import glob
import io
import math
import os
import struct
import zlib
from collections import Counter
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from clever.data.shards import list_members, read_file
from clever.utils import InputError, describe_error, error_prefix

try:
    import simplejpeg
except ImportError:  # optional
    simplejpeg = None

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".gif", ".tif", ".tiff",
)  # fmt: skip
EXPECTED = f"taken are {' '.join(IMAGE_SUFFIXES)}, or tar files of these, not compressed, given as 'folder/*.tar'"
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

Sample = tuple[str, int]  # path, label

DECODE_ERRORS = (  # what Pillow raises for files that are missing, truncated, damaged or not images
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def list_images(root: str | os.PathLike) -> list[str]:
    """Sorted paths of all images below `root`. Symbolic links are followed; hidden files and folders are skipped.

    `root` may also be tar files (shards.py), or a folder of tar files without images: the images in them, in their order.
    Raises InputError if the folder is missing or contains no images.
    """
    images, tar_files = _find(os.fspath(root))
    return images or [path for path, _ in list_members(tar_files, IMAGE_SUFFIXES)]


def labelled_samples(root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """Class names, sorted, and (path, index of the class) of every image that has one.

    Classes are the folders below `root`, or the labels in tar files. Images without a class are left out, which is printed.
    Raises InputError if the folder is missing, contains no class folders, or contains a class folder without images.
    """
    root = os.fspath(root)
    images, tar_files = _find(root)
    if images:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_hidden(entry.name))
        start = len(os.path.join(root, ""))
        members = sorted(((path, path[start:].split(os.sep)[0]) for path in images), key=itemgetter(1))
    else:
        members = list_members(tar_files, IMAGE_SUFFIXES, with_labels=True)
        names = {label for _, label in members} - {None}
        classes = sorted(names, key=int if all(map(str.isdecimal, names)) else None)
    if not classes:
        raise InputError(f"images {root}: have no class folders (<class>/<image>; in tar files, labels <image>.cls or .json)")
    if empty := sorted(set(classes) - {name for _, name in members}):
        raise InputError(f"image folder {os.path.join(root, empty[0])}: has no images; {EXPECTED}")
    index = {name: i for i, name in enumerate(classes)}
    samples = [(path, index[name]) for path, name in members if name in index]
    if len(samples) < len(members):
        print(f"left out of {root}: {len(members) - len(samples)} images without a class folder or label", flush=True)
    return classes, samples


def _find(root: str) -> tuple[list[str], list[str]]:
    """The images below a folder, sorted; without any, its tar files, or those that `root` names. Prints what is left out."""
    if root.lower().endswith(".tar") and not os.path.isdir(root):
        if tar_files := [root] if os.path.isfile(root) else sorted(glob.glob(root, recursive=True)):
            return [], tar_files
        raise InputError(f"tar files {root}: do not exist")
    if not os.path.isdir(root):
        raise InputError(f"image folder {root}: {'is not a folder' if os.path.exists(root) else 'does not exist'}; {EXPECTED}")
    images, tar_files, left_out = [], [], Counter()
    seen = set(map(str, Path(root).resolve().parents))  # a link to one of them would lead in a circle
    for folder, subfolders, files in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            left_out["links to folders listed already"] += 1
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
        if folder == root and len(splits := [name for name in subfolders if name.lower() in SPLITS]) > 1:
            print(f"{root} has {' and '.join(splits)}: images of all are taken; give one of them to leave out the others")
        for path in (os.path.join(folder, name) for name in files if not name.startswith(".")):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                images.append(path)
            elif suffix == ".tar":
                tar_files.append(path)
            else:
                left_out[suffix or "without suffix"] += 1
    if images and tar_files:
        left_out[".tar"] = len(tar_files)
    counted = ", ".join(f"{number} {kind}" for kind, number in left_out.most_common())
    if not images and not tar_files:
        raise InputError(f"image folder {root}: has no images{counted and f', but {counted}'}; {EXPECTED}")
    if left_out:
        print(f"left out below {root}: {counted}; {EXPECTED}", flush=True)
    return sorted(images), sorted(tar_files)


def _raise(error: OSError) -> None:
    raise error


def _is_hidden(folder_name: str) -> bool:
    """True for hidden folders, and for those that operating systems and network drives make."""
    return folder_name.startswith(".") or folder_name in SYSTEM_FOLDERS


def read_image(path: str | os.PathLike, content: bytes | None = None) -> Image.Image:
    """Decode an image of any mode to RGB; `content` is the file's, if it has been read already.

    Raises InputError naming the file and the reason if decoding fails.
    """
    with error_prefix(f"image {path}: cannot be read"):
        return to_rgb(_decode(path, content))


def _decode(path: str | os.PathLike, content: bytes | None = None, quickly: bool = False) -> Image.Image:
    """An image in its own mode. Errors of Pillow are the file's; `quickly`: a whole JPEG, but at an eighth of its size."""
    try:
        image = Image.open(io.BytesIO(read_file(path) if content is None else content))
        if quickly:
            image.draft("L", (1, 1))
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise InputError("not an image that Pillow knows") from error
    except DECODE_ERRORS as error:
        raise InputError(describe_error(error)) from error


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
        to_rgb(_decode(path, quickly=True))
    except InputError as error:
        return str(error)
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: drops transparency without blending, scales 16-bit grey to 8 bits (Pillow would clip it).

    Raises InputError for pixels that are floats or 32-bit integers, and for colours that Pillow cannot convert.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # mode I of other formats has 16 bits
        raise InputError(f"pixels of mode {image.mode}, whose range is not known; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(describe_error(error)) from error
