"""Tables and pictures of a study from scripts/study.sh: accuracies, paired differences, equivariance, training curves.

    python -m scripts.study_table results/study --out results/study
    python -m scripts.study_table docs/study/records.json    # from collected records alone, without a network

Reads the cells (networks) below a folder, or the file records.json of an earlier call, and prints tables in Markdown. Writes to
--out: records.json, which holds all that the tables and pictures need, tables.md, curves.png and differences.png.

Accuracies are means and standard deviations over seeds. A difference between two networks is paired: both are compared on the
same seeds and the same test images. Its interval is a percentile bootstrap that resamples seeds and images.
"""

import functools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from clever.arguments import ArgumentParser, check_writable
from clever.entry import run_entry_point
from clever.evaluation.hits import unpack_hits
from clever.evaluation.tables import SPACES, align
from clever.utils import atomic_file, write_text_atomically
from scripts.study_records import (
    BASELINE,
    COMPARED,
    MEASURES,
    UNTRAINED,
    Study,
    archs_of,
    load_study,
    networks_of,
    perturbations_of,
    recipes_of,
    save_records,
    seeds_of,
)

COLORS = {"dino": "#1f6fb4", "CLeVER": "#e6731a"}
DRAWS = 1000


# --- statistics ------------------------------------------------------------------------------------------------------


