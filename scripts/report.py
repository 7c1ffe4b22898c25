"""One HTML page of everything below folders of results: accuracies, curves, arguments, tables of all results, pictures.

    python -m scripts.report results --out report.html

The page is one file that loads nothing from the network: it opens in a browser from the disk, and can be sent by mail. It shows
every log.txt of main_dino.py, the arguments in the checkpoint.pth beside it, every JSON file of the eval_*.py scripts, and the
pictures that sum up results. Files that cannot be read are named on stderr and in the page.
"""

import base64
import datetime
import fnmatch
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import pandas as pd
from markupsafe import Markup

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from clever.arguments import ArgumentParser, check_not_negative, check_writable, plain_args
from clever.checkpoint import load_checkpoint
from clever.data.augmentations import PERTURBATIONS
from clever.entry import run_entry_point
from clever.evaluation.names import PARTS
from clever.evaluation.saliency.results import METHODS
from clever.evaluation.tables import GAPS, MEASURES, SPACES
from clever.utils import InputError, write_text_atomically
from scripts import study
from scripts.records import BASELINE, Record, list_files, name_rows, note, read_result, readable

# Pictures of our scripts that sum up a result; masks and frames, of which there may be thousands, are not among them.
PICTURES = ("results.png", "front.png", "told.png", "equivariance*.png", "overview.png", "contact_sheet-*.png")
PICTURES += ("*pca*.png", "*tsne*.png", "*umap*.png")
ORDER = {name: i for i, name in enumerate(PERTURBATIONS)}  # of rows
COLORS = ("#2b7de0", "#dd6b10", "#8a63d2", "#2f9e57", "#d0487f", "#a08312", "#1594ab", "#7d868f")  # of runs, light and dark
# Groups of charts, and the beginnings of the names in log.txt that they show; the rest is the last group.
GROUPS = {
    "Losses": ("train_normalized_loss", "train_loss"),
    "Accuracy and R2 while training": ("knn_", "rotation_r2_"),
    "Schedules": ("train_lr", "train_wd", "train_momentum"),
    "Collapse": ("train_feature_std", "train_teacher_entropy", "train_center"),
    "Speed, memory, other": ("",),
}
# What a result depends on; and the headings of columns and charts that are not named as in the files.
SETTINGS = ("dataset", "net", "arch", "aug", "pretrained_epochs", "hp1", "pretraining_seed", "seed", "num_train_images")
SETTINGS += ("num_test_images", "num_labels", "backbone")
HEADINGS = {
    "dataset": "data", "net": "network", "arch": "backbone", "aug": "recipe", "pretrained_epochs": "epochs",
    "pretraining_seed": "pretraining seed", "num_train_images": "training images", "num_test_images": "test images",
    "num_labels": "classes", "backbone": "weights", "test_aug_type": "images", "accuracy": "top-1",
    "best_accuracy": "best top-1", "top5": "top-5", "test_loss": "test loss", "effective_lr": "rate", "ds_mode": "mode",
    "mean_class_accuracy": "mean per class", "best_mean_class_accuracy": "best per class", "num_images": "images",
    "effective_backbone_lr": "backbone's rate", "num_scored": "scored", "num_degenerate": "without a cut",
    "train_loss": "loss", "train_normalized_loss": "loss / ln K", "train_images_per_second": "images per second",
    "memory_gib": "memory, GiB", "knn_ALL": "20-NN of ALL", "train_lr": "learning rate", "train_wd": "weight decay",
    "train_momentum": "momentum of the teacher", "seconds": "seconds per epoch",
}  # fmt: skip


# --- tables of results -----------------------------------------------------------------------------------------------


def equivariance_rows(record: Record) -> list[Record]:
    """A row for every transformation, head, input and measure, with a value for every part and control."""
    rows: dict[tuple, Record] = {}
    for entry in record["results"] + record["gaps"]:
        for name, title in (MEASURES | GAPS).items():
            if entry.get(name) is not None:
                about = {key: entry.get(key) for key in ("transform", "head", "input")} | {"measure": title}
                row = rows.setdefault(tuple(about.values()), about)
                row[SPACES.get((entry["part"], entry["control"]))] = entry[name]
    return list(rows.values())


