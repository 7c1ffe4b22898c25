"""Write small datasets as image folders <out>/{train,val}/<class>/*.png, for quick experiments.

python -m scripts.data.make_small_data digits --out data/digits
python -m scripts.data.make_small_data fashion-mnist --out data/fashion --source data/torchvision --download
python -m scripts.data.make_small_data fashion-mnist --out data/fashion --source /usr/share/datasets/fashion-mnist \
    --train 10000 --val 2000    # a balanced part of the images, from Debian's package dataset-fashion-mnist
"""

import argparse
import gzip
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from distributed import run_entry_point
from utils import ArgumentParser, InputError, describe_error, whole_folder

# One split: images [N, H, W] uint8 and class numbers [N].
Split = tuple[np.ndarray, np.ndarray]


def write_digits(root: str | os.PathLike) -> None:
    """scikit-learn's 1,797 handwritten digits as 8x8 PNG files <root>/{train,val}/<digit>/: 1,437 and 360 images.

    Does nothing if they already exist; raises InputError if `root` contains something else.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # grey levels 0..16 -> 0..255
    train, val = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    splits = {name: (images[index], digits.target[index]) for name, index in (("train", train), ("val", val))}
    _write_image_folder(Path(root), splits, [str(digit) for digit in range(10)])


def write_fashion_mnist(
    root: str | os.PathLike,
    source: str | os.PathLike,
    download: bool = False,
    train: int | None = None,
    val: int | None = None,
) -> None:
    """Fashion-MNIST as 28x28 PNG files <root>/{train,val}/<class>/.

    `train` and `val` are the numbers of images, balanced over the classes; None means all. `source` contains the idx files
    (.gz or not), directly or in torchvision's layout; `download` downloads them there first. Does nothing if the images
    already exist. Raises InputError if files are missing or damaged, if `root` contains something else, or if a number is
    not between 10 and the size of its split.
    """
    splits, classes = _read_fashion_mnist(Path(source), download)
    for name, number in (("train", train), ("val", val)):
        if number is not None:
            images, labels = splits[name]
            index = _balanced_subset(name, labels, number)
            splits[name] = images[index], labels[index]
    # The number keeps the folders in the order of the classes; other characters than letters become "-".
    names = [f"{label}-{re.sub('[^a-z-]+', '-', name.lower())}" for label, name in enumerate(classes)]
    _write_image_folder(Path(root), splits, names)


def _read_fashion_mnist(source, download):
    from torchvision.datasets import FashionMNIST

    try:
        if download:
            FashionMNIST(source, download=True)
        raw = source / "FashionMNIST" / "raw"
        raw = raw if raw.is_dir() else source
        with tempfile.TemporaryDirectory() as scratch:
            _unpack_idx_files(raw, Path(scratch) / "FashionMNIST" / "raw")
            parts = {name: FashionMNIST(scratch, train=name == "train") for name in ("train", "val")}
            splits = {name: (part.data.numpy(), part.targets.numpy()) for name, part in parts.items()}
    except InputError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, AssertionError, zlib.error) as error:
        raise InputError(f"Fashion-MNIST in {source}: cannot be read ({describe_error(error)})") from error
    return splits, FashionMNIST.classes


def _unpack_idx_files(raw, folder):
    """Link or unpack the four files in `raw` to `folder`, where torchvision reads them without .gz."""
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in names if not (raw / name).exists() and not (raw / f"{name}.gz").exists()]
    if missing:
        raise InputError(f"Fashion-MNIST in {raw}: lacks {', '.join(missing)} (or .gz); --download downloads them")
    folder.mkdir(parents=True)
    for name in names:
        if (raw / name).exists():
            (folder / name).symlink_to((raw / name).resolve())
        else:
            with gzip.open(raw / f"{name}.gz") as packed, open(folder / name, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


def _balanced_subset(name, labels, number):
    """Sorted indices of `number` images, drawn with a fixed seed; class sizes differ by at most one."""
    classes = labels.max() + 1
    if not classes <= number <= len(labels):
        raise InputError(f"--{name} {number}: must be between {classes} and {len(labels)} images")
    order = np.random.default_rng(0).permutation(len(labels))
    class_sizes = [number // classes + (label < number % classes) for label in range(classes)]
    return np.sort(np.concatenate([order[labels[order] == label][:n] for label, n in enumerate(class_sizes)]))


def _write_image_folder(root: Path, splits: dict[str, Split], class_names: list[str]) -> None:
    """Write <root>/<split>/<class>/<number>.png, all files or none. Does nothing if `root` already contains those files."""
    expected = Counter(f"{split}/{class_names[label]}" for split, (_, labels) in splits.items() for label in labels)
    counts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in splits.items())
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        found = Counter(path.parent.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        if found != expected:
            raise InputError(f"output folder {root}: contains something else; choose a new or empty folder")
        print(f"{root}: already complete ({counts} images)")
        return
    with whole_folder(root) as folder:
        for split, (images, labels) in splits.items():
            for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                path = folder / split / class_names[label] / f"{number:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    print(f"{root}: wrote {counts} images")


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="data", required=True)
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 handwritten digits, 8x8; no download")
    digits.add_argument("--out", required=True, help="new folder")
    fashion = commands.add_parser("fashion-mnist", help="Fashion-MNIST, 28x28, 60,000 and 10,000 images")
    fashion.add_argument("--out", required=True, help="new folder")
    fashion.add_argument("--source", required=True, help="folder of the idx files, or their root in torchvision's layout")
    fashion.add_argument("--download", action="store_true", help="download the files to --source first")
    fashion.add_argument("--train", type=int, help="number of training images, balanced over the classes; default: all")
    fashion.add_argument("--val", type=int, help="number of test images, balanced over the classes; default: all")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.data == "digits":
        write_digits(args.out)
    else:
        write_fashion_mnist(args.out, args.source, args.download, args.train, args.val)


if __name__ == "__main__":
    run_entry_point(main)
