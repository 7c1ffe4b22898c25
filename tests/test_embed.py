"""embed.py: tables of features in Parquet, NPZ and CSV, and their pictures."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from PIL import Image
from support.in_process import assert_refused, call, snapshot

import embed
from clever import load_backbone
from clever.evaluation import embeddings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def world(world_of_bad_input, tmp_path_factory):
    """The world of bad input, and the table of its training images, as NPZ."""
    folder = tmp_path_factory.mktemp("embed")
    outcome = run_embed(world_of_bad_input, folder / "all.npz")
    assert outcome.status == 0, outcome
    world_of_bad_input.table = np.load(folder / "all.npz")
    return world_of_bad_input


def run_embed(world, out, *flags, weights=None, data=None):
    words = ("--pretrained_weights", weights or world.checkpoint, "--data_path", data or world.data / "train", "--out", out)
    return call(embed.main, *words, "--num_workers", 0, *flags)


@torch.no_grad()
def expected_features(world):
    """IR and EF of the images in the order of their paths, by the interface for users' own code."""
    network, transform, split = load_backbone(world.checkpoint)
    paths = sorted(str(path) for path in (world.data / "train").rglob("*.png"))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    return [part.numpy() for part in split(network(images))]


def test_rows_are_the_features_of_the_network(world):
    ir, ef = expected_features(world)
    assert len(ir) == 12 and ir.shape[1] == 102 and ef.shape[1] == 26
    assert np.allclose(world.table["ir"], ir, atol=1e-5) and np.allclose(world.table["ef"], ef, atol=1e-5)
    assert world.table["path"].tolist() == sorted(f"{c}/{i:02}.png" for c in ("cyan", "grey", "red") for i in range(4))
    assert world.table["class"].tolist() == ["cyan"] * 4 + ["grey"] * 4 + ["red"] * 4
    about = json.loads(str(world.table["about"]))
    assert about["kind"] == "embeddings" and about["net"] == "CLeVER" and about["hp1"] == 0.8 and len(about["backbone"]) == 16


def test_parquet(world, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_embed(world, tmp_path / "t.parquet", "--batch_size_per_gpu", 5).status == 0
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.column_names == ["path", "class", "ir", "ef"]
    for name in ("ir", "ef"):
        rows = np.stack(table[name].to_numpy())
        assert rows.dtype == np.float32 and np.allclose(rows, world.table[name], atol=1e-5)
    assert table["path"].to_pylist() == world.table["path"].tolist()
    assert json.loads(table.schema.metadata[b"clever"])["arch"] == "vit_micro"


@pytest.mark.parametrize("part, names", [("ALL", ("ir", "ef")), ("else_part", ("ef",))])
def test_csv_holds_every_digit_of_each_part(world, tmp_path, part, names):
    assert run_embed(world, tmp_path / "t.csv", "--else_part", part).status == 0
    header, *rows = csv.reader((tmp_path / "t.csv").open(encoding="utf-8"))
    assert header[:2] == ["path", "class"] and len(rows) == 12
    assert header[2:] == [f"{name}_{i}" for name in names for i in range(world.table[name].shape[1])]
    found = np.array([row[2:] for row in rows], np.float32)
    assert np.array_equal(found, np.concatenate([world.table[name] for name in names], axis=1))
    assert json.loads((tmp_path / "t.csv.json").read_text())["args"]["else_part"] == part


def test_a_network_without_parts_has_one_column(world, tmp_path):
    assert run_embed(world, tmp_path / "t.npz", weights=world.dino / "checkpoint.pth").status == 0
    table = np.load(tmp_path / "t.npz")
    assert set(table.files) == {"path", "class", "about", "features"} and table["features"].shape == (12, 128)


def test_unreadable_images_are_named_or_left_out(world, tmp_path):
    shutil.copytree(world.data / "train", tmp_path / "data")
    (tmp_path / "data" / "grey" / "01.png").write_bytes(b"no image")
    assert_refused(run_embed(world, tmp_path / "t.npz", data=tmp_path / "data"), "grey/01.png", "cannot be read")
    assert not (tmp_path / "t.npz").exists()
    outcome = run_embed(world, tmp_path / "t.npz", "--skip_bad_images", "true", data=tmp_path / "data")
    assert outcome.status == 0 and "left out: 1 of 12" in outcome.stdout and "grey/01.png" in outcome.stdout
    table = np.load(tmp_path / "t.npz")
    kept = [i for i, path in enumerate(world.table["path"]) if path != "grey/01.png"]
    assert table["path"].tolist() == world.table["path"][kept].tolist()
    assert np.allclose(table["ef"], world.table["ef"][kept], atol=1e-5)


@pytest.mark.parametrize("colour", ["class", "rotation"])
def test_pictures_have_a_panel_for_each_part(world, tmp_path, colour):
    outcome = run_embed(world, tmp_path / "t.npz", "--plot", "pca", "--colour", colour, "--plot_images", 10)
    assert outcome.status == 0, outcome
    with Image.open(tmp_path / "t.pca.png") as picture:
        assert picture.width > 1.5 * picture.height
        drawn = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(drawn[np.ptp(drawn, axis=1) > 60], axis=0)) > 20  # coloured points


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("equal", ["ir", "ef"])
def test_a_collapsed_part_is_one_point_and_is_said(tmp_path, capsys, monkeypatch, method, equal):
    """Neither rounding noise that is drawn as if it were structure, nor t-SNE's crash on equal rows."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(size=(12, 8)).astype(np.float32) for name in ("ir", "ef")}
    parts[equal][:] = parts[equal][0] * (method == "pca") + 1e-7 * rng.normal(size=(12, 8)) * (method == "pca")
    drawn = {}
    monkeypatch.setattr(Axes, "scatter", lambda axes, x, y, **_: drawn.update({axes: (x, y)}) or PathCollection([]))
    embeddings.plot(parts, method, tmp_path / "t.png", "title", angles=np.zeros(12))
    titles = {name: axes.get_title() for name, axes in zip(parts, drawn, strict=True)}
    spread = {name: np.ptp(np.stack(points)) for name, points in zip(parts, drawn.values(), strict=True)}
    (other,) = parts.keys() - {equal}
    assert spread[equal] == 0 < spread[other]
    assert "collapsed" in titles[equal] and "collapsed" not in titles[other]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and f"({equal.upper()}), 8 dimensions; collapsed: the same features" in line


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_part_of_one_column_is_drawn(method):
    pytest.importorskip("sklearn")
    points = embeddings.reduce(np.arange(12, dtype=np.float32)[:, None], method, 0)
    assert points.shape == (12, 2) and np.isfinite(points).all()


@pytest.mark.parametrize(
    "flags, mentioned",
    [
        ("--out t.txt", ["t.txt", ".parquet, .npz, .csv"]),
        ("--out {old}", ["exists", "--overwrite"]),
        ("--out t.npz --plot umap", ["umap-learn not installed", "pip install umap-learn"]),
        ("--out t.npz --plot pca --data_path {data}/train/red", ["1 to 20 folders", "--colour rotation"]),
    ],
)
def test_refuses(world, tmp_path, monkeypatch, flags, mentioned):
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old.npz"
    old.write_text("kept")
    before = snapshot(tmp_path)
    words = [word.format(old=old, **vars(world)) for word in flags.split()]
    given = ("--pretrained_weights", world.checkpoint, "--data_path", world.data / "train", "--num_workers", 0)
    assert_refused(call(embed.main, *given, *words), *mentioned)
    assert snapshot(tmp_path) == before
