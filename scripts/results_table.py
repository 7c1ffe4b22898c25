"""Collects the results of networks into tables and one plot: accuracies of linear probes, and what rotation does to features.

    python -m scripts.results_table results/IN100_ep200 --out results/IN100_ep200

Reads the JSON files that eval_linear.py and eval_equivariance.py wrote below the given folders, prints the tables in Markdown
(a row per network and part, a column per perturbation; a second table for rotation, if there are results), and writes
results.json (tables, Markdown, records) and results.png to --out. Accuracies are those of the last epoch, in percent. A network
that was not pretrained is the row `untrained`. Results for different data sets, architectures, recipes, numbers of epochs, hp1
or seeds (of the pretraining, of the evaluation) have rows of their own. If several files hold a result for the same cell, the
newest one counts, and a note on stderr says so.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from clever.arguments import ArgumentParser, check_writable
from clever.data.augmentations import PERTURBATIONS
from clever.entry import run_entry_point
from clever.evaluation.names import PARTS
from clever.evaluation.tables import align
from clever.utils import InputError, atomic_file, save_json
from scripts.rotation_table import RANDOM_DIMENSIONS, ROTATION, Rotation, draw, rotation_rows, split_untrained
from scripts.rotation_table import to_markdown as rotation_markdown

# Rows appear in this order, columns in that of PERTURBATIONS; unknown names follow in alphabetical order.
UNTRAINED = "untrained"
NETS = (UNTRAINED, "dino", "CLeVER")
PART_ORDER = ("ALL", "IR", "EF")

# Where networks of the same kind differ in one of these fields, its value is a piece of the row's name.
VARIANT_FORMATS = {
    "dataset": "{}", "arch": "{}", "aug": "{}", "pretrained_epochs": "ep{}", "hp1": "hp{}",
    "pretraining_seed": "pretraining seed {}", "seed": "evaluation seed {}",
}  # fmt: skip
NAMED_IN_ALL_ROWS = ("dataset", "arch")  # or in none
PRETRAINING_FIELDS = ("aug", "pretrained_epochs", "hp1")  # the row `untrained` has none of them
# Kinds of results, and the fields that they must have.
PROBE, EQUIVARIANCE = "linear_probe", "equivariance"
REQUIRED_FIELDS = {
    PROBE: ("net", "arch", "part", "test_aug_type", "accuracy"), EQUIVARIANCE: ("net", "arch", "results", "gaps")
}  # fmt: skip
FIELD_TYPES = {name: (str, int, float, type(None)) for name in VARIANT_FORMATS} | {
    "net": str, "arch": str, "part": str, "test_aug_type": str, "accuracy": (int, float), "num_labels": int, "results": list,
    "gaps": list,
}  # fmt: skip
LARGEST = {"accuracy": 100, "num_labels": 10**9}
COLORS = {UNTRAINED: "Greys", "dino": "Blues", "CLeVER": "Oranges"}
SHADES = {"ALL": 0.85, "IR": 0.6, "EF": 0.35}

Table = dict[str, dict[str, float]]  # {row: {perturbation: accuracy}}


# --- reading ---------------------------------------------------------------------------------------------------------


def find_files(folders: list[Path]) -> list[Path]:
    """The JSON files below the folders, each of them once, oldest first. Raises InputError if a folder is missing."""
    files: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder")
        for path in folder.rglob("*.json"):
            if path.is_file():
                files[path.resolve()] = path
            elif not path.exists():
                print(f"note: {path} is a broken link, ignored", file=sys.stderr)
    return sorted(files.values(), key=lambda path: (path.stat().st_mtime_ns, str(path)))


def read_records(folders: list[Path]) -> list[dict]:
    """Every result of a kind in REQUIRED_FIELDS below the folders, oldest file first, with the path added as `file`.

    Files of other kinds are ignored. Raises InputError if a folder is missing, if a result lacks a field, or if there
    are no results of linear probes.
    """
    records = [record for path in find_files(folders) if (record := read_record(path)) is not None]
    if not any(record["kind"] == PROBE for record in records):
        names = ", ".join(map(str, folders))
        raise InputError(f"no results of eval_linear.py (JSON files) below {names}; run scripts/linear_probe.sh first")
    return records


def read_record(path: Path) -> dict | None:
    """The result in a file, with its `dataset` and `seed` and without its `args`; None if the file holds something else."""
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        print(f"note: {path} is not valid JSON, ignored", file=sys.stderr)
        return None
    if not isinstance(record, dict) or str(record.get("kind")) not in REQUIRED_FIELDS:
        return None
    missing = [name for name in REQUIRED_FIELDS[record["kind"]] if name not in record]
    if missing:
        raise InputError(f"{path} is a result without {', '.join(missing)}; run that evaluation again")
    args = record.pop("args", {})
    if isinstance(args, dict):
        record.setdefault("dataset", Path(str(args.get("data_path", ""))).name or None)
        record.setdefault("seed", args.get("seed"))
    wrong = [name for name, value in record.items() if name in FIELD_TYPES and not isinstance(value, FIELD_TYPES[name])]
    wrong += [name for name, most in LARGEST.items() if name not in wrong and not 0 <= record.get(name, 0) <= most]
    if wrong:
        raise InputError(f"{path} is damaged: {', '.join(wrong)} cannot be right; run that evaluation again")
    return {**record, "file": str(path)}


# --- table -----------------------------------------------------------------------------------------------------------


def network_name(record: dict) -> str:
    return UNTRAINED if record.get("pretrained_epochs") == 0 else record["net"]


def differing_fields(records: list[dict]) -> dict[str, list[str]]:
    """{network: the fields of VARIANT_FORMATS that its rows must name}.

    Data set and architecture are named in all rows or in none; the other fields where records of the same network differ in
    them.
    """
    networks: dict[str, list[dict]] = {}
    for record in records:
        networks.setdefault(network_name(record), []).append(record)

    def differ(name: str, net: str) -> bool:
        if name in PRETRAINING_FIELDS and net == UNTRAINED:
            return False
        return len({record.get(name) for record in (records if name in NAMED_IN_ALL_ROWS else networks[net])}) > 1

    return {net: [name for name in VARIANT_FORMATS if differ(name, net)] for net in networks}


def variant_of(record: dict, fields: list[str]) -> str:
    """The values of these fields, as they stand in the row's name; values that are not known are left out."""
    return " ".join(VARIANT_FORMATS[name].format(record[name]) for name in fields if record.get(name) is not None)


