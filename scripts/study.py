"""The results of a study from scripts/study.sh: its records, tables and pictures. Run by scripts/tables.py.

    python -m scripts.study docs/study/records.json results/study   # unpack records: study.sh does not run their cells again

Differences between two networks are paired: means over the seeds that both have, with 95 % intervals of Student's t
distribution.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import t as student

from clever.arguments import ArgumentParser
from clever.data.augmentations import PERTURBATIONS
from clever.entry import run_entry_point
from clever.evaluation.names import PARTS
from clever.evaluation.tables import align
from clever.utils import InputError, atomic_file, write_text_atomically
from scripts.records import BASELINE, UNTRAINED, note, readable

KNN, PROBE, R2, GAP, MEMORY = "20-NN", "probe", "R2", "cosine gap", "memory"
RANDOM = "random"  # as many dimensions as the EF has, drawn at random
SPACES = {("ALL", None): "ALL", ("IR", None): "IR", ("EF", None): "EF", ("EF", "random_subspace"): RANDOM}
TOLD, HELD_OUT = ("rotation", "crop", "jitter"), ("blur", "flip", "solarize", "elastic")
OWN_SETTINGS = ("arch", "recipe", "net", "lambd", "seed")  # in which the cells of a backbone may differ
PLACE = ("split", "kind", "space", "name")  # of a value of a cell; the name is that of a perturbation or a transformation
COLORS = {"dino": "black", "CLeVER": "#e6731a", "augself": "#1f6fb4", "essl": "#2f9e57", "equimod": "#8a63d2",
          "equimod_pair": "#d0487f", "sie": "#a08312", "care": "#1594ab"}  # fmt: skip

# Tables: {title: {heading: (kind, name)}}. Differences are shown of the first one; CHOICE is that of the tuning split.
CHOICE = {"clean": (KNN, "ori"), "rotated": (KNN, "aug1_2")} | {f"R2 {name}": (R2, name) for name in TOLD}
PROBES = {"probe, clean": (PROBE, "ori"), "probe, rotated": (PROBE, "aug1_2")}
TABLES = {
    "top-1 (%) of 20-NN and linear probe, and R2": CHOICE | {f"R2 {name}": (R2, name) for name in HELD_OUT} | PROBES,
    "20-NN, top-1 (%)": {name: (KNN, name) for name in PERTURBATIONS},
    "linear probe, top-1 (%)": {name: (PROBE, name) for name in PERTURBATIONS},
    "cosine gap": {name: (GAP, name) for name in (*TOLD, *HELD_OUT)},
    "memory of the pretraining": {"GiB": (MEMORY, "GiB")},
}
DIGITS = {KNN: 1, PROBE: 1, MEMORY: 2}  # others 3

# --- reading ---------------------------------------------------------------------------------------------------------


def find_study(source: Path) -> Path | None:
    """The folder or the file records.json of a study that this path names; None if it names none."""
    if source.is_file() or any(source.glob("*/settings.txt")):
        return source
    return source / "records.json" if (source / "records.json").is_file() else None


def read_cells(source: Path) -> list[dict[str, Any]]:
    """The cells in the folder of a study, or in its records, as `read_cell` returns them."""
    if source.is_dir():
        return [read_cell(path.parent) for path in sorted(source.glob("*/settings.txt"))]
    with readable(source, "neither the folder of a study nor a file records.json"):
        return [cell for cell in json.loads(source.read_text())["cells"] if cell["folder"] and cell["settings"]]


def read_cell(folder: Path) -> dict[str, Any]:
    """What the folder of one cell holds, rounded.

    Returns `folder` (its name), `settings` {name: value}, `steps` (those that are done), and `values`: lists of PLACE, whose
    split is `test`, `tune` or `training`, and the value. Starts from cell.json, which `unpack` wrote, if it is there.
    """
    cell: dict[str, Any] = {"folder": folder.name, "values": []}
    with readable(folder, "not the cell of a study"):
        if (known := folder / "cell.json").exists():
            cell = json.loads(known.read_text())
        lines = [line.partition(" ") for line in (folder / "settings.txt").read_text().splitlines()]
    values = {tuple(value[: len(PLACE)]): value for value in cell["values"]}
    for split, place in (("test", folder), ("tune", folder / "tune")):
        for path in sorted(place.glob("*.json")):
            with readable(path, "not a result of the study; remove it, and repeat its step"):
                record = json.loads(path.read_text()) if path != known else {"kind": ""}
                values |= {(split, *value[:3]): [split, *value] for value in VALUES.get(record["kind"], no_values)(record)}
    if (path := folder / "log.txt").exists():
        with readable(path, "not the log of a pretraining"):
            memory = json.loads(path.read_text().splitlines()[-1])["memory_gib"]
            values["training", MEMORY, "ALL", "GiB"] = ["training", MEMORY, "ALL", "GiB", round(memory, 2)]
    cell["settings"] = {name: value.strip() for name, _, value in lines}
    cell["steps"] = sorted({path.stem for path in folder.glob("*.done")} | set(cell.get("steps", ())))
    return cell | {"values": list(values.values())}


def accuracy_values(record: dict[str, Any]) -> Iterator[list[Any]]:
    """Of a result of eval_knn.py or eval_linear.py: kind, space, name, value."""
    kind, top1 = (KNN, record["results"][0]["top1"]) if record["kind"] == "knn" else (PROBE, record["accuracy"])
    yield [kind, PARTS[record["part"]], record["test_aug_type"], round(top1, 2)]


def equivariance_values(record: dict[str, Any]) -> Iterator[list[Any]]:
    """Of a result of eval_equivariance.py, without its shuffled targets: kind, space, name, value."""
    for kind, entries, field in ((R2, record["results"], "r2"), (GAP, record["gaps"], "cosine_gap")):
        for entry in entries:
            if space := SPACES.get((entry["part"], entry["control"])):
                yield [kind, space, entry["transform"], round(entry[field], 4)]


def no_values(record: dict[str, Any]) -> list[list[Any]]:
    return []


VALUES = {"knn": accuracy_values, "linear_probe": accuracy_values, "equivariance": equivariance_values}


def to_values(source: Path, cells: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for every value of every cell, in the order of tables: OWN_SETTINGS, PLACE, `value`, and `label` of the network.

    Raises InputError if two cells are the same network, or if cells of a backbone differ in a setting.
    """
    check_settings(source, cells)
    with readable(source, "not the records of a study"):
        rows = [[*(cell["settings"][name] for name in OWN_SETTINGS), *value] for cell in cells for value in cell["values"]]
        values = pd.DataFrame(rows, columns=[*OWN_SETTINGS, *PLACE, "value"])
    names = values[["net", "lambd", "recipe"]].replace("-", "")
    if names["recipe"].replace("", np.nan).nunique() < 2:
        names["recipe"] = ""
    values["label"] = names.agg(" ".join, axis=1).str.split().str.join(" ")
    values["weight"] = pd.to_numeric(values["lambd"], errors="coerce").fillna(0)
    order = {net: i for i, net in enumerate([UNTRAINED, *COLORS])}
    values["order"] = values["net"].str.split("+").str[0].map(order).fillna(len(order))
    return values.sort_values(["arch", "recipe", "order", "net", "weight"], kind="stable", ignore_index=True)


