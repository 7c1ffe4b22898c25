"""The report: every kind of result, best accuracies, curves, escaping, damaged files; slow: in a browser."""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from support.in_process import assert_refused, call

from clever.evaluation.images import save_png
from clever.utils import save_json
from scripts import report

NETWORK = {
    "net": "CLeVER", "arch": "resnet8", "pretrained_epochs": 20, "aug": "aug1_2", "pretraining_seed": 0, "backbone": "0123abcd",
    "hp1": 0.8,
}  # fmt: skip
PROBE = {
    "kind": "linear_probe", **NETWORK, "part": "ALL", "test_aug_type": "ori", "accuracy": 90.0, "test_loss": 0.4, "top5": 99.0,
    "num_test_images": 360, "num_labels": 10, "seed": 0, "args": {"data_path": "data/digits", "lr": 0.3},
}  # fmt: skip
SCORES = {"r2": 0.731, "mae_degrees": 13.25, "accuracy": None, "auc": None, "cosine_gap": 0.15, "gram_gap": 0.02}
ENTRIES = [
    {"transform": "rotation", "head": "linear", "input": "pair", "part": part, "control": control} | SCORES | {"r2": r2}
    for part, control, r2 in [("ALL", None, 0.731), ("EF", None, 0.831), ("EF", "random_subspace", 0.631)]
]  # fmt: skip
DAVIS = {"J-Mean": 0.611, "J-Recall": 0.7, "J-Decay": 0.1, "F-Mean": 0.655, "F-Recall": 0.8, "F-Decay": 0.2}
SALIENCY = {"kind": "saliency", "dataset": "ECSSD", **NETWORK, "num_images": 9, "num_degenerate": 0, "failed": [], "args": {}}
RESULTS = {
    "linear.json": PROBE | {"best_accuracy": 91.25, "effective_lr": 0.075},
    "only_eval_aug1.json": PROBE | {"test_aug_type": "aug1", "accuracy": 81.5, "correct": "x" * 5000},
    "knn.json": {
        "kind": "knn", **NETWORK, "part": "main_part", "test_aug_type": "ori", "num_labels": 10, "args": {},
        "results": [{"k": k, "temperature": 0.07, "top1": 70.0 + k, "top5": 95.0} for k in (10, 20)],
    },
    "equivariance.json": {"kind": "equivariance", **NETWORK, "results": ENTRIES, "gaps": ENTRIES, "args": {}},
    "downstream.json": PROBE | {
        "kind": "downstream", "dataset": "Flowers102", "ds_mode": "finetune", "accuracy": 55.5, "best_accuracy": 56.0,
        "mean_class_accuracy": 54.0, "best_mean_class_accuracy": 54.5,
    },
    "results-val.json": {
        "kind": "video_segmentation", "subset": "val", **NETWORK, "global": {"J&F-Mean": 0.633, **DAVIS},
        "objects": {"bear_1": DAVIS, "bear_2": DAVIS | {"J-Mean": 0.5}}, "frames": {"bear": {"J": [[0.1] * 50]}}, "args": {},
    },
    "results.json": SALIENCY | {
        "TokenCut": {"IoU": 0.712, "accuracy": 0.9, "F_max": 0.8}, "num_scored": 9,
        "TokenCut + bilateral solver": {"IoU": 0.772, "accuracy": 0.91, "F_max": 0.85},
    },
    "bench.json": {"kind": "bench_views", "torch": "2.14", "step": 2.5},
    "package.json": {"name": "no result"},
}  # fmt: skip


class Page:
    """A report, read: its text, and `tables`, {title: list of rows}, where rows are {heading: text}."""

    def __init__(self, path: Path):
        self.source = path.read_text(encoding="utf-8")
        hidden = r"<(script|style|svg|title)\b.*?</\1>"
        self.text = html.unescape(re.sub(r"<[^>]*>", "", re.sub(hidden, "", self.source, flags=re.DOTALL)))
        self.tables = {}
        titled = r'<h3>([^<]*)</h3>(?:\s*<p class="note">[^<]*</p>)?\s*<div class="scroll"><table>(.*?)</table>'
        for title, table in re.findall(titled, self.source, re.DOTALL):
            lines = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
            cells = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", line) for line in lines]
            heads, *rows = [[html.unescape(cell) for cell in line] for line in cells]
            self.tables[html.unescape(title)] = [dict(zip(heads, row, strict=True)) for row in rows]


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def make(runs: Path, *flags: object) -> tuple[Page, str]:
    """Run the script: the page, and stderr."""
    out = runs.parent / "report.html"
    outcome = call(report.main, runs, "--out", out, *flags)
    assert outcome.status == 0, outcome
    assert f"wrote {out}" in outcome.stdout
    return Page(out), outcome.stderr