def rank(order: Iterable[str], name: str) -> tuple[int, str]:
    """Sort key: names in `order` first, then all others by name."""
    places = list(order)
    return (places.index(name) if name in places else len(places), name)


def row_name(record: dict, fields: dict[str, list[str]], part: str = "") -> str:
    """Network, the `fields` that tell it from others, and part."""
    net = network_name(record)
    return " ".join(filter(None, (net, variant_of(record, fields[net]), part)))


def choose_records(records: list[dict], fields: dict[str, list[str]]) -> list[dict]:
    """The newest record of every cell, in the order of the table, with the name of its `row` added.

    `records` are those of linear probes, from the oldest to the newest.
    """
    cells: dict[tuple, list[dict]] = {}
    for record in records:
        net, part = network_name(record), PARTS.get(record["part"], record["part"])
        variant = variant_of(record, fields[net])
        key = (variant, rank(NETS, net), rank(PART_ORDER, part), rank(PERTURBATIONS, record["test_aug_type"]))
        cells.setdefault(key, []).append({**record, "row": row_name(record, fields, part)})
    for results in cells.values():
        note_older(f"{results[-1]['row']}, {results[-1]['test_aug_type']}", results)
    return [cells[key][-1] for key in sorted(cells)]


def note_older(cell: str, results: list[dict]) -> None:
    """A note on stderr if a cell of a table has several results, from the oldest to the newest."""
    if len(results) > 1:
        print(f"note: {cell}: {len(results)} results, the newest counts: {results[-1]['file']}", file=sys.stderr)


def build_table(chosen: list[dict]) -> tuple[Table, list[str]]:
    """The table of the chosen records, and its perturbations in the order of the columns."""
    table: Table = {}
    for record in chosen:
        table.setdefault(record["row"], {})[record["test_aug_type"]] = record["accuracy"]
    columns = sorted({record["test_aug_type"] for record in chosen}, key=lambda name: rank(PERTURBATIONS, name))
    return table, columns


def to_markdown(table: Table, columns: list[str]) -> str:
    """The table with aligned columns; a missing result is a dash."""
    lines = [["top-1 (%)", *columns]]
    lines += [[row, *(f"{cells[c]:.1f}" if c in cells else "-" for c in columns)] for row, cells in table.items()]
    return align(lines)