def check_settings(source: Path, cells: list[dict[str, Any]]) -> None:
    """Raise InputError unless the cells are different networks, and those of a backbone have equal settings."""
    settings = pd.DataFrame([cell["settings"] for cell in cells])
    twice = settings.loc[settings.duplicated(list(OWN_SETTINGS)), list(OWN_SETTINGS)]
    if len(twice):
        raise InputError(f"{source}: two cells {' '.join(twice.iloc[0])}")
    settings.loc[settings["net"] == UNTRAINED, "epochs"] = None
    for arch, group in settings.groupby("arch"):
        for name in group.columns.difference(OWN_SETTINGS):
            if group[name].nunique() > 1:
                values = ", ".join(map(str, group[name].dropna().unique()))
                raise InputError(f"{source}: {arch} has cells with different {name}: {values}; a table needs equal settings")


def unpack(records: Path, out: Path) -> None:
    """Make the folder of every cell of the records, unless it is there: settings, values, and what is done."""
    for cell in read_cells(records):
        folder = out / cell["folder"]
        if not folder.exists():
            write_text_atomically(json.dumps(cell), folder / "cell.json")
            settings = "".join(f"{name} {value}\n" for name, value in cell["settings"].items())
            write_text_atomically(settings, folder / "settings.txt")
            for step in cell["steps"]:
                (folder / f"{step}.done").touch()