def write_results(folder: Path) -> None:
    for name, record in RESULTS.items():
        save_json(record, folder / name)


def write_log(folder: Path, *records: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))


def epochs(count: int, **values: float) -> list[dict]:
    return [{"train_loss": 5 - epoch, "epoch": epoch, "seconds": 90.0, **values} for epoch in range(count)]


# --- content ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_result_has_a_table_with_its_values(runs):
    write_results(runs)
    page, stderr = make(runs)
    assert stderr == ""
    tables = page.tables
    assert [(row["images"], row["top-1"], row["best top-1"]) for row in tables["Linear probe"]] == [
        ("ori", "90.00", "91.25"), ("aug1", "81.50", "–")
    ]  # fmt: skip
    assert [(row["k"], row["top-1"]) for row in tables["k-NN"]] == [("10", "80.00"), ("20", "90.00")]
    assert tables["Downstream classification"][0]["mean per class"] == "54.00"
    assert tables["Video segmentation (DAVIS 2017)"][0]["J&F-Mean"] == "0.633"
    assert [row["IoU"] for row in tables["Saliency"]] == ["0.712", "0.772"]
    rows = {row["measure"]: row for row in tables["Equivariance"]}
    assert set(rows) == {"R2", "error (degrees)", "cosine gap", "Gram gap"}, "accuracy and AUC were not measured"
    assert [rows["R2"][part] for part in ("ALL", "EF", "random, as wide as EF")] == ["0.731", "0.831", "0.631"]
    assert "IR" not in rows["R2"], "it was not measured"


def test_the_summary_compares_the_best_accuracies_with_dino(runs):
    found = (("dino", "ALL", 80.0), ("CLeVER", "ALL", 83.04), ("CLeVER", "ALL", 70.0), ("CLeVER", "else_part", 60.0))
    for net, part, accuracy in found:
        save_json(PROBE | {"net": net, "part": part, "accuracy": accuracy}, runs / f"{net}{part}{accuracy}.json")
    save_json(PROBE | {"pretrained_epochs": 0, "accuracy": 30.0}, runs / "untrained.json")
    save_json(PROBE | {"test_aug_type": "aug1", "accuracy": 50.0}, runs / "aug1.json")
    page, _ = make(runs)
    rows = page.tables["Linear probe: top-1 accuracy by perturbation of the test images"]
    assert [tuple(row.values()) for row in rows] == [
        ("untrained ALL", "30.0", "–"), ("dino ALL", "80.0", "–"), ("CLeVER ALL", "83.0", "50.0"), ("CLeVER EF", "60.0", "–")
    ]  # fmt: skip
    text = " ".join(page.text.split())
    for tile in ("untrained ALL30.0 -50.0 against dino", "dino ALL80.0 baseline", "CLeVER ALL83.0 +3.0", "CLeVER EF60.0 -20.0"):
        assert tile in text
    assert "Chance: 10.0." in text


def test_each_quantity_of_the_logs_has_a_chart_with_a_curve_per_run(runs):
    write_log(runs / "a", *epochs(3, train_lr=0.1))
    values = {"train_loss": math.nan}, {"train_loss": 2.0, "knn_ALL": 55.0}, {"train_loss": math.inf}
    write_log(runs / "b", *({"epoch": epoch} | record for epoch, record in enumerate(values)))
    page, _ = make(runs)
    charts = dict(re.findall(r"<figcaption>([^<]*)</figcaption>(<svg.*?</svg>)", page.source, re.DOTALL))
    assert {heading: re.findall(r'class="(run\d)"', svg) for heading, svg in charts.items()} == {
        "loss": ["run0", "run1"], "20-NN of ALL": ["run1"], "learning rate": ["run0"], "seconds per epoch": ["run0"],
    }  # fmt: skip
    rows = {row["name"]: row for row in page.tables["Runs"]}
    assert rows["a"]["hours"] == "0.075" and rows["b"]["loss"] == "inf" and rows["b"]["20-NN of ALL"] == "55.000"


