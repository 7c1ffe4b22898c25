"""The tables of a report: which rows and columns each kind of result has."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clever.data.augmentations import PERTURBATIONS
from clever.evaluation.names import PARTS
from clever.evaluation.saliency.results import METHODS
from clever.evaluation.tables import (
    GAPS,
    MEASURES,
    SPACES,
    group_by,
)
from scripts.results_table import (
    EQUIVARIANCE,
    NETS,
    PART_ORDER,
    PROBE,
    differing_fields,
    network_name,
    rank,
    row_name,
    variant_of,
)

Record = dict[str, Any]
Value = str | float | bool | None

KNN, DOWNSTREAM, VIDEO, SALIENCY = "knn", "downstream", "video_segmentation", "saliency"
CLEAN = "ori"


class Column(NamedTuple):
    """Args: key of the record, heading, and digits after the point; with digits the value must be a number, or missing."""

    key: str
    title: str
    digits: int | None = None


# What a result depends on. A table shows the columns in which its rows differ, and states the others once.
SETTINGS = (
    Column("dataset", "data"), Column("net", "network"), Column("arch", "backbone"), Column("aug", "recipe"),
    Column("pretrained_epochs", "epochs"), Column("hp1", "hp1"), Column("pretraining_seed", "pretraining seed"),
    Column("seed", "seed"), Column("num_train_images", "training images"), Column("num_test_images", "test images"),
    Column("num_labels", "classes"), Column("backbone", "weights"),
)  # fmt: skip
PART, PERTURBATION = Column("part", "part"), Column("test_aug_type", "images")
ORDERS = {PART.key: PART_ORDER, PERTURBATION.key: tuple(PERTURBATIONS)}  # of values that are not sorted by name


# --- rows of a result ------------------------------------------------------------------------------------------------


def training_rows(record: Record) -> list[Record]:
    """A classifier after its training: only then there is a best epoch."""
    return [record] if "best_accuracy" in record else []


def evaluation_rows(record: Record) -> list[Record]:
    """A trained classifier that was evaluated, mostly on perturbed images."""
    return [] if "best_accuracy" in record else [record]


def knn_rows(record: Record) -> list[Record]:
    return [record | result for result in record["results"]]


def equivariance_rows(record: Record) -> list[Record]:
    """A row for every transformation, head, input and measure, with a value for every part and control."""
    rows = []
    for (transform, head, kind), found in group_by(record["results"], "transform", "head", "input").items():
        about = {"transform": transform, "head": head, "input": kind}
        rows += [record | about | measured(found, *measure) for measure in MEASURES.items()]
    for transform, found in group_by(record["gaps"], "transform").items():
        rows += [record | {"transform": transform} | measured(found, *measure) for measure in GAPS.items()]
    return [row for row in rows if any(row.get(title) is not None for title in SPACES.values())]


def measured(found: list[Record], key: str, title: str) -> Record:
    """The values of one measure, each under the title of its part or control."""
    values = {SPACES.get((entry["part"], entry["control"])): entry[key] for entry in found}
    return {"measure": title} | {space: value for space, value in values.items() if space is not None}


def video_rows(record: Record) -> list[Record]:
    return [record | record["global"]]


def object_rows(record: Record) -> list[Record]:
    return [record | {"object": name} | scores for name, scores in record.get("objects", {}).items()]


def saliency_rows(record: Record) -> list[Record]:
    """A row for each method; the record also has the scores of both under their names."""
    return [record | {"method": method} | record[method] for method in METHODS if method in record]


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        kind: of the results that it shows.
        title, note: heading, and one sentence on what the numbers say.
        rows: from the record of a result to the rows that it has in this table.
        columns: all but the SETTINGS.
    """

    kind: str
    title: str
    note: str
    rows: Callable[[Record], list[Record]]
    columns: tuple[Column, ...]

    def read(self, record: Record) -> list[dict[str, Value]]:
        """The rows of a result with the values of all columns. Raises LookupError, TypeError or ValueError if it is damaged."""
        return [
            {column.key: plain_value(row.get(column.key), column) for column in (*self.columns, *SETTINGS)}
            for row in self.rows(record)
        ]


