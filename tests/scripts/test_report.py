"""The report: every kind of result, best accuracies, escaping, damaged files, the file that is written; slow: in a browser."""

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from support.in_process import assert_refused, call, snapshot

from clever.utils import save_json, save_png
from scripts import report
from scripts.report_records import short_names

NETWORK = {
    "net": "CLeVER", "arch": "resnet8", "pretrained_epochs": 20, "aug": "aug1_2", "pretraining_seed": 0, "backbone": "0123abcd",
    "hp1": 0.8,
}  # fmt: skip
PROBE = {
    "kind": "linear_probe", **NETWORK, "part": "ALL", "test_aug_type": "ori", "accuracy": 90.0, "test_loss": 0.4, "top5": 99.0,
    "num_test_images": 360, "num_labels": 10, "seed": 0, "args": {"data_path": "data/digits", "lr": 0.3},
}  # fmt: skip
SCORES = {"r2": 0.731, "mae_degrees": 13.25, "accuracy": None, "auc": None, "cosine_gap": 0.15, "gram_gap": 0.02}
SPACES = [("ALL", None, 0), ("EF", None, 0.1), ("EF", "random_subspace", -0.1)]
ENTRIES = [
    {"transform": "rotation", "head": "linear", "input": "pair", "part": part, "control": control}
    | SCORES | {"r2": SCORES["r2"] + more}
    for part, control, more in SPACES
]  # fmt: skip
DAVIS = {"J-Mean": 0.611, "J-Recall": 0.7, "J-Decay": 0.1, "F-Mean": 0.655, "F-Recall": 0.8, "F-Decay": 0.2}
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
    "results.json": {
        "kind": "saliency", "dataset": "ECSSD", **NETWORK, "TokenCut": {"IoU": 0.712, "accuracy": 0.9, "F_max": 0.8},
        "TokenCut + bilateral solver": {"IoU": 0.772, "accuracy": 0.91, "F_max": 0.85}, "num_images": 9, "num_scored": 9,
        "num_degenerate": 0, "failed": [], "args": {},
    },
    "bench.json": {"kind": "bench_loader", "torch": "2.14", "step": 2.5},
    "package.json": {"name": "no result"},
}  # fmt: skip


class Page(HTMLParser):
    """A report, read: the cells of its tables, its data, and what could load or run something.

    `tables` are {title: list of rows}, rows dicts {heading: text}; `keys` likewise what cells are sorted by.
    """

    VOID = ("meta", "link", "img", "input", "wbr")

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = self.title = ""
        self.cells: list[list] = []
        self.tables: dict[str, list[dict]] = {}
        self.keys: dict[str, list[dict]] = {}
        self.feed(self.source)
        self.close()
        assert self.open == [], "elements are not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        elif tag == "h3":
            self.title = ""
        elif tag == "table":
            self.heads, self.tables[self.title], self.keys[self.title] = [], [], []
        elif tag == "tr":
            self.cells = []
        elif tag in ("td", "th"):
            self.cells.append(["", dict(attributes).get("data-v")])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr" and not self.heads:
            self.heads = [text for text, _ in self.cells]
        elif tag == "tr":
            self.tables[self.title].append(dict(zip(self.heads, (text for text, _ in self.cells), strict=True)))
            self.keys[self.title].append(dict(zip(self.heads, (key for _, key in self.cells), strict=True)))

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data
            if "h3" in self.open:
                self.title += data
            if {"td", "th"} & set(self.open):
                self.cells[-1][0] += data

    def data(self, name: str):
        """A block of data; numbers must be those of JSON, without NaN."""
        blocks = [attributes.get("id") for tag, attributes in self.tags if tag == "script"]
        return json.loads(self.scripts[blocks.index(name)], parse_constant=lambda word: pytest.fail(word))


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
    assert tables["Linear probe"][0] | {"part": "ALL", "top-1": "90.00", "best top-1": "91.25"} == tables["Linear probe"][0]
    assert tables["Linear probe on perturbed images"][0]["top-1"] == "81.50"
    assert [(row["k"], row["top-1"]) for row in tables["k-NN"]] == [("10", "80.00"), ("20", "90.00")]
    assert tables["Downstream classification"][0]["mean per class"] == "54.00"
    assert tables["Video segmentation (DAVIS 2017)"][0]["J&F-Mean"] == "0.633"
    assert [(row["object"], row["J-Mean"]) for row in tables["Video segmentation: objects"]] == [
        ("bear_1", "0.611"), ("bear_2", "0.500")
    ]  # fmt: skip
    assert [row["IoU"] for row in tables["Saliency"]] == ["0.712", "0.772"]
    assert tables["Other results: bench_loader"][0]["step"] == "2.5"
    assert "1 other JSON file left out" in page.text


