"""Make ImageNet-100 out of an ImageNet tree: <out>/{train,val}/<class> are links to the class folders of ImageNet.

python -m scripts.data.make_imagenet100 --imagenet /path/to/imagenet --out data/IN100
python -m scripts.data.make_imagenet100 --imagenet /path/to/imagenet --out data/IN100 --copy    # copies instead of links

The 100 classes are scripts/imagenet100.txt; --classes takes any other list, one class folder name a line.
"""

import argparse
from pathlib import Path

from datasets import list_images
from distributed import run_entry_point
from scripts.data.layout import lay_out
from utils import InputError

SPLITS = ("train", "val")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", required=True, type=Path, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--classes", type=Path, default=Path(__file__).with_name("imagenet100.txt"))
    parser.add_argument("--copy", action="store_true", help="copy the images instead of linking their folders")
    return parser


def read_classes(path: Path) -> list[str]:
    """Names in the list, sorted. Raises InputError if there is no list, or nothing in it."""
    if not path.is_file():
        raise InputError(f"--classes {path}: no such file")
    names = sorted({line.strip() for line in path.read_text().splitlines()} - {""})
    if not names:
        raise InputError(f"--classes {path}: lists no classes")
    return names


def find_sources(imagenet: Path, classes: list[str]) -> dict[str, Path]:
    """{<split>/<class>: folder in ImageNet}. Raises InputError naming the splits or classes that are missing."""
    missing = [split for split in SPLITS if not (imagenet / split).is_dir()]
    if missing:
        raise InputError(f"--imagenet {imagenet}: lacks the folder {' and '.join(missing)}")
    sources = {f"{split}/{name}": (imagenet / split / name).resolve() for split in SPLITS for name in classes}
    missing = [place for place, folder in sources.items() if not folder.is_dir()]
    if missing:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"--imagenet {imagenet}: lacks {len(missing)} of {len(sources)} class folders: {first}")
    return sources


def check_out(out: Path, sources: dict[str, Path], copy: bool) -> None:
    """Raise InputError unless all that `out` holds is what this very call would put there."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is not a folder")
    for entry in sorted(out.glob("*")) + sorted(out.glob("*/*")):
        place = entry.relative_to(out).as_posix()
        if place in SPLITS:
            fits = entry.is_dir() and not entry.is_symlink()
        elif copy:
            fits = place.removesuffix(".part") in sources and entry.is_dir() and not entry.is_symlink()
        else:
            fits = place in sources and entry.is_symlink() and entry.resolve() == sources[place]
        if not fits:
            raise InputError(f"--out {out}: holds something else ({place}); choose a new or empty folder")


def main() -> None:
    args = get_args_parser().parse_args()
    classes = read_classes(args.classes)
    sources = find_sources(args.imagenet, classes)
    check_out(args.out, sources, args.copy)
    lay_out(args.out, sources, args.copy)
    for split in SPLITS:
        print(f"{args.out / split}: {len(classes)} classes, {len(list_images(args.out / split))} images")


if __name__ == "__main__":
    run_entry_point(main)
