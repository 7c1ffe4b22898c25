"""Make train/ and val/ folders from the published CUB-200-2011: <out>/{train,val}/<class>/<image> become links to its images.

python -m scripts.data.make_cub200 --cub /path/to/CUB_200_2011 --out data/CUB200
python -m scripts.data.make_cub200 --cub /path/to/CUB_200_2011 --out data/CUB200 --copy    # copies instead of links

train_test_split.txt says which images are for training (5,994 of the 11,788 published ones); the others go to val/.
"""

import argparse
from pathlib import Path

from clever.arguments import ArgumentParser
from clever.entry import run_entry_point
from clever.utils import InputError, read_lines
from scripts.data.layout import link_or_copy

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
        return dict(line.split() for line in read_lines(path))
    except (OSError, ValueError) as error:
        raise InputError(f"--cub {path.parent}: {path.name} must have an image number and a value per line") from error


def find_images(cub: Path) -> dict[str, Path]:
    """{<split>/<class>/<image>: file}. Raises InputError if the tables do not fit together, or if images are missing."""
    paths, split = (read_table(cub / f"{name}.txt") for name in ("images", "train_test_split"))
    if paths.keys() != split.keys() or not set(split.values()) <= SPLITS.keys():
        raise InputError(f"--cub {cub}: train_test_split.txt must have 0 or 1 for each image of images.txt")
    sources = {f"{SPLITS[split[number]]}/{path}": (cub / "images" / path).resolve() for number, path in paths.items()}
    missing = [path for path, file in sources.items() if not file.is_file()]
    if missing:
        raise InputError(f"--cub {cub}: lacks {len(missing)} of {len(sources)} images: {', '.join(missing[:3])}")
    return sources


def main() -> None:
    args = get_args_parser().parse_args()
    sources = find_images(args.cub)
    link_or_copy(args.out, sources, args.copy)
    for split in SPLITS.values():
        images = [Path(path) for path in sources if path.startswith(f"{split}/")]
        print(f"{args.out / split}: {len({image.parent for image in images})} classes, {len(images)} images")


if __name__ == "__main__":
    run_entry_point(main)
