"""Images in tar files of the WebDataset layout, found once and then read by their place in the file.

A sample is a key and its files: `n01/0003.jpg` and `n01/0003.cls` have the key `n01/0003`, which ends at the first dot of the
name. Images are known by the rest (`jpg`, `png`, ...). The label is a number in `.cls`, or in the field `cls` or `label` of
`.json`.

An image in a tar file is named by a path that says where it is: `shards/000.tar//1536+20480/n01/0003.jpg` are the 20480 bytes
that start at byte 1536 of shards/000.tar. So the views of an image depend on (seed, epoch, index), as those of a file do, and a
resumed run repeats them.
"""

import itertools
import json
import math
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from clever.distributed import (
    all_gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
)
from clever.progress import Progress
from clever.utils import InputError, describe_error, plural

MAX_OPEN_FILES = 64  # of a process
MAX_SHARDS = 1_000_000  # that a pattern may mean
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json file
_MEMBER = re.compile(r"(.*\.tar)//(\d+)\+(\d+)/", re.DOTALL)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Member(NamedTuple):
    """An image in a tar file: its path (see above) and its label, or None."""

    path: str
    label: int | None


# --- finding images --------------------------------------------------------------------------------------------------


def find_shards(root: str, suffixes: tuple[str, ...]) -> list[str]:
    """The tar files that `root` means: a path with ranges such as `data/{000..099}.tar`, or a folder of tar files alone.

    `suffixes` are those of images. An empty list if `root` means no tar files. Raises InputError for a range that is empty, or
    files that do not exist.
    """
    if root.endswith(".tar"):
        paths = [root] if os.path.isfile(root) else _expand(root)
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise InputError(f"tar files {root}: {len(missing)} of {len(paths)} do not exist, the first is {missing[0]}")
        return paths
    if not os.path.isdir(root):
        return []
    names = []
    for entry in os.scandir(root):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() or entry.name.lower().endswith(suffixes):  # images beside an archive, perhaps of the same images
            return []
        names += [entry.name] if entry.name.endswith(".tar") else []
    return [os.path.join(root, name) for name in sorted(names)]


def _expand(pattern: str) -> list[str]:
    """All paths of a pattern: `{000..099}` is a range, whose zeros are kept, and `{a,b}` is a list."""
    choices = []
    for text in _BRACES.findall(pattern):
        numbers = _RANGE.fullmatch(text)
        if numbers:
            first, last = numbers.groups()
            if int(first) > int(last):
                raise InputError(f"tar files {pattern}: the range {{{text}}} is empty")
            if int(last) - int(first) >= MAX_SHARDS:
                raise InputError(f"tar files {pattern}: more than {MAX_SHARDS} files")
            choices.append([f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)])
        else:
            choices.append(text.split(","))
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise InputError(f"tar files {pattern}: more than {MAX_SHARDS} files")
    parts = _BRACES.split(pattern)[::2]  # what stands between the braces
    return ["".join(itertools.chain(*zip(parts, (*choice, ""), strict=True))) for choice in itertools.product(*choices)]


def list_members(shards: list[str], suffixes: tuple[str, ...]) -> list[Member]:
    """The images in these tar files, in their order, with labels where there are any. The processes share the files.

    Raises InputError for a file that is damaged, truncated or compressed, that has no images, or has two samples of one name.
    """
    own = shards[get_rank() :: get_world_size()]
    meter = Progress("listing tar files", len(own), unit="files", silent_if_quick=True)
    found: dict[str, tuple[list[Member], int] | InputError] = {}
    for path in own:
        try:
            found[path] = _members_of(path, suffixes)
        except InputError as error:  # raised by all processes, below
            found[path] = error
        meter.advance()
    of_all = {path: each for share in all_gather_objects(found) for path, each in share.items()}
    for path in shards:
        if isinstance(of_all[path], InputError):
            raise of_all[path]
    left_out = sum(of_all[path][1] for path in shards)
    if left_out and is_main_process():
        print(f"left out: {plural(left_out, 'image')} of tar files, with a dot before the suffix of the name", flush=True)
    return [member for path in shards for member in of_all[path][0]]


