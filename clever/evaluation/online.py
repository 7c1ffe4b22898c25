"""What pretraining measures of its teacher while it runs: k-NN accuracy of the parts, and what they know about rotation.

Shapes: M training images, N test images.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from clever import arguments
from clever.data.augmentations import eval_transform
from clever.data.datasets import ImageDataset, labelled_dataset
from clever.evaluation.downstream_data import check_same_classes
from clever.evaluation.equivariance import HELD_OUT, linear_r2
from clever.evaluation.knn import knn_accuracy
from clever.evaluation.pretrained import split_of
from clever.evaluation.transforms import TRANSFORMS, TransformDataset
from clever.utils import InputError

ROTATED_IMAGES, ROTATED_VIEWS = 1000, 4  # training images for the rotation regressor, and views of each


def add_online_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--knn_data", help="labelled folder (train/ and val/), for the accuracy of a 20-NN classifier during training")
    add("--knn_freq", type=int, default=10, help="epochs between k-NN evaluations")
    add("--probe_data", help="labelled folder (train/ and val/): measures, on some of its images, the 20-NN accuracy of ALL, "
        "IR and EF and how well a linear regressor predicts a rotation from them (R2: 0 not at all, 1 exactly)")  # fmt: skip
    add("--probe_freq", type=int, default=10, help="epochs between these measurements. Raise it if they take more than a "
        "minute per hour; the line that they print says how long they took")  # fmt: skip
    add("--probe_images", type=int, default=2000, help="training images of --probe_data to use, and half as many test images")


def check_online_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values of these flags."""
    arguments.check_positive(args, "knn_freq", "probe_freq")
    if args.probe_images < 2 * HELD_OUT:
        raise InputError(f"--probe_images {args.probe_images}: must be {2 * HELD_OUT} or more")


class OnlineEvaluation:
    """The measurements of --knn_data and --probe_data, at the ends of epochs.

    Raises InputError if the folders do not hold the same classes in train/ and val/, or too few images.

    Args:
        args: of the pretraining, with the flags above.
        options: how images are rendered and checked, for datasets.labelled_dataset.
        device: of the backbone.
    """

    def __init__(self, args: argparse.Namespace, options: dict[str, Any], device: torch.device) -> None:
        self.args, self.options, self.device = args, options, device
        self.knn_data = self._labelled(args.knn_data) if args.knn_data else None
        self.probe_data = None
        if args.probe_data:
            train, val = self._labelled(args.probe_data)
            if min(len(train), len(val)) < HELD_OUT:
                raise InputError(f"--probe_data {args.probe_data}: train/ and val/ need {HELD_OUT} images each")
            self.probe_data = subset(train, args.probe_images), subset(val, args.probe_images // 2)
            self.rotated = [self._rotated(images, stream) for stream, images in enumerate(self.probe_data)]

    def _labelled(self, folder: str) -> tuple[ImageDataset, ImageDataset]:
        """Clean images of train/ and val/."""
        view = eval_transform("ori", self.args.global_crops_size)
        train, val = (
            labelled_dataset(os.path.join(folder, split), view, self.args.seed, **self.options) for split in ("train", "val")
        )
        check_same_classes(train, val)
        return train, val

    def _rotated(self, images: ImageDataset, stream: int) -> TransformDataset:
        images = subset(images, ROTATED_IMAGES // (1 + stream))
        paths, size = [path for path, _ in images.samples], self.args.global_crops_size
        return TransformDataset(paths, TRANSFORMS["rotation"], size, ROTATED_VIEWS, self.args.seed, stream, self.args.views)

    def is_due(self, epoch: int) -> bool:
        """Whether anything is measured after this epoch."""
        kinds = (self.knn_data, self.args.knn_freq), (self.probe_data, self.args.probe_freq)
        return any(data is not None and self._is_due(epoch, frequency) for data, frequency in kinds)

    def measure(self, backbone: nn.Module, epoch: int) -> dict[str, float]:
        """What is due after this epoch: values for log.txt. Those of --probe_data are also printed as one line.

        All processes must call it. knn_top1: of --knn_data; knn_<part>, rotation_r2_<part>: of --probe_data.
        """
        record: dict[str, float] = {}
        options = {
            "device": self.device, "batch_size": self.args.batch_size_per_gpu, "stats": (self.args.mean, self.args.std),
            "num_workers": self.args.num_workers,
        }  # fmt: skip
        if self.knn_data and self._is_due(epoch, self.args.knn_freq):
            record["knn_top1"] = knn_accuracy(backbone, *self.knn_data, **options)["ALL"]
        if self.probe_data and self._is_due(epoch, self.args.probe_freq):
            start = time.perf_counter()
            split = split_of(self.args.net, self.args.hp1, backbone.embed_dim, self.args.equiv_part)
            options |= {"parts": ("ALL", "IR", "EF") if split else ("ALL",), "split": split}
            knn = knn_accuracy(backbone, *self.probe_data, **options)
            r2 = linear_r2(backbone, *self.rotated, **options)
            record |= {f"knn_{part}": value for part, value in knn.items()}
            record |= {f"rotation_r2_{part}": value for part, value in r2.items()}
            record["seconds_probe"] = time.perf_counter() - start
            accuracies = ", ".join(f"{part} {value:.1f}" for part, value in knn.items())
            rotation = ", ".join(f"{part} {value:.2f}" for part, value in r2.items())
            print(f"probe {epoch}/{self.args.epochs}: 20-NN {accuracies} %; R2 of rotation {rotation}; "
                  f"took {record['seconds_probe']:.1f} s")  # fmt: skip
        return record

    def _is_due(self, epoch: int, frequency: int) -> bool:
        return (epoch + 1) % frequency == 0 or epoch + 1 == self.args.epochs


def subset(dataset: ImageDataset, number: int) -> ImageDataset:
    """At most `number` of the images, drawn at random, the same ones in every run."""
    if number >= len(dataset):
        return dataset
    chosen = np.sort(np.random.default_rng(0).permutation(len(dataset))[:number])
    samples = dataset.samples
    return ImageDataset([samples[i] for i in chosen], dataset.views, dataset.seed, dataset.classes, dataset.renderer)
