"""Data of the downstream tasks: torchvision's datasets, and lists of the images that keep their labels."""

import os
from pathlib import Path

from clever.data.datasets import ImageDataset
from clever.data.files import Sample, labelled_samples
from clever.utils import InputError, describe_error, read_lines

# torchvision's datasets: folder below the root, number of classes, attributes that hold the paths and the labels.
TORCHVISION = {
    "Flowers102": ("flowers-102", 102, "_image_files", "_labels"),
    "Food101": ("food-101", 101, "_image_files", "_labels"),
    "OxfordIIITPet": ("oxford-iiit-pet", 37, "_images", "_labels"),
}


def torchvision_samples(
    name: str, root: str | os.PathLike, split: str, download: bool = False
) -> tuple[list[str], list[Sample]]:
    """Class names (their numbers) and samples of one split of a torchvision dataset; `download` fetches it first.

    Raises InputError if the data is missing or damaged.
    """
    from torchvision import datasets

    folder, count, images, labels = TORCHVISION[name]
    try:
        data = getattr(datasets, name)(root, split=split, download=download)
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        why = f"cannot be {'downloaded' if download else 'read; --download fetches it'} ({describe_error(error)})"
        raise InputError(f"{name} in {Path(root) / folder}: {why}") from error
    samples = [(os.fspath(path), int(label)) for path, label in zip(getattr(data, images), getattr(data, labels), strict=True)]
    return [str(label) for label in range(count)], samples


def read_semi_list(path: str | os.PathLike) -> dict[str, str]:
    """{<class>/<image>: class} from a text file with one image per line: <class>_<rest>, as in ImageNet, or <class>/<image>.

    Raises InputError if the file cannot be read.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list of images {path}: cannot be read ({describe_error(error)}); python -m "
                         "scripts.data.make_semi_lists makes one, --semi_list names it") from error  # fmt: skip
    classes = {}
    for line in lines:
        name = line.split("/" if "/" in line else "_")[0]
        classes[line if "/" in line else f"{name}/{line}"] = name
    return classes


def listed_samples(path: str | os.PathLike, root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """All classes of the folder `root`, and the samples of the listed images, in the order of the list.

    Raises InputError if a listed image does not exist, or if a class has no image in the list.
    """
    listed = read_semi_list(path)
    classes, samples = labelled_samples(root)
    start = len(os.path.join(root, ""))
    found = {file[start:].replace(os.sep, "/"): (file, label) for file, label in samples}
    absent, without = listed.keys() - found.keys(), set(classes) - set(listed.values())
    if absent or without:
        raise InputError(
            f"list of images {path}: {len(absent)} of its images are not in {root}: {', '.join(sorted(absent)[:3])}; "
            f"{len(without)} class folders have no image in it: {', '.join(sorted(without)[:3])}"
        )
    return classes, [found[image] for image in listed]


def check_same_classes(train: ImageDataset, val: ImageDataset) -> None:
    """Raise InputError unless both have the same class folders: a label must mean the same class in both."""
    differing = sorted(set(train.classes) ^ set(val.classes))
    if differing:
        names = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise InputError(f"train/ and val/ must contain the same class folders; found in only one of them: {names}")
