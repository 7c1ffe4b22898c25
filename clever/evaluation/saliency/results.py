"""Results of the saliency evaluation: a row per image, the means over a set, and rows of its overview."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clever import distributed, utils
from clever.evaluation.saliency.data import Example
from clever.evaluation.saliency.detection import Detection
from clever.evaluation.saliency.metrics import SaliencyMeter
from clever.evaluation.saliency.pictures import OverviewRow, overview_row

METHODS = ("TokenCut", "TokenCut + bilateral solver")
COLUMNS = (
    "image", "IoU", "accuracy", "F_max", "solver_IoU", "solver_accuracy", "solver_F_max", "patches", "foreground",
    "degenerate", "error",
)  # fmt: skip


@dataclass
class SetResults:
    """Results on a set of images, or on the share of one process."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # of results.csv
    meters: dict[str, SaliencyMeter] = field(default_factory=lambda: {method: SaliencyMeter() for method in METHODS})
    overview: list[OverviewRow] = field(default_factory=list)

    def add(self, example: Example, detection: Detection, in_overview: bool) -> None:
        """Add an image. It is scored if it has a ground truth."""
        h, w = detection.cut.mask.shape
        row = {
            "image": example.pair.name, "error": None, "patches": f"{w}x{h}", "foreground": float(detection.mask.mean()),
            "degenerate": detection.cut.degenerate,
        }  # fmt: skip
        if example.truth is not None:
            for prefix, method, mask in zip(("", "solver_"), METHODS, (detection.mask, detection.refined), strict=True):
                scores = self.meters[method].add(mask, example.truth)
                row |= {prefix + name: value for name, value in scores.items()}
        self.rows.append(row)
        if in_overview:
            self.overview.append(overview_row(_caption(row), example, detection))

    def add_failure(self, name: str, error: str) -> None:
        """Add an image that could not be evaluated."""
        self.rows.append({"image": name, "error": error})

    def gather(self) -> "SetResults":
        """The results of all processes, sorted by name."""
        parts = distributed.all_gather_objects(self)
        return SetResults(
            sorted((row for part in parts for row in part.rows), key=lambda row: row["image"]),
            {method: sum((part.meters[method] for part in parts), SaliencyMeter()) for method in METHODS},
            sorted((row for part in parts for row in part.overview), key=lambda row: row.caption),
        )

    @property
    def failures(self) -> list[str]:
        return [f"{row['image']} ({row['error']})" for row in self.rows if row["error"]]

    @property
    def num_degenerate(self) -> int:
        """Number of images without a defined cut."""
        return sum(bool(row.get("degenerate")) for row in self.rows)

    def means(self) -> dict[str, dict[str, float]]:
        """{method: IoU, accuracy and F_max of the set}; empty if no image has a ground truth."""
        return {method: meter.means() for method, meter in self.meters.items() if meter.images}


def _caption(row: dict[str, Any]) -> str:
    scores = [f"IoU {row['IoU']:.3f}, solver {row['solver_IoU']:.3f}"] if "IoU" in row else []
    return "\n".join([row["image"], *scores, *([row["degenerate"]] if row["degenerate"] else [])])


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write results.csv, one line per image; values that do not apply are empty."""
    lines = [[_cell(row.get(column)) for column in COLUMNS] for row in rows]
    utils.save_csv([COLUMNS, *lines], path)


def _cell(value: Any) -> Any:
    return f"{value:.6f}" if isinstance(value, float) else value


def rounded(means: dict[str, float]) -> dict[str, float | None]:
    """Means for a JSON file, which has no NaN."""
    return {name: None if math.isnan(value) else round(value, 6) for name, value in means.items()}
