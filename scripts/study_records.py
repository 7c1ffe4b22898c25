"""The results of a study from scripts/study.sh: read from the folders of its cells, or from one small file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clever.data.augmentations import PERTURBATIONS
from clever.evaluation.hits import unpack_hits
from clever.evaluation.names import PARTS
from clever.utils import InputError, describe_error, write_text_atomically
from scripts.results_table import PART_ORDER, rank

# A cell is one network with its results, as read_cell returns it. {(arch, recipe, net, seed): cell}
Study = dict[tuple[str, str, str, int], dict[str, Any]]

UNTRAINED = "untrained"
NETS = (UNTRAINED, "dino", "CLeVER")
BASELINE = "dino"
COMPARED = (("CLeVER", "ALL"), ("CLeVER", "IR"))  # each minus the baseline's ALL
MEASURES = {"probe": "linear probe", "knn": "20-NN"}
OWN_SETTINGS = ("arch", "recipe", "net", "seed")  # in which the cells of a study may differ, of one backbone

# Fields of the results and gaps of eval_equivariance.py: what was measured, and the scores.
MEASURED = {"results": ("transform", "head", "input", "part", "control"), "gaps": ("transform", "part", "control")}
SCORES = {"results": ("r2", "mae_degrees", "accuracy", "auc"), "gaps": ("cosine_gap", "gram_gap")}

# --- reading ---------------------------------------------------------------------------------------------------------


def load_study(source: Path) -> Study:
    """The cells below a folder, or in a file records.json.

    Raises InputError if there are none, if two are the same network, or if check_settings does.
    """
    if source.is_dir():
        cells = [read_cell(path.parent) for path in sorted(source.rglob("settings.txt"))]
    else:
        with readable(source, "neither a folder nor a file records.json"):
            cells = json.loads(source.read_text())["cells"]
            for cell in cells:
                check_cell(cell)
    if not cells:
        raise InputError(f"{source}: no cells of scripts/study.sh (settings.txt)")
    study: Study = {}
    for cell in cells:
        key = key_of(cell)
        if key in study:
            raise InputError(f"{source}: two cells {' '.join(map(str, key))}")
        study[key] = cell
    check_settings(study)
    return study


def key_of(cell: dict[str, Any]) -> tuple[str, str, str, int]:
    """(arch, recipe, net, seed)."""
    settings = cell["settings"]
    return settings["arch"], settings["recipe"], settings["net"], int(settings["seed"])


def check_cell(cell: dict[str, Any]) -> None:
    """Raise an error that `readable` expects unless the cell has the fields that tables and pictures need."""
    key_of(cell)
    for entries in (*cell["probe"].values(), *cell["knn"].values()):
        for entry in entries.values():
            float(entry["top1"])
            if "correct" in entry:
                unpack_hits(entry["correct"], cell["num_test_images"])
    sum(cell["loss"])
    for kind, names in MEASURED.items():
        for entry in cell.get(kind, ()):
            select_fields(entry, names)


def check_settings(study: Study) -> None:
    """Raise InputError unless the cells of a backbone have equal settings, and all cells as many test images."""
    known: dict[tuple, tuple] = {}
    for key, cell in study.items():
        arch, _, net, _ = key
        shared = {name: value for name, value in cell["settings"].items() if name not in OWN_SETTINGS}
        shared = {(arch, name): value for name, value in shared.items() if net != UNTRAINED or name != "epochs"}
        if cell["num_test_images"] is not None:
            shared["number of", "test images"] = cell["num_test_images"]
        for name, value in shared.items():
            other, expected = known.setdefault(name, (key, value))
            if value != expected:
                raise InputError(f"{' '.join(name)}: {value} in {' '.join(map(str, key))}, "
                    f"but {expected} in {' '.join(map(str, other))}; a table needs equal settings")  # fmt: skip


def read_cell(folder: Path) -> dict[str, Any]:
    """The results in the folder of one cell, rounded; those that are not there yet are left out.

    Returns `settings` {name: value}, `num_test_images`, `probe` and `knn` {part: {perturbation: {top1, correct}}}, where
    `correct` are the hits (evaluation/hits.py) that differences need, `loss` (normalised, per epoch), `results` and `gaps` of
    eval_equivariance.py.
    """
    cell: dict[str, Any] = {"settings": {}, "num_test_images": None, "probe": {}, "knn": {}, "loss": []}
    with readable(path := folder / "settings.txt", "not the settings of a cell"):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            cell["settings"][name] = value.strip()
        key_of(cell)
    for measure, pattern in (("probe", "only_eval_*.json"), ("knn", "knn*.json")):
        for path in sorted(folder.glob(pattern)):
            with readable(path):
                add_accuracy(cell, measure, json.loads(path.read_text()))
    if (path := folder / "log.txt").exists():
        with readable(path):
            epochs = map(json.loads, path.read_text().splitlines())
            cell["loss"] = [round(epoch["train_normalized_loss"], 4) for epoch in epochs]
    if (path := folder / "equivariance.json").exists():
        with readable(path):
            record = json.loads(path.read_text())
            for kind, names in MEASURED.items():
                cell[kind] = [select_fields(entry, names + SCORES[kind]) for entry in record[kind]]
    return cell


@contextlib.contextmanager
def readable(path: Path, problem: str = "not a result of the study; remove it, and repeat its step") -> Iterator[None]:
    """An error while this file is read, such as a missing field, becomes an InputError that names the file and the problem."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {problem} ({describe_error(error)})") from error


