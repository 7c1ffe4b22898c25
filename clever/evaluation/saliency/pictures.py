"""Pictures of the saliency evaluation: the masks of an image, and an overview of several images."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from clever import utils
from clever.evaluation.saliency.bilateral_solver import largest_object
from clever.evaluation.saliency.data import Example
from clever.evaluation.saliency.detection import Detection, upsample

MASK_FOLDERS = ("masks", "solver", "objects")
OVERVIEW_COLUMNS = ("image", "eigenvector", "TokenCut", "+ bilateral solver", "ground truth")


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Values 0..1 as grey levels 0..255."""
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def save_masks(detection: Detection, output: Path, name: str) -> None:
    """Write <output>/{masks,solver,objects}/<name>.png."""
    masks = (detection.mask, detection.refined, largest_object(detection.refined))
    for folder, values in zip(MASK_FOLDERS, masks, strict=True):
        utils.save_png(to_uint8(values), output / folder / f"{name}.png")


@dataclass
class OverviewRow:
    """An image's row of the overview."""

    caption: str
    pictures: list[np.ndarray]  # RGB, in the order of OVERVIEW_COLUMNS; without ground truth the last one is missing


def overview_row(caption: str, example: Example, detection: Detection, height: int = 150) -> OverviewRow:
    """The pictures are shrunk to `height` pixels, because those of all images are kept in memory until they are drawn."""
    H, W = detection.mask.shape
    y = detection.cut.eigenvector
    stretched = (y - y.min()) / (np.ptp(y) or 1.0)
    eigenvector = matplotlib.colormaps["viridis"](upsample(stretched, (H, W)), bytes=True)[..., :3]  # H, W, 3
    pictures = [example.pixels, eigenvector, to_uint8(detection.mask), to_uint8(detection.refined)]
    if example.truth is not None:
        pictures.append(to_uint8(example.truth.astype(float)))
    size = max(1, round(height * W / H)), height
    return OverviewRow(caption, [np.asarray(Image.fromarray(picture).convert("RGB").resize(size)) for picture in pictures])


def draw_overview(rows: list[OverviewRow]) -> np.ndarray:
    """One row per image: image, eigenvector, TokenCut's mask, refined mask and, if any image has one, ground truth."""
    titles = OVERVIEW_COLUMNS[: max(len(row.pictures) for row in rows)]
    figure = Figure(figsize=(2 * len(titles) + 1.2, 1.7 * len(rows) + 0.3), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for row_axes, row in zip(grid, rows, strict=True):
        for axes, picture in zip(row_axes, row.pictures, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(row.caption, fontsize=7)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(utils.printable(title), fontsize=9, parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
