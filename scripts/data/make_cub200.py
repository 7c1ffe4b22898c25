"""Make train/ and val/ folders from the published CUB-200-2011: <out>/{train,val}/<class>/<image> become links to its images.

python -m scripts.data.make_cub200 --cub /path/to/CUB_200_2011 --out data/CUB200
python -m scripts.data.make_cub200 --cub /path/to/CUB_200_2011 --out data/CUB200 --copy    # copies instead of links

train_test_split.txt says which images are for training (5,994 of the 11,788 published ones); the others go to val/.
"""

import argparse
from collections import Counter
from pathlib import Path

from clever.arguments import ArgumentParser
from clever.entry import run_entry_point
from clever.utils import InputError, read_lines
from scripts.data.layout import check_output, link_or_copy

SPLITS = {"1": "train", "0": "val"}  # values in train_test_split.txt


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--cub", required=True, type=Path, help="folder with images.txt and images/")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking them")
    return parser


def read_table(path: Path) -> dict[str, str]:
    """{image number: value} from a text file with two words per line. Raises InputError if the file is not like that."""
    try:
        rows = [line.split() for line in read_lines(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--cub {path.parent}: cannot read {path.name} ({error})") from error
    if not rows or any(len(row) != 2 for row in rows) or len({row[0] for row in rows}) != len(rows):
        raise InputError(f"--cub {path.parent}: {path.name} must have an image number and a value per line, each number once")
    return dict(rows)


def find_images(cub: Path) -> dict[str, Path]:
    """{<split>/<class>/<image>: file}. Raises InputError if tables or images are missing, or tables contradict each other."""
    paths, split, labels = (read_table(cub / f"{name}.txt") for name in ("images", "train_test_split", "image_class_labels"))
    check_tables(cub, paths, split, labels)
    sources = {f"{SPLITS[split[number]]}/{path}": (cub / "images" / path).resolve() for number, path in paths.items()}
    missing = [path for path, file in sources.items() if not file.is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"--cub {cub}: lacks {len(missing)} of {len(sources)} images: {first}")
    return sources


def check_tables(cub: Path, paths: dict[str, str], split: dict[str, str], labels: dict[str, str]) -> None:
    """Raise InputError unless the three tables list the same images, and classes correspond to folders one to one."""
    for name, table in (("train_test_split.txt", split), ("image_class_labels.txt", labels)):
        if table.keys() != paths.keys():
            raise InputError(f"--cub {cub}: {name} lists other images than images.txt ({len(table)} and {len(paths)} images)")
    if not set(split.values()) <= SPLITS.keys():
        raise InputError(f"--cub {cub}: train_test_split.txt contains other values than 0 and 1")
    pairs = {(Path(path).parent.as_posix(), labels[number]) for number, path in paths.items()}
    if any(count > 1 for side in zip(*pairs, strict=True) for count in Counter(side).values()):
        raise InputError(f"--cub {cub}: image_class_labels.txt and the folders in images.txt contradict each other")
    if any(Path(path).is_absolute() or ".." in Path(path).parts or len(Path(path).parts) != 2 for path in paths.values()):
        raise InputError(f"--cub {cub}: images.txt must name images as <class>/<image>")


def main() -> None:
    args = get_args_parser().parse_args()
    sources = find_images(args.cub)
    check_output(args.out, sources, args.copy)
    link_or_copy(args.out, sources, args.copy)
    for split in SPLITS.values():
        images = [Path(path) for path in sources if path.startswith(f"{split}/")]
        print(f"{args.out / split}: {len({image.parent for image in images})} classes, {len(images)} images")


if __name__ == "__main__":
    run_entry_point(main)