def test_arguments_come_from_the_checkpoint_and_those_that_differ_are_a_table(runs):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        write_log(runs / name, *epochs(1))
        torch.save({"args": {"lr": rate, "net": "dino", "crop": [0.5, 1.0]}, "student": {}}, runs / name / "checkpoint.pth")
    write_log(runs / "c", *epochs(1))
    page, _ = make(runs)
    assert page.tables["Arguments in which runs differ"] == [{"name": "lr", "a": "0.1", "b": "0.2"}]
    assert "crop[0.5, 1.0]" in page.text


def test_pictures_are_in_the_page_as_long_as_they_fit(runs):
    write_log(runs, *epochs(1))
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)  # does not compress
    save_png(noise[:10, :10], runs / "results.png")
    save_png(noise, runs / "rotated" / "equivariance_x.png")
    save_png(noise, runs / "masks" / "00001.png")
    page, _ = make(runs, "--max_pictures_mb", 0.1)
    (image,) = re.findall(r'<img src="data:image/png;base64,([^"]*)"', page.source)
    assert base64.b64decode(image) == (runs / "results.png").read_bytes()
    assert "Left out" in page.text and "equivariance_x.png" in page.text and "masks" not in page.text


# --- safety ----------------------------------------------------------------------------------------------------------

EVIL = "<img src=x onerror=alert(1)>\"'&"
EVIL_SCRIPT = "</script><script>alert(1)</script><!--"


def test_text_from_files_is_never_markup_and_nothing_is_loaded(runs):
    folder = runs / EVIL.replace("/", "")
    record = PROBE | {"net": EVIL, "arch": EVIL_SCRIPT, "aug": "\ud800", "args": {EVIL_SCRIPT: EVIL_SCRIPT, "data_path": EVIL}}
    save_json(record, folder / "a.json")
    write_log(folder, {"epoch": 0, EVIL_SCRIPT: 1.0, "train_loss": 2.0})
    torch.save({"args": {EVIL_SCRIPT: EVIL_SCRIPT}}, folder / "checkpoint.pth")
    (folder / "c.json").write_text("{")
    page, _ = make(runs)
    assert page.source.count("<script") == 1 and "<img" not in page.source
    assert page.text.count(EVIL) > 3 and EVIL_SCRIPT in page.text
    for address in re.findall(r'(?:src|href|action)="([^"]*)"', page.source):
        assert address.startswith("#"), address
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", page.source)


DAMAGED = {
    "half.json": '{"kind": "linear_probe", "acc',
    "no_accuracy.json": json.dumps({key: value for key, value in PROBE.items() if key != "accuracy"}),
    "text_accuracy.json": json.dumps(PROBE | {"accuracy": "high"}),
    "binary/log.txt": b"\xff\xfe\x00",
    "run/checkpoint.pth": "no checkpoint",
}  # fmt: skip


def test_damaged_files_are_named_and_the_others_are_shown(runs):
    write_results(runs / "good")
    write_log(runs / "run", *epochs(1))
    for name, text in DAMAGED.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    page, stderr = make(runs)
    lines = stderr.splitlines()
    assert len(lines) == len(DAMAGED) and all(line.startswith("note: ") for line in lines), stderr
    for name in DAMAGED:
        assert len([line for line in lines if str(runs / name) in line]) == 1, name
        assert str(runs / name) in page.text
    assert [row["name"] for row in page.tables["Runs"]] == ["run"]
    assert page.tables["Saliency"][0]["IoU"] == "0.712"


def test_without_results_there_is_one_line_and_no_file(tmp_path, runs):
    save_json({"name": "no result"}, runs / "package.json")
    out = tmp_path / "report.html"
    assert_refused(call(report.main, runs, "--out", out), str(runs), "no results")
    assert_refused(call(report.main, tmp_path / "absent", "--out", out), "absent", "not a folder")
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_reports_no_error(tmp_path, runs):
    write_results(runs)
    write_log(runs, *epochs(3))
    make(runs)
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000")
    flags += ("--disable-background-networking", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}")
    command = ["chromium", *flags, "--dump-dom", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    assert "<svg" in done.stdout and "CONSOLE" not in done.stderr, done.stderr