class Table(NamedTuple):
    """The table of a kind of result: title, a sentence on what the numbers say, columns, scores with `digits` after the point.

    `rows` makes the rows of a result, which have its fields, too. SETTINGS are further columns.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    scores: tuple[str, ...] = ()
    digits: int = 3
    rows: Callable[[Record], list[Record]] = lambda record: [{}]


TABLES = {
    "linear_probe": Table(
        "Linear probe", "Accuracy in percent: of the last epoch, and of the best one; ori: unchanged test images.",
        ("part", "test_aug_type", "effective_lr"), ("accuracy", "best_accuracy", "top5", "test_loss"), 2,
    ),
    "knn": Table(
        "k-NN", "Accuracy in percent of a vote of the k nearest training images.",
        ("part", "test_aug_type", "k", "temperature"), ("accuracy", "top5"), 2,
        lambda record: [{**result, "accuracy": float(result["top1"])} for result in record["results"]],
    ),
    "equivariance": Table(
        "Equivariance",
        "What regressors read off the features about a transformation (R2: 0 nothing, 1 all of it); how far features move.",
        ("transform", "measure", "head", "input"), tuple(SPACES.values()), rows=equivariance_rows,
    ),
    "downstream": Table(
        "Downstream classification", "Accuracy in percent: of the last epoch, and of the best one.",
        ("ds_mode", "part", "test_aug_type", "effective_lr", "effective_backbone_lr"),
        ("accuracy", "best_accuracy", "top5", "mean_class_accuracy", "best_mean_class_accuracy"), 2,
    ),
    "video_segmentation": Table(
        "Video segmentation (DAVIS 2017)", "J: overlap of masks. F: agreement of their boundaries. 1 is perfect.", ("subset",),
        ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"), rows=lambda record: [record["global"]],
    ),
    "saliency": Table(
        "Saliency", "Masks of the object in the foreground against the true ones, where there are any. 1 is perfect.",
        ("method", "num_images", "num_scored", "num_degenerate"), ("IoU", "accuracy", "F_max"),
        rows=lambda record: [{"method": name} | record[name] for name in METHODS if name in record] or [{}],
    ),
}  # fmt: skip


def show(value: Any, digits: int | None = None) -> str:
    """A value of any kind as short text; a number with so many digits after the point, or with four that count."""
    if value is None:
        return "–"
    if isinstance(value, (int, float)) and digits is not None:
        return f"{round(value, digits) + 0:.{digits}f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 300 else text[:300] + "…"


def fill(table: Table, rows: list[Record]) -> dict[str, Any]:
    """A table as the template shows it. What all rows share stands in its note; columns without values are left out."""
    keys = [key for key in (*table.columns, *table.scores, *SETTINGS) if any(row.get(key) is not None for row in rows)]
    shared = {
        key: show(rows[0].get(key)) for key in keys
        if key not in table.scores and len(rows) > 1 and len({repr(row.get(key)) for row in rows}) == 1
    }  # fmt: skip
    keys = [key for key in keys if key not in shared]
    cells = [[show(row.get(key), table.digits if key in table.scores else None) for key in keys] for row in rows]
    numeric = [not any(isinstance(row.get(key), str) for row in rows) for key in keys]
    about = f"{table.note} In all rows: " + ", ".join(f"{HEADINGS.get(key, key)} {text}" for key, text in shared.items()) + "."
    return {
        "title": table.title, "note": about if shared else table.note, "heads": [HEADINGS.get(key, key) for key in keys],
        "numeric": numeric, "rows": list(zip([row["name"] for row in rows], cells, strict=True)),
        "files": [row.get("file", "") for row in rows],
    }  # fmt: skip


# --- reading ---------------------------------------------------------------------------------------------------------


def read_run(path: Path, problems: list[str]) -> dict[str, Any]:
    """The `folder` of this log.txt, its `log`, {epoch: {name: number}}, and the `arguments` in the checkpoint beside it."""
    with readable(path, "is not the log of a pretraining"):
        records = [json.loads(line, parse_int=float) for line in path.read_text(encoding="utf-8").splitlines()]
        log = {record["epoch"]: {name: float(value) for name, value in record.items()} for record in records}
    arguments, checkpoint = {}, path.with_name("checkpoint.pth")
    try:
        arguments = plain_args(load_checkpoint(checkpoint, mmap=True).get("args", {})) if checkpoint.exists() else {}
    except InputError as error:
        problems.append(str(error))
    return {"folder": path.parent, "log": log, "arguments": arguments}


def collect(folders: list[Path], problems: list[str]) -> tuple[list[dict], list[Record], list[Path]]:
    """The runs, results (with their `rows`) and pictures below the folders. Raises InputError if a folder is missing."""
    runs, results, pictures = [], [], []
    for path in sorted(list_files(folders)):
        try:
            if path.name == "log.txt":
                runs.append(read_run(path, problems))
            elif path.suffix == ".json" and (record := read_result(path)) and record["kind"] in TABLES:
                with readable(path, f"is damaged, or no result of kind {record['kind']}"):
                    results.append(record | {"rows": [record | row for row in TABLES[record["kind"]].rows(record)]})
            elif any(fnmatch.fnmatchcase(path.name, pattern) for pattern in PICTURES):
                pictures.append(path)
        except InputError as error:
            problems.append(str(error))
    return runs, results, pictures


def short_names(folders: Iterable[Path]) -> dict[Path, str]:
    """{folder: the parts of its path, from the left, that are needed to tell the folders apart}."""
    unique = list(dict.fromkeys(folders))
    names: list[tuple[str, ...]] = [()] * len(unique)
    for parts in itertools.zip_longest(*(folder.parts for folder in unique), fillvalue=""):
        longer = [(*name, part) if part else name for name, part in zip(names, parts, strict=True)]
        if len(set(longer)) > len(set(names)):
            names = longer
    return {folder: "/".join(name) or folder.name or str(folder) for folder, name in zip(unique, names, strict=True)}


# --- sections of the page --------------------------------------------------------------------------------------------


def best_accuracies(results: list[Record], kind: str) -> pd.DataFrame:
    """The best result of each row and perturbation, of linear probes or of k-NN (over all k), in the order of a table."""
    records = [row for record in results if record["kind"] == kind for row in record["rows"]]
    cells = name_rows(records)
    cells["accuracy"] = pd.Series([row["accuracy"] for row in records], dtype=float)
    cells["classes"] = pd.Series([row.get("num_labels") for row in records])
    best = cells.reset_index(drop=True).sort_values("accuracy", ascending=False, kind="stable")
    return best.drop_duplicates(["row", "test_aug_type"]).sort_index()


def best_table(title: str, best: pd.DataFrame) -> dict[str, Any]:
    """A row for each network and part, a column for each perturbation."""
    cells = best.pivot(index="row", columns="test_aug_type", values="accuracy").reindex(best["row"].unique())
    note = "In percent; ori: unchanged test images. Of several results for a cell the best one counts. Bold: best of a column."
    if best["classes"].nunique() == 1:
        note += f" Chance: {100 / best['classes'].max():.1f}."
    rows = list(zip(cells.index, cells.to_numpy(), strict=True))
    return {"title": title, "note": note, "heads": list(cells), "best": list(cells.max()), "rows": rows}


def tiles_of(best: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """For each data set and backbone, the best accuracy of each network and part on clean images, beside the ALL of dino."""
    clean = best[best["test_aug_type"] == "ori"].sort_values("accuracy", ascending=False, kind="stable")
    for (data, arch), group in clean.groupby(["dataset", "arch"], dropna=False):
        group = group.drop_duplicates(["net", "part"]).sort_values(["net", "part"])
        base = group.loc[(group["net"] == BASELINE) & (group["part"] == "ALL"), "accuracy"].max()
        tiles = [(cell.net, cell.part, cell.accuracy, cell.accuracy - base) for cell in group.itertuples()]
        yield {"title": f"Best top-1 accuracy on clean images of {data}, {arch} (percent)", "tiles": tiles}


def draw(curves: dict[int, dict[int, float]]) -> Markup:
    """A chart as SVG of {number of the run: {epoch: value}}. What is black in it gets the colour of the page's text."""
    figure, axes = plt.subplots(figsize=(3.6, 2.0), layout="constrained")
    axes.tick_params(labelsize=7)
    for run, curve in curves.items():
        style = {"color": COLORS[run % len(COLORS)], "linestyle": ("-", "--", ":")[run // len(COLORS) % 3]}
        axes.plot(list(curve), list(curve.values()), gid=f"run{run}", marker="." if len(curve) == 1 else None, **style)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    return to_svg(figure)


def to_svg(figure: plt.Figure) -> Markup:
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    plt.close(figure)
    svg = file.getvalue()[file.getvalue().index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r'id="run(\d+)"', r'class="run\1"', svg)  # an id occurs once in a page
    return Markup(re.sub(r'<g id="\w+">', "<g>", svg))


def charts_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, Markup]]:
    """{group: {heading: chart}} of everything in the logs."""
    left = sorted({name for run in runs for record in run["log"].values() for name in record} - {"epoch"})
    groups: dict[str, dict[str, Markup]] = {}
    for title, beginnings in GROUPS.items():
        for name in [name for beginning in beginnings for name in left if name.startswith(beginning)]:
            logs = [{epoch: record[name] for epoch, record in run["log"].items() if name in record} for run in runs]
            heading = HEADINGS.get(name, name.removeprefix("train_"))
            groups.setdefault(title, {})[heading] = draw({i: log for i, log in enumerate(logs) if log})
            left.remove(name)
    return groups


