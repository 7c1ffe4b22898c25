"""The study: tables, choice and pictures of results written by hand, variables of the script; slow: killed and resumed."""

import importlib
import json
import os
import re
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

from scripts.report import main as make_page
from scripts.study import main as unpack
from scripts.tables import main as make_tables

PARTS = {"ALL": "ALL", "IR": "main_part", "EF": "else_part"}
# Of seed 0: top-1 on clean images, and R2 of the rotation of ALL.
KNOWN = {
    "untrained": (20, 0.1),
    "dino": (50, 0.4),
    "CLeVER 0.1": (60, 0.5),
    "augself+EF 1": (49.5, 0.7),
    "augself+EF 3": (48, 0.8),
}
SETTINGS = {"data": "data/digits", "epochs": "2", "lr": "0.016", "PRETRAIN_FLAGS": ""}


def write_cell(root: Path, network: str, seed: int, recipe: str = "aug1_2", **settings: str) -> None:
    """A cell with known results, a point and 0.1 more for each next seed; rotated images have 10 points less.

    IR: a point more, all of the R2; EF: 10 points less, half of it; random dimensions: a quarter. R2 of blur: always 0.2.
    """
    net, _, lambd = network.partition(" ")
    top1, r2 = KNOWN[network]
    folder = root / f"{settings.get('arch', 'resnet8')}_{recipe}_{net}-{lambd}_seed{seed}"
    values = {"arch": "resnet8", "recipe": recipe, "net": net, "lambd": lambd or "-", "seed": seed, **SETTINGS, **settings}
    (folder / "tune").mkdir(parents=True)
    (folder / "settings.txt").write_text("".join(f"{name} {value}\n" for name, value in values.items()))
    (folder / "log.txt").write_text(json.dumps({"epoch": 0, "memory_gib": 0.751}) + "\n")
    parts = ["ALL"] if net in ("dino", "untrained") else list(PARTS)
    for place in (folder, folder / "tune"):
        for part in parts:
            for name, loss in (("ori", 0), ("aug1_2", 10)):
                value = float(top1 + seed + {"ALL": 0, "IR": 1, "EF": -10}[part] - loss)
                record = {"part": PARTS[part], "test_aug_type": name}
                write(place / f"knn_{name}_{part}.json", record | {"kind": "knn", "results": [{"k": 20, "top1": value}]})
                write(place / f"only_eval_{name}_{part}.json", record | {"kind": "linear_probe", "accuracy": value / 2})
        results, gaps = [], []
        spaces = {("ALL", None): 1, ("EF", "random_subspace"): 0.25, ("ALL", "shuffled"): 0}
        spaces |= {("IR", None): 1, ("EF", None): 0.5} if len(parts) > 1 else {}
        for (part, control), share in spaces.items():
            for name, value in (("rotation", share * (r2 + seed / 10)), ("blur", 0.2)):
                entry = {"transform": name, "part": part, "control": control}
                results.append(entry | {"head": "linear", "input": "pair", "r2": value})
                gaps.append(entry | {"cosine_gap": value / 2})
        write(place / "equivariance.json", {"kind": "equivariance", "results": results, "gaps": gaps})
    (folder / "pretrain.done").touch()


def write(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record))


@pytest.fixture
def cells(tmp_path):
    """The cells of three seeds."""
    for seed in range(3):
        for network in KNOWN:
            write_cell(tmp_path / "cells", network, seed, recipe="-" if network == "untrained" else "aug1_2")
    return tmp_path / "cells"


def tables_of(source: Path) -> dict[str, dict[str, list[str]]]:
    """{title: {network: cells of its row}} of what the script prints; the key "network" has the headings."""
    outcome = call(make_tables, source)
    assert outcome.status == 0, outcome
    tables: dict[str, dict[str, list[str]]] = {}
    for line in outcome.stdout.splitlines():
        if line.startswith("### "):
            rows = tables.setdefault(line.removeprefix("### resnet8: "), {})
        elif line.startswith("| ") and not line.startswith("| --"):
            name, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name] = rest
    return tables


# --- tables ----------------------------------------------------------------------------------------------------------