def rotation_table(records: list[dict], fields: dict[str, list[str]]) -> Rotation:
    """The rows of all results of eval_equivariance.py, from the oldest to the newest; of different ones the newest counts."""
    rows: Rotation = {}
    results: dict[str, list[dict]] = {}
    for record in records:
        for row, values in rotation_rows(record, row_name(record, fields)).items():
            if rows.get(row) != values:  # networks share the numbers of the untrained one
                results.setdefault(row, []).append(record)
            rows[row] = values
    for row, several in results.items():
        note_older(f"{row}, {ROTATION}", several)
    parts = (*PART_ORDER, RANDOM_DIMENSIONS)
    part_of = {row: next(part for part in parts if row.endswith(part)) for row in rows}

    def place(row: str) -> tuple:
        return (row.removesuffix(part_of[row]).split(" ", 1)[1:], rank(NETS, row.split(" ")[0]), parts.index(part_of[row]))

    return {row: rows[row] for row in sorted(rows, key=place)}


# --- plot ------------------------------------------------------------------------------------------------------------


def chance_level(records: list[dict]) -> float | None:
    """Accuracy of guessing, in percent; None unless all records have the same number of classes."""
    numbers = {record.get("num_labels") for record in records}
    number = numbers.pop() if len(numbers) == 1 else None
    return 100 / number if number else None


def plot(table: Table, columns: list[str], chance: float | None, rotation: Rotation, path: Path) -> None:
    """Write a bar chart of the accuracies, and a second one of the rotation if there are results."""
    width = 2.5 + max(5, 0.28 * len(table) * len(columns))
    widths = [width, 1.5 + 0.7 * len(rotation)] if rotation else [width]
    figure, panels = plt.subplots(
        1, len(widths), figsize=(sum(widths), 4.2), width_ratios=widths, layout="constrained", squeeze=False
    )  # fmt: skip
    draw_accuracies(panels[0, 0], table, columns, chance)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if rotation:
        draw(panels[0, 1], rotation, {row: color_of(row) for row in rotation})
        more = zip(*panels[0, 1].get_legend_handles_labels(), strict=True)
        new = [(handle, label) for handle, label in more if label not in labels]
        handles, labels = handles + [handle for handle, _ in new], labels + [label for _, label in new]
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def color_of(row: str) -> tuple[float, ...]:
    """By network, and darker for ALL than for IR than for EF."""
    words = row.removesuffix(RANDOM_DIMENSIONS).split()
    return plt.get_cmap(COLORS.get(words[0], "Greens"))(SHADES.get(words[-1], 0.2))


def draw_accuracies(axes: plt.Axes, table: Table, columns: list[str], chance: float | None) -> None:
    """A group of bars per perturbation, a bar per row."""
    rows = list(table)
    width = 0.86 / len(rows)
    centers = np.arange(len(columns))
    for i, row in enumerate(rows):
        heights = [table[row].get(column, np.nan) for column in columns]
        places = centers + (i - (len(rows) - 1) / 2) * width
        bars = axes.bar(places, heights, 0.92 * width, color=color_of(row), label=row)
        labels = ["" if np.isnan(height) else f"{height:.0f}" for height in heights]
        axes.bar_label(bars, labels, fontsize=8, padding=2, bbox={"color": "white", "pad": 0.3})
    if chance is not None:
        axes.axhline(chance, color="black", linestyle="--", linewidth=1, zorder=0, label=f"chance ({chance:.3g} %)")
    axes.set(ylim=(0, 105), ylabel="top-1 accuracy (%)", xlabel="perturbation of the test images")
    axes.set_xticks(centers, columns)
    axes.spines[["top", "right"]].set_visible(False)


# --- command line ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched for results, with sub-folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and results.png")
    args = parser.parse_args()
    check_writable(args.out, "--out")
    records = read_records(args.folders)
    probes, others = ([record for record in records if (record["kind"] == PROBE) == kind] for kind in (True, False))
    others = [network for record in others for network in split_untrained(record)]
    fields = differing_fields(probes + others)
    chosen, rotation = choose_records(probes, fields), rotation_table(others, fields)
    table, columns = build_table(chosen)
    markdown = to_markdown(table, columns) + (f"\n\n{rotation_markdown(rotation)}" if rotation else "")
    print(markdown)
    rows = [{"row": row, **cells} for row, cells in table.items()]
    results = {
        "table": {"columns": columns, "rows": rows}, "rotation": rotation, "markdown": markdown, "records": chosen
    }  # fmt: skip
    save_json(results, args.out / "results.json")
    plot(table, columns, chance_level(chosen), rotation, args.out / "results.png")
    print(f"\nwrote {args.out / 'results.json'} and {args.out / 'results.png'}")


if __name__ == "__main__":
    run_entry_point(main)