def test_equivariance_has_a_row_per_measure_and_a_column_per_part(runs):
    save_json(RESULTS["equivariance.json"], runs / "equivariance.json")
    rows = {row["measure"]: row for row in make(runs)[0].tables["Equivariance"]}
    assert list(rows) == ["R2", "error (degrees)", "cosine gap", "Gram gap"], "accuracy and AUC were not measured"
    assert [rows["R2"][part] for part in ("ALL", "EF", "random, as wide as EF")] == ["0.731", "0.831", "0.631"]
    assert "IR" not in rows["R2"], "it was not measured"
    assert rows["cosine gap"]["ALL"] == "0.150" and rows["cosine gap"]["head"] == "–"


def test_what_rows_share_stands_above_the_table_and_the_rest_in_columns(runs):
    for epoch in (10, 20):
        save_json(PROBE | {"pretrained_epochs": epoch}, runs / f"{epoch}.json")
    page, _ = make(runs)
    assert [row["epochs"] for row in page.tables["Linear probe on perturbed images"]] == ["10", "20"]
    assert "backbone" not in page.tables["Linear probe on perturbed images"][0]
    assert "In all rows: part ALL, images ori, data digits, network CLeVER, backbone resnet8, recipe aug1_2" in page.text


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
    for tile in ("untrained ALL30.0−50.0 against dino", "dino ALL80.0baseline", "CLeVER ALL83.0+3.0", "CLeVER EF60.0−20.0"):
        assert tile in page.text
    assert "Chance: 10.0." in page.text


def test_curves_of_runs_with_gaps_for_what_is_not_finite_and_epochs_of_sparse_values(runs):
    write_log(runs / "a", *epochs(3, train_lr=0.1))
    values = {"train_loss": math.nan}, {"train_loss": 2.0, "knn_ALL": 55.0}, {"train_loss": math.inf}
    write_log(runs / "b", *({"epoch": epoch} | record for epoch, record in enumerate(values)))
    page, _ = make(runs)
    curves = page.data("curves-data")
    assert curves["labels"] == ["a", "b"] and curves["epochs"] == [[0, 1, 2], [0, 1, 2]]
    shown = [(a["data-chart"]) for tag, a in page.tags if tag == "figure"]
    assert shown == [str(i) for i in range(len(curves["charts"]))]
    by_title = dict(zip(re.findall(r"<figcaption>([^<]*)", page.source), curves["charts"], strict=True))
    assert [run["y"] for run in by_title["loss"]["curves"]] == [[5, 4, 3], [None, 2, None]]
    assert by_title["20-NN of ALL, top-1 in percent"]["curves"] == [{"y": []}, {"y": [55], "x": [1]}]
    assert "2 values are not finite" in page.text
    rows = {row["run"]: row for row in page.tables["Runs"]}
    assert rows["a"]["time"] == "0:04:30" and rows["b"]["loss"] == "∞" and rows["b"]["20-NN"] == "55.0"


def test_arguments_come_from_the_checkpoint_and_those_that_differ_are_a_table(runs):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        write_log(runs / name, *epochs(1))
        torch.save({"args": {"lr": rate, "net": "dino", "crop": [0.5, 1.0]}, "student": {}}, runs / name / "checkpoint.pth")
    write_log(runs / "c", *epochs(1))
    page, _ = make(runs)
    assert page.tables["Arguments in which runs differ"] == [{"argument": "lr", "a": "0.1", "b": "0.2"}]
    assert "crop[0.5, 1.0]" in page.text and "Known of 2 of 3 runs" in page.text


def test_details_hold_everything_but_what_nobody_reads(runs):
    write_results(runs)
    details = {Path(entry["file"]).name: entry for entry in make(runs)[0].data("results-data")}
    probe = details["only_eval_aug1.json"]
    assert probe["values"]["backbone"] == "0123abcd" and probe["args"] == {"data_path": "data/digits", "lr": "0.3"}
    assert "correct" not in probe["values"] and "frames" not in details["results-val.json"]["values"]