SUMMARY = "top-1 (%) of 20-NN and linear probe, and R2"


def test_means_over_seeds(cells):
    table = tables_of(cells)[SUMMARY]
    assert table.pop("network") == ["seeds", "clean", "rotated", "R2 rotation", "R2 blur", "probe, clean", "probe, rotated"]
    assert list(table) == [
        "untrained ALL", "untrained random", "dino ALL", "dino random",
        *(f"{network} {space}" for network in list(KNOWN)[2:] for space in ("ALL", "IR", "EF", "random")),
    ]  # fmt: skip
    assert table["dino ALL"] == ["3", "51.0 ± 1.0", "41.0 ± 1.0", "0.500 ± 0.100", "0.200 ± 0.000", "25.5 ± 0.5", "20.5 ± 0.5"]
    assert table["dino random"] == ["3", "-", "-", "0.125 ± 0.025", "0.200 ± 0.000", "-", "-"]
    assert table["CLeVER 0.1 EF"][:4] == ["3", "51.0 ± 1.0", "41.0 ± 1.0", "0.300 ± 0.050"]


def test_differences_are_paired_by_seed(cells):
    """ALL and IR minus dino's ALL; the EF minus random dimensions: half of R2 minus a quarter, .5 + .1 for each seed."""
    table = tables_of(cells)["paired differences, with 95 % intervals"]
    assert table["CLeVER 0.1 ALL"] == [
        "dino ALL", "3", "+10.0 [+10.0, +10.0]", "+10.0 [+10.0, +10.0]", "+0.100 [+0.100, +0.100]", "+0.000 [+0.000, +0.000]",
        "+5.0 [+5.0, +5.0]", "+5.0 [+5.0, +5.0]",
    ]  # fmt: skip
    assert table["CLeVER 0.1 IR"][2] == "+11.0 [+11.0, +11.0]"
    # .125, .15, .175: mean .15, standard deviation .025; t of 2 degrees of freedom 4.303
    assert table["CLeVER 0.1 EF"][:5] == ["its random", "3", "-", "-", f"+0.150 [+{0.15 - 4.303 * 0.025 / 3**0.5:.3f}, +0.212]"]
    assert not any(name.startswith(("dino", "untrained")) for name in table)


def test_weights_are_chosen_on_the_tuning_split(cells):
    assert list(tables_of(cells)["weights"].items())[1:] == [
        ("CLeVER 0.1", ["R2 and accuracy"]), ("augself+EF 1", ["R2 and accuracy"]),
    ]  # fmt: skip
    for seed in range(3):
        path = cells / f"resnet8_aug1_2_augself+EF-3_seed{seed}" / "tune" / "knn_ori_ALL.json"
        path.write_text(path.read_text().replace(f"{48.0 + seed}", f"{49.4 + seed}"))
    assert list(tables_of(cells)["weights"].items())[2:] == [("augself+EF 3", ["R2"]), ("augself+EF 1", ["accuracy"])]


def test_missing_results_are_named(cells):
    """A seed less, a single missing file: none is averaged without a word."""
    shutil.rmtree(cells / "resnet8_aug1_2_dino-_seed1")
    (cells / "resnet8_aug1_2_CLeVER-0.1_seed2" / "knn_aug1_2_ALL.json").unlink()
    assert "note: resnet8 CLeVER 0.1, seed 2, test: no 20-NN ALL aug1_2" in call(make_tables, cells).stderr
    tables = tables_of(cells)
    assert tables[SUMMARY]["dino ALL"][:2] == ["2", "51.0 ± 1.4"]
    assert tables[SUMMARY]["CLeVER 0.1 ALL"][:3] == ["3", "61.0 ± 1.0", "50.5 ± 0.7 (2 of 3 seeds)"]
    differences = tables["paired differences, with 95 % intervals"]["CLeVER 0.1 ALL"]
    assert differences[1:4] == ["2", "+10.0 [+10.0, +10.0]", "+10.0 (1 of 2 seeds)"]


