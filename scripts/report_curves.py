"""The curves of a report: what log.txt holds, one chart per quantity, all runs in each."""

import fnmatch
import math
from collections.abc import Iterable
from typing import Any

from scripts.report_html import Html, json_block, tag
from scripts.report_records import Run

# Groups of charts, and patterns of the names in log.txt; the rest is the last group.
GROUPS = {
    "Losses": ("train_normalized_loss", "train_loss", "train_loss_*", "test_loss"),
    "Accuracy while training": ("knn_top1", "knn_ALL", "knn_IR", "knn_EF", "test_acc*"),
    "R2 of rotation while training": ("rotation_r2_ALL", "rotation_r2_IR", "rotation_r2_EF"),
    "Schedules": ("train_lr", "train_wd", "train_momentum"),
    "Collapse": ("train_feature_std*", "train_teacher_entropy", "train_center*"),
    "Speed and memory": ("train_images_per_second", "seconds*", "memory_gib"),
    "Other": ("*",),
}
TITLES = {
    "train_normalized_loss": "loss as a fraction of ln K",
    "train_lr": "learning rate",
    "train_wd": "weight decay",
    "train_momentum": "momentum of the teacher",
    "train_images_per_second": "images per second",
    "seconds": "seconds per epoch",
    "seconds_probe": "seconds of the evaluation",
    "memory_gib": "peak memory, GiB",
    "knn_top1": "k-NN, top-1 in percent",
    **{f"knn_{part}": f"20-NN of {part}, top-1 in percent" for part in ("ALL", "IR", "EF")},
    **{f"rotation_r2_{part}": f"R2 of rotation from {part}" for part in ("ALL", "IR", "EF")},
}
OPEN_GROUPS = 3  # the others are closed at first
SHOWN_RUNS = 12  # at first, of more
COLORS = 8  # in report.css; then they come again, with other dashes


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """{title of a group: its names}, in the order of GROUPS and of their patterns; groups without names are left out."""
    left = sorted(set(names) - {"epoch"})
    groups = {}
    for title, patterns in GROUPS.items():
        groups[title] = [name for pattern in patterns for name in left if fnmatch.fnmatchcase(name, pattern)]
        groups[title] = list(dict.fromkeys(groups[title]))
        left = [name for name in left if name not in groups[title]]
    return {title: chosen for title, chosen in groups.items() if chosen}


def plain(value: float) -> float | None:
    """A number with the digits that a chart can show; None if it is not finite."""
    return None if not math.isfinite(value) else int(value) if value == int(value) else float(f"{value:.5g}")


def curve(run: Run, name: str) -> dict[str, list[float | None]]:
    """Values `y` of one quantity, None where they are not finite; with their epochs `x` if some epochs have no value."""
    found = {"y": [plain(record[name]) for record in run.log if name in record]}
    if 0 < len(found["y"]) < len(run.log):
        found["x"] = epochs_of([record for record in run.log if name in record])
    return found


def epochs_of(log: list[dict[str, float]]) -> list[float | None]:
    return [plain(record["epoch"]) for record in log]


def swatch(index: int) -> Html:
    """The colour of a run: a short piece of its line."""
    return tag("i", class_=f"swatch c{index % COLORS} d{index // COLORS % 3}")


def curves_section(runs: list[Run], labels: list[str]) -> Html:
    """Legend and charts of all runs, to be drawn by report.js from the data that comes with them."""
    charts: list[dict[str, Any]] = []
    groups = []
    for title, names in group_names(name for run in runs for record in run.log for name in record).items():
        figures = []
        for name in names:
            curves = [curve(run, name) for run in runs]
            lost = sum(y is None for found in curves for y in found["y"])
            note = f"{lost} values are not finite" if lost > 1 else "1 value is not finite" if lost else ""
            heading = tag("figcaption", TITLES.get(name, name.removeprefix("train_")), tag("small", note) if note else "")
            figures.append(tag("figure", heading, tag("div", class_="plot"), class_="chart", data_chart=len(charts)))
            charts.append({"curves": curves, "line": 1 if name == "train_normalized_loss" else None})
        opened = len(groups) < OPEN_GROUPS
        count = tag("small", f"{len(names)} chart{'s' * (len(names) > 1)}")
        grid = tag("div", *figures, class_="charts")
        groups.append(tag("details", tag("summary", title, " ", count), grid, class_="group", open=opened))
    chips = [
        tag("button", swatch(i), label, type="button", class_="chip", aria_pressed=str(i < SHOWN_RUNS).lower(), title=label)
        for i, label in enumerate(labels)
    ]
    every = [tag("button", word, type="button", class_="plain", data_all=word) for word in ("all", "none")]
    note = tag("p", f"The first {SHOWN_RUNS} of {len(runs)} runs are shown.", class_="note") if len(runs) > SHOWN_RUNS else ""
    buttons = [*every, *chips] if len(runs) > 1 else chips
    legend = tag("div", *buttons, class_="legend", role="group", aria_label="runs in the charts")
    epochs = [epochs_of(run.log) for run in runs]
    data = json_block("curves-data", {"labels": labels, "epochs": epochs, "charts": charts})
    hint = tag("p", "By epoch. Point at a chart to read its values; press a run's name to hide or show it.", class_="note")
    return tag("section", tag("h2", "Curves"), hint, note, legend, *groups, data)
