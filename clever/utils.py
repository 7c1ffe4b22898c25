"""Errors, seeds, and atomic writers."""

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the channels, for pixels in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputError(ValueError):
    """Invalid user input. The message is one line, which names the value and the valid choices."""


def describe_error(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put "prefix: ", such as the name of a file, before the message of an InputError raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from error


def seed_everything(*key: int) -> None:
    """Seed torch (CPU and GPUs), numpy and random from a tuple such as (seed, epoch, step, rank).

    Seeding at every step gives a resumed run the random numbers of an uninterrupted one, without any state to save.
    """
    # SeedSequence ignores trailing zeros; with the length in front, (1,) and (1, 0) give different seeds.
    words = np.random.SeedSequence((len(key), *key)).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[0])
    random.seed(int(words[1]))


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Write atomically: `path` holds the whole old file or the whole new one at any moment, whatever happens.

    Yields the name of a temporary file beside `path`, which replaces `path` at the end, or is removed if an error occurs. The
    folder is made if it does not exist.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # writing to an open file fails without its name
            error.filename = str(path)
        raise


def write_text_atomically(text: str, path: str | Path) -> None:
    """Write a text file atomically, in UTF-8 whatever the locale; see `printable`."""
    with atomic_file(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


def printable(text: str) -> str:
    """Text that can be encoded: the bytes of a file name that is not UTF-8, which Python holds as surrogates, become \\xe9.

    Other surrogates, which JSON may hold, become question marks.
    """
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not blank, without spaces around them. They may name files, which need not be UTF-8."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")  # some editors write a byte order mark
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def save_json(record: Any, path: str | Path) -> None:
    """Write a JSON file atomically."""
    write_text_atomically(json.dumps(record, indent=1) + "\n", path)


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A new folder beside `out` for what is not yet complete, with the same file system; removed at the end."""
    folder = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically: yields a new, empty folder, which replaces `folder` at the end unless an error occurs.

    `folder` is whole, old or new, or absent for a moment; it is never incomplete.
    """
    with unfinished(folder) as scratch:
        new, former = scratch / "new", scratch / "former"
        new.mkdir()
        yield new
        if folder.exists():
            folder.replace(former)
        new.replace(folder)