def missing(values: pd.DataFrame) -> Iterator[str]:
    """What some seeds of a network have and others have not; what no network has is not known here."""
    for (arch, split, label), found in values.groupby(["arch", "split", "label"], sort=False):
        for place, group in found.groupby(list(PLACE[1:]), sort=False):
            for seed in sorted(set(found["seed"]) - set(group["seed"]), key=int):
                yield f"{arch} {label}, seed {seed}, {split}: no {' '.join(place)}"


# --- tables ----------------------------------------------------------------------------------------------------------


def pivot(values: pd.DataFrame, columns: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """A row for each `label`, `net`, `weight`, `space` and `seed`, a column for each heading."""
    headings = {place: heading for heading, place in columns.items()}
    heading = [headings.get(place) for place in zip(values["kind"], values["name"], strict=True)]
    values = values.assign(heading=heading).dropna(subset="heading")
    table = values.pivot(index=["label", "net", "weight", "space", "seed"], columns="heading", values="value")
    order = {name: i for i, name in enumerate([*values["label"].unique(), *SPACES.values()])}
    table = table.reindex(columns=list(columns)).reset_index()
    return table.sort_values(["label", "space"], key=lambda names: names.map(order), kind="stable")


def spread(values: np.ndarray, places: int) -> str:
    """Mean and, of several seeds, standard deviation."""
    return f"{values.mean():.{places}f}" + (f" ± {values.std(ddof=1):.{places}f}" if len(values) > 1 else "")


def interval(values: np.ndarray, places: int) -> str:
    """Mean and, of several seeds, 95 % interval."""
    if len(values) < 2:
        return f"{values.mean():+.{places}f}"
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.{places}f} [{values.mean() - half:+.{places}f}, {values.mean() + half:+.{places}f}]"


def to_lines(table: pd.DataFrame, columns: dict[str, tuple[str, str]], show=spread, base: str = "") -> list[list[str]]:
    """Headings, then a row for each network and space. A cell of fewer seeds than others of its row says so."""
    headings = [name for name in columns if table[name].notna().any()]
    lines = [["network", *["minus"] * bool(base), "seeds", *headings]]
    for (label, space), rows in table.groupby(["label", "space"], sort=False):
        seeds = int(rows[headings].notna().sum().max())
        texts = []
        for name in headings:
            found = rows[name].dropna().to_numpy()
            text = show(found, DIGITS.get(columns[name][0], 3)) if len(found) else "-"
            texts.append(f"{text} ({len(found)} of {seeds} seeds)" if 0 < len(found) < seeds else text)
        minus = [f"its {RANDOM}" if space == "EF" else base] * bool(base)
        lines.append([f"{label} {space}", *minus, str(seeds), *texts])
    return lines


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """ALL and IR of every trained network minus the baseline's ALL, EF minus as many random dimensions, for each seed."""
    headings = [name for name in table if name not in ("label", "net", "weight", "space", "seed")]
    base = table[(table["net"] == BASELINE) & (table["space"] == "ALL")].set_index("seed")[headings]
    rows = []
    for (label, space), group in table.groupby(["label", "space"], sort=False):
        if space != RANDOM and group["net"].iloc[0] not in (BASELINE, UNTRAINED):
            random = table[(table["label"] == label) & (table["space"] == RANDOM)].set_index("seed")[headings]
            other = (random if space == "EF" else base).reindex(group["seed"]).to_numpy()
            rows.append(group.assign(**dict(zip(headings, (group[headings].to_numpy() - other).T, strict=True))))
    return pd.concat(rows) if rows else table[:0]


