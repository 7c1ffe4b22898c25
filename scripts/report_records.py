"""What a report shows, read from folders: runs with their logs and arguments, results, and pictures.

Files that cannot be read are left out and named in `Found.problems`.
"""

import fnmatch
import json
import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from clever.arguments import plain_args
from clever.checkpoint import load_checkpoint
from clever.utils import InputError, describe_error
from scripts.report_tables import KINDS, Record, check_result, data_name
from scripts.results_table import NETS, rank
from scripts.study_records import readable

LOG, CHECKPOINT = "log.txt", "checkpoint.pth"
# Pictures of our scripts that sum up a result; masks and frames, of which there may be thousands, are not among them.
PICTURES = (
    "results.png", "curves.png", "differences.png", "equivariance*.png", "overview.png", "contact_sheet-*.png",
    "*pca*.png", "*tsne*.png", "*umap*.png",
)  # fmt: skip
MAX_PIXELS = 50e6  # of a picture; browsers need four bytes for each
MAX_JSON = 100e6  # bytes of a file


@dataclass
class Run:
    """A folder with log.txt.

    Args:
        log: a record of numbers for each epoch, in their order.
        arguments: those of the pretraining, from the checkpoint in the folder; empty if there is none.
    """

    folder: Path
    log: list[dict[str, float]]
    arguments: dict[str, Any]


@dataclass
class Picture:
    path: Path
    width: int
    height: int
    size: int  # bytes


@dataclass
class Found:
    """Everything below the folders.

    Args:
        results: records of the evaluations, with their `file` (a Path) and `dataset` added.
        problems: one line for each file that cannot be read, or not completely.
        others: number of JSON files that are no results.
    """

    runs: list[Run] = field(default_factory=list)
    results: list[Record] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    others: int = 0


def collect(folders: list[Path]) -> Found:
    """Read everything below the folders, each file once. Raises InputError if a folder is missing."""
    found = Found()
    for path in list_files(folders, found.problems):
        try:
            if not path.is_file():
                raise InputError(f"{path}: a broken link, or no regular file")
            if path.name == LOG:
                found.runs.append(read_run(path, found.problems))
            elif path.suffix == ".json":
                record = read_result(path)
                found.others += record is None
                found.results += [] if record is None else [record]
            else:
                found.pictures.append(read_picture(path))
        except InputError as error:
            found.problems.append(str(error))
    found.runs.sort(key=lambda run: (rank(NETS, str(run.arguments.get("net"))), run.folder))
    return found


def list_files(folders: list[Path], problems: list[str]) -> list[Path]:
    """The logs, JSON files and pictures below the folders, in the order of their paths; hidden folders are passed over."""
    files: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        for where, names, found in os.walk(folder, onerror=lambda error: problems.append(describe_error(error))):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(found):
                if name == LOG or name.endswith(".json") or any(fnmatch.fnmatchcase(name, pattern) for pattern in PICTURES):
                    path = Path(where, name)
                    files.setdefault(os.path.realpath(path), path)
    return list(files.values())


# --- results ---------------------------------------------------------------------------------------------------------


def read_result(path: Path) -> Record | None:
    """The result in a JSON file; None if the file holds something else, without a `kind`."""
    with readable(path, "cannot be read"):
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON / 1e6:.0f} MB")
        record = parse(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    record |= {"dataset": data_name(record), "file": path}
    if isinstance(args := record.get("args"), dict):
        record.setdefault("seed", args.get("seed"))
    if record["kind"] in KINDS:
        with readable(path, f"is damaged, or no result of kind {record['kind']}"):
            check_result(record)
    return record


def parse(text: str) -> Any:
    """The value of a JSON text; long integers become floats, or infinite. Raises ValueError, also if nested too deeply."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# --- runs ------------------------------------------------------------------------------------------------------------


def read_run(path: Path, problems: list[str]) -> Run:
    """The run with this log.txt. Lines that are not records of an epoch are left out, as are arguments that cannot be read.

    Raises InputError if no line is a record. An epoch that occurs twice counts as its last line has it.
    """
    with readable(path, "cannot be read"):
        lines = path.read_text(encoding="utf-8").splitlines()
    epochs: dict[float, dict[str, float]] = {}
    bad: list[int] = []
    for number, line in enumerate(lines, 1):
        record = log_record(line)
        if record:
            epochs[record["epoch"]] = record
        else:
            bad.append(number)
    if not epochs:
        raise InputError(f"{path}: holds no epochs")
    if bad:
        more = f" and {len(bad) - 1} others" if len(bad) > 1 else ""
        problems.append(f"{path}: line {bad[0]}{more} left out, no record of an epoch")
    return Run(path.parent, [epochs[epoch] for epoch in sorted(epochs)], read_arguments(path.with_name(CHECKPOINT), problems))


def log_record(line: str) -> dict[str, float] | None:
    """The numbers in a line of log.txt; None if it is not a JSON object with a finite `epoch`."""
    try:
        record = parse(line)
        if not isinstance(record, dict):
            return None
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    except ValueError:
        return None
    return numbers if math.isfinite(numbers.get("epoch", math.nan)) else None


def read_arguments(path: Path, problems: list[str]) -> dict[str, Any]:
    """The arguments in a checkpoint, of which no weights are read; empty if there are none."""
    if not path.exists():
        return {}
    try:
        args = load_checkpoint(path, mmap=zipfile.is_zipfile(path)).get("args", {})
        return dict(parse(json.dumps(plain_args(args), default=str)))
    except InputError as error:
        problems.append(str(error))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        problems.append(f"{path}: its arguments cannot be read ({describe_error(error)})")
    return {}


# --- pictures --------------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Picture:
    """The size of a picture. Raises InputError if it is not a PNG file, or larger than browsers should decode."""
    with readable(path, "is not a picture that can be shown"), Image.open(path, formats=["PNG"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return Picture(path, image.width, image.height, path.stat().st_size)


# --- names -----------------------------------------------------------------------------------------------------------


def short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """{folder: the parts of its path, from the left, that are needed to tell the folders apart}."""
    unique = list(dict.fromkeys(folders))
    names: list[tuple[str, ...]] = [()] * len(unique)
    for parts in zip_longest(*(folder.parts for folder in unique), fillvalue=""):
        longer = [(*name, part) if part else name for name, part in zip(names, parts, strict=True)]
        if len(set(longer)) > len(set(names)):
            names = longer
    return {folder: "/".join(name) or folder.name or str(folder) for folder, name in zip(unique, names, strict=True)}