def _members_of(path: str, suffixes: tuple[str, ...]) -> tuple[list[Member], int]:
    """The images in one tar file, in their order, and the number of those that are left out.

    In WebDataset's layout, a sample's name ends at its first dot: `a.seg.png` is the segmentation of `a`, no image of its own.
    """
    left_out = 0
    images: dict[str, str] = {}  # by key
    labels: dict[str, int] = {}
    for member in _read_headers(path):
        folder, name = os.path.split(os.path.normpath(member.name))
        if not member.isfile() or any(part.startswith((".", "__MACOSX")) for part in (*folder.split("/"), name)):
            continue  # a Mac's or another hidden file
        stem, dot, kind = name.partition(".")
        key, kind = os.path.join(folder, stem), (dot + kind).lower()
        if kind in suffixes:
            if key in images:
                raise InputError(f"tar file {path}: two images of the name {key}")
            images[key] = f"{path}//{member.offset_data}+{member.size}/{member.name}"
        elif kind.endswith(suffixes):
            left_out += 1
        elif kind in (".cls", ".json"):
            label = _read_label(path, member, kind)
            if label is not None and labels.setdefault(key, label) != label:
                raise InputError(f"tar file {path}: two labels for {key}: {labels[key]} and {label}")
    if not images:
        dots = f"; {plural(left_out, 'image')} with a dot before the suffix of the name" if left_out else ""
        raise InputError(f"tar file {path}: has no images ({' '.join(suffixes)}){dots}")
    return [Member(image, labels.get(key)) for key, image in images.items()], left_out


def _read_headers(path: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file in their order. Raises InputError unless all of them are whole."""
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps all of them
                if member.offset_data + (member.size if member.isfile() else 0) > size:
                    raise InputError(f"tar file {path}: truncated, {member.name} is not whole")
                yield member
            if archive.offset + tarfile.BLOCKSIZE > size:
                raise InputError(f"tar file {path}: truncated, its end is missing")
    except InputError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        with open(path, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        reason = "compressed; unpack it, its images are read by their place" if packed else describe_error(error)
        raise InputError(f"tar file {path}: {reason}") from error


def _read_label(path: str, member: tarfile.TarInfo, kind: str) -> int | None:
    """The label in a .cls or .json file; None if a .json has none. Raises InputError for anything but a number from 0 on."""
    content = _read_bytes(path, member.offset_data, min(member.size, MAX_LABEL_BYTES))
    try:
        value: Any = content.decode().strip()
        if kind == ".json":
            fields = json.loads(value)
            fields = fields if isinstance(fields, dict) else {}
            value = fields.get("cls", fields.get("label"))
            if value is None:
                return None
        if isinstance(value, (bool, float)) or not 0 <= int(value) < 2**31:
            raise ValueError(value)
        return int(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"tar file {path}: the label in {member.name} is no whole number from 0 on") from error


# --- reading images --------------------------------------------------------------------------------------------------

_open_files: OrderedDict[str, int] = OrderedDict()  # descriptors of this process, the latest last; a fork may share them


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a file, or of an image in a tar file. Raises OSError if it cannot be read as a whole."""
    member = _MEMBER.match(os.fspath(path))
    if member is None:
        with open(path, "rb", opener=_open_without_waiting) as file:
            return file.read()
    return _read_bytes(member[1], int(member[2]), int(member[3]))


def _open_without_waiting(path: str, flags: int) -> int:
    """os.open, which for a named pipe would wait for a writer: its content is empty instead."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def file_of(path: str) -> str:
    """The file that an image is in: the tar file, or the path itself."""
    member = _MEMBER.match(path)
    return path if member is None else member[1]


def is_member(path: str) -> bool:
    """True for the path of an image in a tar file."""
    return _MEMBER.match(path) is not None


def _read_bytes(path: str, start: int, size: int) -> bytes:
    if path not in _open_files:
        while len(_open_files) >= MAX_OPEN_FILES:
            os.close(_open_files.popitem(last=False)[1])
        _open_files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    _open_files.move_to_end(path)
    content = os.pread(_open_files[path], size, start)  # keeps no position: safe in forks and threads
    if len(content) != size:
        raise OSError(f"{path} has become shorter since it was listed")
    return content
