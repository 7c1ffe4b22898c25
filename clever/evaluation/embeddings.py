"""Tables of embeddings: files for pandas, polars and numpy, and pictures of them in two dimensions.

Shapes: M images, D' columns of a part.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clever.training.telemetry import COLLAPSED, feature_std
from clever.utils import atomic_file, printable, save_json


@dataclass
class Embeddings:
    """One row per image.

    Args:
        paths: relative to the folder of the images.
        classes: name of each image's class, or None where it has none.
        parts: features float32 [M, D'] by the name of their column: `ir` and `ef`, or `features` for a network without parts.
        about: what they were made of and with; plain values.
    """

    paths: list[str]
    classes: list[str | None]
    parts: dict[str, np.ndarray]
    about: dict[str, Any]


def write_parquet(table: Embeddings, path: Path) -> None:
    """Columns path, class, and a list of fixed length for each part; `about` is in the metadata of the schema, key `clever`."""
    import pyarrow
    from pyarrow import parquet

    columns = {"path": pyarrow.array(table.paths, pyarrow.string()), "class": pyarrow.array(table.classes, pyarrow.string())}
    for name, rows in table.parts.items():
        values = pyarrow.array(np.ascontiguousarray(rows).reshape(-1))
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(values, rows.shape[1])
    metadata = {"clever": json.dumps(table.about)}
    with atomic_file(path) as temporary:
        parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), temporary)


def write_npz(table: Embeddings, path: Path) -> None:
    """Arrays path [M], class [M] (empty where there is none), one [M, D'] for each part, and `about`, a JSON string."""
    texts = {"path": table.paths, "class": [name or "" for name in table.classes], "about": json.dumps(table.about)}
    arrays = {name: np.array(text, dtype=str) for name, text in texts.items()} | table.parts
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def write_csv(table: Embeddings, path: Path) -> None:
    """Columns path, class, and one for each feature: ir_0, ir_1, ..., ef_0, ...; `about` is in <path>.json."""
    names = [f"{part}_{i}" for part, rows in table.parts.items() for i in range(rows.shape[1])]
    save_json(table.about, f"{path}.json")
    with atomic_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", *names])
        for i, (name, label) in enumerate(zip(table.paths, table.classes, strict=True)):
            features = np.concatenate([rows[i] for rows in table.parts.values()])
            writer.writerow([name, label or "", *features])  # as short as float32 can be told apart


WRITERS: dict[str, Callable[[Embeddings, Path], None]] = {".parquet": write_parquet, ".npz": write_npz, ".csv": write_csv}


# --- pictures ------------------------------------------------------------------------------------------------------------

REDUCTIONS = {"pca": "sklearn", "tsne": "sklearn", "umap": "umap"}  # the packages they need
MAX_CLASSES = 20  # that a legend can tell apart


def reduce(features: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Features [M, D'] in two dimensions [M, 2]."""
    features = np.pad(features, ((0, 0), (0, max(0, 2 - features.shape[1]))))  # an EF may have a single column
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, random_state=seed).fit_transform(features)
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
    import umap

    return umap.UMAP(n_components=2, n_neighbors=min(15, len(features) - 1), random_state=seed).fit_transform(features)


TITLES = {"ir": "invariant representation (IR)", "ef": "equivariant factor (EF)", "features": "whole representation"}


def plot(
    parts: dict[str, np.ndarray], method: str, path: str | Path, title: str, seed: int = 0,
    classes: list[str] | None = None, angles: np.ndarray | None = None,
) -> None:  # fmt: skip
    """A panel for each part, a point for each image, coloured by its class or by the angle (degrees [M]) of its rotation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(parts), figsize=(5.5 * len(parts) + 1.5, 5), squeeze=False, layout="constrained")
    names = sorted(set(classes or ()))
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    for panel, (part, features) in zip(panels[0], parts.items(), strict=True):
        collapsed = feature_std(torch.from_numpy(features)) < COLLAPSED  # the method would spread rounding noise
        points = np.zeros((len(features), 2)) if collapsed else reduce(features, method, seed)  # M, 2
        if angles is not None:
            drawn = panel.scatter(*points.T, c=angles, cmap="coolwarm", vmin=-90, vmax=90, s=9)
        else:
            rows = [np.array(classes) == name for name in names]
            drawn = [panel.scatter(*points[mine].T, color=colours[i], s=9) for i, mine in enumerate(rows)]
        text = f"{TITLES[part]}, {features.shape[1]} dimensions"
        if collapsed:
            text += f"\ncollapsed: the same features for all images (feature_std < {COLLAPSED})"
            print(f"warning: {text}".replace("\n", "; "))
        panel.set(title=text, xticks=[], yticks=[])
        panel.set(xlabel=f"{method.upper()} 1", ylabel=f"{method.upper()} 2")
    if angles is not None:
        figure.colorbar(drawn, ax=panels, label="rotation of the image, degrees", ticks=range(-90, 91, 45))
    else:
        labels = [printable(name).replace("$", r"\$") for name in names]
        figure.legend(drawn, labels, title="class", loc="outside right upper", frameon=False, markerscale=2)
    figure.suptitle(printable(title), parse_math=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
