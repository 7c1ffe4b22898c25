"""The study: intervals and tables on results written by hand, pictures, variables of the script; slow: killed and resumed."""

import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.in_process import assert_refused, call, snapshot
from support.processes import ROOT, write_labelled_images
from support.shell import SCRIPTS, run

from clever.evaluation.hits import pack_hits
from clever.evaluation.tables import SPACES
from scripts.study_stats import paired_interval
from scripts.tables import main as make_tables

IMAGES = 400
PARTS = {"ALL": "ALL", "IR": "main_part", "EF": "else_part"}
ACCURACY = {"untrained": 20, "dino": 50, "CLeVER": 60}  # percent, of seed 0 on clean images; a point more for each next seed
SETTINGS = {"data": "data/digits", "epochs": "2", "lr": "0.016", "PRETRAIN_FLAGS": ""}


def write_cell(root: Path, net: str, seed: int, recipe: str = "aug1_2", **settings: str) -> Path:
    """A cell with known accuracies: `ori` as in ACCURACY, `aug1_2` 10 points less; IR a point more, EF 10 points less."""
    folder = root / f"{settings.get('arch', 'resnet8')}_{recipe}_{net}_seed{seed}"
    folder.mkdir(parents=True)
    values = {"arch": "resnet8", "recipe": recipe, "net": net, "seed": seed, **SETTINGS, **settings}
    (folder / "settings.txt").write_text("".join(f"{name} {value}\n" for name, value in values.items()))
    for part, flag in PARTS.items() if net != "dino" else (("ALL", "ALL"),):
        for perturbation, loss in (("ori", 0), ("aug1_2", 10)):
            top1 = ACCURACY[net] + seed + {"ALL": 0, "IR": 1, "EF": -10}[part] - loss
            result = {"correct": pack_hits(np.arange(IMAGES) < IMAGES * top1 / 100)}
            record = {"part": flag, "test_aug_type": perturbation, "num_test_images": IMAGES}
            probe = record | {"kind": "linear_probe", "accuracy": float(top1), **result}
            (folder / f"only_eval_{perturbation}_linear_{part}.json").write_text(json.dumps(probe))
            knn = record | {"kind": "knn", "results": [{"k": 20, "top1": float(top1) / 2, **result}]}
            (folder / f"knn_{perturbation}_{part}.json").write_text(json.dumps(knn))
    if net != "untrained":
        losses = [{"epoch": epoch, "train_normalized_loss": 1 / (epoch + 1 + seed)} for epoch in range(3)]
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in losses))
        write_equivariance(folder, net, seed)
    return folder


def write_equivariance(folder: Path, net: str, seed: int) -> None:
    """R2 of rotation .5 for ALL, .2 for IR, .4 for EF, .3 for random subspaces, and .1 more for each next seed; of flip half.

    The fields are those that eval_equivariance.py writes.
    """
    known = {("ALL", None): 0.5, ("EF", "random_subspace"): 0.3, ("ALL", "untrained"): 0.1, ("ALL", "shuffled"): 0.0}
    known |= {("IR", None): 0.2, ("EF", None): 0.4} if net == "CLeVER" else {}
    results, gaps = [], []
    for (part, control), r2 in known.items():
        space = {"part": part, "control": control}
        r2 += seed / 10
        known_of_class = {"mae_degrees": None, "accuracy": (r2 + 1) / 2, "auc": 0.75}
        known_of_angle = {"mae_degrees": 20.0, "accuracy": None, "auc": None}
        for name, value, scores in (("rotation", r2, known_of_angle), ("flip", r2 / 2, known_of_class)):
            result = {"transform": name, "head": "linear", "input": "pair", **space, "r2": value, "r2_sie": value}
            if control == "random_subspace":
                result |= {"draws": 5, "r2_std": 0.02}
            results.append(result | {"r2_per_target": {name: value}} | scores)
            if control != "shuffled":
                gaps.append({"transform": name, **space, "cosine_gap": value / 2, "gram_gap": 0.01})
    (folder / "equivariance.json").write_text(json.dumps({"kind": "equivariance", "results": results, "gaps": gaps}))


@pytest.fixture
def cells(tmp_path):
    """The cells of three seeds with one recipe, and the untrained ones."""
    for seed in range(3):
        for net in ("dino", "CLeVER"):
            write_cell(tmp_path / "cells", net, seed)
        write_cell(tmp_path / "cells", "untrained", seed, recipe="-", epochs="0")
    return tmp_path / "cells"