def plain_value(value: Any, column: Column) -> Value:
    """The value of a cell. Raises TypeError if it is not a number where one is needed, or if it has parts of its own."""
    if column.digits is not None and not (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        raise TypeError(f"{column.key} is not a number")
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise TypeError(f"{column.key} is neither text nor a number")
    return PARTS.get(value, value) if column == PART else value


def scores(digits: int, *titles: str) -> tuple[Column, ...]:
    """Columns whose headings are their keys."""
    return tuple(Column(title, title, digits) for title in titles)


TOP1, TOP5, LOSS = Column("accuracy", "top-1", 2), Column("top5", "top-5", 2), Column("test_loss", "test loss", 3)
PER_CLASS = Column("mean_class_accuracy", "mean per class", 2)
DAVIS_SCORES = scores(3, "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")
TABLES = (
    Table(
        PROBE, "Linear probe", "Accuracy in percent on clean test images: of the last epoch, and of the best one.",
        training_rows, (PART, TOP1, Column("best_accuracy", "best top-1", 2), TOP5, LOSS, Column("effective_lr", "rate")),
    ),
    Table(
        PROBE, "Linear probe on perturbed images", "The same classifiers, evaluated on perturbed test images; ori: unchanged.",
        evaluation_rows, (PART, PERTURBATION, TOP1, TOP5, LOSS),
    ),
    Table(
        KNN, "k-NN", "Accuracy in percent of a vote of the k nearest training images.",
        knn_rows,
        (PART, PERTURBATION, Column("k", "k"), Column("temperature", "temperature"), Column("top1", "top-1", 2), TOP5),
    ),
    Table(
        EQUIVARIANCE, "Equivariance",
        "What regressors read off the features about a transformation (R2: 0 nothing, 1 all of it); how far features move.",
        equivariance_rows,
        (*(Column(key, key) for key in ("transform", "measure", "head", "input")), *scores(3, *SPACES.values())),
    ),
    Table(
        DOWNSTREAM, "Downstream classification", "Accuracy in percent: of the last epoch, and of the best one.",
        lambda record: [record],
        (
            Column("ds_mode", "mode"), PART, PERTURBATION, TOP1, Column("best_accuracy", "best top-1", 2), TOP5, PER_CLASS,
            Column("best_mean_class_accuracy", "best per class", 2), Column("effective_lr", "rate"),
            Column("effective_backbone_lr", "backbone's rate"),
        ),
    ),
    Table(
        VIDEO, "Video segmentation (DAVIS 2017)", "J: overlap of masks. F: agreement of their boundaries. 1 is perfect.",
        video_rows, (Column("subset", "subset"), *scores(3, "J&F-Mean"), *DAVIS_SCORES),
    ),
    Table(
        VIDEO, "Video segmentation: objects", "The same scores of every object.",
        object_rows, (Column("subset", "subset"), Column("object", "object"), *DAVIS_SCORES),
    ),
    Table(
        SALIENCY, "Saliency", "Masks of the object in the foreground against the true ones. 1 is perfect.",
        saliency_rows,
        (
            Column("method", "method"), *scores(3, "IoU", "accuracy", "F_max"), Column("num_images", "images"),
            Column("num_scored", "scored"), Column("num_degenerate", "without a cut"),
        ),
    ),
)  # fmt: skip
KINDS = tuple(dict.fromkeys(table.kind for table in TABLES))
MOST_OTHER_COLUMNS = 12


def other_table(kind: str, records: Iterable[Record]) -> Table:
    """A table for results of another kind: their first plain values."""
    keys = dict.fromkeys(
        key for record in records for key, value in record.items()
        if isinstance(value, (str, int, float)) and key not in ("kind", *(column.key for column in SETTINGS))
    )  # fmt: skip
    columns = tuple(Column(key, key) for key in list(keys)[:MOST_OTHER_COLUMNS])
    return Table(kind, f"Other results: {kind}", "A kind that this report does not know: its first values.",
        lambda record: [{key: value for key, value in record.items() if isinstance(value, (str, int, float))}],
        columns)  # fmt: skip


def check_result(record: Record) -> list[tuple[Table, list[dict[str, Value]]]]:
    """The tables of a result of a known kind, with its rows in each. Raises an error if the result is damaged."""
    found = [(table, table.read(record)) for table in TABLES if table.kind == record["kind"]]
    cells = ((row[column.key], column) for table, rows in found for row in rows for column in table.columns)
    if not any(value is not None for value, column in cells if column.digits is not None):
        raise ValueError("holds no scores")
    if record["kind"] in (PROBE, KNN):  # the summary needs these
        for name in ("net", "part", "test_aug_type"):
            if not isinstance(record[name], str):
                raise TypeError(f"{name} is not text")
    if record["kind"] == PROBE and "accuracy" not in record:
        raise LookupError("has no accuracy")
    return found


def sort_key(column: Column, value: Value) -> str:
    """What a browser sorts a cell by: a number, or nothing if the text itself counts."""
    if isinstance(value, str):
        return str(rank(ORDERS[column.key], value)[0]) if column.key in ORDERS else ""
    if value is None or math.isnan(value):
        return "NaN"
    return "Infinity" if value == math.inf else "-Infinity" if value == -math.inf else repr(float(value))


# --- the best accuracies ---------------------------------------------------------------------------------------------

Best = dict[str, dict[str, Record]]  # {row: {perturbation: the record with the highest accuracy}}


def accuracies(records: Iterable[Record], kind: str) -> list[Record]:
    """Records with `accuracy`, of linear probes or (one for every k) of k-NN; without those that are not finite."""
    found = [record for record in records if record["kind"] == kind]
    if kind == KNN:
        found = [record | {"accuracy": result.get("top1")} for record in found for result in record["results"]]
    return [record for record in found if record["accuracy"] is not None and math.isfinite(record["accuracy"])]


def best_accuracies(records: list[Record]) -> tuple[Best, list[str]]:
    """The best record of each network and part on each perturbation, and the perturbations, both in the order of a table."""
    fields = differing_fields(records)
    cells: dict[tuple, Record] = {}
    for record in records:
        net, part = network_name(record), PARTS.get(record["part"], record["part"])
        row = variant_of(record, fields[net]), rank(NETS, net), rank(PART_ORDER, part)
        key = (row, row_name(record, fields, part), record["test_aug_type"])
        if key not in cells or record["accuracy"] > cells[key]["accuracy"]:
            cells[key] = record
    best: Best = {}
    for key in sorted(cells, key=lambda key: key[:2]):
        best.setdefault(key[1], {})[key[2]] = cells[key]
    columns = sorted({perturbation for _, _, perturbation in cells}, key=lambda name: rank(PERTURBATIONS, name))
    return best, columns


def headlines(records: list[Record]) -> dict[tuple[str, str], dict[tuple[str, str], Record]]:
    """{(data, backbone): {(network, part): record with the highest accuracy on clean images}}, each in its usual order."""
    best: dict[tuple[str, str], dict[tuple[str, str], Record]] = {}
    for record in records:
        if record["test_aug_type"] != CLEAN:
            continue
        group = best.setdefault((str(record.get("dataset") or "data"), str(record.get("arch") or "backbone")), {})
        key = network_name(record), PARTS.get(record["part"], record["part"])
        if key not in group or record["accuracy"] > group[key]["accuracy"]:
            group[key] = record

    def place(key: tuple[str, str]) -> tuple:
        return rank(NETS, key[0]), rank(PART_ORDER, key[1])

    return {name: {key: best[name][key] for key in sorted(best[name], key=place)} for name in sorted(best)}


def data_name(record: Record) -> str | None:
    """What the result was measured on: its own word, or the folder of --data_path."""
    args = record.get("args") if isinstance(record.get("args"), dict) else {}
    return record.get("dataset") or Path(str(args.get("data_path") or "")).name or None