@functools.lru_cache
def bootstrap_weights(count: int) -> np.ndarray:
    """How often each of `count` items is drawn in each bootstrap sample, divided by `count`: float32 [DRAWS, count]."""
    rng = np.random.default_rng(0)
    rows = [np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(DRAWS)]
    return np.stack(rows).astype(np.float32) / count


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of differences [S, N] between two networks, of S seeds on N test images.

    A percentile bootstrap that draws seeds and images with replacement, independently of each other; every seed gets the same
    images, since these are shared. The draws are always the same ones.
    """
    S, N = differences.shape
    means = differences.astype(np.float32) @ bootstrap_weights(N).T  # S, DRAWS
    chosen = np.random.default_rng(1).integers(S, size=(S, DRAWS))
    means = np.take_along_axis(means, chosen, axis=0).mean(0)  # DRAWS
    low, high = np.percentile(means, (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)


# --- accuracies ------------------------------------------------------------------------------------------------------


def accuracies(study: Study, arch: str, measure: str) -> dict[tuple[str, str, str, str], dict[int, dict[str, Any]]]:
    """{(recipe, net, part, perturbation): {seed: entry of the cell}}; `measure` is probe or knn."""
    found: dict[tuple, dict[int, dict]] = {}
    for (cell_arch, recipe, net, seed), cell in sorted(study.items()):
        for part, entries in cell[measure].items() if cell_arch == arch else ():
            for perturbation, entry in entries.items():
                found.setdefault((recipe, net, part, perturbation), {})[seed] = entry | {"count": cell["num_test_images"]}
    return found


def accuracy_table(study: Study, arch: str, measure: str) -> str:
    found, perturbations = accuracies(study, arch, measure), perturbations_of(study)
    lines = [["recipe", "network", "seeds", *perturbations]]
    for recipe, net, part in networks_of(study):
        cells = []
        for perturbation in perturbations:
            entries = found.get((recipe, net, part, perturbation), {})
            cells.append(mean_and_std([entry["top1"] for entry in entries.values()], digits=1))
        lines.append(make_row([recipe, f"{net} {part}"], cells))
    return align(lines, text_columns=2)


def differences(study: Study, arch: str, measure: str) -> dict[tuple[str, str, str, str], tuple[int, float, float, float]]:
    """{(recipe, net, part, perturbation): (seeds that both networks have, difference, and its interval)}, in points of top-1.

    Each of COMPARED minus the baseline's ALL; those without a common seed are left out.
    """
    found, intervals = accuracies(study, arch, measure), {}
    for recipe, net, part, perturbation in found:
        first, second = found[recipe, net, part, perturbation], found.get((recipe, BASELINE, "ALL", perturbation), {})
        seeds = [seed for seed in first if seed in second]
        if (net, part) in COMPARED and seeds:
            pairs = np.stack([hits_of(first[seed]) - hits_of(second[seed]) for seed in seeds])  # S, N
            intervals[recipe, net, part, perturbation] = (len(seeds), *paired_interval(100 * pairs))
    return intervals


def hits_of(entry: dict[str, Any]) -> np.ndarray:
    """1 for each of N test images that was classified correctly, else 0: int [N]."""
    return unpack_hits(entry["correct"], entry["count"]).astype(int)


def difference_table(study: Study, arch: str, measure: str) -> str:
    found, perturbations = differences(study, arch, measure), perturbations_of(study)
    lines = [["recipe", "difference", "seeds", *perturbations]]
    for recipe in recipes_of(study):
        for net, part in COMPARED:
            cells = []
            for perturbation in perturbations:
                seeds, *interval = found.get((recipe, net, part, perturbation), (0, 0, 0, 0))
                cells.append((seeds, "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval)))
            lines.append(make_row([recipe, f"{net} {part} - {BASELINE} ALL"], cells))
    return align(lines, text_columns=2)


# --- equivariance ----------------------------------------------------------------------------------------------------


def equivariance_scores(study: Study, arch: str, kind: str, field: str, **wanted: str) -> dict[tuple, dict[int, float]]:
    """{(transformation, recipe, net, part, control): {seed: score}}.

    Args:
        kind: `results` or `gaps` of eval_equivariance.py.
        field: the score.
        wanted: values of other fields, such as the head.
    """
    found: dict[tuple, dict[int, float]] = {}
    for (cell_arch, recipe, net, seed), cell in sorted(study.items()):
        for entry in cell.get(kind, ()) if cell_arch == arch else ():
            if field in entry and wanted.items() <= entry.items():
                key = entry["transform"], recipe, net, entry["part"], entry["control"]
                found.setdefault(key, {})[seed] = entry[field]
    return found


def equivariance_table(study: Study, arch: str, kind: str, field: str, **wanted: str) -> str:
    """A row per transformation, recipe and net, a column per part and control; arguments as in equivariance_scores."""
    found = equivariance_scores(study, arch, kind, field, **wanted)
    applicable = {(transform, net, *space) for transform, _, net, *space in found}  # dino, for example, has no IR
    rows = dict.fromkeys((recipe, net) for recipe, net, _ in networks_of(study) if net != UNTRAINED)
    spaces = [space for space in SPACES if space in {key[3:] for key in found}]
    lines = [["transformation", "recipe", "net", "seeds", *(SPACES[space] for space in spaces)]]
    for transform in dict.fromkeys(key[0] for key in found):
        for recipe, net in rows:
            cells = []
            for space in spaces:
                scores = found.get((transform, recipe, net, *space), {})
                applies = (transform, net, *space) in applicable
                cells.append(mean_and_std(list(scores.values()), digits=3) if applies else None)
            lines.append(make_row([transform, recipe, net], cells))
    return align(lines, text_columns=3)


def equivariance_sections(study: Study, arch: str) -> list[str]:
    """Titles and tables of one backbone; only those for which there are scores."""
    entries = [entry for key, cell in study.items() if key[0] == arch for entry in cell.get("results", ())]
    tables: dict[str, tuple[str, str, dict[str, str]]] = {}
    for head, given in dict.fromkeys((entry["head"], entry["input"]) for entry in entries):
        for field, title in (("r2", "R2"), ("accuracy", "accuracy")):
            title = f"what is known about transformations, {title} (head {head}, input {given})"
            tables[title] = "results", field, {"head": head, "input": given}
    tables["cosine gap"] = "gaps", "cosine_gap", {}
    sections = []
    for title, (kind, field, wanted) in tables.items():
        if equivariance_scores(study, arch, kind, field, **wanted):
            sections += [f"### {arch}: {title}", equivariance_table(study, arch, kind, field, **wanted)]
    return sections


# --- rows ------------------------------------------------------------------------------------------------------------

Cell = tuple[int, str]  # number of seeds, and what they say


def mean_and_std(values: list[float], digits: int) -> Cell:
    """Mean and, of several seeds, standard deviation."""
    if not values:
        return 0, ""
    mean = f"{np.mean(values):.{digits}f}"
    return len(values), mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def make_row(titles: list[str], cells: list[Cell | None]) -> list[str]:
    """The titles, the number of seeds of the row, and its cells; None where nothing applies.

    A cell of fewer seeds than others in the row says so; one without any seed is `missing`.
    """
    most = max((seeds for seeds, _ in filter(None, cells)), default=0)

    def text(seeds: int, words: str) -> str:
        return "missing" if not seeds else words if seeds == most else f"{words} ({seeds} of {most} seeds)"

    return [*titles, str(most), *(text(*cell) if cell else "" for cell in cells)]


def report(study: Study) -> str:
    """All tables in Markdown."""
    sections = []
    for arch in archs_of(study):
        for measure, title in MEASURES.items():
            sections += [f"### {arch}: top-1 (%), {title}", accuracy_table(study, arch, measure)]
            sections += [f"### {arch}: differences of top-1 (points), {title}", difference_table(study, arch, measure)]
        sections += equivariance_sections(study, arch)
    seeds = " ".join(map(str, seeds_of(study)))
    note = f"Mean ± standard deviation over seeds ({seeds}); in brackets, 95 % intervals over seeds and test images."
    return "\n\n".join([note, *sections]) + "\n"


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_panels(rows: list[str], columns: list[str], titles: dict[tuple[str, str], str], share_y: str) -> tuple:
    """A figure with a panel per row and column: (figure, {(row, column): axes})."""
    size = 1.5 + 4.5 * len(columns), 0.8 + 2.9 * len(rows)
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=size, squeeze=False, sharey=share_y, layout="constrained"
    )  # fmt: skip
    panels = {(row, column): axes[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)}
    for key, panel in panels.items():
        panel.set_title(titles[key], fontsize=10)
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
    archs, recipes = archs_of(study), recipes_of(study)
    titles = {(arch, recipe): f"{arch}, {recipe}" for arch in archs for recipe in recipes}
    figure, panels = draw_panels(archs, recipes, titles, share_y="row")
    for (arch, recipe), panel in panels.items():
        for net, color in COLORS.items():
            curves = [cell["loss"] for key, cell in study.items() if key[:3] == (arch, recipe, net) and cell["loss"]]
            if curves:
                losses = np.array([curve[: min(map(len, curves))] for curve in curves])  # S, epochs
                epochs = np.arange(1, losses.shape[1] + 1)
                panel.plot(epochs, losses.mean(0), color=color, marker=".", label=net)
                panel.fill_between(epochs, losses.min(0), losses.max(0), color=color, alpha=0.25, linewidth=0)
        panel.set(xlabel="epoch", ylim=(0, 1.05))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for arch in archs:
        panels[arch, recipes[0]].set_ylabel("loss / ln(out_dim)\n(1: nothing learned)")
    finish(figure, "Loss in training: mean of the seeds (lines), and their range (bands)", panel, path)


def plot_differences(study: Study, path: Path) -> None:
    """Differences of top-1 with their intervals; above 0, CLeVER is ahead."""
    archs, recipes, perturbations = archs_of(study), recipes_of(study), perturbations_of(study)
    titles = {(arch, measure): f"{arch}, {title}" for arch in archs for measure, title in MEASURES.items()}
    figure, panels = draw_panels(archs, list(MEASURES), titles, share_y="row")
    series = [(recipe, net, part) for recipe in recipes for net, part in COMPARED]
    for (arch, measure), panel in panels.items():
        found = differences(study, arch, measure)
        panel.axhline(0, color="black", linewidth=1)
        for i, (recipe, net, part) in enumerate(series):
            rows = [found.get((recipe, net, part, name), (0, np.nan, np.nan, np.nan))[1:] for name in perturbations]
            means, lows, highs = np.array(rows).T
            x = np.arange(len(perturbations)) + 0.7 * ((i + 0.5) / len(series) - 0.5)
            color = plt.get_cmap("tab10")(i // len(COMPARED))
            panel.errorbar(x, means, [means - lows, highs - means], fmt="o" if part == "ALL" else "s", color=color, capsize=3,
                markersize=5, markerfacecolor=color if part == "ALL" else "white",
                label=f"{net} {part}, trained with {recipe}")  # fmt: skip
        panel.set_xticks(range(len(perturbations)), perturbations)
        panel.set_xlabel("perturbation of the test images")
    for arch in archs:
        panels[arch, "probe"].set_ylabel(f"top-1 minus that of\n{BASELINE} ALL (points)")
    finish(figure, f"Above 0, CLeVER is better than {BASELINE}. Bars: 95 % intervals over seeds and test images", panel, path)


# --- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder of cells from scripts/study.sh, searched with its sub-folders, or a "
        "file records.json")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for records.json, tables.md and, as far as there are results to draw, "
        "curves.png and differences.png; default: tables are only printed")  # fmt: skip
    args = parser.parse_args()
    if args.out:
        check_writable(args.out, "--out")
    study = load_study(args.source)
    text = report(study)
    if args.out:
        save_records(study, args.out / "records.json")
        write_text_atomically(text, args.out / "tables.md")
        if any(cell["loss"] for cell in study.values()):
            plot_curves(study, args.out / "curves.png")
        if any(differences(study, arch, measure) for arch in archs_of(study) for measure in MEASURES):
            plot_differences(study, args.out / "differences.png")
    print(text)
    if args.out:
        print(f"wrote the tables, their records and pictures to {args.out}")


if __name__ == "__main__":
    run_entry_point(main)