def tables_of(source: Path) -> dict[str, list[list[str]]]:
    """{title: rows of its table} of what the script prints."""
    outcome = call(make_tables, source)
    assert outcome.status == 0, outcome
    tables: dict[str, list[list[str]]] = {}
    for line in outcome.stdout.splitlines():
        if line.startswith("### "):
            rows = tables.setdefault(line.removeprefix("### "), [])
        elif line.startswith("| ") and not line.startswith("| --"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_one_seed_is_that_of_the_binomial_distribution():
    """The mean of N = 2000 hits with p = .3 has the standard error sqrt(p (1 - p) / N)."""
    hits = np.zeros((1, 2000))
    hits[0, :600] = 1
    mean, low, high = paired_interval(hits)
    error = 1.96 * (0.3 * 0.7 / 2000) ** 0.5
    assert mean == pytest.approx(0.3) and (low, high) == pytest.approx((0.3 - error, 0.3 + error), abs=0.15 * error)
    assert paired_interval(hits) == (mean, low, high)  # always the same draws


def test_interval_contains_the_variation_between_seeds():
    """Differences 0 and 1 of two seeds, the same on all images: only the seeds vary; a quarter of the draws each is 0 and 1."""
    assert paired_interval(np.array([[0] * 100, [1] * 100])) == pytest.approx((0.5, 0, 1))


# --- tables ----------------------------------------------------------------------------------------------------------


def test_accuracies_and_differences(cells):
    tables = tables_of(cells)
    assert tables["resnet8: top-1 (%), linear probe"] == [
        ["recipe", "network", "seeds", "ori", "aug1_2"],
        ["-", "untrained ALL", "3", "21.0 ± 1.0", "11.0 ± 1.0"],
        ["aug1_2", "dino ALL", "3", "51.0 ± 1.0", "41.0 ± 1.0"],
        ["aug1_2", "CLeVER ALL", "3", "61.0 ± 1.0", "51.0 ± 1.0"],
        ["aug1_2", "CLeVER IR", "3", "62.0 ± 1.0", "52.0 ± 1.0"],
        ["aug1_2", "CLeVER EF", "3", "51.0 ± 1.0", "41.0 ± 1.0"],
    ]
    assert tables["resnet8: top-1 (%), 20-NN"][1] == ["-", "untrained ALL", "3", "10.5 ± 0.5", "5.5 ± 0.5"]
    for measure in ("linear probe", "20-NN"):
        title, *rows = tables[f"resnet8: differences of top-1 (points), {measure}"]
        assert [row[1:3] for row in rows] == [["CLeVER ALL - dino ALL", "3"], ["CLeVER IR - dino ALL", "3"]]
        for row, expected in zip(rows, ("+10.0", "+11.0"), strict=True):
            for cell in row[3:]:
                mean, low, high = cell.replace("[", "").replace("]", "").replace(",", "").split()
                assert mean == expected and 6 < float(low) < float(mean) - 2 < float(mean) + 2 < float(high) < 15


def test_equivariance(cells):
    tables = tables_of(cells)
    title, *rows = tables["resnet8: what is known about transformations, R2 (head linear, input pair)"]
    found = {tuple(row[:3]): dict(zip(title[3:], row[3:], strict=True)) for row in rows}
    clever, dino = (found["rotation", "aug1_2", net] for net in ("CLeVER", "dino"))
    assert len(found) == 4 and clever["seeds"] == "3" and found["flip", "aug1_2", "dino"]["ALL"] == "0.300 ± 0.050"
    assert [clever[part] for part in ("ALL", "IR", "EF")] == ["0.600 ± 0.100", "0.300 ± 0.100", "0.500 ± 0.100"]
    assert clever[SPACES["EF", "random_subspace"]] == "0.400 ± 0.100"
    assert "untrained IR" not in clever and (dino["ALL"], dino["IR"], dino["EF"]) == ("0.600 ± 0.100", "", "")
    title, *rows = tables["resnet8: what is known about transformations, accuracy (head linear, input pair)"]
    assert [row[:5] for row in rows] == [["flip", "aug1_2", net, "3", "0.800 ± 0.050"] for net in ("dino", "CLeVER")]
    assert tables["resnet8: cosine gap"][1][4] == "0.300 ± 0.050"


def test_missing_results_are_named(cells):
    """A network without any result, fewer seeds, a single missing file: none is averaged without a word."""
    write_cell(cells, "CLeVER", 0, recipe="aug1")  # aug1: one seed of CLeVER, none of dino
    shutil.rmtree(cells / "resnet8_aug1_2_dino_seed1")
    (cells / "resnet8_aug1_2_CLeVER_seed2" / "only_eval_aug1_2_linear_ALL.json").unlink()
    (cells / "resnet8_aug1_2_CLeVER_seed0" / "equivariance.json").unlink()
    tables = tables_of(cells)
    rows = {tuple(row[:2]): row[2:] for row in tables["resnet8: top-1 (%), linear probe"]}
    assert rows["aug1", "dino ALL"] == ["0", "missing", "missing"]
    assert rows["aug1", "CLeVER ALL"] == ["1", "60.0", "50.0"]
    assert rows["aug1_2", "dino ALL"] == ["2", "51.0 ± 1.4", "41.0 ± 1.4"]
    assert rows["aug1_2", "CLeVER ALL"] == ["3", "61.0 ± 1.0", "50.5 ± 0.7 (2 of 3 seeds)"]
    rows = {tuple(row[:2]): row[2:] for row in tables["resnet8: differences of top-1 (points), linear probe"]}
    assert rows["aug1", "CLeVER ALL - dino ALL"] == ["0", "missing", "missing"]
    seeds, ori, aug1_2 = rows["aug1_2", "CLeVER ALL - dino ALL"]
    assert seeds == "2" and ori.startswith("+10.0 [") and aug1_2.startswith("+10.0 [") and aug1_2.endswith("] (1 of 2 seeds)")
    rows = {tuple(row[:3]): row[3:] for row in tables["resnet8: cosine gap"]}
    assert [rows["rotation", "aug1_2", net][0] for net in ("dino", "CLeVER")] == ["2", "2"]
    assert rows["rotation", "aug1", "dino"][:3] == ["0", "missing", ""]


def test_tables_and_pictures_from_the_collected_records_alone(cells, tmp_path):
    outcomes = []
    for source, out in ((cells, "first"), (tmp_path / "first" / "records.json", "second")):
        outcomes.append(call(make_tables, source, "--out", tmp_path / out))
        assert outcomes[-1].status == 0 and not outcomes[-1].stderr, outcomes[-1]
        shutil.rmtree(cells, ignore_errors=True)
    first, second = (snapshot(tmp_path / name) for name in ("first", "second"))
    assert sorted(first) == ["curves.png", "differences.png", "records.json", "tables.md"]
    assert first["tables.md"] == second["tables.md"] and first["records.json"] == second["records.json"]
    assert first["tables.md"].decode() in outcomes[0].stdout
    assert len(first["records.json"]) < 60_000
    for name in ("curves.png", "differences.png"):
        pictures = [np.asarray(Image.open(tmp_path / folder / name)) for folder in ("first", "second")]
        assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 10


@pytest.mark.parametrize("folder", ["", "digits", "sep0.1"])
def test_committed_tables_come_from_the_committed_records(folder):
    outcome = call(make_tables, ROOT / "docs" / "study" / folder / "records.json")
    assert outcome.stdout == (ROOT / "docs" / "study" / folder / "tables.md").read_text() + "\n", outcome.stderr


def test_refused_sources(cells, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert_refused(call(make_tables, tmp_path / "other.json", "--out", tmp_path / "out"), "neither the folder of a study nor")
    shutil.copytree(cells / "resnet8_aug1_2_dino_seed0", cells / "copy")
    assert_refused(call(make_tables, cells), "two cells resnet8 aug1_2 dino 0")
    shutil.rmtree(cells / "copy")
    write_cell(cells, "dino", 3, lr="0.5")
    assert_refused(call(make_tables, cells), "resnet8 has cells with different lr: 0.016, 0.5")
    shutil.rmtree(cells / "resnet8_aug1_2_dino_seed3")
    half = json.dumps({"part": "ALL", "num_test_images": IMAGES, "accuracy": 5.0, "correct": pack_hits(np.ones(IMAGES // 2))})
    file = cells / "resnet8_aug1_2_dino_seed0" / "knn_ori_ALL.json"
    for text in ("{", "[5]", half):
        file.write_text(text)
        assert_refused(call(make_tables, cells), str(file), "not ")
    assert not (tmp_path / "out").exists()


# --- the script ------------------------------------------------------------------------------------------------------

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"STUDY": "large"}, ("STUDY=large", "small full")),
        ({"RECIPES": "aug1 aug1"}, ("RECIPES=aug1 aug1", "twice")),
        ({"SEEDS": "0 x"}, ("SEEDS=0 x", "whole numbers")),
    ],
)
def test_refused_variables(variables, words, tmp_path):
    result = run(SCRIPTS / "study.sh", RESULT=str(tmp_path / "out"), **variables)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("study: ") and all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def dry_run(**variables: str) -> list[tuple[str, dict]]:
    """The script and the parsed arguments of every command."""
    result = run(SCRIPTS / "study.sh", DRY_RUN="1", **variables)
    assert result.returncode == 0, result.stderr
    commands = []
    for line in result.stdout.splitlines():
        python, script, *words = shlex.split(line)
        parser = importlib.import_module(Path(script).stem).get_args_parser()
        commands.append((script, vars(parser.parse_args(words))))
    return commands


@needs_bash
def test_nets_share_all_settings_and_seeds(tmp_path):
    commands = dry_run(RESULT=str(tmp_path / "out"))
    runs = [args for script, args in commands if script == "main_dino.py"]
    assert len(commands) == 3 * (4 * 5 + 4) and len(runs) == 3 * (2 * 2 + 1)
    trained = [args for args in runs if args["epochs"]]
    for args in trained:
        (other,) = [o for o in trained if (o["aug"], o["seed"]) == (args["aug"], args["seed"]) and o["net"] != args["net"]]
        assert {name for name in args if args[name] != other[name]} == {"net", "output_dir"}
    assert {(args["arch"], args["data_path"]) for args in runs} == {("resnet8", "data/fashion-mnist-10000/train")}
    for script, args in commands:
        assert args["seed"] in (0, 1, 2) if "seed" in args else script == "eval_knn.py"
        assert args["num_workers"] == 0 and f"seed{args.get('seed', '')}" in args["output_dir"]
    assert list(tmp_path.iterdir()) == []


def start_study(**variables: str) -> subprocess.Popen:
    python = str(Path(sys.executable).parent)  # has all packages, so that setup.sh installs nothing
    environment = {"PATH": os.pathsep.join([python, os.environ["PATH"]]), "HOME": os.environ.get("HOME", "/")}
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "study.sh")], cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""} | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@needs_bash
@pytest.mark.slow
def test_killed_resumed_and_one_cell_that_fails(tmp_path):
    """Two nets and two seeds on tiny images. Killed in the middle, the study leaves no process behind and goes on later."""
    data, out = write_labelled_images(tmp_path / "data", 16, 8), tmp_path / "out"
    variables = {
        "DATA": str(data), "RESULT": str(out), "EPOCHS": "1", "RECIPES": "aug1_2", "SEEDS": "0 1", "NETS": "dino CLeVER",
        "JOBS": "2", "PRETRAIN_FLAGS": "--batch_size_per_gpu 16", "PROBE_FLAGS": "--epochs 1",
        "EQUIVARIANCE_FLAGS": "--views_per_image 2 --random_subspaces 1 --transforms rotation",
    }  # fmt: skip
    study = start_study(**variables)
    while not list(out.glob("*/pretrain.done")):
        assert study.poll() is None, study.stdout.read()
        time.sleep(0.1)
    study.send_signal(signal.SIGTERM)
    study.communicate(timeout=60)
    assert study.returncode == 143
    time.sleep(1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    finished = {path.with_name("checkpoint.pth") for path in out.glob("*/pretrain.done")}
    time.sleep(2)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}  # nothing runs any more
    assert finished and len(list(out.glob("*/equivariance.done"))) < 4

    broken = out / "resnet8_aug1_2_dino_seed1"
    broken.mkdir(exist_ok=True)
    (broken / "equivariance.md").mkdir()  # where a file should be
    study = start_study(**variables)
    text, _ = study.communicate(timeout=900)
    assert study.returncode == 1 and f"failed: {broken}, see {broken}/cell.log" in text and "3 of 4" in text, text
    assert [path.parent.name for path in sorted(out.glob("*/equivariance.done"))] == [
        "resnet8_aug1_2_CLeVER_seed0", "resnet8_aug1_2_CLeVER_seed1", "resnet8_aug1_2_dino_seed0",
    ]  # fmt: skip
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)  # not trained again

    (broken / "equivariance.md").rmdir()
    study = start_study(**variables)
    text, _ = study.communicate(timeout=300)
    assert study.returncode == 0 and "1 of 4 cells to run" in text and "failed" not in text, text
    assert "CLeVER ALL - dino ALL" in text and "missing" not in text
    assert {"records.json", "tables.md", "curves.png", "differences.png"} <= {path.name for path in out.iterdir()}

    result = start_study(**variables | {"PROBE_FLAGS": "--epochs 2"})
    text, _ = result.communicate(timeout=60)
    assert result.returncode == 2 and "was made with other settings than PROBE_FLAGS --epochs 2" in text, text
