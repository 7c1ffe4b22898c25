"""Linear probe of a frozen backbone, of its IR or of its EF, and its accuracy on perturbed images.

Train the probe of the IR, then evaluate it on rotated and jittered images:
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part \\
        --evaluate --test_aug_type aug1_2
Several processes: torchrun --nproc_per_node=2 eval_linear.py ..., or torch.distributed.launch.

The classifier, its training loop and its files are in evaluation/probe.py.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

import optim
import utils
from augmentations import eval_transform, probe_train_transform
from datasets import ImageDataset, check_same_classes, labelled_dataset
from distributed import add_distributed_arguments, get_world_size, init_distributed, run_entry_point
from evaluation.features import FeatureExtractor
from evaluation.names import PARTS, linear_probe_name
from evaluation.pretrained import add_backbone_arguments, load_pretrained
from evaluation.probe import (
    FIXED_ARGUMENTS,
    Probe,
    add_probe_arguments,
    build_probe,
    check_class_count,
    check_probe_args,
    lr_scale,
    write_result,
)
from utils import InputError

CLASSES = {"Imagenet": 1000, "IN100": 100}


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser)
    add_probe_arguments(parser)
    add = parser.add_argument
    add("--data_path", required=True, help="folder with train/ and val/, a folder per class in each")
    add("--dataset_type", help="Imagenet (1000 classes) or IN100 (100), to check the folder; default: any number of classes")
    add("--optimizer", default="sgd", choices=["sgd", "lars"], help="lars suits large batches")
    add("--output_dir", default=".", help="folder for the probe's checkpoint and results")
    add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    check_probe_args(args)
    if args.dataset_type is not None and args.dataset_type not in CLASSES:
        raise InputError(f"--dataset_type {args.dataset_type!r}: must be one of {', '.join(CLASSES)}")
    utils.check_writable(args.output_dir)


def build_dataset(args: argparse.Namespace, split: str, transform: Callable) -> ImageDataset:
    """The images of one split. Raises InputError if the number of classes differs from --dataset_type or --num_labels."""
    folder = os.path.join(args.data_path, split)
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation that fails loses nothing
    dataset = labelled_dataset(
        folder, transform, args.seed, skip_bad_images=args.skip_bad_images, check=check, threads=args.num_workers
    )
    check_class_count(args, folder, len(dataset.classes), CLASSES)
    return dataset


def build_optimizer(args: argparse.Namespace, classifier: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or LARS; no weight decay."""
    lr = args.lr * lr_scale(args)
    if args.optimizer == "sgd":
        return torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    return optim.LARS(classifier.parameters(), lr=lr, adapt_1d=True)


def train(args: argparse.Namespace, probe: Probe, dataset: ImageDataset, test: ImageDataset) -> dict[str, float]:
    """Train the probe, or resume its checkpoint; its accuracies and effective learning rate."""
    optimizer = build_optimizer(args, probe.classifier)
    lr = optimizer.param_groups[0]["lr"]
    print(
        f"{args.else_part}: {probe.extractor.dim} features, {len(test.classes)} classes, {len(dataset)} training images, "
        f"lr {lr:.4g} for {args.batch_size_per_gpu * get_world_size()} images per step"
    )
    result = probe.fit(optimizer, dataset, test)
    print(f"Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
    return result | {"effective_lr": lr}


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = init_distributed(args)
    part, output = PARTS[args.else_part], Path(args.output_dir)
    pretrained = load_pretrained(args, device)
    pretrained.check_part(part)
    extractor = FeatureExtractor(pretrained.backbone, part, pretrained.hp1, args.n_last_blocks, args.avgpool_patchtokens)

    view = pretrained.img_size, pretrained.mean, pretrained.std
    test = build_dataset(args, "val", eval_transform(args.test_aug_type, *view))
    print(f"{pretrained.net} {pretrained.arch}, {len(test)} test images, perturbation {args.test_aug_type}")

    name = linear_probe_name(part, pretrained.hp1, args.lr, args.epochs, args.trial_name)
    path = output / f"checkpoint_{name}.pth.tar"
    probe = build_probe(args, pretrained, extractor, len(test.classes), path, device)
    probe.fixed_arguments = (*FIXED_ARGUMENTS, "optimizer")
    if args.evaluate:
        probe.load(args.final_eval_weights or path)
        result = probe.evaluate(test)
        print(f"Accuracy of the network on the {result['num_test_images']} test images: {result['accuracy']:.2f}%")
        name = f"only_eval_{args.test_aug_type}_{name}"
    else:
        dataset = build_dataset(args, "train", probe_train_transform(*view))
        check_same_classes(dataset, test)
        result = train(args, probe, dataset, test)
    result["num_labels"] = len(test.classes)
    write_result(output / f"{name}.json", "linear_probe", args, pretrained, result)


if __name__ == "__main__":
    run_entry_point(main)
