"""Make lists of training images for eval_linear_ds.py --ds_mode semi_1 and semi_10: one image a line.

python -m scripts.data.make_semi_lists filter --list Imagenet_1percent.txt --data_path data/IN100 \\
    --out data/IN100/IN100_1percent.txt
python -m scripts.data.make_semi_lists draw --percent 10 --data_path data/IN100 --out data/IN100/IN100_10percent.txt

`filter` keeps the images of a list whose class folders are in <data_path>/train: SimCLR's public lists of ImageNet
(imagenet_subsets/1percent.txt, 10percent.txt) become lists of ImageNet-100. `draw` draws a share of all images, with a seed,
of every class as many as of the others (or all that it has), at least one.
"""

import argparse
from pathlib import Path

import numpy as np

from datasets import labelled_samples
from distributed import run_entry_point
from evaluation.downstream_data import read_semi_list
from utils import ArgumentParser, InputError, write_text_atomically


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    kept = commands.add_parser("filter", help="the images of a list whose class folders are there")
    kept.add_argument("--list", required=True, type=Path, help="text file, one image a line: <class>_<rest> or <class>/<image>")
    drawn = commands.add_parser("draw", help="a seeded share of the images, balanced over the classes")
    drawn.add_argument("--percent", required=True, type=float, help="of all training images, above 0 to 100")
    drawn.add_argument("--seed", type=int, default=0)
    for command in (kept, drawn):
        command.add_argument("--data_path", required=True, type=Path, help="folder with train/<class>/")
        command.add_argument("--out", required=True, type=Path, help="list to write")
    return parser


def images_by_class(root: Path) -> dict[str, list[str]]:
    """{class folder: its images, as <class>/<image>}, sorted. Raises InputError as labelled_samples does."""
    classes, samples = labelled_samples(root)
    images: dict[str, list[str]] = {name: [] for name in classes}
    for path, label in samples:
        images[classes[label]].append(Path(path).relative_to(root).as_posix())
    return images


def filter_list(path: Path, images: dict[str, list[str]]) -> list[str]:
    """The list's images <class>/<image> of the classes in `images`. Raises InputError if none are, or one is not there."""
    kept = [place for place, name in read_semi_list(path).items() if name in images]
    if not kept:
        raise InputError(f"--list {path}: has no image of the {len(images)} class folders")
    there = {place for name in images for place in images[name]}
    missing = [place for place in kept if place not in there]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"--list {path}: {len(missing)} of its images are not in the class folders: {first}")
    return kept


def draw(images: dict[str, list[str]], percent: float, seed: int) -> list[str]:
    """`percent` of the images <class>/<image>, drawn without replacement, evenly over the classes. Raises InputError."""
    if not 0 < percent <= 100:
        raise InputError(f"--percent {percent:g}: must be above 0 and at most 100")
    if seed < 0:
        raise InputError(f"--seed {seed}: must be 0 or greater")
    rng = np.random.default_rng(seed)
    total = max(len(images), round(sum(map(len, images.values())) * percent / 100))
    turns = rng.permutation(len(images)).tolist()  # who gives one more, if it does not come out even
    ranked = [
        (rank, turn, places[index])
        for turn, places in zip(turns, images.values(), strict=True)
        for rank, index in enumerate(rng.permutation(len(places)).tolist())
    ]
    return [place for *_, place in sorted(ranked)[:total]]  # the first of every class, then the second, ...


def shortest(place: str) -> str:
    """<class>/<class>_<rest> as SimCLR's lists have it, without the folder; other names as they are."""
    name, image = place.split("/", 1)
    return image if "/" not in image and image.split("_")[0] == name else place


def write_list(out: Path, places: list[str]) -> None:
    """Write the list, sorted. Raises InputError if another list is there, or no file can be."""
    text = "".join(f"{line}\n" for line in sorted(map(shortest, places)))
    try:
        if out.exists() and out.read_text() != text:
            raise InputError(f"--out {out}: is there, with other content; delete it, or choose another name")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(text, out)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--out {out}: cannot be written ({error})") from error


def main() -> None:
    args = get_args_parser().parse_args()
    images = images_by_class(args.data_path / "train")
    places = filter_list(args.list, images) if args.command == "filter" else draw(images, args.percent, args.seed)
    write_list(args.out, places)
    counts = [0] * len(images)
    numbers = {name: number for number, name in enumerate(images)}
    for place in places:
        counts[numbers[place.split("/")[0]]] += 1
    print(
        f"{args.out}: {len(places)} images of {len(images) - counts.count(0)} classes, {min(counts)} to {max(counts)} of each"
    )


if __name__ == "__main__":
    run_entry_point(main)
