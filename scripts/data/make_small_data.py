"""Write small datasets as image folders <out>/{train,val}/<class>/*.png, for quick experiments.

python -m scripts.data.make_small_data digits --out data/digits
python -m scripts.data.make_small_data fashion-mnist --out data/fashion --source data/torchvision --download
python -m scripts.data.make_small_data fashion-mnist --out data/fashion --source /usr/share/datasets/fashion-mnist \
    --train 10000 --val 2000    # a balanced part of the images, from Debian's package dataset-fashion-mnist
python -m scripts.data.make_small_data digits --out data/digits --tune data/digits_tune

--tune writes a second folder without any test image. Choose settings on its val/, and report results on that of --out: a
result that was chosen as the best of several on the test images is better than the same network would be on new images.
"""

import argparse
import gzip
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from clever.arguments import ArgumentParser
from clever.entry import run_entry_point
from clever.utils import InputError, describe_error, whole_folder

# One split: images [N, H, W] uint8 and class numbers [N].
Split = tuple[np.ndarray, np.ndarray]


def write_digits(root: str | os.PathLike, tune: str | os.PathLike | None = None) -> None:
    """scikit-learn's 1,797 handwritten digits as 8x8 PNG files <root>/{train,val}/<digit>/: 1,437 and 360 images.

    `tune` is a second folder, for choosing settings: its train/ and val/ hold 80 and 20 % of the training images.

    Folders that are already complete are left alone. Raises InputError, before anything is written, if one contains something
    else, or if one lies inside the other.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # grey levels 0..16 -> 0..255

    def split(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return train_test_split(numbers, test_size=0.2, stratify=digits.target[numbers], random_state=0)

    train, val = split(np.arange(len(images)))
    tune_train, tune_val = split(train)

    def folder(train: np.ndarray, val: np.ndarray) -> dict[str, Split]:
        return {name: (images[index], digits.target[index]) for name, index in (("train", train), ("val", val))}

    class_names = [str(digit) for digit in range(10)]
    _write_image_folders(root, folder(train, val), tune, folder(tune_train, tune_val), class_names)


def write_fashion_mnist(
    root: str | os.PathLike,
    source: str | os.PathLike,
    download: bool = False,
    train: int | None = None,
    val: int | None = None,
    tune: str | os.PathLike | None = None,
) -> None:
    """Fashion-MNIST as 28x28 PNG files <root>/{train,val}/<class>/.

    `train` and `val` are the numbers of images, balanced over the classes; None means all. `source` contains the idx files
    (.gz or not), directly or in torchvision's layout; `download` downloads them there first. `tune` is a second folder, for
    choosing settings: its train/ holds the same images, its val/ a fifth as many other training images.

    Folders that are already complete are left alone. Raises InputError, before anything is written, if files are missing or
    damaged, if a folder contains something else or lies inside the other, or if there are fewer images than wanted.
    """
    splits, classes = _read_fashion_mnist(Path(source), download)
    tune_splits = {}
    images, labels = splits["train"]
    if tune is not None:
        number = len(labels) if train is None else train
        chosen, others = _balanced_subsets("train", labels, number, max(number // 5, len(classes)))
        splits["train"] = tune_splits["train"] = images[chosen], labels[chosen]
        tune_splits["val"] = images[others], labels[others]
    elif train is not None:
        (chosen,) = _balanced_subsets("train", labels, train)
        splits["train"] = images[chosen], labels[chosen]
    if val is not None:
        images, labels = splits["val"]
        (chosen,) = _balanced_subsets("val", labels, val)
        splits["val"] = images[chosen], labels[chosen]
    # The number keeps the folders in the order of the classes; other characters than letters become "-".
    names = [f"{label}-{re.sub('[^a-z-]+', '-', name.lower())}" for label, name in enumerate(classes)]
    _write_image_folders(root, splits, tune, tune_splits, names)


def _read_fashion_mnist(source: Path, download: bool) -> tuple[dict[str, Split], list[str]]:
    from torchvision.datasets import FashionMNIST

    raw = source / "FashionMNIST" / "raw"
    try:
        if download:
            FashionMNIST(source, download=True)
        raw, splits = raw if raw.is_dir() else source, {}
        for split, part in (("train", "train"), ("val", "t10k")):
            images, labels = (_read_idx(raw / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
            if images.shape != (len(labels), 28, 28) or labels.max() >= len(FashionMNIST.classes):
                raise ValueError(f"{part}: images {images.shape}, labels {labels.shape}")
            splits[split] = images, labels
    except (OSError, EOFError, RuntimeError, ValueError, IndexError, zlib.error) as error:
        reason = describe_error(error)
        raise InputError(f"Fashion-MNIST in {raw}: cannot be read; --download downloads it ({reason})") from error
    return splits, FashionMNIST.classes


def _read_idx(path: Path) -> np.ndarray:
    """A file in MNIST's format, packed or not: bytes 0, 0, 8 and the number of dimensions; their sizes; the values."""
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
    shape = np.frombuffer(content, ">u4", content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _balanced_subsets(name: str, labels: np.ndarray, number: int, others: int = 0) -> list[np.ndarray]:
    """Sorted indices of `number` images and, if wanted, of so many `others`, drawn with a fixed seed.

    Within each of the two, class sizes differ by at most one.
    """
    classes = int(labels.max()) + 1
    order = np.random.default_rng(0).permutation(len(labels))
    subsets = []
    for count in filter(None, (number, others)):
        sizes = [count // classes + (label < count % classes) for label in range(classes)]
        chosen = [order[labels[order] == label][:size] for label, size in enumerate(sizes)]
        if count < classes or sum(map(len, chosen)) < count:
            raise InputError(f"--{name} {number}: must be {classes} to {len(labels)} images, and leave {others} for --tune")
        subsets.append(np.sort(np.concatenate(chosen)))
        order = order[~np.isin(order, subsets[-1])]
    return subsets


def _write_image_folders(root, splits, tune, tune_splits, class_names) -> None:
    """Write the folder of the data set and, unless `tune` is None, the one for tuning; check both before writing."""
    folders = {Path(root): splits}
    if tune is not None:
        inner, outer = Path(tune).resolve(), Path(root).resolve()
        if inner == outer or inner in outer.parents or outer in inner.parents:
            raise InputError(f"--tune {tune}: must be another folder than --out {root}, and neither inside the other")
        folders[Path(tune)] = tune_splits
    complete = {folder: _is_complete(folder, contents, class_names) for folder, contents in folders.items()}
    for folder, contents in folders.items():
        counts = ", ".join(f"{len(labels)} {split}" for split, (_, labels) in contents.items())
        if complete[folder]:
            print(f"{folder}: already complete ({counts} images)")
        else:
            _write_image_folder(folder, contents, class_names)
            print(f"{folder}: wrote {counts} images")


def _is_complete(root: Path, splits: dict[str, Split], class_names: list[str]) -> bool:
    """Whether `root` holds the files of these splits. Raises InputError if it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    expected = Counter(f"{split}/{class_names[label]}" for split, (_, labels) in splits.items() for label in labels)
    found = Counter(path.parent.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    if found != expected:
        raise InputError(f"output folder {root}: contains something else; choose a new or empty folder")
    return True


def _write_image_folder(root: Path, splits: dict[str, Split], class_names: list[str]) -> None:
    """Write <root>/<split>/<class>/<number>.png, all files or none."""
    with whole_folder(root) as folder:
        for split, (images, labels) in splits.items():
            for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                path = folder / split / class_names[label] / f"{number:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="data", required=True)
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 handwritten digits, 8x8; no download")
    digits.add_argument("--out", required=True, help="new folder")
    digits.add_argument("--tune", help="another new folder, to choose settings by: 80 and 20 %% of the training images")
    fashion = commands.add_parser("fashion-mnist", help="Fashion-MNIST, 28x28, 60,000 and 10,000 images")
    fashion.add_argument("--out", required=True, help="new folder")
    fashion.add_argument("--source", required=True, help="folder of the idx files, or their root in torchvision's layout")
    fashion.add_argument("--download", action="store_true", help="download the files to --source first")
    fashion.add_argument("--train", type=int, help="number of training images, balanced over the classes; default: all")
    fashion.add_argument("--val", type=int, help="number of test images, balanced over the classes; default: all")
    fashion.add_argument("--tune", help="another new folder, to choose settings by: the same training images and, as its val/, "
        "a fifth as many other training images")  # fmt: skip
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.data == "digits":
        write_digits(args.out, args.tune)
    else:
        write_fashion_mnist(args.out, args.source, args.download, args.train, args.val, args.tune)


if __name__ == "__main__":
    run_entry_point(main)
