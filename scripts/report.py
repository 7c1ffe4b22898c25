"""One HTML page of everything below folders of results: accuracies, curves, arguments, tables of all results, pictures.

    python -m scripts.report results --out report.html

The page is one file that loads nothing from the network: it opens in a browser from the disk, and can be sent by mail. It shows
every log.txt of main_dino.py, the arguments in the checkpoint.pth beside it, every JSON file of the eval_*.py scripts, and the
pictures that sum up results. Files that cannot be read are named on stderr and in the page.
"""

import sys
from pathlib import Path

from clever.arguments import ArgumentParser, check_not_negative, check_writable
from clever.entry import run_entry_point
from clever.utils import InputError, atomic_file, plural
from scripts.report_page import MARKER, render
from scripts.report_records import collect


def check_out(path: Path) -> None:
    """Raise InputError unless the report can be written there without replacing anything but an older report."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {path}: must end with .html, so that a browser opens it")
    check_writable(path.parent, "--out")
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"--out {path}: is not a file")
    try:
        with path.open("rb") as file:
            known = file.read(len(MARKER)) == MARKER.encode()
    except OSError as error:
        raise InputError(f"--out {path}: cannot be read ({error.strerror})") from error
    if not known:
        raise InputError(f"--out {path}: exists, and is not a report of this script; give another name")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched for results, with sub-folders")
    parser.add_argument("--out", required=True, type=Path, help="the page, *.html; an older report of this name is replaced")
    parser.add_argument("--max_pictures_mb", type=float, default=20, help="size of all pictures in the page, megabytes; those "
        "beyond it are only named. 0: no pictures")  # fmt: skip
    args = parser.parse_args()
    check_not_negative(args, "max_pictures_mb")
    check_out(args.out)
    found = collect(args.folders)
    for problem in found.problems:
        print(f"note: {problem}", file=sys.stderr)
    if not found.runs and not found.results:
        raise InputError(f"{', '.join(map(str, args.folders))}: no results, neither log.txt nor JSON files of the evaluations")
    page = render(found, args.folders, args.max_pictures_mb * 1e6)
    with atomic_file(args.out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(
        f"wrote {args.out}: {plural(len(found.runs), 'run')}, {plural(len(found.results), 'result')}, "
        f"{plural(len(found.pictures), 'picture')}, "
        f"{args.out.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run_entry_point(main)
