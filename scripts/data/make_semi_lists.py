"""Make lists of training images for eval_linear_ds.py --ds_mode semi_1 and semi_10, one image per line.

python -m scripts.data.make_semi_lists filter --list Imagenet_1percent.txt --data_path data/IN100 \\
    --out data/IN100/IN100_1percent.txt
python -m scripts.data.make_semi_lists draw --percent 10 --data_path data/IN100 --out data/IN100/IN100_10percent.txt

`filter` keeps those images of a list whose class folders are in <data_path>/train. So it turns SimCLR's public lists for
ImageNet (imagenet_subsets/1percent.txt, 10percent.txt) into lists for ImageNet-100. `draw` draws a share of all images with
a seed: equally many of every class (or all images of a smaller class), at least one.
"""

import argparse
import os
from collections import Counter
from pathlib import Path

import numpy as np

from clever.arguments import ArgumentParser, check_not_negative
from clever.data.files import labelled_samples
from clever.entry import run_entry_point
from clever.evaluation.downstream_data import read_semi_list
from clever.utils import InputError, atomic_file


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kept = commands.add_parser("filter", help="keep the listed images whose class folders exist")
    kept.add_argument("--list", required=True, type=Path, help="text file, per line: <class>_<rest> or <class>/<image>")
    drawn = commands.add_parser("draw", help="draw a share of the images, balanced over the classes")
    drawn.add_argument("--percent", required=True, type=float, help="share of all training images, in (0, 100]")
    drawn.add_argument("--seed", type=int, default=0, help="random seed of the draw")
    for command in (kept, drawn):
        command.add_argument("--data_path", required=True, type=Path, help="folder with train/<class>/")
        command.add_argument("--out", required=True, type=Path, help="the new list")
    return parser


def images_by_class(root: Path) -> dict[str, list[str]]:
    """{class folder: its images as <class>/<image>}, sorted. Raises InputError as labelled_samples does."""
    classes, samples = labelled_samples(root)
    images: dict[str, list[str]] = {name: [] for name in classes}
    for path, label in samples:
        images[classes[label]].append(Path(path).relative_to(root).as_posix())
    return images


def filter_list(path: Path, images: dict[str, list[str]]) -> list[str]:
    """The listed images <class>/<image> of the classes in `images`.

    Raises InputError if there are none, or if one of them does not exist.
    """
    kept = [image for image, name in read_semi_list(path).items() if name in images]
    missing = sorted(set(kept).difference(*images.values()))
    if missing or not kept:
        raise InputError(
            f"--list {path}: has {len(kept)} images of the {len(images)} class folders, of which {len(missing)} do not exist"
            f": {', '.join(missing[:3])}"
        )
    return kept


def draw(images: dict[str, list[str]], percent: float, seed: int) -> list[str]:
    """Draw `percent` of the images <class>/<image> without replacement, balanced over the classes.

    Raises InputError for a percentage outside (0, 100].
    """
    if not 0 < percent <= 100:
        raise InputError(f"--percent {percent:g}: must be above 0 and at most 100")
    rng = np.random.default_rng(seed)
    total = max(len(images), round(sum(map(len, images.values())) * percent / 100))
    turns = rng.permutation(len(images)).tolist()  # order of the classes: the first ones give one more if needed
    ranked = [
        (rank, turn, own_images[index])
        for turn, own_images in zip(turns, images.values(), strict=True)
        for rank, index in enumerate(rng.permutation(len(own_images)).tolist())
    ]
    return [image for *_, image in sorted(ranked)[:total]]  # one of every class, then a second of every class, ...


def line_of(image: str) -> str:
    """<class>/<class>_<rest> without its folder, as in SimCLR's lists; other paths unchanged."""
    name, file = image.split("/", 1)
    return file if "/" not in file and file.split("_")[0] == name else image


def write_list(out: Path, images: list[str]) -> None:
    """Write the sorted list. Raises InputError if `out` has other content."""
    lines = sorted(map(line_of, images))
    odd = [line for line in lines if line != line.strip() or "\n" in line or "\r" in line]
    if odd:
        raise InputError(f"image {odd[0]!r}: a list cannot hold a name with line breaks, or spaces at its ends; rename it")
    content = os.fsencode("".join(f"{line}\n" for line in lines))  # names need not be UTF-8
    if out.exists() and out.read_bytes() != content:
        raise InputError(f"--out {out}: exists with other content; delete it or choose another name")
    with atomic_file(out) as temporary:
        temporary.write_bytes(content)


def main() -> None:
    args = get_args_parser().parse_args()
    if args.command == "draw":
        check_not_negative(args, "seed")
    images = images_by_class(args.data_path / "train")
    chosen = filter_list(args.list, images) if args.command == "filter" else draw(images, args.percent, args.seed)
    write_list(args.out, chosen)
    found = Counter(image.split("/")[0] for image in chosen)
    counts = [found[name] for name in images]
    print(f"{args.out}: {len(chosen)} images of {len(found)} classes, {min(counts)} to {max(counts)} per class")


if __name__ == "__main__":
    run_entry_point(main)