def runs_table(runs: list[dict[str, Any]], names: dict[Path, str]) -> dict[str, Any]:
    """What every run has reached."""
    scores = ("train_loss", "train_normalized_loss", "knn_ALL", "train_images_per_second", "memory_gib")
    rows = []
    for run in runs:
        last = {name: value for record in run["log"].values() for name, value in record.items()}
        hours = sum(record.get("seconds", 0) for record in run["log"].values()) / 3600
        about = {"name": names[run["folder"]], "pretrained_epochs": len(run["log"]), "hours": hours}
        rows.append(last | run["arguments"] | about)
    return fill(Table("Runs", "The last value of each.", ("hours",), scores), rows)


def arguments_of(runs: list[dict[str, Any]], names: dict[Path, str]) -> dict[str, Any]:
    """The arguments in which runs differ as a table, and those that all share; of runs with a checkpoint."""
    known = [run for run in runs if run["arguments"]]
    texts = {key: [show(run["arguments"].get(key)) for run in known] for run in known for key in run["arguments"]}
    differing = {key: values for key, values in sorted(texts.items()) if len(set(values)) > 1}
    heads = [names[run["folder"]] for run in known]
    return {
        "differing": {"title": "Arguments in which runs differ", "heads": heads, "rows": list(differing.items())},
        "shared": {key: values[0] for key, values in sorted(texts.items()) if key not in differing},
    }


