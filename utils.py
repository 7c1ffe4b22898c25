"""Errors, command-line parsing, seeds and files that are whole at any moment."""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image


class InputError(ValueError):
    """The user asked for something that cannot be; the message is one line naming the value and the valid choices."""


def describe_error(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextlib.contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put "prefix: " before the message of an InputError raised inside, such as the name of the file at fault."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}: {error}") from error


class ArgumentParser(argparse.ArgumentParser):
    """Raises InputError instead of printing the usage: one line, of one process, as for every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists all arguments)")


def bool_flag(text: str) -> bool:
    """Parse true/false/on/off/1/0 for argparse."""
    values = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of true, false, on, off, 1, 0")
    return values[text.lower()]


class TypedFloat(float):
    """A float that prints as it was typed: file names hold lr and hp1 as the launch scripts spell them."""

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
    """Raise InputError unless each of these arguments is greater than zero, and finite."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be greater than 0, and finite")


def check_not_negative(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each of these arguments is zero or greater, and finite."""
    for name in names:
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 or greater, and finite")


def plain_args(args: argparse.Namespace | dict[str, Any]) -> dict[str, Any]:
    """Arguments as a plain dict, as checkpoints and JSON files hold them; those of the originals are Namespaces."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: float(value) if isinstance(value, TypedFloat) else value for name, value in values.items()}


def seed_everything(*key: int) -> None:
    """Seed torch (CPU and GPUs), numpy and random from a tuple such as (seed, epoch, rank).

    Seeding every epoch makes a resumed run draw what an uninterrupted one draws, without any state to save.
    """
    words = np.random.SeedSequence((len(key), *key)).generate_state(2)  # its own zeros at the end would not count
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[0])
    random.seed(int(words[1]))


def write_text_atomically(text: str, path: str | Path) -> None:
    """The same for a text file."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save_json(record: Any, path: str | Path) -> None:
    """The same for a record of numbers; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(json.dumps(record, indent=1) + "\n", path)


def save_png(pixels: np.ndarray, path: str | Path) -> None:
    """The same for a picture, [H, W] or [H, W, channels] of bytes; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    Image.fromarray(pixels).save(temporary, format="PNG")
    os.replace(temporary, path)


def check_writable(folder: str | Path) -> None:
    """Raise InputError unless files can be made in `folder` (or in the nearest parent there is); leaves nothing behind."""
    path = Path(folder).absolute()
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {folder}: is a file, not a folder")
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):  # permission bits do not tell of root, or of a read-only file system
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder}: {path} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` in the end: that is whole or absent, whatever happens."""
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
