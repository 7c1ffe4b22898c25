"""Tables and pictures of results: of a folder of networks, or of a study.

    python -m scripts.tables results/IN100_ep200 --out results/IN100_ep200
    python -m scripts.tables results/study --out results/study    # a study, from scripts/study.sh
    python -m scripts.tables docs/study/records.json              # one from its collected records alone, without a network

Prints the tables in Markdown. With --out, they are also written to that folder:

- of networks, from the JSON files of eval_linear.py and eval_equivariance.py: results.json (tables, Markdown, records) and
  results.png. Accuracies are those of the last epoch, in percent. The row `untrained` is a network without pretraining.
  Networks of different data sets, architectures, recipes, epochs, hp1 or seeds have rows of their own. If several files hold a
  result for the same cell, the newest one counts, and a note on stderr says so. A second table shows what rotation does to the
  features. R2 says how well a linear regressor predicts the angle (1: exactly); the cosine gap, how much closer a rotated image
  is to itself than to other images.
- of a study (scripts/study.py): records.json, tables.md, front.png and told.png.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.container import BarContainer

from clever.arguments import ArgumentParser, check_writable
from clever.entry import run_entry_point
from clever.evaluation.tables import align
from clever.utils import InputError, atomic_file, save_json
from scripts import study
from scripts.records import UNTRAINED, Record, list_files, name_rows, note, read_result, readable

PROBE, EQUIVARIANCE, ROTATION = "linear_probe", "equivariance", "rotation"
RANDOM = "random dimensions"  # as many as the EF has
FIELDS = {"R2": "r2", "cosine gap": "cosine_gap"}
TITLES = {"R2": "R2 of the angle\n(1: predicted exactly)", "cosine gap": "cosine gap\n(0: as far as another image)"}
COLORS = {UNTRAINED: "Greys", "dino": "Blues", "CLeVER": "Oranges"}
SHADES = {"ALL": 0.85, "IR": 0.6, "EF": 0.35}


# --- values of the tables --------------------------------------------------------------------------------------------


def read_cells(folders: list[Path]) -> pd.DataFrame:
    """All values below the folders that the tables show, in their order: `row`, `test_aug_type`, `value`, `std`, and `record`.

    Raises InputError if there are no accuracies, or if a result is damaged.
    """
    cells = []
    for path in list_files(folders):
        if path.suffix != ".json" or (record := read_result(path)) is None:
            continue
        if record["kind"] == PROBE:
            cells.append(record | {"value": record["accuracy"], "std": None, "record": record})
        elif record["kind"] == EQUIVARIANCE:
            with readable(path, "is damaged; run that evaluation again"):
                cells += rotation_cells(record)
    if not any(cell["kind"] == PROBE for cell in cells):
        names = ", ".join(map(str, folders))
        raise InputError(f"no results of eval_linear.py (JSON files) below {names}; run scripts/linear_probe.sh first")
    return name_rows(cells).join(pd.DataFrame(cells)[["kind", "value", "std", "record"]])


def rotation_cells(record: Record) -> list[Record]:
    """What a result of eval_equivariance.py says about rotation; of several heads and inputs the first counts.

    The untrained network with which it compares is a network of its own, initialised from the seed of the evaluation.
    """
    cells = []
    for kind, (measure, field) in zip(("results", "gaps"), FIELDS.items(), strict=True):
        entries = [entry for entry in record[kind] if entry["transform"] == ROTATION]
        for entry in entries:
            if any(entry.get(name) != entries[0].get(name) for name in ("head", "input")):
                continue
            std = entry[f"{field}_std"] if entry.get("draws", 1) > 1 else None
            cell = record | {"test_aug_type": measure, "value": float(entry[field]), "std": std, "record": record}
            if entry["control"] is None:
                cells.append(cell | {"part": entry["part"]})
            elif (entry["part"], entry["control"]) == ("EF", "random_subspace"):
                cells.append(cell | {"part": RANDOM})
            elif (entry["part"], entry["control"]) == ("ALL", UNTRAINED):
                cells.append(cell | {"part": "ALL", "pretrained_epochs": 0, "pretraining_seed": record["seed"]})
    return cells


def newest(cells: pd.DataFrame) -> pd.DataFrame:
    """The newest value of each cell of a table; a note names the cells for which there are different ones."""
    place = ["row", "test_aug_type"]
    different = cells.drop_duplicates([*place, "value"], keep="last")
    for (row, column), found in different.groupby(place, sort=False, observed=True):
        if len(found) > 1:
            note(f"{row}, {column}: {len(found)} results, the newest counts: {found['record'].iloc[-1]['file']}")
    return cells.drop_duplicates(place, keep="last")


def to_table(cells: pd.DataFrame, values: str) -> pd.DataFrame:
    """A column of the cells as a table: a row per network and part, a column per perturbation or measure."""
    return cells.pivot(index="row", columns="test_aug_type", values=values).reindex(cells["row"].unique())


def to_markdown(cells: pd.DataFrame, title: str, digits: int) -> str:
    """The table with aligned columns; a missing result is a dash."""
    spread = cells["std"].map(lambda std: "" if pd.isna(std) else f" ± {std:.{digits}f}")
    table = to_table(cells.assign(text=cells["value"].map(f"{{:.{digits}f}}".format) + spread), "text").fillna("-")
    return align([[title, *table.columns], *([row, *texts] for row, texts in zip(table.index, table.to_numpy(), strict=True))])


# --- picture ---------------------------------------------------------------------------------------------------------


def draw_bars(panel: plt.Axes, cells: pd.DataFrame, digits: int) -> None:
    """A group of bars per column of the table, a bar per row; darker for ALL than for IR than for EF."""
    heights, spread = to_table(cells, "value").astype(float), to_table(cells, "std").astype(float)
    colors = []
    for row in heights.index:
        words = row.removesuffix(RANDOM).split()
        colors.append(plt.get_cmap(COLORS.get(words[0], "Greens"))(SHADES.get(words[-1], 0.2)))
    style = {"width": 0.86, "rot": 0, "color": colors, "edgecolor": "white", "lw": 0, "legend": False, "xlabel": ""}
    heights.T.plot.bar(ax=panel, yerr=spread.T if spread.notna().any(axis=None) else None, **style)
    for bars in (each for each in panel.containers if isinstance(each, BarContainer)):
        plt.setp(bars, hatch="///" if bars.get_label().endswith(RANDOM) else None)
        labels = ["" if np.isnan(bar.get_height()) else f"{bar.get_height():.{digits}f}" for bar in bars]
        panel.bar_label(bars, labels, fontsize=8, padding=2, bbox={"color": "white", "pad": 0.3})
    panel.spines[["top", "right"]].set_visible(False)


def draw(accuracies: pd.DataFrame, rotation: pd.DataFrame, path: Path) -> None:
    """Write a bar chart of the accuracies, and a second one of the rotation if there are results."""
    widths = [2.5 + max(5, 0.28 * len(accuracies))] + ([1.5 + 0.35 * len(rotation)] if len(rotation) else [])
    figure, panels = plt.subplots(
        1, len(widths), figsize=(sum(widths), 4.2), width_ratios=widths, layout="constrained", squeeze=False
    )  # fmt: skip
    panel = panels[0, 0]
    draw_bars(panel, accuracies, digits=0)
    panel.set(ylim=(0, 105), ylabel="top-1 accuracy (%)", xlabel="perturbation of the test images", title="linear probe")
    classes = {record.get("num_labels") for record in accuracies["record"]}
    if len(classes) == 1 and (count := classes.pop()):
        panel.axhline(100 / count, color="black", linestyle="--", linewidth=1, zorder=0, label=f"chance ({100 / count:.3g} %)")
    if len(rotation):
        panel = panels[0, 1]
        draw_bars(panel, rotation, digits=2)
        lowest = rotation["value"].min()
        panel.set(ylim=(min(0, 1.2 * lowest - 0.06) if lowest < 0 else 0, 1.05), title="what rotation does to the features")
        panel.set_xticklabels([TITLES[label.get_text()] for label in panel.get_xticklabels()])
        panel.axhline(0, color="black", linewidth=0.8)
    pairs = [pair for panel in panels[0] for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in reversed(pairs)}
    order = dict.fromkeys(label for _, label in pairs)
    figure.legend([entries[label] for label in order], list(order), loc="outside right upper", frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


# --- command line ----------------------------------------------------------------------------------------------------


def make_tables(folders: list[Path], out: Path | None) -> None:
    """Print the tables of networks, and write them."""
    cells = read_cells(folders)
    accuracies, rotation = (newest(cells[cells["kind"] == kind]) for kind in (PROBE, EQUIVARIANCE))
    markdown = to_markdown(accuracies, "top-1 (%)", digits=1)
    if len(rotation):
        markdown += "\n\n" + to_markdown(rotation, ROTATION, digits=2)
    print(markdown)
    if out is None:
        return
    table = to_table(accuracies, "value")
    rows = [{"row": row, **values.dropna().to_dict()} for row, values in table.iterrows()]
    measures: dict[str, dict] = {row: {} for row in rotation["row"]}
    for cell in rotation.itertuples():
        measures[cell.row][FIELDS[cell.test_aug_type]] = [cell.value, None if pd.isna(cell.std) else cell.std]
    records = [cell.record | {"row": cell.row, "file": str(cell.record["file"])} for cell in accuracies.itertuples()]
    table = {"columns": list(table.columns), "rows": rows}
    save_json({"table": table, "rotation": measures, "markdown": markdown, "records": records}, out / "results.json")
    draw(accuracies, rotation, out / "results.png")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", type=Path, metavar="DIR", help="folders of results, searched with their "
        "sub-folders; or the folder of a study, or its records.json")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for tables and pictures; default: tables are only printed")
    args = parser.parse_args()
    if args.out:
        check_writable(args.out, "--out")
    if len(args.sources) == 1 and (source := study.find_study(args.sources[0])):
        study.make_tables(source, args.out)
    else:
        make_tables(args.sources, args.out)
    if args.out:
        print(f"\nwrote the tables and their pictures to {args.out}")


if __name__ == "__main__":
    run_entry_point(main)
