"""Make ImageNet-100 from ImageNet: <out>/{train,val}/<class> become links to the class folders of ImageNet.

python -m scripts.data.make_imagenet100 --imagenet /path/to/imagenet --out data/IN100
python -m scripts.data.make_imagenet100 --imagenet /path/to/imagenet --out data/IN100 --copy    # copies instead of links

The 100 classes are those of scripts/data/imagenet100.txt; --classes reads another list, one class folder per line.
"""

import argparse
from pathlib import Path

from clever.arguments import ArgumentParser
from clever.data.files import list_images
from clever.entry import run_entry_point
from clever.utils import InputError, read_lines
from scripts.data.layout import link_or_copy

SPLITS = ("train", "val")


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--imagenet", required=True, type=Path, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument(
        "--classes", type=Path, default=Path(__file__).with_name("imagenet100.txt"),
        help="text file with one class folder per line; default: imagenet100.txt beside this script",
    )  # fmt: skip
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking their folders")
    return parser


def find_sources(imagenet: Path, classes: list[str]) -> dict[str, Path]:
    """{<split>/<class>: folder in ImageNet}. Raises InputError naming the folders that are missing."""
    sources = {f"{split}/{name}": (imagenet / split / name).resolve() for split in SPLITS for name in classes}
    missing = [path for path, folder in sources.items() if not folder.is_dir()]
    if missing:
        raise InputError(f"--imagenet {imagenet}: lacks {len(missing)} of {len(sources)} folders: {', '.join(missing[:5])}")
    return sources


def main() -> None:
    args = get_args_parser().parse_args()
    classes = sorted(set(read_lines(args.classes))) if args.classes.is_file() else []
    if not classes:
        raise InputError(f"--classes {args.classes}: no such file, or no classes in it")
    sources = find_sources(args.imagenet, classes)
    link_or_copy(args.out, sources, args.copy)
    for split in SPLITS:
        print(f"{args.out / split}: {len(classes)} classes, {len(list_images(args.out / split))} images")


if __name__ == "__main__":
    run_entry_point(main)
