"""The HTML of a report: summary first, then curves, arguments, results and pictures."""

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clever.utils import plural
from scripts.report_curves import curves_section, swatch
from scripts.report_html import Html, data_uri, document, escape, json_block, number, tag, text_of, void
from scripts.report_records import Found, Picture, Run, short_names
from scripts.report_tables import (
    KINDS,
    KNN,
    ORDERS,
    PROBE,
    SETTINGS,
    TABLES,
    Best,
    Column,
    Record,
    Table,
    accuracies,
    best_accuracies,
    headlines,
    other_table,
    sort_key,
)
from scripts.results_table import rank

MARKER = "<!doctype html><!-- scripts/report.py -->"  # the beginning of every report, by which it is known
MAX_HEADLINES = 4  # pairs of data and backbone; beyond, the table below says it better
MEASURES = {PROBE: "Linear probe", KNN: "k-NN"}
RUN_COLUMNS = (
    Column("net", "network"), Column("arch", "backbone"), Column("aug", "recipe"), Column("epochs", "epochs"),
    Column("train_loss", "loss", 3), Column("train_normalized_loss", "of ln K", 3), Column("knn_ALL", "20-NN", 1),
    Column("train_images_per_second", "images/s", 0), Column("seconds", "time"), Column("memory_gib", "memory, GiB", 2),
    Column("seed", "seed"), Column("backbone", "weights"),
)  # fmt: skip
HIDDEN = ("args", "kind", "file", "correct", "frames")  # of a result's record: shown elsewhere, or long and not for reading


def render(found: Found, folders: list[Path], max_bytes: float) -> str:
    """The page. Pictures are included as long as they fit into `max_bytes`; the others are named."""
    names = short_names([run.folder for run in found.runs] + [record["file"].parent for record in found.results])
    results, count = result_sections(found, names)
    pictures = picture_section(found.pictures, max_bytes)
    sections = {
        "Summary": summary_section(found, names),
        "Curves": curves_section(found.runs, [names[run.folder] for run in found.runs]) if found.runs else None,
        "Arguments": arguments_section(found.runs, names),
        "Results": results,
        "Pictures": pictures,
    }
    sections = {title: section for title, section in sections.items() if section}
    links = [tag("a", title, href=f"#{title.lower()}") for title in sections]
    anchored = [tag("div", section, id=title.lower(), class_="anchor") for title, section in sections.items()]
    title = "Report: " + ", ".join(str(folder) for folder in folders)
    body = Html("\n").join([
        page_head(found, folders, count),
        tag("nav", *links, aria_label="sections"),
        tag("main", problem_box(found.problems), *anchored),
        tag("dialog", tag("form", tag("button", "close", class_="plain"), method="dialog"), tag("div"), id="details"),
    ])  # fmt: skip
    return document(title, MARKER, Html(body))


def page_head(found: Found, folders: list[Path], count: int) -> Html:
    """Title, and how much there is."""
    now = datetime.datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0")
    amounts = [plural(len(found.runs), "run"), plural(count, "result"), plural(len(found.pictures), "picture")]
    about = [*amounts, *([f"{plural(found.others, 'other JSON file')} left out"] if found.others else []), now]
    return tag("header", tag("h1", ", ".join(folder.name or str(folder) for folder in folders)), tag("p", " · ".join(about)))


def problem_box(problems: list[str]) -> Html | str:
    """The files that could not be read, or not completely."""
    if not problems:
        return ""
    return tag(
        "details", tag("summary", f"{plural(len(problems), 'file')} could not be read, or not completely"),
        tag("ul", *(tag("li", problem) for problem in problems)), class_="problems", open=len(problems) <= 5,
    )  # fmt: skip


# --- summary ---------------------------------------------------------------------------------------------------------