def result_tables(results: list[Record], names: dict[Path, str]) -> list[dict[str, Any]]:
    """A table for each kind of result."""
    by_kind: dict[str, list[Record]] = {kind: [] for kind in TABLES}
    for record in results:
        about = {"name": names[record["file"].parent], "part": PARTS.get(record.get("part"), record.get("part"))}
        by_kind[record["kind"]] += [row | about for row in record["rows"]]
    for rows in by_kind.values():
        rows.sort(key=lambda row: (row["name"], ORDER.get(row.get("test_aug_type"), len(ORDER))))
    return [fill(TABLES[kind], rows) for kind, rows in by_kind.items() if rows]


def comparison(source: Path) -> dict[str, Any]:
    """The tables of a study (scripts/study.sh), and its front as a chart."""
    values = study.to_values(source, study.read_cells(source))
    tables = [
        {"title": title, "heads": heads, "numeric": [True] * len(heads), "rows": [(name, cells) for name, *cells in rows]}
        for title, ((_, *heads), *rows) in study.tables_of(values).items()
    ]
    return {"tables": tables, "front": to_svg(study.draw_front(values)) if (values["split"] == "tune").any() else ""}


def sections_of(folders: list[Path], max_bytes: float, problems: list[str]) -> dict[str, Any]:
    """What the template shows. Pictures are included as long as they fit into `max_bytes`; the others are named."""
    runs, results, pictures = collect(folders, problems)
    if not runs and not results and not any(map(study.find_study, folders)):
        raise InputError(f"{', '.join(map(str, folders))}: no results, neither log.txt nor JSON files of the evaluations")
    names = short_names([run["folder"] for run in runs] + [record["file"].parent for record in results])
    best = {"Linear probe": best_accuracies(results, "linear_probe"), "k-NN": best_accuracies(results, "knn")}
    best = {title: found for title, found in best.items() if len(found)}
    tables = [best_table(f"{title}: top-1 accuracy by perturbation of the test images", found) for title, found in best.items()]
    sizes = itertools.accumulate(path.stat().st_size for path in pictures)
    shown = [path for path, size in zip(pictures, sizes, strict=True) if size <= max_bytes]
    return {
        "comparisons": list(map(comparison, filter(None, map(study.find_study, folders)))),
        "tiles": next((list(tiles_of(found)) for found in best.values()), []),
        "tables": tables + ([runs_table(runs, names)] if runs else []),
        "runs": [names[run["folder"]] for run in runs],
        "charts": charts_of(runs),
        **arguments_of(runs, names),
        "results": result_tables(results, names),
        "pictures": {str(path): base64.b64encode(path.read_bytes()).decode() for path in shown},
        "left_out": [path for path in pictures if path not in shown],
        "amounts": f"{len(runs)} runs, {len(results)} results, {len(pictures)} pictures",
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched for results, with sub-folders")
    parser.add_argument("--out", required=True, type=Path, help="the page, *.html")
    parser.add_argument("--max_pictures_mb", type=float, default=20, help="size of all pictures in the page, megabytes; those "
        "beyond it are only named. 0: no pictures")  # fmt: skip
    args = parser.parse_args()
    check_not_negative(args, "max_pictures_mb")
    check_writable(args.out.parent, "--out")
    problems: list[str] = []
    sections = sections_of(args.folders, args.max_pictures_mb * 1e6, problems)
    for problem in problems:
        note(problem)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    title = ", ".join(folder.name or str(folder) for folder in args.folders)
    about = {"title": title, "now": f"{datetime.datetime.now():%d %B %Y, %H:%M}", "problems": problems, "colors": COLORS}
    page = templates.get_template("report.html.j2").render(about | sections)
    write_text_atomically(page, args.out)
    print(f"wrote {args.out}: {sections['amounts']}, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_entry_point(main)
