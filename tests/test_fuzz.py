"""Damaged files: each reader reads them or raises InputError in one line."""

import argparse
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import main_dino
from clever.checkpoint import load_checkpoint
from clever.data import shards
from clever.data.files import IMAGE_SUFFIXES, read_pixels
from clever.evaluation.downstream_data import read_semi_list
from clever.training.telemetry import truncate_log
from clever.utils import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged images


def image_bytes(kind):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def tar_bytes():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.png", image_bytes("PNG")), ("a.cls", b"3")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read_image(path):
    assert read_pixels(path).dtype == np.uint8


def read_tar(path):
    for image, _ in shards.list_members([str(path)], IMAGE_SUFFIXES):
        read_pixels(image)


def parse_config(path):
    """As main_dino.py reads --config: nothing is trained."""
    main_dino.resolve_args(main_dino.get_args_parser().parse_args(["--config", str(path), "--data_path", "x"]))


READERS = {  # reader, name of the file, its whole content
    "checkpoint": (load_checkpoint, "c.pth", saved({"teacher": {"w": torch.ones(2)}, "args": argparse.Namespace(arch="x")})),
    "old checkpoint": (load_checkpoint, "c.pth", pickle.dumps({"teacher": {"w": [1.0]}, "epoch": 1}, protocol=2)),
    "png": (read_image, "i.png", image_bytes("PNG")),
    "jpeg": (read_image, "i.jpg", image_bytes("JPEG")),
    "tar": (read_tar, "t.tar", tar_bytes()),
    "list": (read_semi_list, "l.txt", b"n01_1.JPEG\nn02/3.png\n"),
    "log": (lambda path: truncate_log(path, 2), "log.txt", b'{"epoch": 0, "train_loss": 5.0}\n{"epoch": 1}\n'),
    "config": (parse_config, "c.yaml", yaml.safe_dump({"epochs": 5, "net": "CLeVER", "mean": [0.5, 0.5, 0.5]}).encode()),
}  # fmt: skip


def read_damaged(name, folder, at, patch, rest):
    """The reader of a file in which `patch` stands over the bytes at a share `at` of it; without `rest` it ends there."""
    reader, file, whole = READERS[name]
    start = int(at * len(whole))
    (folder / file).write_bytes(whole[:start] + patch + whole[start + len(patch) :] * rest)
    try:
        reader(folder / file)
    except InputError as error:
        assert "\n" not in str(error)


DAMAGE = st.floats(0, 1), st.binary(max_size=8), st.booleans()
OPTIONS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=5, derandomize=True, **OPTIONS)
@given(*DAMAGE)
@example(0.0, b"", False)
@example(0.5, b"", False)
@example(0.0, b"\xff", True)
@example(1.0, b"", True)
def test_damaged_files(name, tmp_path, at, patch, rest):
    read_damaged(name, tmp_path, at, patch, rest)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=1000, **OPTIONS)
@given(*DAMAGE)
def test_many_damaged_files(name, tmp_path, at, patch, rest):
    read_damaged(name, tmp_path, at, patch, rest)