def summary_section(found: Found, names: dict[Path, str]) -> Html:
    """The best accuracies of every network and part, and the runs."""
    parts = []
    measured = {kind: accuracies(found.results, kind) for kind in MEASURES}
    for kind, records in measured.items():
        groups = headlines(records)
        if groups and len(groups) <= MAX_HEADLINES:
            parts += [headline(MEASURES[kind], group, best, names) for group, best in groups.items()]
            break
    for kind, records in measured.items():
        if records:
            parts.append(best_table(kind, *best_accuracies(records), records, names))
    if found.runs:
        parts.append(runs_table(found, names))
    return tag("section", tag("h2", "Summary"), *parts)


def headline(measure: str, group: tuple[str, str], best: dict[tuple[str, str], Record], names: dict[Path, str]) -> Html:
    """A tile for each network and part: its best accuracy on clean images, and how far it is from the ALL of dino."""
    base = best.get(("dino", "ALL"))
    tiles = []
    for (net, part), record in best.items():
        gain = record["accuracy"] - base["accuracy"] if base and (net, part) != ("dino", "ALL") else None
        tiles.append(tag(
            "div",
            tag("dt", net, " ", tag("b", part)),
            tag("dd", number(record["accuracy"], 1), tag("small", f"{gain:+.1f} against dino".replace("-", "−"))
                if gain is not None else tag("small", "baseline" if base else "percent")),
            class_="tile", title=names[record["file"].parent],
        ))  # fmt: skip
    heading = f"{measure}: best top-1 accuracy on clean images of {group[0]}, {group[1]} (percent)"
    return tag("div", tag("h3", heading), tag("dl", *tiles, class_="tiles"), class_="headline")


def best_table(kind: str, best: Best, columns: list[str], records: list[Record], names: dict[Path, str]) -> Html:
    """A row for each network and part, a column for each perturbation; the length of a bar is the accuracy."""
    top = {column: max(cells[column]["accuracy"] for cells in best.values() if column in cells) for column in columns}
    rows = []
    for row, cells in best.items():
        line = [tag("th", row, scope="row")]
        for column in columns:
            record = cells.get(column)
            if record is None:
                line.append(tag("td", "–", data_v="NaN"))
                continue
            value = record["accuracy"]
            line.append(tag("td", number(value, 1), data_v=repr(value), title=names[record["file"].parent], class_="bar best"
                if value == top[column] else "bar", style=f"--share:{max(0, min(1, value / 100)):.3f}"))  # fmt: skip
        rows.append(tag("tr", *line))
    note = "In percent; ori: unchanged test images. Of several results for a cell the best one counts. Bold: best of a column."
    classes = {record.get("num_labels") for record in records}
    if len(classes) == 1 and isinstance(count := classes.pop(), int) and count > 0:
        note += f" Chance: {number(100 / count, 1)}."
    heads = [Column("row", "network"), *(Column(column, column, 1) for column in columns)]
    return table_box(f"{MEASURES[kind]}: top-1 accuracy by perturbation of the test images", note, heads, rows)


def runs_table(found: Found, names: dict[Path, str]) -> Html:
    """What every run has reached."""
    weights: dict[Path, dict[str, None]] = {}
    for record in found.results:
        if record.get("backbone"):
            weights.setdefault(record["file"].parent, {})[str(record["backbone"])] = None
    rows = []
    for i, run in enumerate(found.runs):
        name = tag("th", swatch(i), breakable(names[run.folder]), scope="row", title=run.folder)
        prints = list(weights.get(run.folder, {}))
        shown = ", ".join(prints[:2]) + (f" and {len(prints) - 2} more" if len(prints) > 2 else "")
        rows.append((name, run_values(run) | {"backbone": shown or None}))
    note = "The last value of each. Weights: fingerprints that the results in the same folder name."
    return rows_table("Runs", note, "run", RUN_COLUMNS, rows)


