"""Damaged and malicious files: each reader reads them or raises InputError, in bounded memory, and runs no code.

FUZZ_EXAMPLES (default 25) is the number of files per reader; the slow tests try 40 times as many.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.in_process import call
from support.processes import fork, wait

import main_dino
from clever import load_backbone
from clever.arguments import read_config
from clever.checkpoint import load_checkpoint
from clever.data import shards
from clever.data.datasets import CheckRecord
from clever.data.files import IMAGE_SUFFIXES, read_pixels
from clever.evaluation.downstream_data import read_semi_list
from clever.evaluation.feature_files import FeatureSet, load_features, save_features
from clever.models.vision_transformer import vit_micro
from clever.training.telemetry import truncate_log
from clever.utils import InputError
from scripts import report, results_table
from scripts.data import make_small_data
from vmamba.config import CONFIGS
from vmamba.config import read_config as read_vmamba_config

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about damaged images
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 25))

# --- inputs ------------------------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
FEW = {"max_size": 4}
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner, **FEW) | st.dictionaries(st.text(max_size=8), inner, **FEW))


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Bytes of a file that is cut, has bits flipped, or bytes written over, removed or repeated; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["cut", "flip", "over", "remove", "repeat"]))
        at, length = draw(st.integers(0, max(0, len(found) - 1))), draw(st.integers(1, 40))
        if kind == "cut":
            del found[at:]
        elif kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "over":
            found[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "remove":
            del found[at : at + length]
        else:
            found[at:at] = found[at : at + length]
    return bytes(found)


@st.composite
def changed(draw, record: dict) -> dict:
    """A JSON object in which one value, at any depth, is another one or is missing."""
    record = json.loads(json.dumps(record))
    where, key = record, draw(st.sampled_from(sorted(record)))
    while isinstance(where[key], dict | list) and where[key] and draw(st.booleans()):
        where = where[key]
        key = draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
    if draw(st.integers(0, 3)):
        where[key] = draw(NESTED)
    else:
        del where[key]
    return record


def image_bytes(suffix: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    return file.getvalue()


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.png", image_bytes("png")), ("a.cls", b"3"), ("b.png", image_bytes("png")), ("b.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


# --- readers -----------------------------------------------------------------------------------------------------------

# Each reader gets the path of a file; READERS has it beside the file's name and its whole content.


def read_image(path: Path) -> None:
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def read_tar(path: Path) -> None:
    for image, _ in shards.list_members([str(path)], IMAGE_SUFFIXES):
        with contextlib.suppress(InputError):
            read_pixels(image)


def read_features(path: Path) -> None:
    save_features(FeatureSet(torch.ones(4, 3), torch.arange(4) % 2, torch.ones(2, 3), torch.arange(2)), path.parent / "f")
    name = "metadata.json" if path.suffix == ".json" else "trainfeat.pth"
    [target] = [each for each in (path.parent / "f").iterdir() if each.name == name or each.suffix == path.suffix == ".json"]
    target.write_bytes(path.read_bytes())
    load_features(path.parent / "f", "--load_features")


def read_idx(path: Path) -> None:
    labels = idx_bytes(np.arange(20, dtype=np.uint8) % 10)
    images = idx_bytes(np.zeros((20, 28, 28), np.uint8))
    for part in ("train", "t10k"):
        (path.parent / f"{part}-images-idx3-ubyte").write_bytes(images)
        (path.parent / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    (path.parent / path.name.removeprefix("fuzz-")).write_bytes(path.read_bytes())
    make_small_data._read_fashion_mnist(path.parent, download=False)


def parse_config(path: Path) -> None:
    """As main_dino.py reads --config: nothing is trained."""
    main_dino.resolve_args(main_dino.get_args_parser().parse_args(["--config", str(path), "--data_path", "x"]))


def make_tables(path: Path) -> None:
    """The report and the table of a folder of results: they may leave out a file, but end."""
    for main in (report.main, results_table.main):
        outcome = call(main, path.parent, "--out", path.parent.parent / f"{main.__module__}.html")
        assert outcome.status in (0, 2), outcome
        assert outcome.status == 0 or outcome.stderr.count("error: ") == 1


NETWORK = {"teacher": {f"backbone.{name}": value for name, value in vit_micro(patch_size=16, img_size=32).state_dict().items()}}
PROBE = {
    "kind": "linear_probe", "net": "CLeVER", "arch": "resnet8", "pretrained_epochs": 20, "aug": "aug1_2", "pretraining_seed": 0,
    "backbone": "0123", "hp1": 0.8, "part": "ALL", "test_aug_type": "ori", "accuracy": 90.0, "test_loss": 0.4, "top5": 99.0,
    "num_test_images": 360, "num_labels": 10, "seed": 0, "args": {"data_path": "data/digits", "lr": 0.3},
}  # fmt: skip
LOG = "".join(json.dumps({"epoch": epoch, "train_loss": 5.0, "seconds": 1}) + "\n" for epoch in range(3)).encode()
SMALL = {"teacher": {"w": torch.ones(3, 2)}, "epoch": 1, "args": argparse.Namespace(arch="vit_tiny", net="dino")}
CONFIG = yaml.safe_dump({"epochs": 5, "net": "CLeVER", "lr": 0.1, "mean": [0.5, 0.5, 0.5], "log_to": []}).encode()
IMAGES = ("jpg", "png", "gif", "bmp", "webp", "tif", "ppm")
READERS = {
    "checkpoint": (load_checkpoint, "c.pth", saved(SMALL)),
    "old checkpoint": (load_checkpoint, "c.pth", pickle.dumps({"teacher": {"w": [1.0, 2.0]}, "epoch": 1}, protocol=2)),
    **{f"{kind} image": (read_image, f"i.{kind}", image_bytes(kind)) for kind in IMAGES},
    "tar": (read_tar, "t.tar", tar_bytes()),
    "features": (read_features, "trainfeat.pth", saved(torch.ones(4, 3))),
    "idx images": (read_idx, "fuzz-train-images-idx3-ubyte", idx_bytes(np.zeros((20, 28, 28), np.uint8))),
    "idx labels": (read_idx, "fuzz-train-labels-idx1-ubyte", idx_bytes(np.arange(20, dtype=np.uint8) % 10)),
    "list": (read_semi_list, "l.txt", b"n01_1.JPEG\nn01_2.JPEG\nn02/3.png\n"),
    "log": (lambda path: truncate_log(path, 2), "log.txt", LOG),
    "checked images": (CheckRecord, "checked_images.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<u8', 'fortran_order': False, "
                       b"'shape': (2,), }" + b" " * 59 + b"\n" + bytes(16)),
    "config": (parse_config, "c.yaml", CONFIG),
    "VMamba's configuration": (read_vmamba_config, "v.yaml", (CONFIGS / "vssm2/vmambav2_tiny_224.yaml").read_bytes()),
    "results": (make_tables, "r/linear.json", json.dumps(PROBE).encode()),
    "log of a report": (make_tables, "r/log.txt", LOG),
}  # fmt: skip
SLOWER = {"results", "log of a report"}  # they take longer: a quarter of the examples


def try_to_read(reader, path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        reader(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


def examples(count: int):
    return settings(max_examples=count, deadline=None, database=None, derandomize=count <= 25,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


def fuzz(name: str, folder: Path, count: int) -> None:
    reader, file, whole = READERS[name]
    try_to_read(reader, folder / file, whole)

    @examples(max(1, count // 4) if name in SLOWER else count)
    @given(damaged(whole))
    def check(content):
        try_to_read(reader, folder / file, content)

    check()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name, tmp_path):
    fuzz(name, tmp_path, EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(name, tmp_path):
    fuzz(name, tmp_path, 40 * EXAMPLES)


# --- structures --------------------------------------------------------------------------------------------------------


def structures(folder: Path, count: int) -> None:
    """Files that are whole and hold what nobody expects."""
    names = st.sampled_from(["arch", "net", "hp1", "patch_size", "global_crops_size", "mean", "std", "aug", "seed", "epochs"])

    @examples(count)
    @given(st.dictionaries(names, NESTED), NESTED, st.sampled_from(["args", "arch", "epoch", "state_dict", "model", "teacher"]))
    def checkpoints(args, value, key):
        state = NETWORK | {"args": argparse.Namespace(**args)} | {key: value}
        try_to_read(load_backbone, folder / "c.pth", saved(state))

    @examples(4 * count)
    @given(st.dictionaries(st.sampled_from(["epochs", "lr", "mean", "log_to", "net", "evaluate", "x"]), NESTED))
    def configurations(values):
        try_to_read(parse_config, folder / "c.yaml", yaml.safe_dump(values).encode())

    @examples(4 * count)
    @given(NESTED, st.sampled_from(["DEPTHS", "EMBED_DIM", "SSM_D_STATE", "NORM_LAYER", "SSM_RATIO", "GMLP"]))
    def vmambas(value, key):
        content = {"MODEL": {"VSSM": {"DEPTHS": [1, 1], "SSM_FORWARDTYPE": "v0"} | {key: value}}}
        try_to_read(read_vmamba_config, folder / "v.yaml", yaml.safe_dump(content).encode())

    @examples(max(1, count // 4))
    @given(changed(PROBE))
    def results(record):
        try_to_read(make_tables, folder / "r" / "linear.json", json.dumps(record).encode())

    for check in (checkpoints, configurations, vmambas, results):
        check()


def test_unexpected_structures(tmp_path):
    structures(tmp_path, EXAMPLES)


@pytest.mark.slow
def test_many_unexpected_structures(tmp_path):
    structures(tmp_path, 40 * EXAMPLES)


# --- bombs -------------------------------------------------------------------------------------------------------------

LIMIT = 1 << 30  # bytes that a reader may take beside what the process has already


def zipped_zeros() -> bytes:
    """A checkpoint of 1.5 GiB of zeros in some MB."""
    file, small = io.BytesIO(), io.BytesIO(saved({"w": torch.zeros(8)}))
    with zipfile.ZipFile(small) as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for entry in whole.infolist():
            with out.open(entry.filename, "w", force_zip64=True) as target:
                if entry.filename.endswith("data/0"):
                    for _ in range(1536):
                        target.write(bytes(1 << 20))
                else:
                    target.write(whole.read(entry))
    return file.getvalue()


def huge_png(side: int = 60_000) -> bytes:
    """A PNG file of 60,000 x 60,000 pixels in some MB at most: its rows are cut off."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", rows)


