"""Data of the downstream tasks: torchvision's datasets, and lists of the images that keep their labels."""

import os
from pathlib import Path

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

    Raises InputError if the data is missing or damaged, or if a class has no image.
    """
    from torchvision import datasets

    folder, count, images, labels = TORCHVISION[name]
    location = Path(root) / folder
    if not location.is_dir() and not download:
        raise InputError(f"{name}: no folder {location} (torchvision's layout); --download fetches it")
    try:
        data = getattr(datasets, name)(root, split=split, download=download)
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{name} in {location}: cannot be read ({describe_error(error)})") from error
    samples = [(os.fspath(path), int(label)) for path, label in zip(getattr(data, images), getattr(data, labels), strict=True)]
    found = {label for _, label in samples}
    if found != set(range(count)):
        raise InputError(f"{name} in {location}: split {split} has images of {len(found)} classes, expected {count}")
    return [str(label) for label in range(count)], samples


def read_semi_list(path: str | os.PathLike) -> dict[str, str]:
    """{<class>/<image>: class} from a text file with one image per line: <class>_<rest>, as in ImageNet, or <class>/<image>.

    Raises InputError if the file cannot be read or is empty, or if an image is listed twice.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list of images {path}: cannot be read ({describe_error(error)})") from error
    if not lines:
        raise InputError(f"list of images {path}: is empty")
    classes = {}
    for line in lines:
        name = line.split("/" if "/" in line else "_")[0]
        image = line if "/" in line else f"{name}/{line}"
        if image in classes:
            raise InputError(f"list of images {path}: lists {line} twice")
        classes[image] = name
    return classes


def listed_samples(path: str | os.PathLike, root: str | os.PathLike) -> tuple[list[str], list[Sample]]:
    """All classes of the folder `root`, and the samples of the listed images, in the order of the list.

    Raises InputError if a listed class or image does not exist, or if a class has no image in the list.
    """
    listed = read_semi_list(path)
    classes, samples = labelled_samples(root)
    start = len(os.path.join(root, ""))
    found = {file[start:].replace(os.sep, "/"): (file, label) for file, label in samples}
    for problem, names in (
        (f"class folders that are not in {root}", sorted(set(listed.values()) - set(classes))),
        (f"images that are not in {root}", [image for image in listed if image not in found]),
        (f"no image of these class folders of {root}", sorted(set(classes) - set(listed.values()))),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"list of images {path}: lists {problem}: {shown} ({len(names)} in total)")
    return classes, [found[image] for image in listed]