def choose(values: pd.DataFrame) -> dict[str, str]:
    """{network: why it is chosen} for one backbone, on the tuning split.

    Of each net, the weight with the most R2 of the rotation among those whose clean accuracy is at most a point below dino's,
    and the weight with the highest clean accuracy.
    """
    table = pivot(values[(values["split"] == "tune") & (values["space"] == "ALL")], CHOICE)
    table = table.groupby(["net", "weight", "label"], sort=False)[list(CHOICE)].mean().reset_index()  # over seeds
    least = table.loc[table["net"] == BASELINE, "clean"].mean() - 1
    chosen: dict[str, str] = {}
    for _, group in table[table["weight"] > 0].groupby("net", sort=False):
        for why, rows, name in (("R2", group[group["clean"] >= least], "R2 rotation"), ("accuracy", group, "clean")):
            if rows[name].notna().any():
                label = rows.loc[rows[name].idxmax(), "label"]
                chosen[label] = " and ".join(filter(None, [chosen.get(label), why]))
    return chosen


def tables_of(values: pd.DataFrame) -> dict[str, list[list[str]]]:
    """{title: headings and rows} of all tables."""
    tables = {}
    for arch, found in values.groupby("arch", sort=False):
        is_tuned = found["split"] == "tune"
        for title, columns in TABLES.items():
            table = pivot(found[~is_tuned], columns)
            tables[f"{arch}: {title}"] = to_lines(table, columns)
            if title == next(iter(TABLES)):
                title = f"{arch}: paired differences, with 95 % intervals"
                tables[title] = to_lines(differences(table), columns, interval, base=f"{BASELINE} ALL")
        tables[f"{arch}: tuning split, 20-NN top-1 (%) and R2"] = to_lines(pivot(found[is_tuned], CHOICE), CHOICE)
        tables[f"{arch}: weights"] = [["chosen on the tuning split", "for"], *map(list, choose(found).items())]
    return {title: lines for title, lines in tables.items() if len(lines) > 1}


def report(values: pd.DataFrame) -> str:
    """All tables in Markdown."""
    sections = [f"### {title}\n\n{align(lines, 1 + (lines[0][1] == 'minus'))}" for title, lines in tables_of(values).items()]
    return "\n\n".join(["Mean ± standard deviation over seeds.", *sections]) + "\n"


# --- pictures --------------------------------------------------------------------------------------------------------


def style_of(net: str) -> dict[str, Any]:
    """Colour of the method; dashed, open markers: the term is on the EF alone; a star: dino; crosses: controls."""
    name, _, variant = net.partition("+")
    marker = "*" if net == BASELINE else "X" if variant not in ("", "EF") else "o"
    on_ef, color = variant == "EF" or net == "sie", COLORS.get(name, "grey")
    style = {"color": color, "linestyle": "--" if on_ef else "-", "markerfacecolor": "white" if on_ef else color}
    return style | {"marker": marker, "markersize": {"*": 13, "X": 9}.get(marker, 6)}


