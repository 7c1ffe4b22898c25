"""Errors, command-line parsing, seeds, and atomic writers."""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image


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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, "", argparse.SUPPRESS) or action.const is True or "default" in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else "%(default)s"
        return f"{text} (default: {default})".strip()


class ArgumentParser(argparse.ArgumentParser):
    """Raises InputError instead of printing the usage: one line, of one process, as for any other invalid input."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, **{"formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists all arguments)")


def bool_flag(text: str) -> bool:
    """Parse true/false/on/off/1/0 for argparse."""
    values = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false, on, off, 1, 0")
    return values[text.lower()]


class TypedFloat(float):
    """A float that prints as it was typed: file names contain lr and hp1 as the launch scripts spell them."""

    def __new__(cls, text: str):
        try:
            number = super().__new__(cls, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is finite and greater than 0."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be greater than 0, and finite")


def check_not_negative(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is at least 0 and below 2**63, which torch's seeds must not reach."""
    for name in names:
        if not 0 <= getattr(args, name) < 2**63:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 or greater, and less than 2**63")


def check_choices(flag: str, values: Sequence[str], choices: Iterable[str]) -> None:
    """Raise InputError if one of the values of a flag is unknown or given twice."""
    for i, value in enumerate(values):
        if value not in choices:
            raise InputError(f"--{flag} {value!r}: must be one of {', '.join(choices)}")
        if value in values[:i]:
            raise InputError(f"--{flag} {value!r}: given twice")


def plain_args(args: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """Arguments as a dict of plain values, as checkpoints and JSON files store them; the originals store a Namespace."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: float(value) if isinstance(value, TypedFloat) else value for name, value in values.items()}


def seed_everything(*key: int) -> None:
    """Seed torch (CPU and GPUs), numpy and random from a tuple such as (seed, epoch, rank).

    Seeding at every epoch gives a resumed run the random numbers of an uninterrupted one, without any state to save.
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
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(text: str, path: str | Path) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def save_json(record: Any, path: str | Path) -> None:
    """Write a JSON file atomically."""
    write_text_atomically(json.dumps(record, indent=1) + "\n", path)


def save_csv(rows: Iterable[Sequence[Any]], path: str | Path) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomically(text.getvalue(), path)


def save_png(pixels: np.ndarray, path: str | Path) -> None:
    """Write a picture, uint8 [H, W] or [H, W, channels], as PNG, atomically."""
    with atomic_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Raise InputError, which names the flag, unless `folder` or its nearest existing parent is writable; leaves no file."""
    path = Path(folder).absolute()
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"{flag} {folder}: is a file, not a folder")
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):  # permission bits say nothing about root and read-only file systems
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: {path} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically: yields a new, empty folder, which replaces `folder` at the end unless an error occurs.

    `folder` is whole, old or new, or absent for a moment; it is never incomplete.
    """
    scratch, former = (folder.with_name(f".{folder.name}.{word}") for word in ("unfinished", "former"))
    try:
        for leftover in (scratch, former):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        if folder.exists():
            folder.replace(former)
        scratch.replace(folder)
    finally:
        for leftover in (scratch, former):
            shutil.rmtree(leftover, ignore_errors=True)