def test_sort_keys_are_numbers_and_the_usual_order_of_parts_and_perturbations(runs):
    for part, perturbation in (("ALL", "ori"), ("main_part", "aug1_2"), ("else_part", "zoom")):
        save_json(PROBE | {"part": part, "test_aug_type": perturbation, "accuracy": math.nan if part == "ALL" else 50.5},
            runs / f"{part}.json")  # fmt: skip
    page, _ = make(runs)
    rows = page.keys["Linear probe on perturbed images"]
    assert [row["part"] for row in rows] == ["0", "1", "2"]
    order = [int(row["images"]) for row in rows]
    assert order == sorted(set(order)), "ori, aug1_2, and then what is not known"
    assert [row["top-1"] for row in rows] == ["NaN", "50.5", "50.5"]
    assert page.tables["Linear probe on perturbed images"][0]["top-1"] == "NaN"


def test_names_are_as_short_as_they_can_be():
    folders = [Path("r/d_ep0/CLeVER/1/CLeVER_1"), Path("r/d_ep9/CLeVER/1/CLeVER_1"), Path("r/d_ep9/dino/1/dino_1")]
    assert list(short_names(folders).values()) == ["d_ep0/CLeVER", "d_ep9/CLeVER", "d_ep9/dino"]
    assert short_names([Path("r/a")] * 2) == {Path("r/a"): "a"}
    assert list(short_names([Path("r"), Path("r/a")]).values()) == ["r", "a"]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_in_the_page_as_long_as_they_fit(runs):
    write_log(runs, *epochs(1))
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)  # does not compress
    save_png(noise[:10, :10], runs / "results.png")
    save_png(noise, runs / "deep" / "equivariance_x.png")
    save_png(noise, runs / "masks" / "00001.png")
    page, _ = make(runs, "--max_pictures_mb", 0.1)
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == (runs / "results.png").read_bytes()
    assert (image["width"], image["height"]) == ("10", "10")
    assert "1 picture left out" in page.text and "equivariance_x.png (0.4 MB)" in page.text and "masks" not in page.text


# --- safety ----------------------------------------------------------------------------------------------------------

EVIL = "<img src=x onerror=alert(1)>\"'&"
EVIL_SCRIPT = "</script><script>alert(1)</script><!--"


def test_text_from_files_is_never_markup(runs):
    folder = runs / EVIL.replace("/", "")
    record = PROBE | {"net": EVIL, "arch": EVIL_SCRIPT, "aug": "\ud800", "args": {EVIL_SCRIPT: EVIL_SCRIPT, "data_path": EVIL}}
    save_json(record, folder / "a.json")
    save_json({"kind": EVIL_SCRIPT, EVIL: EVIL}, folder / "b.json")
    write_log(folder, {"epoch": 0, EVIL_SCRIPT: 1.0, "train_loss": 2.0})
    torch.save({"args": {EVIL_SCRIPT: EVIL_SCRIPT}}, folder / "checkpoint.pth")
    (folder / "c.json").write_text("{")
    page, _ = make(runs)
    assert [attributes.get("id") for tag, attributes in page.tags if tag == "script"] == ["curves-data", "results-data", None]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(EVIL) > 5 and EVIL_SCRIPT in page.text
    assert page.data("results-data")[0]["args"][EVIL_SCRIPT] == EVIL_SCRIPT
    assert page.data("curves-data")["labels"] == [folder.name]


