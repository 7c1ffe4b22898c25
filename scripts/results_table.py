"""Collects all linear-probe results into one table and one plot: a row per network and part, a column per perturbation.

    python -m scripts.results_table results/IN100_ep200 --out results/IN100_ep200

Reads the JSON files that eval_linear.py wrote below the given folders, prints the table in Markdown, and writes results.json
(table, Markdown, records) and results.png to --out. Accuracies are those of the last epoch, in percent. A network that was
not pretrained is the row `random`. Results for different data sets, architectures, recipes, numbers of epochs, hp1 or seeds
have rows of their own. If several files hold a result for the same cell, the newest one counts, and a note on stderr says so.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from evaluation.names import PARTS

# Rows and columns appear in this order; unknown names follow in alphabetical order. A test compares PERTURBATIONS with those
# of augmentations.py, whose import would cost this script the seconds that torch takes.
RANDOM = "random"
NETS = (RANDOM, "dino", "CLeVER")
PART_ORDER = ("ALL", "IR", "EF")
PERTURBATIONS = ("ori", "basic", "aug1", "aug1_2", "aug1_3", "aug1_4_1", "aug1_4_2", "aug1_4_3")

# Where networks of the same kind differ in one of these fields, its value is a piece of the row's name.
VARIANT_FORMATS = {
    "dataset": "{}", "arch": "{}", "aug": "{}", "pretrained_epochs": "ep{}", "hp1": "hp{}", "seed": "seed{}"
}  # fmt: skip
NAMED_IN_ALL_ROWS = ("dataset", "arch")  # or in none
PRETRAINING_FIELDS = ("aug", "pretrained_epochs", "hp1")  # the row `random` has none of them
REQUIRED_FIELDS = ("net", "arch", "part", "test_aug_type", "accuracy")
COLORS = {RANDOM: "Greys", "dino": "Blues", "CLeVER": "Oranges"}
SHADES = {"ALL": 0.85, "IR": 0.6, "EF": 0.35}

Table = dict[str, dict[str, float]]  # {row: {perturbation: accuracy}}


class ResultError(ValueError):
    """There are no results, or a result file is incomplete."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_records(folders: list[Path]) -> list[dict]:
    """Every linear-probe result below the folders, oldest file first, with the path added as `file`.

    Files of other kinds are ignored. Raises ResultError if a folder is missing, if a result lacks a field, or if there
    are no results.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ResultError(f"{folder} is not a folder")
    files = {path.resolve(): path for folder in folders for path in folder.rglob("*.json")}
    oldest_first = sorted(files.values(), key=lambda path: (path.stat().st_mtime_ns, str(path)))
    records = [record for path in oldest_first if (record := read_record(path)) is not None]
    if not records:
        names = ", ".join(map(str, folders))
        raise ResultError(f"no results of eval_linear.py (JSON files) below {names}; run scripts/linear_probe.sh first")
    return records


def read_record(path: Path) -> dict | None:
    """The linear-probe result in a file, with its `dataset` and without its `args`; None if the file holds something else."""
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        print(f"note: {path} is not valid JSON, ignored", file=sys.stderr)
        return None
    if not isinstance(record, dict) or record.get("kind") != "linear_probe":
        return None
    missing = [name for name in REQUIRED_FIELDS if name not in record]
    if missing:
        raise ResultError(f"{path} is a result without {', '.join(missing)}; run that evaluation again")
    args = record.pop("args", {})
    record.setdefault("dataset", Path(args.get("data_path", "")).name or None)
    return {**record, "file": str(path)}


# --- table -----------------------------------------------------------------------------------------------------------


def network_name(record: dict) -> str:
    return RANDOM if record.get("pretrained_epochs") == 0 else record["net"]


def differing_fields(records: list[dict]) -> dict[str, list[str]]:
    """{network: the fields of VARIANT_FORMATS that its rows must name}.

    Data set and architecture are named in all rows or in none; the other fields where records of the same network differ in
    them.
    """
    networks: dict[str, list[dict]] = {}
    for record in records:
        networks.setdefault(network_name(record), []).append(record)

    def differ(name: str, net: str) -> bool:
        if name in PRETRAINING_FIELDS and net == RANDOM:
            return False
        return len({record.get(name) for record in (records if name in NAMED_IN_ALL_ROWS else networks[net])}) > 1

    return {net: [name for name in VARIANT_FORMATS if differ(name, net)] for net in networks}


def variant_of(record: dict, fields: list[str]) -> str:
    """The values of these fields, as they stand in the row's name; values that are not known are left out."""
    return " ".join(VARIANT_FORMATS[name].format(record[name]) for name in fields if record.get(name) is not None)