def test_tables_and_pictures_from_the_collected_records_alone(cells, tmp_path):
    outcomes = []
    for source, out in ((cells, "first"), (tmp_path / "first" / "records.json", "second")):
        outcomes.append(call(make_tables, source, "--out", tmp_path / out))
        assert outcomes[-1].status == 0 and not outcomes[-1].stderr, outcomes[-1]
        shutil.rmtree(cells, ignore_errors=True)
    first, second = (snapshot(tmp_path / name) for name in ("first", "second"))
    assert sorted(first) == ["front.png", "records.json", "tables.md", "told.png"]
    assert first["tables.md"] == second["tables.md"] and first["records.json"] == second["records.json"]
    assert first["tables.md"].decode() in outcomes[0].stdout
    for name in ("front.png", "told.png"):
        pictures = [np.asarray(Image.open(tmp_path / folder / name)) for folder in ("first", "second")]
        assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 10


def test_page_of_the_records(cells, tmp_path):
    """Every table, and the front as a drawing with a line for each net."""
    call(make_tables, cells, "--out", tmp_path / "out")
    outcome = call(make_page, tmp_path / "out", "--out", tmp_path / "page.html")
    assert outcome.status == 0, outcome
    page = (tmp_path / "page.html").read_text()
    assert all(f"resnet8: {title}</h3>" in page for title in tables_of(cells)) and "49.5 ± 1.0" not in page
    assert ">augself+EF 3 IR</th>" in page and "50.5 ± 1.0" in page
    (front,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert all(f">{net}<" in front for net in ("dino", "CLeVER", "augself+EF"))


def test_unpacked_records_and_new_results_of_a_cell(cells, tmp_path):
    """Folders that are there stay as they are; a result beside unpacked ones counts."""
    call(make_tables, cells, "--out", tmp_path / "out")
    kept = "resnet8_aug1_2_dino-_seed1"
    (tmp_path / "new" / kept).mkdir(parents=True)
    shutil.copy(cells / kept / "settings.txt", tmp_path / "new" / kept)
    outcome = call(unpack, tmp_path / "out" / "records.json", tmp_path / "new")
    assert outcome.status == 0 and [path.name for path in (tmp_path / "new" / kept).iterdir()] == ["settings.txt"]
    assert len(list((tmp_path / "new").glob("*/pretrain.done"))) == 3 * len(KNOWN) - 1
    assert tables_of(tmp_path / "new")[SUMMARY]["dino ALL"][:2] == ["2", "51.0 ± 1.4"]
    for source in (cells / kept).rglob("*.json"):
        shutil.copy(source, tmp_path / "new" / kept)
    record = {"kind": "knn", "part": "ALL", "test_aug_type": "aug1_2", "results": [{"top1": 41.5}]}
    write(tmp_path / "new" / "resnet8_aug1_2_dino-_seed0" / "knn.json", record)
    assert tables_of(tmp_path / "new")[SUMMARY]["dino ALL"][:3] == ["3", "51.0 ± 1.0", "41.5 ± 0.5"]


def test_committed_tables_come_from_the_committed_records():
    outcome = call(make_tables, ROOT / "docs" / "study" / "records.json")
    assert outcome.stdout == (ROOT / "docs" / "study" / "tables.md").read_text(), outcome.stderr


def test_refused_sources(cells, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert_refused(call(make_tables, tmp_path / "other.json", "--out", tmp_path / "out"), "neither the folder of a study nor")
    shutil.copytree(cells / "resnet8_aug1_2_dino-_seed0", cells / "copy")
    assert_refused(call(make_tables, cells), "two cells resnet8 aug1_2 dino - 0")
    shutil.rmtree(cells / "copy")
    write_cell(cells, "dino", 3, lr="0.5")
    assert_refused(call(make_tables, cells), "resnet8 has cells with different lr: 0.016, 0.5")
    shutil.rmtree(cells / "resnet8_aug1_2_dino-_seed3")
    file = cells / "resnet8_aug1_2_dino-_seed0" / "knn_ori_ALL.json"
    for text in ("{", "[5]", '{"kind": "knn"}'):
        file.write_text(text)
        assert_refused(call(make_tables, cells), str(file), "not ")
    assert not (tmp_path / "out").exists()


# --- the script ------------------------------------------------------------------------------------------------------

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@needs_bash
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NETS": "dino augsel"}, ("augsel is not one of", "augself+EF")),
        ({"NETS": "augself:x"}, ("augself", "weight x")),
        ({"LAMBDAS": "1 -1"}, ("CLeVER", "weight -1")),
        ({"RECORDS": "none.json"}, ("RECORDS=none.json", "no such file")),
        ({"RECIPES": "aug1 aug2"}, ("RECIPES=aug1 aug2", "aug2 is not one of", "aug1_4_2")),
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
    (dino,) = (args for args in runs if args["net"] == "dino" and args["seed"] == 1 and not args["local_crops_number"])
    own = {"net", "output_dir", "seed", "sep_lambd", "equiv_lambd", "equiv_part", "equiv_params", "local_crops_number",
           "local_crops_size", "local_crops_scale"}  # fmt: skip
    for args in runs:
        assert {name for name in args if args[name] != dino[name]} <= own | (
            {"epochs"} if "untrained" in args["output_dir"] else set()
        )
        name, told = Path(args["output_dir"]).name, args["net"] in ("augself", "equimod", "equimod_pair", "sie")
        alone = [group for group in ("rotation", "grey") if f"-{group}-" in name]
        assert args["equiv_params"] == (alone or ["crop", "rotation", "brightness", "contrast"] if told else None), name
    assert {(args["net"], args["equiv_part"]) for args in runs} >= {("sie", None), ("augself", "EF"), ("care", None)}
    assert len({args["output_dir"] for args in runs}) == len(runs) and {args["seed"] for args in runs} == {1, 2, 3}
    for script, args in commands:
        data = "data/fashion-mnist-10000" + "/train" * (script == "main_dino.py")
        assert args["data_path"] == data and args["num_workers"] == 0
    assert list(tmp_path.iterdir()) == []


@needs_bash
def test_tuning_never_reads_test_images_and_tries_five_weights(tmp_path):
    commands = dry_run(RESULT=str(tmp_path / "out"), TUNE="1", NETS="dino augself+EF CLeVER", DATA="digits")
    runs = [args for script, args in commands if script == "main_dino.py"]
    assert [args["equiv_lambd"] for args in runs if args["net"] == "augself"] == [1, 0.3, 3, 0.1, 10]
    assert [args["sep_lambd"] for args in runs if args["net"] == "CLeVER"] == [1, 0.3, 3, 0.1, 10]
    assert {args["data_path"] for script, args in commands if script != "main_dino.py"} == {"data/digits_tune"}
    fine = dry_run(RESULT=str(tmp_path / "out"), TUNE="1", NETS="augself:0.5 CLeVER", LAMBDAS="0 2", STEPS="pretrain")
    assert [args["equiv_lambd"] or args["sep_lambd"] for _, args in fine] == [0.5, 0, 2]


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
        "DATA": str(data), "RESULT": str(out), "EPOCHS": "1", "RECIPES": "aug1_2", "SEEDS": "0 1", "NETS": "dino CLeVER:1",
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
        "resnet8_aug1_2_CLeVER-1_seed0", "resnet8_aug1_2_CLeVER-1_seed1", "resnet8_aug1_2_dino_seed0",
    ]  # fmt: skip
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)  # not trained again

    (broken / "equivariance.md").rmdir()
    study = start_study(**variables)
    text, _ = study.communicate(timeout=300)
    assert study.returncode == 0 and "1 of 4 cells to run" in text and "failed" not in text, text
    assert "| CLeVER 1 ALL" in text and "note: " not in text
    assert {"records.json", "tables.md", "told.png"} <= {path.name for path in out.iterdir()}

    result = start_study(**variables | {"PROBE_FLAGS": "--epochs 2"})
    text, _ = result.communicate(timeout=60)
    assert result.returncode == 2 and "was made with other settings than PROBE_FLAGS --epochs 2" in text, text

    records = {"RESULT": str(tmp_path / "other"), "RECORDS": str(out / "records.json")}
    text, _ = start_study(**variables | records).communicate(timeout=60)
    assert "0 of 4 cells to run" in text and (tmp_path / "other" / "tables.md").read_text() == (out / "tables.md").read_text()
