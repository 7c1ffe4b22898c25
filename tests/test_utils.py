"""Seeds and writers of files."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from clever import utils
from clever.evaluation.images import save_png

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
        save_png(np.full((2, 3), value, dtype=np.uint8), folder / "c.png")
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


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), utils.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
