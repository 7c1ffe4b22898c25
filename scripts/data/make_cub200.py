"""Make train/ and val/ folders out of CUB-200-2011 as published: <out>/{train,val}/<class>/<image> are links to its images.

python -m scripts.data.make_cub200 --cub /path/to/CUB_200_2011 --out data/CUB200
python -m scripts.data.make_cub200 --cub /path/to/CUB_200_2011 --out data/CUB200 --copy    # copies instead of links

train_test_split.txt says which images are for training: 5,994 of 11,788 in the published data; the others go to val/.
"""

import argparse
from collections import Counter
from pathlib import Path

from distributed import run_entry_point
from scripts.data.layout import lay_out
from utils import ArgumentParser, InputError

SPLITS = {"1": "train", "0": "val"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cub", required=True, type=Path, help="folder with images.txt and images/")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking them")
    return parser


def read_table(path: Path) -> dict[str, str]:
    """{image number: value} of a text file with two words a line. Raises InputError if it is no such file."""
    try:
        rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--cub {path.parent}: cannot read {path.name} ({error})") from error
    if not rows or any(len(row) != 2 for row in rows) or len({row[0] for row in rows}) != len(rows):
        raise InputError(f"--cub {path.parent}: {path.name} must have lines of an image's number and a value, each number once")
    return dict(rows)


def find_images(cub: Path) -> dict[str, Path]:
    """{<split>/<class>/<image>: file}. Raises InputError if tables or images are missing, or contradict each other."""
    paths, split, labels = (read_table(cub / f"{name}.txt") for name in ("images", "train_test_split", "image_class_labels"))
    for name, table in (("train_test_split.txt", split), ("image_class_labels.txt", labels)):
        if table.keys() != paths.keys():
            raise InputError(f"--cub {cub}: {name} is about other images than images.txt ({len(table)} and {len(paths)})")
    if not set(split.values()) <= SPLITS.keys():
        raise InputError(f"--cub {cub}: train_test_split.txt holds other values than 0 and 1")
    pairs = {(Path(path).parent.as_posix(), labels[number]) for number, path in paths.items()}
    if any(count > 1 for side in zip(*pairs, strict=True) for count in Counter(side).values()):
        raise InputError(f"--cub {cub}: image_class_labels.txt and the folders in images.txt contradict each other")
    if any(Path(path).is_absolute() or ".." in Path(path).parts or len(Path(path).parts) != 2 for path in paths.values()):
        raise InputError(f"--cub {cub}: images.txt must name images as <class>/<image>")
    sources = {f"{SPLITS[split[number]]}/{path}": (cub / "images" / path).resolve() for number, path in paths.items()}
    missing = [place for place, file in sources.items() if not file.is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"--cub {cub}: lacks {len(missing)} of {len(sources)} images: {first}")
    return sources


def check_out(out: Path, sources: dict[str, Path], copy: bool) -> None:
    """Raise InputError unless all that `out` holds is what this very call would put there."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is not a folder")
    folders = {parent.as_posix() for place in sources for parent in Path(place).parents}
    for entry in sorted(out.rglob("*")):
        place = entry.relative_to(out).as_posix()
        if entry.is_symlink():
            fits = not copy and entry.resolve() == sources.get(place)
        elif entry.is_dir():
            fits = place in folders
        else:
            fits = copy and place.removesuffix(".part") in sources
        if not fits:
            raise InputError(f"--out {out}: holds something else ({place}); choose a new or empty folder")


def main() -> None:
    args = get_args_parser().parse_args()
    sources = find_images(args.cub)
    check_out(args.out, sources, args.copy)
    lay_out(args.out, sources, args.copy)
    for split in SPLITS.values():
        places = [place for place in sources if place.startswith(f"{split}/")]
        print(f"{args.out / split}: {len({place.split('/')[1] for place in places})} classes, {len(places)} images")


if __name__ == "__main__":
    run_entry_point(main)
