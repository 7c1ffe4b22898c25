"""The results of a study from scripts/study.sh: its records, tables and pictures. Run by scripts/tables.py.

Accuracies are means and standard deviations over seeds. A difference between two networks is paired: both are compared on the
same seeds and the same test images (scripts/study_stats.py).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from clever.data.augmentations import PERTURBATIONS
from clever.evaluation.hits import unpack_hits
from clever.evaluation.names import PARTS
from clever.evaluation.tables import SPACES, align
from clever.utils import InputError, atomic_file, write_text_atomically
from scripts.records import BASELINE, NETS, PART_ORDER, UNTRAINED, in_order, readable
from scripts.study_stats import paired_interval

MEASURES = {"probe": "linear probe", "knn": "20-NN"}
COMPARED_PARTS = ("ALL", "IR")  # of every other net, with the baseline's ALL
OWN_SETTINGS = ("arch", "recipe", "net", "seed")  # in which the cells of a study may differ, of one backbone
# Fields of the results and gaps of eval_equivariance.py: what was measured, and the scores.
MEASURED = {"results": ("transform", "head", "input", "part", "control"), "gaps": ("transform", "part", "control")}
SCORES = ("r2", "mae_degrees", "accuracy", "auc", "cosine_gap", "gram_gap")
COLORS = {"dino": "#1f6fb4", "CLeVER": "#e6731a"}

# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """Results of networks (cells), each a backbone pretrained by one net with one recipe and one seed."""

    cells: list[dict[str, Any]]  # as read_cell returns them, and as records.json holds them
    accuracy: pd.DataFrame  # a row per cell, measure, part and perturbation: `top1` and, where differences need them, `hits`
    equivariance: pd.DataFrame  # a row per cell and entry of the results and gaps of eval_equivariance.py


def is_study(source: Path) -> bool:
    """Whether this is a file of records, or the folder of a study, each cell of which has settings."""
    return source.is_file() or any(source.glob("*/settings.txt"))


def load_study(source: Path) -> Study:
    """The cells in a folder, or in a file records.json.

    Raises InputError if two cells are the same network, if a result is damaged, or if cells of a backbone differ in a setting.
    """
    if source.is_dir():
        cells = [read_cell(path.parent) for path in sorted(source.glob("*/settings.txt"))]
    with readable(source, "neither the folder of a study nor a file records.json"):
        if source.is_file():
            cells = json.loads(source.read_text())["cells"]
        networks = [{name: cell["settings"][name] for name in OWN_SETTINGS} | {"cell": cell} for cell in cells]
        networks.sort(key=lambda network: (network["arch"], network["recipe"], network["net"], int(network["seed"])))
        rows = [row for network in networks for row in accuracy_rows(**network)]
        accuracy = pd.DataFrame(rows, columns=[*OWN_SETTINGS, "measure", "part", "perturbation", "top1", "hits"])
        rows = [row for network in networks for row in equivariance_rows(**network)]
        equivariance = pd.DataFrame(rows, columns=[*OWN_SETTINGS, *MEASURED["results"], "kind", "space", *SCORES])
    check_settings(source, cells)
    return Study(cells, accuracy, equivariance)


def accuracy_rows(cell: dict[str, Any], **network: str) -> Iterable[dict[str, Any]]:
    for measure in MEASURES:
        for part, entries in cell[measure].items():
            for perturbation, entry in entries.items():
                hits = unpack_hits(entry["correct"], cell["num_test_images"]) if "correct" in entry else None
                about = {"measure": measure, "part": part, "perturbation": perturbation}
                yield network | about | {"top1": float(entry["top1"]), "hits": hits}


def equivariance_rows(cell: dict[str, Any], **network: str) -> Iterable[dict[str, Any]]:
    for kind in MEASURED:
        for entry in cell.get(kind, ()):
            yield network | entry | {"kind": kind, "space": SPACES.get((entry["part"], entry["control"]))}


def check_settings(source: Path, cells: list[dict[str, Any]]) -> None:
    """Raise InputError unless the cells are different networks, and those of a backbone have equal settings."""
    settings = pd.DataFrame([cell["settings"] | {"num_test_images": cell["num_test_images"]} for cell in cells])
    twice = settings.loc[settings.duplicated(list(OWN_SETTINGS)), list(OWN_SETTINGS)]
    if len(twice):
        raise InputError(f"{source}: two cells {' '.join(twice.iloc[0])}")
    settings.loc[settings["net"] == UNTRAINED, "epochs"] = None
    for arch, group in settings.groupby("arch"):
        for name in group.columns.difference(OWN_SETTINGS):
            if group[name].nunique() > 1:
                values = ", ".join(map(str, group[name].dropna().unique()))
                raise InputError(f"{source}: {arch} has cells with different {name}: {values}; a table needs equal settings")


def read_cell(folder: Path) -> dict[str, Any]:
    """The results in the folder of one cell, rounded; those that are not there yet are left out.

    Returns `settings` {name: value}, `num_test_images`, `probe` and `knn` {part: {perturbation: {top1, correct}}}, where
    `correct` are the hits (clever/evaluation/hits.py) that differences need, `loss` (normalised, per epoch), `results` and
    `gaps` of eval_equivariance.py.
    """
    cell: dict[str, Any] = {"settings": {}, "num_test_images": None, "probe": {}, "knn": {}, "loss": []}
    for line in (folder / "settings.txt").read_text().splitlines():
        name, _, value = line.partition(" ")
        cell["settings"][name] = value.strip()
    for measure, pattern in (("probe", "only_eval_*.json"), ("knn", "knn*.json")):
        for path in sorted(folder.glob(pattern)):
            with readable(path, "not a result of the study; remove it, and repeat its step"):
                add_accuracy(cell, measure, json.loads(path.read_text()))
    if (path := folder / "log.txt").exists():
        with readable(path, "not the log of a pretraining"):
            epochs = map(json.loads, path.read_text().splitlines())
            cell["loss"] = [round(epoch["train_normalized_loss"], 4) for epoch in epochs]
    if (path := folder / "equivariance.json").exists():
        with readable(path, "not a result of the study; remove it, and repeat its step"):
            record = json.loads(path.read_text())
            for kind, names in MEASURED.items():
                cell[kind] = [select_fields(entry, names) for entry in record[kind]]
    return cell


def add_accuracy(cell: dict[str, Any], measure: str, record: dict[str, Any]) -> None:
    """Add a result of eval_linear.py (measure probe) or eval_knn.py (knn) to a cell."""
    result, name = (record["results"][0], "top1") if measure == "knn" else (record, "accuracy")
    part, entry = PARTS[record["part"]], {"top1": round(result[name], 4)}
    if cell["settings"]["net"] != UNTRAINED and part in COMPARED_PARTS:
        unpack_hits(result["correct"], record["num_test_images"])  # raises an error if they are damaged
        entry["correct"] = result["correct"]
    cell[measure].setdefault(part, {})[record["test_aug_type"]] = entry
    cell["num_test_images"] = record["num_test_images"]


def select_fields(entry: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """These fields and the scores, rounded."""
    scores = {name: round(entry[name], 4) for name in SCORES if entry.get(name) is not None}
    return {name: entry[name] for name in names} | scores


# --- tables ----------------------------------------------------------------------------------------------------------

Network = tuple[str, str, str]  # recipe, net, part
Cell = tuple[int, str]  # number of seeds, and what they say


def networks_of(accuracy: pd.DataFrame) -> list[Network]:
    """The rows of the tables: the untrained network, then every net with every recipe, whether or not it is there."""
    parts = {net: in_order(found["part"], PART_ORDER) for net, found in accuracy.groupby("net")}
    recipes = sorted(set(accuracy.loc[accuracy["net"] != UNTRAINED, "recipe"]))
    rows = [("-", UNTRAINED, "ALL")] if UNTRAINED in parts else []
    nets = in_order(set(parts) - {UNTRAINED}, NETS)
    return rows + [(recipe, net, part) for recipe in recipes for net in nets for part in parts[net]]


def mean_and_std(found: pd.DataFrame, by: list[str], value: str, digits: int) -> dict[Any, Cell]:
    """{values of the fields `by`: mean and, of several seeds, standard deviation}."""
    groups = found.dropna(subset=value).groupby(by, sort=False)[value]
    groups = groups.agg(count="count", mean=lambda values: np.mean(values.to_numpy()), std="std")
    texts = groups["mean"].map(f"{{:.{digits}f}}".format)
    texts += groups["std"].map(lambda std: "" if np.isnan(std) else f" ± {std:.{digits}f}")
    return dict(zip(groups.index, zip(groups["count"], texts, strict=True), strict=True))


def align_rows(titles: list[str], columns: list[str], rows: dict[tuple[str, ...], list[Cell | None]]) -> str:
    """A table: the titles of a row, the number of its seeds, and its cells; None where nothing applies.

    A cell of fewer seeds than others in its row says so; one without any seed is `missing`.
    """
    lines = [[*titles, "seeds", *columns]]
    for names, cells in rows.items():
        most = max((seeds for seeds, _ in filter(None, cells)), default=0)
        texts = [
            "" if cell is None else "missing" if not cell[0] else cell[1] if cell[0] == most
            else f"{cell[1]} ({cell[0]} of {most} seeds)"
            for cell in cells
        ]  # fmt: skip
        lines.append([*names, str(most), *texts])
    return align(lines, text_columns=len(titles))


def accuracy_table(accuracy: pd.DataFrame, networks: list[Network], perturbations: list[str]) -> str:
    found = mean_and_std(accuracy, ["recipe", "net", "part", "perturbation"], "top1", digits=1)
    rows = {
        (recipe, f"{net} {part}"): [found.get((recipe, net, part, name), (0, "")) for name in perturbations]
        for recipe, net, part in networks
    }
    return align_rows(["recipe", "network"], perturbations, rows)


def compared(networks: list[Network]) -> list[Network]:
    """The networks of which differences from the baseline are shown."""
    return [row for row in networks if row[1] not in (UNTRAINED, BASELINE) and row[2] in COMPARED_PARTS]


def differences(accuracy: pd.DataFrame) -> dict[tuple[str, str, str, str], tuple[int, float, float, float]]:
    """{(recipe, net, part, perturbation): (seeds, difference, and its interval)}, in points of top-1, for one backbone.

    Differences are taken from the baseline's ALL, over the seeds that both networks have.
    """
    found = accuracy.dropna(subset="hits")
    base = found[(found["net"] == BASELINE) & (found["part"] == "ALL")]
    pairs = found.merge(base, on=["recipe", "perturbation", "seed"], suffixes=("", "_base"))
    intervals = {}
    for key, pair in pairs.groupby(["recipe", "net", "part", "perturbation"], sort=False):
        hits, base_hits = (np.stack(pair[name]).astype(int) for name in ("hits", "hits_base"))  # S, N
        intervals[key] = (len(pair), *paired_interval(100 * (hits - base_hits)))
    return intervals


def difference_table(accuracy: pd.DataFrame, networks: list[Network], perturbations: list[str]) -> str:
    found = {
        key: (seeds, f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        for key, (seeds, mean, low, high) in differences(accuracy).items()
    }
    rows = {
        (recipe, f"{net} {part} - {BASELINE} ALL"): [found.get((recipe, net, part, name), (0, "")) for name in perturbations]
        for recipe, net, part in compared(networks)
    }
    return align_rows(["recipe", "difference"], perturbations, rows)


def equivariance_table(entries: pd.DataFrame, networks: list[Network], score: str) -> str:
    """A row per transformation, recipe and net, a column per part and control."""
    found = mean_and_std(entries, ["transform", "recipe", "net", "space"], score, digits=3)
    applicable = {(transform, net, space) for transform, _, net, space in found}  # dino, for example, has no IR
    spaces = in_order({key[3] for key in found}, SPACES.values())
    rows = {
        (transform, recipe, net): [
            found.get((transform, recipe, net, space), (0, "")) if (transform, net, space) in applicable else None
            for space in spaces
        ]
        for transform in dict.fromkeys(key[0] for key in found)
        for recipe, net, _ in networks if net != UNTRAINED
    }  # fmt: skip
    return align_rows(["transformation", "recipe", "net"], spaces, rows)


def equivariance_tables(entries: pd.DataFrame, networks: list[Network]) -> dict[str, str]:
    """{title: table} for one backbone; only those for which there are scores."""
    tables = {}
    results, gaps = (entries[entries["kind"] == kind] for kind in MEASURED)
    for (head, given), found in results.groupby(["head", "input"], sort=False):
        for score, title in (("r2", "R2"), ("accuracy", "accuracy")):
            if found[score].notna().any():
                title = f"what is known about transformations, {title} (head {head}, input {given})"
                tables[title] = equivariance_table(found, networks, score)
    return tables | ({"cosine gap": equivariance_table(gaps, networks, "cosine_gap")} if len(gaps) else {})


def report(study: Study) -> str:
    """All tables in Markdown."""
    networks = networks_of(study.accuracy)
    perturbations = in_order(study.accuracy["perturbation"], PERTURBATIONS)
    sections = []
    for arch, accuracy in study.accuracy.groupby("arch"):
        tables = {}
        for measure, title in MEASURES.items():
            found = accuracy[accuracy["measure"] == measure]
            tables[f"top-1 (%), {title}"] = accuracy_table(found, networks, perturbations)
            if compared(networks):
                tables[f"differences of top-1 (points), {title}"] = difference_table(found, networks, perturbations)
        tables |= equivariance_tables(study.equivariance[study.equivariance["arch"] == arch], networks)
        sections += [f"### {arch}: {title}\n\n{table}" for title, table in tables.items()]
    seeds = " ".join(sorted({cell["settings"]["seed"] for cell in study.cells}, key=int))
    note = f"Mean ± standard deviation over seeds ({seeds}); in brackets, 95 % intervals over seeds and test images."
    return "\n\n".join([note, *sections]) + "\n"


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_panels(rows: list[str], columns: list[str]) -> tuple[plt.Figure, dict[tuple[str, str], plt.Axes]]:
    """A figure with a panel per row and column."""
    size = 1.5 + 4.5 * len(columns), 0.8 + 2.9 * len(rows)
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )  # fmt: skip
    panels = {(row, column): axes[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}
    for (row, column), panel in panels.items():
        panel.set_title(f"{row}, {MEASURES.get(column, column)}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
    return figure, panels


def finish(figure: plt.Figure, title: str, panel: plt.Axes, path: Path) -> None:
    """Add a title and the legend of one panel to the figure, and write it."""
    figure.suptitle(title, fontsize=11)
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def plot_curves(study: Study, path: Path) -> None:
    """The normalised loss per epoch: mean over seeds as a line, their range as a band."""
    curves: dict[tuple[str, str, str], list[list[float]]] = {}
    for cell in study.cells:
        if cell["loss"]:
            curves.setdefault(tuple(cell["settings"][name] for name in ("arch", "recipe", "net")), []).append(cell["loss"])
    archs, recipes, nets = (sorted({key[i] for key in curves}) for i in range(3))
    figure, panels = draw_panels(archs, recipes)
    for (arch, recipe), panel in panels.items():
        for net in in_order(nets, NETS):
            if found := curves.get((arch, recipe, net)):
                losses = np.array([curve[: min(map(len, found))] for curve in found])  # S, epochs
                epochs = np.arange(1, losses.shape[1] + 1)
                (line,) = panel.plot(epochs, losses.mean(0), color=COLORS.get(net), marker=".", label=net)
                panel.fill_between(epochs, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.25, linewidth=0)
        panel.set(xlabel="epoch", ylim=(0, 1.05))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for arch in archs:
        panels[arch, recipes[0]].set_ylabel("loss / ln(out_dim)\n(1: nothing learned)")
    finish(figure, "Loss in training: mean of the seeds (lines), and their range (bands)", panel, path)


def plot_differences(study: Study, path: Path) -> None:
    """Differences of top-1 with their intervals; above 0, the network is ahead of the baseline."""
    archs, perturbations = sorted(set(study.accuracy["arch"])), in_order(study.accuracy["perturbation"], PERTURBATIONS)
    series = compared(networks_of(study.accuracy))
    figure, panels = draw_panels(archs, list(MEASURES))
    for (arch, measure), panel in panels.items():
        accuracy = study.accuracy
        found = differences(accuracy[(accuracy["arch"] == arch) & (accuracy["measure"] == measure)])
        panel.axhline(0, color="black", linewidth=1)
        for i, (recipe, net, part) in enumerate(series):
            rows = [found.get((recipe, net, part, name), (0, np.nan, np.nan, np.nan))[1:] for name in perturbations]
            means, lows, highs = np.array(rows).T
            x = np.arange(len(perturbations)) + 0.7 * ((i + 0.5) / len(series) - 0.5)
            color = plt.get_cmap("tab10")([row[:2] for row in series if row[2] == "ALL"].index((recipe, net)) % 10)
            panel.errorbar(x, means, [means - lows, highs - means], fmt="o" if part == "ALL" else "s", color=color, capsize=3,
                markersize=5, markerfacecolor=color if part == "ALL" else "white",
                label=f"{net} {part}, trained with {recipe}")  # fmt: skip
        panel.set_xticks(range(len(perturbations)), perturbations)
        panel.set_xlabel("perturbation of the test images")
    for arch in archs:
        panels[arch, "probe"].set_ylabel(f"top-1 minus that of\n{BASELINE} ALL (points)")
    finish(figure, f"Above 0, a net is better than {BASELINE}. Bars: 95 % intervals over seeds and test images", panel, path)


# --- files -----------------------------------------------------------------------------------------------------------


def make_tables(source: Path, out: Path | None) -> None:
    """Print the tables of a study; write them with their records and, as far as there are results to draw, pictures."""
    study = load_study(source)
    text = report(study)
    print(text)
    if out is None:
        return
    lines = ",\n".join(json.dumps(cell) for cell in study.cells)
    write_text_atomically(f'{{"cells": [\n{lines}\n]}}\n', out / "records.json")
    write_text_atomically(text, out / "tables.md")
    if any(cell["loss"] for cell in study.cells):
        plot_curves(study, out / "curves.png")
    if compared(networks_of(study.accuracy)) and differences(study.accuracy):
        plot_differences(study, out / "differences.png")
