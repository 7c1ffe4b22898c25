"""Tables of networks: rows, columns, the newest of several results, files left out or refused."""

import json
import os

import pytest
from support.in_process import assert_refused, call

from scripts import tables


@pytest.fixture
def write(tmp_path):
    """write(file, accuracy, net, part, aug, ...) writes a result of eval_linear.py, newer than all before."""
    clock = iter(range(1_000_000, 2_000_000))

    def write(file, accuracy, net="CLeVER", part="ALL", aug="ori", epochs=20, arch="resnet8", recipe="aug1_2", **more):
        path = tmp_path / "runs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "kind": "linear_probe", "net": net, "arch": arch, "part": part, "hp1": 0.8, "pretrained_epochs": epochs,
            "test_aug_type": aug, "aug": recipe, "accuracy": accuracy, "num_test_images": 360, "num_labels": 10, "seed": 0,
            "pretraining_seed": 0, "args": {"lr": 0.1, "data_path": "data/digits"}, **more,
        }  # fmt: skip
        path.write_text(json.dumps(record))
        os.utime(path, (when := next(clock), when))
        return path

    return write


def table_of(tmp_path, *folders):
    """Run the script: (rows of the Markdown table as lists of cells, results.json, stderr)."""
    folders = folders or (tmp_path / "runs",)
    outcome = call(tables.main, *folders, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert outcome.stdout.startswith(results["markdown"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in results["markdown"].splitlines()]
    return lines, results, outcome.stderr


def test_rows_name_the_fields_in_which_networks_of_the_same_kind_differ(tmp_path, write):
    """Only these: dino and CLeVER may differ in hp1, and an untrained network has no recipe."""
    for recipe, accuracy in (("aug1", 70.0), ("aug1_2", 60.0)):
        write(f"{recipe}/c.json", accuracy, recipe=recipe)
    write("d.json", 50.0, net="dino", hp1=1.0)
    write("r.json", 20.0, epochs=0, recipe="aug1_4_2")
    lines, _, _ = table_of(tmp_path)
    assert lines[2:] == [
        ["untrained ALL", "20.0"],
        ["dino ALL", "50.0"],
        ["CLeVER aug1 ALL", "70.0"],
        ["CLeVER aug1_2 ALL", "60.0"],
    ]


def test_order_of_rows_and_columns_and_missing_results(tmp_path, write):
    write("c/ef.json", 33.333, part="else_part")
    write("c/ir_rot.json", 61.0, part="main_part", aug="aug1_2")
    write("c/all.json", 90.0)
    write("c/odd.json", 12.0, aug="zoom")
    write("d/all_rot.json", 55.55, net="dino", aug="aug1_2")
    write("d/all_basic.json", 56.0, net="dino", aug="basic")
    write("r/all.json", 40.04, net="dino", epochs=0)
    lines, results, err = table_of(tmp_path)
    assert lines[0] == ["top-1 (%)", "ori", "basic", "aug1_2", "zoom"]
    assert lines[2:] == [
        ["untrained ALL", "40.0", "-", "-", "-"],
        ["dino ALL", "-", "56.0", "55.5", "-"],
        ["CLeVER ALL", "90.0", "-", "-", "12.0"],
        ["CLeVER IR", "-", "-", "61.0", "-"],
        ["CLeVER EF", "33.3", "-", "-", "-"],
    ]
    assert results["table"]["columns"] == ["ori", "basic", "aug1_2", "zoom"]
    assert results["table"]["rows"][0] == {"row": "untrained ALL", "ori": 40.04}
    assert err == ""


def test_the_newest_of_several_results_counts(tmp_path, write):
    write("z/first.json", 10.0)
    newest = write("a/second.json", 20.0)
    lines, results, err = table_of(tmp_path, tmp_path / "runs" / "z", tmp_path / "runs" / "a")
    assert lines[2] == ["CLeVER ALL", "20.0"]
    assert err == f"note: CLeVER ALL, ori: 2 results, the newest counts: {newest}\n"
    [record] = results["records"]
    assert record["accuracy"] == 20.0 and record["file"] == str(newest) and "args" not in record


def test_what_is_no_result_is_left_out_and_what_is_damaged_refused(tmp_path, write):
    runs = write("a.json", 10.0).parent
    write("other.json", 99.0, kind="knn", net="dino", results=[])
    (runs / "list.json").write_text("[1, 2]")
    (runs / "link.json").symlink_to(runs / "removed.json")
    lines, _, err = table_of(tmp_path)
    assert lines[2:] == [["CLeVER ALL", "10.0"]] and err == ""
    lines, _, _ = table_of(tmp_path, runs, tmp_path / "out")  # with its own results.json in the input
    assert lines[2:] == [["CLeVER ALL", "10.0"]]
    (runs / "broken.json").write_text('{"kind": "linear_pro')
    assert_refused(call(tables.main, runs, "--out", tmp_path / "new"), str(runs / "broken.json"))
    equivariance(tmp_path / "empty")
    assert_refused(call(tables.main, tmp_path / "empty", "--out", tmp_path / "new"), "no results of eval_linear.py")
    assert not (tmp_path / "new").exists()


def test_data_sets_and_seeds_are_not_merged(tmp_path, write):
    """An older file names its data set in its arguments only; `untrained` has seeds, too."""
    write("a.json", 10.0)
    write("b.json", 20.0, seed=1)
    write("c.json", 30.0, args={"data_path": "data/IN100/"})
    write("d.json", 40.0, dataset="IN100", args={"data_path": "/elsewhere"}, net="dino")
    write("e.json", 50.0, epochs=0)
    write("f.json", 60.0, epochs=0, seed=1)
    lines, _, err = table_of(tmp_path)
    assert err == ""
    assert lines[2:] == [
        ["dino IN100 ALL", "40.0"],
        ["CLeVER IN100 evaluation seed 0 ALL", "30.0"],
        ["untrained digits evaluation seed 0 ALL", "50.0"],
        ["CLeVER digits evaluation seed 0 ALL", "10.0"],
        ["untrained digits evaluation seed 1 ALL", "60.0"],
        ["CLeVER digits evaluation seed 1 ALL", "20.0"],
    ]


# --- rotation ----------------------------------------------------------------------------------------------------------


def equivariance(folder, net="CLeVER", r2=0.7, untrained=0.4, seed=0, **more):
    """A result of eval_equivariance.py as a file, with another transformation than rotation as well."""
    parts = [("ALL", None), ("ALL", "shuffled"), ("EF", "random_subspace"), ("ALL", "untrained")]
    parts += [("IR", None), ("EF", None), ("EF", "untrained")] if net == "CLeVER" else []
    results = [
        {"transform": name, "head": "linear", "input": kind, "part": part, "control": control}
        | {"r2": (untrained if control == "untrained" else r2 - 0.1 * i) + other}
        | ({"r2_std": 0.25, "draws": 5} if control == "random_subspace" else {})
        for name, kind, other in (("rotation", "pair", 0), ("rotation", "single", 5), ("crop", "pair", 7))
        for i, (part, control) in enumerate(parts)
    ]
    gaps = [
        {"transform": "rotation", "part": part, "control": control, "cosine_gap": 0.5}
        | ({"cosine_gap_std": 0.125, "draws": 5} if control == "random_subspace" else {})
        for part, control in parts
    ]
    record = {"kind": "equivariance", "net": net, "arch": "resnet8", "hp1": 0.8, "pretrained_epochs": 20, "aug": "aug1_2"}
    record |= {"pretraining_seed": seed, "args": {"data_path": "data/digits", "seed": seed}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{net}.json"
    path.write_text(json.dumps(record | {"results": results, "gaps": gaps} | more))
    return path


def test_rotation_stands_in_a_table_of_its_own(tmp_path, write):
    write("a.json", 80.0)
    equivariance(tmp_path / "runs", "dino", r2=0.9)
    equivariance(tmp_path / "runs", "CLeVER", r2=0.7)
    lines, results, err = table_of(tmp_path)
    assert err == ""  # both hold the same numbers of the untrained network
    table = lines[lines.index([""]) + 1 :]
    assert table[0] == ["rotation", "R2", "cosine gap"]
    assert table[2:] == [
        ["untrained ALL", "0.40", "0.50"],
        ["dino ALL", "0.90", "0.50"],
        ["dino random dimensions", "0.70 ± 0.25", "0.50 ± 0.12"],
        ["CLeVER ALL", "0.70", "0.50"],
        ["CLeVER IR", "0.30", "0.50"],
        ["CLeVER EF", "0.20", "0.50"],
        ["CLeVER random dimensions", "0.50 ± 0.25", "0.50 ± 0.12"],
    ]
    assert results["rotation"]["CLeVER random dimensions"]["r2"] == pytest.approx([0.5, 0.25])
    assert results["rotation"]["CLeVER ALL"]["r2"] == [0.7, None]
    assert lines[:3] == [["top-1 (%)", "ori"], lines[1], ["CLeVER ALL", "80.0"]]