def test_the_page_loads_nothing_and_runs_only_its_own_script(runs):
    write_results(runs)
    write_log(runs, *epochs(2))
    page, _ = make(runs)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|import\(", page.source)
    (policy,) = [attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes]
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


# --- damaged files ---------------------------------------------------------------------------------------------------

DAMAGED = {
    "half.json": '{"kind": "linear_probe", "acc',
    "deep.json": "[" * 100_000,
    "no_accuracy.json": json.dumps({key: value for key, value in PROBE.items() if key != "accuracy"}),
    "text_accuracy.json": json.dumps(PROBE | {"accuracy": "high"}),
    "list_net.json": json.dumps(PROBE | {"net": ["dino"]}),
    "number_net.json": json.dumps(PROBE | {"net": 5}),
    "no_gaps.json": json.dumps({key: value for key, value in RESULTS["equivariance.json"].items() if key != "gaps"}),
    "empty_knn.json": json.dumps(RESULTS["knn.json"] | {"results": []}),
    "odd_knn.json": json.dumps(RESULTS["knn.json"] | {"results": 7}),
    "overview.png": "no picture",
    "empty/log.txt": "",
    "binary/log.txt": b"\xff\xfe\x00",
    "half/log.txt": json.dumps(epochs(1)[0]) + '\n{"train_loss": 4.0, "ep',
}  # fmt: skip


def test_damaged_files_are_named_and_the_others_are_shown(runs):
    write_results(runs / "good")
    for name, text in DAMAGED.items():
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (runs / "link.json").symlink_to("nowhere")
    write_log(runs / "run", *epochs(1))
    (runs / "run" / "checkpoint.pth").write_bytes(b"no checkpoint")
    page, stderr = make(runs)
    names = [*DAMAGED, "link.json", "run/checkpoint.pth"]
    lines = stderr.splitlines()
    assert len(lines) == len(names) and all(line.startswith("note: ") for line in lines), stderr
    for name in names:
        assert len([line for line in lines if str(runs / name) in line]) == 1, name
        assert str(runs / name) in page.text
    assert f"{len(names)} files could not be read" in page.text
    assert [row["run"] for row in page.tables["Runs"]] == ["half", "run"], "the first line of half/log.txt is whole"
    assert page.tables["Saliency"][0]["IoU"] == "0.712"


def test_numbers_without_bounds_and_odd_values_break_nothing(runs):
    values = {"accuracy": math.inf, "test_loss": 10**400, "top5": -math.inf, "num_labels": "ten", "hp1": True, "seed": 1e300}
    (runs / "x").mkdir(parents=True)
    (runs / "x" / "a.json").write_text(json.dumps(PROBE | values))
    save_json(PROBE | {"accuracy": None, "kind": "downstream"}, runs / "b.json")
    write_log(runs, {"epoch": 0, "train_loss": 10**400}, {"epoch": 1.5, "train_loss": 1e308, "seconds": math.nan, "x": True})
    page, stderr = make(runs)
    row = page.tables["Linear probe on perturbed images"][0]
    assert (row["top-1"], row["test loss"], row["top-5"]) == ("∞", "∞", "−∞")
    assert page.data("curves-data")["epochs"] == [[0, 1.5]]
    assert stderr == "", "b.json has a top-5"


# --- the file --------------------------------------------------------------------------------------------------------


def test_without_results_there_is_one_line_and_no_file(tmp_path, runs):
    save_json({"name": "no result"}, runs / "package.json")
    out = tmp_path / "report.html"
    assert_refused(call(report.main, runs, "--out", out), str(runs), "no results")
    assert_refused(call(report.main, tmp_path / "absent", "--out", out), "absent", "not a folder")
    assert not out.exists()


def test_only_an_older_report_is_replaced(tmp_path, runs):
    write_results(runs)
    first = make(runs)[0].source
    save_json(PROBE, runs / "more.json")
    assert make(runs)[0].source != first
    others = {"page.html": "<!doctype html><title>mine</title>", "empty.html": ""}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.html").mkdir()
    before = snapshot(tmp_path)
    for name, words in (("page.html", "not a report"), ("empty.html", "not a report"), ("folder.html", "not a file"),
                        ("report.txt", "must end with .html"), ("page.html/report.html", "not a folder")):  # fmt: skip
        assert_refused(call(report.main, runs, "--out", tmp_path / name), "--out", words)
    assert_refused(call(report.main, runs, "--out", tmp_path / "new.html", "--max_pictures_mb", -1), "--max_pictures_mb")
    assert snapshot(tmp_path) == before


def write_thousand(runs: Path) -> None:
    runs.mkdir(parents=True)
    for i in range(1000):
        values = {"net": ("dino", "CLeVER")[i % 2], "accuracy": i / 10, "pretraining_seed": i // 100, "backbone": f"{i:016x}"}
        record = PROBE | values
        (runs / f"{i}.json").write_text(json.dumps(record | {"args": {f"argument_{j}": j / 7 for j in range(35)}}))


def test_a_thousand_results_are_written_in_seconds_into_a_few_megabytes(runs):
    write_thousand(runs)
    start = time.process_time()
    page, _ = make(runs)
    assert time.process_time() - start < 10  # about 1 on an idle core
    assert len(page.tables["Linear probe on perturbed images"]) == len(page.data("results-data")) == 1000
    assert len(page.source) < 3e6


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_draws_the_curves_and_reports_no_error(tmp_path, runs):
    write_results(runs)
    write_log(runs, *epochs(3))
    make(runs)
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000")
    command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)})
    assert done.stdout.count('<path class="curve') >= 1, done.stderr
    assert "CONSOLE" not in done.stderr