def draw_front(values: pd.DataFrame) -> plt.Figure:
    """Accuracy on rotated images against R2 of the rotation, a line for each net through its weights, on the tuning split.

    Left, of the whole representation; right, what a split gains: accuracy of the IR minus dino's, R2 of the EF minus that of as
    many random dimensions.
    """
    archs = [arch for arch, found in values.groupby("arch") if (found["split"] == "tune").any()]
    figure, panels = plt.subplots(len(archs), 2, figsize=(11, 4.4 * len(archs)), squeeze=False, layout="constrained")
    for (whole, gain), arch in zip(panels, archs, strict=True):
        table = pivot(values[(values["arch"] == arch) & (values["split"] == "tune")], CHOICE)
        gains = differences(table)
        for net, rows in table.groupby("net", sort=False):
            ALL = rows[rows["space"] == "ALL"]
            whole.plot(ALL["R2 rotation"], ALL["rotated"], label=net, **style_of(net))
            for end in (ALL[ALL["weight"] > 0].head(1), ALL[ALL["weight"] > 0].tail(1)):
                for x, y, weight in end[["R2 rotation", "rotated", "weight"]].to_numpy():
                    whole.annotate(f"{weight:g}", (x, y), fontsize=7, textcoords="offset points", xytext=(5, 3))
            EF, IR = (gains[(gains["net"] == net) & (gains["space"] == space)].set_index("weight") for space in ("EF", "IR"))
            gain.plot(EF["R2 rotation"], IR["rotated"].reindex(EF.index), **style_of(net))
        gain.axhline(0, color="black", linewidth=0.8)
        gain.axvline(0, color="black", linewidth=0.8)
        whole.set(title=f"{arch}: the whole representation", xlabel="R2 of the rotation", ylabel="20-NN on rotated images (%)")
        gain.set(title=f"{arch}: split into IR and EF", xlabel="R2 of the rotation: EF minus as many random dimensions",
                 ylabel="20-NN on rotated images:\nIR minus dino (points)")  # fmt: skip
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.93")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def draw_told(values: pd.DataFrame) -> plt.Figure:
    """R2 minus dino's, of transformations told and held out, on the test images, for the largest weight of each method."""
    archs = [arch for arch, found in values.groupby("arch") if (found["split"] == "test").any()]
    figure, panels = plt.subplots(len(archs), 1, figsize=(11, 4 * len(archs)), squeeze=False, layout="constrained")
    names = [*TOLD, *HELD_OUT]
    for panel, arch in zip(panels[:, 0], archs, strict=True):
        found = values[(values["arch"] == arch) & (values["split"] == "test") & (values["space"] == "ALL")]
        table = pivot(found, {name: (R2, name) for name in names}).set_index("seed")
        base = table.loc[table["net"] == BASELINE, names]
        labels = table[~table["net"].isin([BASELINE, UNTRAINED])].drop_duplicates("net", keep="last")["label"]
        for i, label in enumerate(labels):
            rows = table[table["label"] == label]
            gains = rows[names] - base.reindex(rows.index)
            style = style_of(rows["net"].iloc[0])
            edge, hatch = ("white", "//") if style["marker"] == "X" else (style["color"], None)  # hatched: controls
            style = {"edgecolor": edge, "color": style["markerfacecolor"], "hatch": hatch, "error_kw": {"linewidth": 0.8}}
            x, width = np.arange(len(names)) + 0.8 * ((i + 0.5) / len(labels) - 0.5), 0.8 / len(labels)
            panel.bar(x, gains.mean(), width, yerr=gains.std(), label=label, **style)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axvline(len(TOLD) - 0.5, color="0.7", linestyle=":")
        panel.set_xticks(range(len(names)), [f"{name}\n({'told' if name in TOLD else 'held out'})" for name in names])
        panel.set(ylabel="R2 minus dino's", title=arch)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


# --- files -----------------------------------------------------------------------------------------------------------


def make_tables(source: Path, out: Path | None) -> None:
    """Print the tables of a study; write them with their records and, as far as there are results to draw, pictures."""
    cells = read_cells(source)
    values = to_values(source, cells)
    for line in missing(values):
        note(line)
    text = report(values)
    print(text, end="")
    if out is None:
        return
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    write_text_atomically(f'{{"cells": [\n{lines}\n]}}\n', out / "records.json")
    write_text_atomically(text, out / "tables.md")
    for name, split, draw in (("front", "tune", draw_front), ("told", "test", draw_told)):
        if (values["split"] == split).any():
            figure = draw(values)
            with atomic_file(out / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=130, format="png")
            plt.close(figure)


def main() -> None:
    parser = ArgumentParser(description="Unpack the records of a study, so that scripts/study.sh does not run its cells again.")
    parser.add_argument("records", type=Path, help="records.json")
    parser.add_argument("folder", type=Path, help="RESULT of scripts/study.sh")
    args = parser.parse_args()
    unpack(args.records, args.folder)


if __name__ == "__main__":
    run_entry_point(main)
