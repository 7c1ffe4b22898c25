"""Names and texts that users chose: not UTF-8, with characters that matplotlib reads as mathematics, in any locale."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.in_process import call

import embed
import visualize_attention
from clever.utils import (
    printable,
    read_lines,
    write_text_atomically,
)

ROOT = Path(__file__).resolve().parent.parent
CAFE = os.fsdecode(b"caf\xe9.png")  # a name in Latin-1


def write_png(path, mode="RGB", size=(40, 32)):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(path)


def test_names_that_are_not_utf_8_are_printed_escaped(tmp_path):
    assert printable(CAFE) == r"caf\xe9.png" and printable("grün $x") == "grün $x"
    write_text_atomically(f"{CAFE} grün\n", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_bytes() == r"caf\xe9.png grün".encode() + b"\n"


@pytest.mark.parametrize("content", ["\ufeffa.png\r\n\r\n grün.png \r\n".encode(), b"a.png\ngr\xc3\xbcn.png"])
def test_lists_of_any_editor_are_read(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert read_lines(tmp_path / "list.txt") == ["a.png", "grün.png"]
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png")
    assert read_lines(tmp_path / "list.txt") == [CAFE]


@pytest.mark.parametrize("name", [CAFE, "US$1__US$2.png"])
def test_pictures_of_images_with_any_name(world_of_bad_input, tmp_path, name):
    (tmp_path / "images").mkdir()
    write_png(os.path.join(tmp_path, "images", "a.png"))
    write_png(os.path.join(tmp_path, "images", name))
    flags = ("--pretrained_weights", world_of_bad_input.checkpoint, "--output_dir", tmp_path / "out", "--image_size", 32, 32)
    outcome = call(visualize_attention.main, *flags, "--image_path", os.path.join(tmp_path, "images", name))
    assert outcome.status == 0, outcome.stderr
    assert list((tmp_path / "out").rglob("*.png"))
    table = ("--pretrained_weights", world_of_bad_input.checkpoint, "--data_path", tmp_path / "images", "--num_workers", 0)
    for suffix in (".csv", ".npz"):
        outcome = call(embed.main, *table, "--out", tmp_path / f"t{suffix}")
        assert outcome.status == 0, outcome.stderr
    assert printable(name) in (tmp_path / "t.csv").read_text(encoding="utf-8")


def test_an_ascii_locale(world_of_bad_input, tmp_path):
    """A real process, since Python chooses its encodings when it starts."""
    for split in ("train", "val"):
        for label in ("grün", "rot"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(2):
                write_png(tmp_path / "data" / split / label / f"{i}ü.png")
    (tmp_path / "data" / "val" / "rot" / "0ü.png").write_bytes(b"no image")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [sys.executable, ROOT / "eval_knn.py", "--pretrained_weights", world_of_bad_input.checkpoint, "--data_path",
               tmp_path / "data", "--output_dir", tmp_path / "out", "--nb_knn", "1", "--num_workers", "0"]  # fmt: skip
    process = subprocess.run([*command, "--skip_bad_images", "true"], env=plain, capture_output=True, timeout=200)
    assert process.returncode == 0, process.stderr
    assert b"left out: 1 of 4" in process.stdout and (tmp_path / "out" / "knn.json").exists()
