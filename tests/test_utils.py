"""Flags, seeds, and writers of files."""

import argparse
import copy
import json
import math
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from utils import InputError, TypedFloat

# --- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "on", "On", "1"])
def test_true_flags(text):
    assert utils.bool_flag(text) is True


@pytest.mark.parametrize("text", ["false", "False", "off", "OFF", "0"])
def test_false_flags(text):
    assert utils.bool_flag(text) is False


@pytest.mark.parametrize("text", ["yes", "", "2", "tru", " true"])
def test_other_flags_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is not one of true, false, on, off, 1, 0"):
        utils.bool_flag(text)


@pytest.mark.parametrize("text", ["0.80", "1e-3", "1E-03", ".5", "5", "5.", "inf"])
def test_typed_floats_print_as_typed(text):
    number = TypedFloat(text)
    assert number == float(text) and isinstance(number, float)
    assert str(number) == f"{number}" == f"{number!s}" == text
    assert type(number * 2) is float and copy.deepcopy(number) == number and str(copy.deepcopy(number)) == text


def test_typed_float_refuses_words():
    with pytest.raises(argparse.ArgumentTypeError, match="'1/2' is not a number"):
        TypedFloat("1/2")


def test_plain_arguments():
    for args in ({"lr": TypedFloat("1e-3"), "n": 3}, argparse.Namespace(lr=TypedFloat("1e-3"), n=3)):
        values = utils.plain_args(args)
        assert values == {"lr": 0.001, "n": 3} and type(values["lr"]) is float


def test_parser_reports_in_one_line():
    parser = utils.ArgumentParser()
    parser.add_argument("--size", type=int, required=True)
    with pytest.raises(InputError, match=r"^argument --size: invalid int value: 'x' \(--help lists all arguments\)$"):
        parser.parse_args(["--size", "x"])
    with pytest.raises(InputError, match="required: --size"):
        parser.parse_args([])


def test_help_shows_every_default():
    parser = utils.ArgumentParser(description="What it does.\n    python example.py")
    parser.add_argument("--size", type=int, default=3, help="side, pixels")
    parser.add_argument("--scale", type=float, nargs=2, default=[0.5, 1.0], help="from and to")
    parser.add_argument("--arch", help="network; default: the checkpoint's")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert "--size SIZE side, pixels (default: 3)" in lines and "--scale SCALE SCALE from and to (default: 0.5 1.0)" in lines
    assert "--arch ARCH network; default: the checkpoint's" in lines and "--evaluate only evaluate" in lines
    assert "    python example.py" in parser.format_help().splitlines()


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_check_positive(value):
    utils.check_positive(argparse.Namespace(lr=1e-9), "lr")
    with pytest.raises(InputError, match=f"--lr {value}: must be greater than 0"):
        utils.check_positive(argparse.Namespace(lr=value), "lr")


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_check_not_negative(value):
    utils.check_not_negative(argparse.Namespace(lr=0), "lr")
    with pytest.raises(InputError, match=f"--lr {value}: must be 0 or greater"):
        utils.check_not_negative(argparse.Namespace(lr=value), "lr")


# --- seeds -------------------------------------------------------------------------------------------------------------


def draws(*key):
    utils.seed_everything(*key)
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_seeds_are_reproducible_and_different_per_key():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2, 1), (2**40, 0, 1)]
    first = {key: draws(*key) for key in keys}
    assert all(draws(*key) == first[key] for key in keys)
    for generator in range(3):
        assert len({tuple(values[generator]) for values in first.values()}) == len(keys)


# --- files -------------------------------------------------------------------------------------------------------------


def test_atomic_writes_replace_and_leave_nothing_else(tmp_path):
    """Folders are made; a file is never seen half-written."""
    folder = tmp_path / "new"
    for value in (1, 2):
        utils.write_text_atomically(f"{value}\n", folder / "a.txt")
        utils.save_json({"value": value}, folder / "b.json")
        utils.save_png(np.full((2, 3), value, dtype=np.uint8), folder / "c.png")
    assert (folder / "a.txt").read_text() == "2\n" and json.loads((folder / "b.json").read_text()) == {"value": 2}
    assert np.asarray(Image.open(folder / "c.png")).tolist() == [[2] * 3] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.json", "c.png"]


def test_a_whole_folder_replaces_the_old_one_or_nothing(tmp_path):
    folder = tmp_path / "folder"
    with utils.whole_folder(folder) as scratch:
        (scratch / "old").touch()
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), utils.whole_folder(folder) as scratch:
        (scratch / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in folder.iterdir()] == ["old"]
    with utils.whole_folder(folder) as scratch:
        (scratch / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [folder]


def test_the_old_text_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    path.write_text("old")
    seen = []
    real = os.replace
    monkeypatch.setattr(utils.os, "replace", lambda source, target: (seen.append(path.read_text()), real(source, target)))
    utils.write_text_atomically("new", path)
    assert seen == ["old"] and path.read_text() == "new"


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), utils.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_check_writable_leaves_nothing(tmp_path):
    utils.check_writable(tmp_path)
    utils.check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, not a folder"):
        utils.check_writable(tmp_path / "file")
    with pytest.raises(InputError, match="file cannot be written"):
        utils.check_writable(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="cannot be written"):
        utils.check_writable(tmp_path / ("x" * 300) / "below")