def rank(order: tuple[str, ...], name: str) -> tuple[int, str]:
    """Sort key: names in `order` first, then all others by name."""
    return (order.index(name) if name in order else len(order), name)


def choose_records(records: list[dict]) -> list[dict]:
    """The newest record of every cell, in the order of the table, with the name of its `row` added.

    `records` must be sorted from the oldest to the newest.
    """
    fields = differing_fields(records)
    cells: dict[tuple, list[dict]] = {}
    for record in records:
        net, part = network_name(record), PARTS.get(record["part"], record["part"])
        variant = variant_of(record, fields[net])
        key = (variant, rank(NETS, net), rank(PART_ORDER, part), rank(PERTURBATIONS, record["test_aug_type"]))
        cells.setdefault(key, []).append({**record, "row": " ".join(filter(None, (net, variant, part)))})
    for *older, newest in cells.values():
        if older:
            cell = f"{newest['row']}, {newest['test_aug_type']}"
            print(f"note: {cell}: {len(older) + 1} results, the newest counts: {newest['file']}", file=sys.stderr)
    return [cells[key][-1] for key in sorted(cells)]


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


def align(lines: list[list[str]], text_columns: int = 1) -> str:
    """A Markdown table, the title first, with aligned columns; all but the first `text_columns` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: list[str]) -> list[str]:
        pairs = enumerate(zip(cells, widths, strict=True))
        return [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in pairs]

    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [row(lines[0]), rule, *map(row, lines[1:])])


# --- plot ------------------------------------------------------------------------------------------------------------


def chance_level(records: list[dict]) -> float | None:
    """Accuracy of guessing, in percent; None unless all records have the same number of classes."""
    numbers = {record.get("num_labels") for record in records}
    number = numbers.pop() if len(numbers) == 1 else None
    return 100 / number if number else None


def plot(table: Table, columns: list[str], chance: float | None, path: Path) -> None:
    """Write a bar chart: a group of bars per perturbation, a bar per row."""
    rows = list(table)
    width = 0.86 / len(rows)
    figure, axes = plt.subplots(figsize=(2.5 + max(5, 0.28 * len(rows) * len(columns)), 4.2), layout="constrained")
    centers = np.arange(len(columns))
    for i, row in enumerate(rows):
        net, part = row.split(" ")[0], row.split(" ")[-1]
        color = plt.get_cmap(COLORS.get(net, "Greens"))(SHADES.get(part, 0.5))
        heights = [table[row].get(column, np.nan) for column in columns]
        bars = axes.bar(centers + (i - (len(rows) - 1) / 2) * width, heights, 0.92 * width, color=color, label=row)
        labels = ["" if np.isnan(height) else f"{height:.0f}" for height in heights]
        axes.bar_label(bars, labels, fontsize=8, padding=2, bbox={"color": "white", "pad": 0.3})
    if chance is not None:
        axes.axhline(chance, color="black", linestyle="--", linewidth=1, zorder=0, label=f"chance ({chance:.3g} %)")
    axes.set(ylim=(0, 105), ylabel="top-1 accuracy (%)", xlabel="perturbation of the test images")
    axes.set_xticks(centers, columns)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched for results, with sub-folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and results.png")
    args = parser.parse_args(argv)
    try:
        records = read_records(args.folders)
    except ResultError as error:
        print(f"results_table.py: {error}", file=sys.stderr)
        return 2
    chosen = choose_records(records)
    table, columns = build_table(chosen)
    markdown = to_markdown(table, columns)
    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [{"row": row, **cells} for row, cells in table.items()]
    results = {"table": {"columns": columns, "rows": rows}, "markdown": markdown, "records": chosen}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(table, columns, chance_level(chosen), args.out / "results.png")
    print(f"\nwrote {args.out / 'results.json'} and {args.out / 'results.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