def run_values(run: Run) -> dict[str, Any]:
    """The values of RUN_COLUMNS; of quantities in the log the last one."""
    last = {name: value for record in run.log for name, value in record.items()}
    arguments = {key: text_of(run.arguments[key]) for key in ("net", "arch", "aug", "seed") if key in run.arguments}
    seconds = sum(record.get("seconds", 0) for record in run.log)
    return {column.key: last.get(column.key) for column in RUN_COLUMNS} | arguments | {
        "epochs": len(run.log), "seconds": seconds or None, "knn_ALL": last.get("knn_ALL", last.get("knn_top1")),
    }  # fmt: skip


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds))) if 0 <= seconds < 1e9 else number(seconds)


# --- arguments -------------------------------------------------------------------------------------------------------


def arguments_section(runs: list[Run], names: dict[Path, str]) -> Html | None:
    """The arguments of all runs: those in which runs differ as a table, the others as a list."""
    known = [(i, run) for i, run in enumerate(runs) if run.arguments]
    if not known:
        return None
    keys = sorted({key for _, run in known for key in run.arguments})
    texts = {key: [text_of(run.arguments.get(key, "not there")) for _, run in known] for key in keys}
    shared = {key: values[0] for key, values in texts.items() if len(set(values)) == 1}
    parts = []
    if len(shared) < len(keys):
        heads = [Column("argument", "argument"), *(Column(names[run.folder], names[run.folder]) for _, run in known)]
        marks = {names[run.folder]: swatch(i) for i, run in known}
        rows = [
            tag("tr", tag("th", key, scope="row"), *(tag("td", value, class_="code wrap") for value in texts[key]))
            for key in keys if key not in shared
        ]  # fmt: skip
        parts.append(table_box("Arguments in which runs differ", "", heads, rows, marks=marks))
    title = "Arguments of all runs" if len(known) > 1 else "Arguments"
    listed = tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in shared.items()), class_="pairs")
    if shared:
        count = tag("small", len(shared))
        parts.append(tag("details", tag("summary", title, " ", count), listed, class_="group", open=len(known) == 1))
    note = "" if len(known) == len(runs) else tag("p", f"Known of {len(known)} of {len(runs)} runs: from their checkpoint.pth.",
        class_="note")  # fmt: skip
    return tag("section", tag("h2", "Arguments of the pretraining"), note, *parts)


# --- results ---------------------------------------------------------------------------------------------------------


def result_sections(found: Found, names: dict[Path, str]) -> tuple[Html | None, int]:
    """A table for each kind of result, and the number of results."""
    details = [describe(record) for record in found.results]
    numbered = list(enumerate(found.results))
    others = dict.fromkeys(record["kind"] for record in found.results if record["kind"] not in KINDS)
    other_tables = [other_table(kind, [r for r in found.results if r["kind"] == kind]) for kind in others]
    boxes = []
    for table in (*TABLES, *other_tables):
        rows = [(i, row) for i, record in numbered if record["kind"] == table.kind for row in table.read(record)]
        if rows:
            boxes.append(result_table(table, rows, [names[record["file"].parent] for record in found.results]))
    if not boxes:
        return None, 0
    hint = tag("p", "Press a heading to sort by it, the first cell of a row for everything about its result.", class_="note")
    section = tag("section", tag("h2", "Results"), hint, *boxes, json_block("results-data", details))
    return section, len(details)


def describe(record: Record) -> dict[str, Any]:
    """What the page shows about one result on request, as texts."""
    args = record.get("args")
    plain = {key: value for key, value in record.items() if key not in HIDDEN and value is not None}
    return {
        "file": str(record["file"]),
        "values": {key: text_of(value) for key, value in plain.items()},
        "args": {key: text_of(value) for key, value in args.items()} if isinstance(args, dict) else {},
    }


def result_table(table: Table, rows: list[tuple[int, Record]], labels: list[str]) -> Html:
    """The rows, each with the number of its result; parts and perturbations of a folder in their usual order."""

    def place(numbered: tuple[int, Record]) -> tuple:
        i, row = numbered
        return labels[i], *(rank(order, str(row[key])) for key, order in ORDERS.items() if key in row)

    lines = []
    for i, row in sorted(rows, key=place):
        button = tag("button", breakable(labels[i]), type="button", class_="more", data_result=i)
        lines.append((tag("th", button, scope="row"), row))
    return rows_table(table.title, table.note, "folder", (*table.columns, *SETTINGS), lines)


