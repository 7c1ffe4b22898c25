"""Images in tar files of the WebDataset layout, found once and then read by their place in the file.

A sample is a key and its files: `n01/0003.jpg` and `n01/0003.cls` have the key `n01/0003`, which ends at the first dot of the
name. Images are known by the rest (`jpg`, `png`, ...): `0003.seg.png` is a segmentation, no image of its own. The label is the
number or name in `.cls`, or else in the field `cls` or `label` of `.json`.

An image in a tar file is named by a path that says where it is: `shards/000.tar//1536+20480/n01/0003.jpg` are the 20480 bytes
that start at byte 1536 of shards/000.tar. So the views of an image depend on (seed, epoch, index), as those of a file do, and a
resumed run repeats them.
"""

import functools
import io
import json
import os
import re
import tarfile
from collections import ChainMap
from collections.abc import Iterator

from clever.distributed import all_gather_objects, get_rank, get_world_size
from clever.progress import progress
from clever.utils import InputError, describe_error

MAX_OPEN_FILES = 64  # of a process
_MEMBER = re.compile(r"(.*\.tar)//(\d+)\+(\d+)/", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[-+.\d]+")

Member = tuple[str, str | None]  # an image in a tar file: its path, see above, and its label


def list_members(shards: list[str], suffixes: tuple[str, ...], with_labels: bool = False) -> list[Member]:
    """The images in these tar files, in their order; labels are read `with_labels` only. The processes share the files.

    Raises InputError for a file that is damaged, truncated or compressed, that has no images, or has two images of one name.
    """
    own = shards[get_rank() :: get_world_size()]
    found: dict[str, tuple[list[Member], int]] = {}
    with progress("listing tar files", len(own), unit="files", silent_if_quick=True) as bar:
        for path in own:
            found[path] = _members_of(path, suffixes, with_labels)
            bar.update()
    of_all = ChainMap(*all_gather_objects(found))
    left_out = sum(of_all[path][1] for path in shards)
    if left_out:
        print(f"left out of tar files: names with a dot before the suffix {left_out}", flush=True)
    return [member for path in shards for member in of_all[path][0]]


def _members_of(path: str, suffixes: tuple[str, ...], with_labels: bool) -> tuple[list[Member], int]:
    """The images in one tar file, in their order, and the number of those with a dot before the suffix."""
    left_out = 0
    images: dict[str, str] = {}  # by key
    labels: dict[str, str | None] = {}
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
        elif kind == ".cls" or (kind == ".json" and key not in labels):
            labels[key] = _read_label(path, member, kind) if with_labels else None
        elif kind.endswith(suffixes):
            left_out += 1
    if not images:
        raise InputError(f"tar file {path}: has no images ({' '.join(suffixes)}), or only with a dot before the suffix")
    return [(image, labels.get(key)) for key, image in images.items()], left_out


def _read_headers(path: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file in their order. Raises InputError unless all of them are whole."""
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps all of them
                yield member
            if archive.offset + tarfile.BLOCKSIZE > os.path.getsize(path):
                raise tarfile.ReadError("truncated, its end is missing")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"tar file {path}: damaged, or compressed, which it must not be ({describe_error(error)})") from error


def _read_label(path: str, member: tarfile.TarInfo, kind: str) -> str | None:
    """The label in a .cls or .json file; None if a .json has none. Raises InputError unless it is a name or a number from 0."""
    content = _read_bytes(path, member.offset_data, member.size)
    try:
        value = content.decode()
        if kind == ".json":
            fields = json.loads(value)
            value = fields.get("cls", fields.get("label")) if isinstance(fields, dict) else None
            if value is None:
                return None
        name = str(value).strip()
        if type(value) not in (int, str) or not name or (_NUMBER.fullmatch(name) and not name.isdecimal()):
            raise ValueError(value)
        return str(int(name)) if name.isdecimal() else name
    except (ValueError, RecursionError) as error:
        raise InputError(f"tar file {path}: the label in {member.name} is no name and no whole number from 0 on") from error


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a file, or of an image in a tar file. Raises OSError if it cannot be read as a whole."""
    member = _MEMBER.match(os.fspath(path))
    if member is None:
        with open(path, "rb") as file:
            return file.read()
    return _read_bytes(member[1], int(member[2]), int(member[3]))


def file_of(path: str) -> str:
    """The file that an image is in: the tar file, or the path itself."""
    member = _MEMBER.match(path)
    return path if member is None else member[1]


def _read_bytes(path: str, start: int, size: int) -> bytes:
    file = _open(path)  # held here: another thread may drop it from the cache
    content = os.pread(file.fileno(), size, start)  # keeps no position: safe in forks and threads
    if len(content) != size:
        raise OSError(f"{path} has become shorter since it was listed")
    return content


@functools.lru_cache(MAX_OPEN_FILES)
def _open(path: str) -> io.FileIO:
    return io.FileIO(path)