def huge_jpeg() -> bytes:
    """A small JPEG file whose header says 65,000 x 65,000 pixels."""
    content = bytearray(image_bytes("jpg"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(content)


def laughs(depth: int = 30) -> bytes:
    """YAML's lists of lists, each twice in the next one: 2^30 words when they are written out."""
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, depth)]
    return "\n".join([*rows, f"mean: *a{depth - 1}", f"epochs: *a{depth - 1}"]).encode()


BOMBS = {
    "zip": (load_checkpoint, "c.pth", zipped_zeros),
    "png": (read_image, "i.png", huge_png),
    "jpeg": (read_image, "i.jpg", huge_jpeg),
    "yaml": (parse_config, "c.yaml", laughs),
    "yaml of VMamba": (read_vmamba_config, "v.yaml", lambda: laughs().replace(b"mean:", b"MODEL:")),
    "json": (lambda path: read_config(str(path)), "c.json", lambda: b"[" * 100_000),
    "idx": (read_idx, "fuzz-train-images-idx3-ubyte", lambda: struct.pack(">HBBIII", 0, 8, 3, 2**31, 2**15, 2**15) + b"x"),
    "npy": (CheckRecord, "c.npy", lambda: b"\x93NUMPY\x01\x00v\x00{'descr': '<u8', 'fortran_order': False, "
            b"'shape': (99999999999,), }" + b" " * 49 + b"\n" + bytes(16)),
}  # fmt: skip


def read_with_little_memory(name: str, folder: str) -> None:
    reader, file, make = BOMBS[name]
    content = make()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
    try_to_read(reader, Path(folder) / file, content)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_would_become_large(name, tmp_path):
    assert wait([fork(read_with_little_memory, name, str(tmp_path))]) == [0]


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["checkpoint", "args", "features"])
def test_no_code_is_run(where, tmp_path):
    attack = Attack()
    Attack.path = str(tmp_path / "was_run")
    content = {"checkpoint": attack, "args": {"teacher": {}, "args": attack}, "features": attack}[where]
    reader = read_features if where == "features" else load_checkpoint
    file = io.BytesIO()
    torch.save(content, file)
    path = tmp_path / "trainfeat.pth"
    path.write_bytes(file.getvalue())
    with pytest.raises(InputError):
        reader(path)
    assert not (tmp_path / "was_run").exists()