def add_accuracy(cell: dict[str, Any], measure: str, record: dict[str, Any]) -> None:
    """Add a result of eval_linear.py (measure probe) or eval_knn.py (knn) to a cell."""
    result, name = (record["results"][0], "top1") if measure == "knn" else (record, "accuracy")
    part, entry = PARTS[record["part"]], {"top1": round(result[name], 4)}
    if cell["settings"]["net"] == BASELINE or (cell["settings"]["net"], part) in COMPARED:
        unpack_hits(result["correct"], record["num_test_images"])  # raises an error if they are damaged
        entry["correct"] = result["correct"]
    cell[measure].setdefault(part, {})[record["test_aug_type"]] = entry
    cell["num_test_images"] = record["num_test_images"]


def select_fields(entry: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """These fields, rounded; scores that are None are left out."""
    fields = {name: entry[name] for name in names}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
    return {name: value for name, value in rounded.items() if value is not None or name == "control"}


def save_records(study: Study, path: Path) -> None:
    """All cells as one JSON file, a line per cell."""
    lines = ",\n".join(json.dumps(cell) for cell in study.values())
    write_text_atomically(f'{{"cells": [\n{lines}\n]}}\n', path)


# --- axes of the tables ----------------------------------------------------------------------------------------------


def archs_of(study: Study) -> list[str]:
    return list(dict.fromkeys(key[0] for key in study))


def recipes_of(study: Study) -> list[str]:
    return sorted({recipe for _, recipe, net, _ in study if net != UNTRAINED})


def seeds_of(study: Study) -> list[int]:
    """The seeds of all cells: every row should have a result for each of them."""
    return sorted({key[3] for key in study})


def perturbations_of(study: Study) -> list[str]:
    names = {name for cell in study.values() for measure in MEASURES for part in cell[measure].values() for name in part}
    return sorted(names, key=lambda name: rank(PERTURBATIONS, name))


def networks_of(study: Study) -> list[tuple[str, str, str]]:
    """(recipe, net, part) of the rows: the untrained network, then every net with every recipe, whether or not it is there."""
    nets = [net for net in NETS if any(key[2] == net for key in study)]
    rows = [("-", UNTRAINED, "ALL")] if UNTRAINED in nets else []
    for recipe in recipes_of(study):
        rows += [(recipe, net, part) for net in nets if net != UNTRAINED for part in parts_of(net)]
    return rows


def parts_of(net: str) -> tuple[str, ...]:
    return ("ALL",) if net == BASELINE else PART_ORDER
