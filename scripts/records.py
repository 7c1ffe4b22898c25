"""Results of the evaluations, read from their JSON files, and how tables name and order them; for tables.py and report.py."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from clever.data.augmentations import PERTURBATIONS
from clever.evaluation.names import PARTS
from clever.utils import InputError, describe_error, printable

Record = dict[str, Any]

UNTRAINED, BASELINE = "untrained", "dino"
# Tables have networks, parts and perturbations in this order; other names follow in alphabetical order.
NETS = (UNTRAINED, BASELINE, "CLeVER")
PART_ORDER = ("ALL", "IR", "EF")

# Where networks of the same kind differ in one of these fields, its value is a piece of the row's name.
VARIANTS = {
    "dataset": "{}", "arch": "{}", "aug": "{}", "pretrained_epochs": "ep{}", "hp1": "hp{}",
    "pretraining_seed": "pretraining seed {}", "seed": "evaluation seed {}",
}  # fmt: skip
NAMED_IN_ALL_ROWS = ("dataset", "arch")  # or in none
PRETRAINING = ("aug", "pretrained_epochs", "hp1")  # the row `untrained` has none of them

REQUIRED = {
    "linear_probe": ("net", "arch", "part", "test_aug_type", "accuracy"),
    "knn": ("net", "arch", "part", "test_aug_type", "results"),
    "equivariance": ("net", "arch", "results", "gaps"),
}
TYPES = dict.fromkeys(VARIANTS, (str, int, float, type(None))) | dict.fromkeys(("net", "arch", "part", "test_aug_type"), str)
TYPES |= {"accuracy": (int, float), "num_labels": (int, type(None)), "results": list, "gaps": list}


# --- reading ---------------------------------------------------------------------------------------------------------


def list_files(folders: Iterable[Path]) -> list[Path]:
    """All files below the folders, each once, the oldest first. Raises InputError if a folder is missing."""
    files: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        files |= {os.path.realpath(path): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return sorted(files.values(), key=lambda path: path.stat().st_mtime_ns)


@contextlib.contextmanager
def readable(path: Path, problem: str) -> Iterator[None]:
    """Errors from reading the content of this file, such as a missing field, become an InputError with the problem."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: {problem} ({describe_error(error)})") from error


def read_result(path: Path) -> Record | None:
    """The result in a JSON file, with `file`, `dataset` and `seed`, without `args`; None if the file holds something else.

    Raises InputError if the file is damaged.
    """
    with readable(path, "is not valid JSON"):
        record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    args = record.pop("args", None)
    args = args if isinstance(args, dict) else {}
    record.setdefault("dataset", Path(str(args.get("data_path") or "")).name or None)
    record.setdefault("seed", args.get("seed"))
    wrong = [name for name in REQUIRED.get(record["kind"], ()) if name not in record]
    wrong += [name for name, types in TYPES.items() if name in record and not isinstance(record[name], types)]
    if wrong or not 0 <= record.get("accuracy", 0) <= 100:
        raise InputError(f"{path}: no such result has this {', '.join(wrong) or 'accuracy'}; run that evaluation again")
    return {name: printable(value) if isinstance(value, str) else value for name, value in record.items()} | {"file": path}


# --- names and order -------------------------------------------------------------------------------------------------


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The different names: those that are known in the given order, then all others by name."""
    names = set(names)
    return [name for name in known if name in names] + sorted(names - set(known))


def name_rows(records: list[Record]) -> pd.DataFrame:
    """The results as a frame, in the order of a table, with the column `row`: network, what tells it from others, and part.

    The index is that of `records`; results of the same row and perturbation keep their order.
    """
    fields = ["net", "part", "test_aug_type", *VARIANTS]
    frame = pd.DataFrame([[record.get(name) for name in fields] for record in records], columns=fields, dtype=object)
    frame["net"] = frame["net"].mask(frame["pretrained_epochs"] == 0, UNTRAINED)
    frame["part"] = frame["part"].map(lambda part: PARTS.get(part, part))
    frame["variant"] = ""
    for name, words in VARIANTS.items():
        values = frame.groupby("net")[name]
        count = frame[name].nunique(dropna=False) if name in NAMED_IN_ALL_ROWS else values.transform("nunique", dropna=False)
        named = (count > 1) & frame[name].notna() & ((frame["net"] != UNTRAINED) | (name not in PRETRAINING))
        frame["variant"] += frame[name].map(lambda value, words=words: f" {words.format(value)}").where(named, "")
    frame["row"] = frame["net"] + frame["variant"] + " " + frame["part"]
    for name, known in (("net", NETS), ("part", PART_ORDER), ("test_aug_type", PERTURBATIONS)):
        frame[name] = pd.Categorical(frame[name], in_order(frame[name].dropna(), known), ordered=True)
    return frame.sort_values(["variant", "net", "part", "test_aug_type"], kind="stable")


def note(text: object) -> None:
    print(f"note: {text}", file=sys.stderr)
