"""One table and one plot of all linear probes: a row per network and part, a column per perturbation.

    python -m scripts.results_table results/digits_ep20 --out results/digits_ep20

Gathers the JSON files that eval_linear.py wrote below the given folders, prints the table in Markdown, and writes
results.json (table, Markdown, records) and results.png to --out. Accuracies are of the last epoch, in percent.
A network that was not pretrained is the row `random`. Where a row has several results for a perturbation, the newest
file counts, and a line on stderr says so.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RANDOM = "random"
NETS = (RANDOM, "dino", "CLeVER")
DISTINGUISHING = {"arch": "{}", "aug": "{}", "pretrained_epochs": "ep{}", "hp1": "hp{}"}  # how a row's name tells them
PARTS = {"ALL": "ALL", "main_part": "IR", "else_part": "EF"}
PERTURBATIONS = ("ori", "basic", "aug1", "aug1_2", "aug1_3", "aug1_4_1", "aug1_4_2", "aug1_4_3")
NEEDED = ("net", "arch", "part", "test_aug_type", "accuracy")
COLORS = {"random": "Greys", "dino": "Blues", "CLeVER": "Oranges"}
SHADES = {"ALL": 0.85, "IR": 0.6, "EF": 0.35}


class ResultError(ValueError):
    """There is nothing to make a table of, or a result file is incomplete."""


def read_records(folders: list[Path]) -> list[dict]:
    """Every linear-probe result below the folders, oldest file first, with `file` and `row` added.

    Files of other kinds, or that hold no JSON, are passed over.

    Raises: ResultError if a folder is missing, a result lacks a field, or there is no result at all.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ResultError(f"{folder} is not a folder")
    files = {path.resolve(): path for folder in folders for path in folder.rglob("*.json")}
    records = []
    for path in sorted(files.values(), key=lambda path: (path.stat().st_mtime_ns, str(path))):
        try:
            record = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            print(f"note: {path} is no JSON, passed over", file=sys.stderr)
            continue
        if not isinstance(record, dict) or record.get("kind") != "linear_probe":
            continue
        missing = [name for name in NEEDED if name not in record]
        if missing:
            raise ResultError(f"{path} is a result without {', '.join(missing)}; run that evaluation again")
        record.pop("args", None)  # stays in the file itself
        records.append({**record, "file": str(path)})
    if not records:
        names = ", ".join(map(str, folders))
        raise ResultError(f"no results of eval_linear.py (JSON files) below {names}; run scripts/linear_probe.sh first")
    return records


def rank(names: tuple[str, ...], name: str) -> tuple[int, str]:
    """Sort key: known names in their order, then the others by name."""
    return (names.index(name) if name in names else len(names), name)


def build_table(records: list[dict]) -> tuple[dict[str, dict[str, float]], list[str], list[dict]]:
    """{row: {perturbation: accuracy}}, the perturbations in order, and the records that count.

    `records` come oldest first: a later one replaces an earlier one of the same row and perturbation. A row's name tells
    architecture, recipe, epochs and hp1 where networks of the same kind differ in them.
    """
    nets = [RANDOM if record.get("pretrained_epochs") == 0 else record["net"] for record in records]
    values: dict[tuple[str, str], set] = {}
    for net, record in zip(nets, records, strict=True):
        for name in DISTINGUISHING if net != RANDOM else ("arch",):
            values.setdefault((net, name), set()).add(record.get(name))
    archs = set().union(*(found for (_, name), found in values.items() if name == "arch"))
    chosen: dict[tuple, dict] = {}
    count: dict[tuple, int] = {}
    for net, record in zip(nets, records, strict=True):
        part = PARTS.get(record["part"], record["part"])
        differing = [name for name in DISTINGUISHING if len(archs if name == "arch" else values.get((net, name), ())) > 1]
        variant = " ".join(DISTINGUISHING[name].format(record.get(name)) for name in differing)
        key = (variant, rank(NETS, net), rank(tuple(SHADES), part), rank(PERTURBATIONS, record["test_aug_type"]))
        chosen[key] = {**record, "row": " ".join(filter(None, (net, variant, part)))}
        count[key] = count.get(key, 0) + 1
    for key, record in chosen.items():
        if count[key] > 1:
            print(
                f"note: {record['row']}, {record['test_aug_type']}: {count[key]} results, the newest counts: "
                f"{record['file']}", file=sys.stderr,
            )  # fmt: skip
    used = [chosen[key] for key in sorted(chosen)]
    columns = [name for _, name in sorted({key[-1] for key in chosen})]
    table: dict[str, dict[str, float]] = {}
    for record in used:
        table.setdefault(record["row"], {})[record["test_aug_type"]] = record["accuracy"]
    return table, columns, used


def to_markdown(table: dict[str, dict[str, float]], columns: list[str]) -> str:
    """The table with columns of equal width; a result that is not there is a dash."""
    lines = [["top-1 (%)", *columns]]
    lines += [[row, *(f"{cells[c]:.1f}" if c in cells else "-" for c in columns)] for row, cells in table.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def chance_level(records: list[dict]) -> float | None:
    """Accuracy of guessing in percent, where every record tells the same number of classes."""
    labels = {record.get("num_labels") for record in records}
    number = labels.pop() if len(labels) == 1 else None
    return 100 / number if number else None


def plot(table: dict[str, dict[str, float]], columns: list[str], chance: float | None, path: Path) -> None:
    """Grouped bars: a group per perturbation, a bar per row."""
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched for results, with all below")
    parser.add_argument("--out", required=True, type=Path, help="folder for results.json and results.png")
    args = parser.parse_args(argv)
    try:
        records = read_records(args.folders)
    except ResultError as error:
        print(f"results_table.py: {error}", file=sys.stderr)
        return 2
    table, columns, used = build_table(records)
    markdown = to_markdown(table, columns)
    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [{"row": row, **cells} for row, cells in table.items()]
    results = {"table": {"columns": columns, "rows": rows}, "markdown": markdown, "records": used}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(table, columns, chance_level(used), args.out / "results.png")
    print(f"\nwrote {args.out / 'results.json'} and {args.out / 'results.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
