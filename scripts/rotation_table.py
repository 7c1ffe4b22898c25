"""What the parts of networks do under rotation, from the results of eval_equivariance.py: a table and a panel of bars.

results_table.py shows both beside the accuracies. R2 says how well a linear regressor tells the angle from the features (0: not
at all, 1: exactly); the cosine gap says how much closer a rotated image is to itself than to other images (0: not closer).
"""

import matplotlib.pyplot as plt
import numpy as np

from evaluation.markdown import align

RANDOM_PART = "random part"  # as wide as the EF
PARTS = {
    ("ALL", None): "ALL", ("IR", None): "IR", ("EF", None): "EF", ("EF", "random_subspace"): RANDOM_PART
}  # fmt: skip
MEASURES = {"r2": "R2", "cosine_gap": "cosine gap"}
TITLE = "rotation"

Rotation = dict[str, dict[str, tuple[float, float]]]  # {row: {measure: value, standard deviation over random parts}}


def rotation_rows(record: dict, name: str, untrained_name: str) -> Rotation:
    """The rows of one result of eval_equivariance.py for the network `name`, and of its untrained copy.

    Of several heads and inputs the first counts; without the transformation `rotation` there are no rows.
    """
    rows: Rotation = {}
    results = [entry for entry in record["results"] if entry["transform"] == TITLE]
    first = [entry for entry in results if all(entry[key] == results[0][key] for key in ("head", "input"))]
    gaps = [entry for entry in record["gaps"] if entry["transform"] == TITLE]
    for measure, entries in (("r2", first), ("cosine_gap", gaps)):
        for entry in entries:
            space = (entry["part"], entry["control"])
            if space == ("ALL", "untrained"):
                row = f"{untrained_name} ALL"
            elif space in PARTS:
                row = f"{name} {PARTS[space]}"
            else:
                continue
            rows.setdefault(row, {})[measure] = entry[measure], entry.get(f"{measure}_std", 0.0)
    return rows


def to_markdown(rows: Rotation) -> str:
    """The table with aligned columns."""

    def cell(values: dict[str, tuple[float, float]], measure: str) -> str:
        value, std = values[measure]
        return f"{value:.2f}" + (f" ± {std:.2f}" if std else "")

    lines = [[TITLE, *MEASURES.values()]]
    return align(lines + [[row, *(cell(values, measure) for measure in MEASURES)] for row, values in rows.items()])


def draw(axes: plt.Axes, rows: Rotation, colors: dict[str, str]) -> None:
    """A group of bars for each measure, a bar for each row, as in the table; random parts are hatched."""
    names, width = list(rows), 0.86 / len(rows)
    for i, row in enumerate(names):
        places = np.arange(len(MEASURES)) + (i - (len(names) - 1) / 2) * width
        heights, spread = zip(*(rows[row][measure] for measure in MEASURES), strict=True)
        is_random_part = row.endswith(RANDOM_PART)
        bars = axes.bar(
            places, heights, 0.92 * width, color=colors[row], label=row, hatch="///" if is_random_part else None,
            yerr=spread if any(spread) else None, edgecolor="white", linewidth=0,
        )  # fmt: skip
        axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8, padding=2)
    titles = ["R2 of the angle\n(1: told exactly)", "cosine gap\n(0: as far as another image)"]
    axes.set_xticks(range(len(MEASURES)), titles)
    axes.set(ylim=(0, 1.05), title="what rotation does to the features")
    axes.spines[["top", "right"]].set_visible(False)
