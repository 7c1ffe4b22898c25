"""Tables in Markdown, and table and plot of the results of eval_equivariance.py, from the record that it writes as JSON."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clever.utils import atomic_file, write_text_atomically

Record = dict[str, Any]
Space = tuple[str, str | None]  # part and control

SPACES: dict[Space, str] = {  # columns of the tables, in their order
    ("ALL", None): "ALL",
    ("IR", None): "IR",
    ("EF", None): "EF",
    ("EF", "random_subspace"): "random, as wide as EF",
    ("ALL", "untrained"): "untrained ALL",
    ("IR", "untrained"): "untrained IR",
    ("EF", "untrained"): "untrained EF",
    ("ALL", "shuffled"): "shuffled targets",
}
MEASURES = {"r2": "R2", "mae_degrees": "error (degrees)", "accuracy": "accuracy", "auc": "AUC"}
GAPS = {"cosine_gap": "cosine gap", "gram_gap": "Gram gap"}
DIGITS = {"mae_degrees": 1, "gram_gap": 4}  # others 3

BARS: dict[Space, tuple[str, str]] = {  # of the plot
    ("ALL", None): ("ALL: the whole representation", "#4d4d4d"),
    ("IR", None): ("IR: its invariant part", "#1f6fb4"),
    ("EF", None): ("EF: its equivariant factor", "#e6731a"),
    ("EF", "random_subspace"): ("random dimensions, as many as EF's", "#f2c18d"),
    ("ALL", "untrained"): ("ALL of the untrained network", "#c4c4c4"),
}
TITLES = {"rotation": "rotation\n(disc of the image)", "rotation_corners": "rotation\n(whole image)"}
HEADS = {"linear": "Linear regression", "mlp": "MLP"}
INPUTS = {"pair": "the clean and the transformed view", "single": "the transformed view"}


def align(lines: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table, the title first, with aligned columns; all but the first `text_columns` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: list[str]) -> list[str]:
        pairs = enumerate(zip(cells, widths, strict=True))
        return [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in pairs]

    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [row(lines[0]), rule, *map(row, lines[1:])])


def group_by(records: list[Record], *fields: str) -> dict[Any, list[Record]]:
    """{values of these fields: their records}, in the order in which they come; of one field, its value alone."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        values = tuple(record[field] for field in fields)
        groups.setdefault(values if len(fields) > 1 else values[0], []).append(record)
    return groups


def by_space(records: list[Record]) -> dict[Space, Record]:
    """{(part, control): record}."""
    return {(record["part"], record["control"]): record for record in records}


def std_over_draws(record: Record, field: str) -> float | None:
    """Standard deviation over the random subspaces; None for other records, and for a single subspace, which has none."""
    return record[f"{field}_std"] if record.get("draws", 1) > 1 else None


# --- table ---------------------------------------------------------------------------------------------------------------


def to_markdown(record: Record) -> str:
    """A table for each head and input, with a row for every measure, and for every target if there are several; one of gaps."""
    sections = []
    for (head, kind), results in group_by(record["results"], "head", "input").items():
        rows = {}
        for name, group in group_by(results, "transform").items():
            found, first = by_space(group), group[0]
            fields = [field for field in MEASURES if first[field] is not None]
            rows |= {f"{name}: {MEASURES[field]}": {key: cell(r, field) for key, r in found.items()} for field in fields}
            targets = first["r2_per_target"] if len(first["r2_per_target"]) > 1 else ()
            for target in targets:
                rows[f"{name}, {target}: R2"] = {key: number(r["r2_per_target"][target]) for key, r in found.items()}
        sections.append(f"What is known (head {head}, input {kind})\n\n{to_table(rows)}")
    rows = {
        f"{name}: {title}": {key: cell(found, field) for key, found in by_space(group).items()}
        for name, group in group_by(record["gaps"], "transform").items()
        for field, title in GAPS.items()
    }
    return "\n\n".join([*sections, f"How far features move\n\n{to_table(rows)}"])


def cell(record: Record, field: str) -> str:
    """The value, with its standard deviation over draws if there is one."""
    digits, std = DIGITS.get(field, 3), std_over_draws(record, field)
    return number(record[field], digits) + ("" if std is None else f" ± {std:.{digits}f}")


def number(value: float, digits: int = 3) -> str:
    """The rounded number, without a sign if it is 0."""
    return f"{round(value, digits) + 0:.{digits}f}"


def to_table(rows: dict[str, dict[Space, str]]) -> str:
    """A Markdown table of {title: cells}; the columns are the SPACES that occur."""
    keys = [key for key in SPACES if any(key in cells for cells in rows.values())]
    lines = [[title, *(cells.get(key, "-") for key in keys)] for title, cells in rows.items()]
    return align([["", *(SPACES[key] for key in keys)], *lines])


# --- plot ----------------------------------------------------------------------------------------------------------------


def plot(record: Record, path: str) -> None:
    """A bar chart of R2: a panel per head and input, a group of bars per transformation, a bar per part or control."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = group_by(record["results"], "head", "input")
    count = len(group_by(record["results"], "transform"))
    figure, panels = plt.subplots(
        len(settings), squeeze=False, layout="constrained", figsize=(3 + 1.3 * max(count, 5), 1.4 + 2.8 * len(settings))
    )
    for panel, ((head, kind), results) in zip(panels[:, 0], settings.items(), strict=True):
        draw_bars(panel, results)
        panel.set_title(f"{HEADS[head]}, from features of {INPUTS[kind]}", fontsize="medium", loc="left")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"What frozen features of {record['net']} {record['arch']} know about the transformation of an image")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def draw_bars(panel: Any, results: list[Record]) -> None:
    """A group of bars for every transformation. R2 below 0, worse than predicting the mean, has no bar."""
    names = list(group_by(results, "transform"))
    found = {(result["transform"], result["part"], result["control"]): result for result in results}
    spaces = [(key, *about) for key, about in BARS.items() if (names[0], *key) in found]
    width = 0.85 / len(spaces)
    for i, (key, label, colour) in enumerate(spaces):
        bars = [found[(name, *key)] for name in names]
        places = np.arange(len(names)) + (i - (len(spaces) - 1) / 2) * width
        heights, spread = [bar["r2"] for bar in bars], [std_over_draws(bar, "r2") for bar in bars]
        panel.bar(places, heights, 0.92 * width, color=colour, label=label)
        if None not in spread:
            panel.errorbar(places, heights, spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    panel.set_xticks(range(len(names)), [TITLES.get(name, name) for name in names])
    panel.set(ylabel="R2 on other images\n(0: nothing, 1: everything)", ylim=(0, 1.05))
    panel.spines[["top", "right"]].set_visible(False)


def save_csv(rows: Iterable[Sequence[Any]], path: str | Path) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text_atomically(text.getvalue(), path)
