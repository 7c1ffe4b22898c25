"""What the parts of networks do under rotation, from the results of eval_equivariance.py: a table and a panel of bars.

results_table.py shows both beside the accuracies. R2 says how well a linear regressor predicts the angle from the features (0:
not at all, 1: exactly); the cosine gap says how much closer a rotated image is to itself than to other images (0: not closer).
"""

import math

import matplotlib.pyplot as plt
import numpy as np

from clever.evaluation.tables import align, std_over_draws

RANDOM_DIMENSIONS = "random dimensions"  # as wide as the EF
PARTS = {
    ("ALL", None): "ALL", ("IR", None): "IR", ("EF", None): "EF", ("EF", "random_subspace"): RANDOM_DIMENSIONS
}  # fmt: skip
MEASURES = {"r2": "R2", "cosine_gap": "cosine gap"}
ROTATION = "rotation"

Value = tuple[float, float | None]  # and its standard deviation over several random dimensions
Rotation = dict[str, dict[str, Value]]  # {row: {measure: value}}


def split_untrained(record: dict) -> list[dict]:
    """One result of eval_equivariance.py as two: of the network, and of the untrained one (its ALL) that it is compared with.

    The seed of the evaluation is the one from which the untrained network was initialised. If it was not measured, there is
    one result.
    """
    untrained = {
        name: [entry | {"control": None} for entry in record[name] if (entry["part"], entry["control"]) == ("ALL", "untrained")]
        for name in ("results", "gaps")
    }
    about = {"pretrained_epochs": 0, "pretraining_seed": record["seed"]}
    return [record, *([record | about | untrained] if untrained["results"] else [])]


def rotation_rows(record: dict, name: str) -> Rotation:
    """The rows of one result of eval_equivariance.py, for the network `name`.

    Of several heads and inputs the first counts; without the transformation `rotation` there are no rows.
    """
    rows: Rotation = {}
    results = [entry for entry in record["results"] if entry.get("transform") == ROTATION]
    first = [entry for entry in results if all(entry.get(key) == results[0].get(key) for key in ("head", "input"))]
    gaps = [entry for entry in record["gaps"] if entry.get("transform") == ROTATION]
    for measure, entries in (("r2", first), ("cosine_gap", gaps)):
        for entry in entries:
            part = PARTS.get((entry.get("part"), entry.get("control")))
            if part and isinstance(entry.get(measure), (int, float)):
                rows.setdefault(f"{name} {part}", {})[measure] = entry[measure], std_over_draws(entry, measure)
    return rows


def to_markdown(rows: Rotation) -> str:
    """The table with aligned columns."""

    def cell(values: dict[str, Value], measure: str) -> str:
        if measure not in values:
            return "-"
        value, std = values[measure]
        return f"{value:.2f}" + ("" if std is None else f" ± {std:.2f}")

    lines = [[ROTATION, *MEASURES.values()]]
    return align(lines + [[row, *(cell(values, measure) for measure in MEASURES)] for row, values in rows.items()])


def draw(axes: plt.Axes, rows: Rotation, colors: dict[str, str]) -> None:
    """A group of bars for each measure, a bar for each row, as in the table; random dimensions are hatched."""
    names, width = list(rows), 0.86 / len(rows)
    for i, row in enumerate(names):
        places = np.arange(len(MEASURES)) + (i - (len(names) - 1) / 2) * width
        heights, spread = zip(*(rows[row].get(measure, (math.nan, None)) for measure in MEASURES), strict=True)
        is_random = row.endswith(RANDOM_DIMENSIONS)
        bars = axes.bar(
            places, heights, 0.92 * width, color=colors[row], label=row, hatch="///" if is_random else None,
            yerr=None if None in spread else spread, edgecolor="white", linewidth=0,
        )  # fmt: skip
        axes.bar_label(bars, ["" if math.isnan(h) else f"{h:.2f}" for h in heights], fontsize=8, padding=2)
    titles = ["R2 of the angle\n(1: predicted exactly)", "cosine gap\n(0: as far as another image)"]
    axes.set_xticks(range(len(MEASURES)), titles)
    lowest = min(values[0] for row in rows.values() for values in row.values())
    axes.set(ylim=(min(0, 1.2 * lowest - 0.06) if lowest < 0 else 0, 1.05), title="what rotation does to the features")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