def rows_table(title: str, note: str, head: str, columns: tuple[Column, ...], rows: list[tuple[Html, Record]]) -> Html:
    """A table of rows with these first cells. What all rows share stands in the note; columns without values are left out."""
    used = [column for column in columns if any(row[column.key] is not None for _, row in rows)]
    shared = [column for column in used if column.digits is None and len(rows) > 1 and same(row[column.key] for _, row in rows)]
    shown = [column for column in used if column not in shared]
    if shared:
        note += f" In all rows: {', '.join(f'{column.title} {text_of(rows[0][1][column.key])}' for column in shared)}."
    lines = [tag("tr", first, *(cell(column, row[column.key]) for column in shown)) for first, row in rows]
    return table_box(title, note, [Column(head, head), *shown], lines)


def same(values: Iterable[Any]) -> bool:
    """Whether all values are equal."""
    return len({repr(value) for value in values}) == 1


def cell(column: Column, value: Any) -> Html:
    """A cell with what it is sorted by."""
    text = duration(value) if column.key == "seconds" and value is not None else text_of(value, column.digits)
    kind = "code" if column.key == "backbone" else None if isinstance(value, str) else "num"
    return tag("td", text, data_v=sort_key(column, value) or None, class_=kind)


def breakable(name: str) -> Html:
    """A name that may continue in a new line after /, _ and -."""
    return Html("".join(f"{escape(piece)}<wbr>" if piece in "/_-" else escape(piece) for piece in re.split("([/_-])", name)))


def table_box(title: str, note: str, heads: list[Column], rows: list[Html], marks: dict[str, Html] | None = None) -> Html:
    """A table that scrolls in its box, with a filter if it is long; its headings sort it."""
    titles = [
        tag("th", tag("button", (marks or {}).get(head.title, ""), head.title, type="button"), scope="col", aria_sort="none")
        for head in heads
    ]
    search = void("input", type="search", placeholder=f"filter {len(rows)} rows", aria_label=f"filter {title}")
    bar = tag("div", tag("h3", title), search if len(rows) > 8 else "", class_="bar-top")
    table = tag("table", tag("thead", tag("tr", *titles)), tag("tbody", *rows))
    scroll = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=title)
    return tag("div", bar, tag("p", note, class_="note") if note else "", scroll, class_="table")


# --- pictures --------------------------------------------------------------------------------------------------------


def picture_section(pictures: list[Picture], max_bytes: float) -> Html | None:
    """The pictures in the page as long as they fit, and the names of the others."""
    if not pictures:
        return None
    names = short_names([picture.path for picture in pictures])
    figures, left_out, total = [], [], 0
    for picture in sorted(pictures, key=lambda picture: (len(picture.path.parts), picture.path)):
        if total + picture.size > max_bytes:
            left_out.append(f"{picture.path} ({picture.size / 1e6:.1f} MB)")
            continue
        total += picture.size
        image = void("img", src=data_uri(picture.path), alt=names[picture.path], width=picture.width, height=picture.height,
            decoding="async")  # fmt: skip
        button = tag("button", image, type="button", class_="zoom", aria_label=f"enlarge {names[picture.path]}")
        wide = "wide" if picture.width > 2.4 * picture.height else None
        figures.append(tag("figure", button, tag("figcaption", names[picture.path], title=picture.path), class_=wide))
    rest = tag("details", tag("summary", f"{plural(len(left_out), 'picture')} left out, beyond --max_pictures_mb"),
        tag("ul", *(tag("li", name) for name in left_out)), class_="group") if left_out else ""  # fmt: skip
    return tag("section", tag("h2", "Pictures"), tag("div", *figures, class_="pictures"), rest)
