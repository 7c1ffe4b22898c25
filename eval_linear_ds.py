"""Downstream classification: a linear classifier on a pretrained backbone, frozen or fine-tuned, on ALL, IR or EF.

    python eval_linear_ds.py --ds_mode linear --dataset_type Food101 --data_path data --pretrained_weights R/checkpoint.pth \\
        --output_dir R/ds --epochs 200 --batch_size_per_gpu 256
    python eval_linear_ds.py --ds_mode ds_ft --dataset_type CUB200 --data_path data/CUB200 --backbone_lr 0.001 \\
        --weight_decay 1e-4 --pretrained_weights R/checkpoint.pth --output_dir R/ds
    python eval_linear_ds.py --ds_mode semi_1 --dataset_type IN100 --data_path data/IN100 --semi_list IN100_1percent.txt ...
Several processes: torchrun --nproc_per_node=2 eval_linear_ds.py ... All ten jobs: scripts/downstream.sh.

linear: the backbone is frozen. ds_ft: the backbone is fine-tuned, on all training images. semi_1, semi_10: the backbone is
fine-tuned, on a list of 1 or 10 percent of them. Accuracies are those on all test images. The classifier, its training loop
and its files are in evaluation/probe.py, the data sets in evaluation/downstream_data.py.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from clever import arguments
from clever.arguments import TypedFloat, bool_flag
from clever.data.augmentations import Views, eval_transform, probe_train_transform
from clever.data.datasets import ImageDataset, check_same_classes, dataset_of
from clever.data.files import labelled_samples
from clever.data.rendering import resolve_renderer
from clever.distributed import add_distributed_arguments, init_distributed
from clever.entry import run_entry_point
from clever.evaluation.downstream_data import TORCHVISION, listed_samples, torchvision_samples
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.names import PARTS, classifier_name, downstream_name
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, load_pretrained
from clever.evaluation.probe import ProbeGroup
from clever.evaluation.probe_arguments import (
    IMAGENET_CLASSES,
    add_probe_arguments,
    build_probe,
    check_class_count,
    check_probe_args,
    group_probes,
    images_per_step,
    lr_scale,
    short_hash,
    write_result,
)
from clever.locking import locked
from clever.models.backbones import build_backbone, synchronize_batch_norm
from clever.utils import InputError
from vmamba import is_config_name

MODES = ("linear", "ds_ft", "semi_1", "semi_10")
CLASSES = IMAGENET_CLASSES | {"CUB200": 200} | {name: count for name, (_, count, *_) in TORCHVISION.items()}
FOLDERS = {"train": "train", "test": "val"}  # sub-folders of an image folder
CHECKPOINT = ".pth.tar"


# --- arguments ---------------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser)
    add_probe_arguments(parser)
    add = parser.add_argument
    add("--ds_mode", default="linear", help=f"{', '.join(MODES)}; see above")
    add("--dataset_type", help=f"{', '.join(CLASSES)}; default: an image folder with any number of classes")
    add("--data_path", required=True, help="folder with train/ and val/, a folder per class in each; torchvision's data "
        "sets: their root")  # fmt: skip
    add("--download", action="store_true", help="torchvision's data sets: download them to --data_path first")
    add("--train_on_val", type=bool_flag, default=False, help="Flowers102: train on its splits train and val")
    add("--semi_list", help="semi_*: list of the training images; default: <data_path>/<data set>_<1 or 10>percent.txt")
    add("--backbone_lr", type=TypedFloat, help="learning rate of a fine-tuned backbone, for 256 images per step; default: 0.1. "
        "0.001 keeps more of the pretraining")  # fmt: skip
    add("--weight_decay", type=float, default=0.0, help="weight decay of all trained parameters; must be 0 for linear")
    add("--output_dir", default=".", help=f"folder for the checkpoint and results, or the checkpoint's name, *{CHECKPOINT}")
    add_distributed_arguments(parser)
    return parser


def resolve_args(args: argparse.Namespace) -> argparse.Namespace:
    """Checked arguments with the default of --backbone_lr filled in."""
    if args.backbone_lr is None:
        args = argparse.Namespace(**vars(args) | {"backbone_lr": TypedFloat("0" if args.ds_mode == "linear" else "0.1")})
    check_args(args)
    return resolve_renderer(args)


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    check_probe_args(args)
    if args.ds_mode not in MODES:
        raise InputError(f"--ds_mode {args.ds_mode!r}: must be one of {', '.join(MODES)}")
    if args.dataset_type is not None and args.dataset_type not in CLASSES:
        raise InputError(f"--dataset_type {args.dataset_type!r}: must be one of {', '.join(CLASSES)}")
    semi, from_torchvision = args.ds_mode.startswith("semi"), args.dataset_type in TORCHVISION
    if semi and from_torchvision:
        raise InputError(f"--ds_mode {args.ds_mode}: its list names files of an image folder, {args.dataset_type} has none")
    if args.semi_list is not None and not semi:
        raise InputError(f"--semi_list {args.semi_list}: is for --ds_mode semi_1 or semi_10, not {args.ds_mode}")
    if args.download and not from_torchvision:
        raise InputError(f"--download: only for --dataset_type {', '.join(TORCHVISION)}")
    if args.download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--download: with one process only; start it once without a launcher, then without --download")
    if args.train_on_val and args.dataset_type != "Flowers102":
        raise InputError("--train_on_val true: only for --dataset_type Flowers102")
    frozen = args.ds_mode == "linear"
    arguments.check_not_negative(args, "backbone_lr", "weight_decay")
    for name in ("backbone_lr", "weight_decay"):
        if frozen and getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 with --ds_mode linear")
    if os.path.isdir(args.output_dir) and args.output_dir.endswith(CHECKPOINT):
        raise InputError(f"--output_dir {args.output_dir}: is a folder, but names a checkpoint (*{CHECKPOINT})")
    arguments.check_writable(Path(args.output_dir).parent if args.output_dir.endswith(CHECKPOINT) else args.output_dir)


def data_name(args: argparse.Namespace) -> str:
    """Name of the data in file names."""
    return (args.dataset_type or Path(args.data_path).resolve().name) + ("_trainval" if args.train_on_val else "")


def checkpoint_path(args: argparse.Namespace, hp1: float) -> Path:
    """`downstream_name` in --output_dir; or --output_dir itself, if that names a checkpoint, as in CLeVER's script."""
    if args.output_dir.endswith(CHECKPOINT):
        return Path(args.output_dir)
    part, lr, backbone_lr = PARTS[args.else_part], args.lr, args.backbone_lr
    sizes = args.epochs, args.batch_size_per_gpu
    name = downstream_name(args.ds_mode, data_name(args), part, hp1, args.trial_name, lr, backbone_lr, *sizes)
    return Path(args.output_dir) / f"{name}{CHECKPOINT}"


# --- data --------------------------------------------------------------------------------------------------------------


def find_images(args: argparse.Namespace, split: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes and samples (path, class) of `split`, train or test. Raises InputError if they are not there."""
    if args.dataset_type in TORCHVISION:
        splits = [split]
        if split == "train" and args.dataset_type == "OxfordIIITPet":
            splits = ["trainval"]
        elif split == "train" and args.train_on_val:
            splits = ["train", "val"]
        shares = [torchvision_samples(args.dataset_type, args.data_path, name, args.download) for name in splits]
        return shares[0][0], [sample for _, samples in shares for sample in samples]
    root = os.path.join(args.data_path, FOLDERS[split])
    if not os.path.isdir(root) and os.path.exists(os.path.join(args.data_path, "image_class_labels.txt")):
        raise InputError(
            f"--data_path {args.data_path}: is CUB-200-2011 as published; "
            "python -m scripts.data.make_cub200 makes train/ and val/"
        )
    if split == "train" and args.ds_mode.startswith("semi"):
        percent = args.ds_mode.removeprefix("semi_")
        path = args.semi_list or os.path.join(args.data_path, f"{data_name(args)}_{percent}percent.txt")
        if not os.path.isfile(path):
            raise InputError(
                f"list of images {path}: no such file; python -m scripts.data.make_semi_lists makes one, --semi_list names it"
            )
        return listed_samples(path, root)
    return labelled_samples(root)


def build_dataset(args: argparse.Namespace, split: str, views: Views) -> ImageDataset:
    """The images of `split`, train or test. Raises InputError if --dataset_type or --num_labels give another class count."""
    classes, samples = find_images(args, split)
    folder = args.data_path if args.dataset_type in TORCHVISION else os.path.join(args.data_path, FOLDERS[split])
    check_class_count(args, folder, len(classes), CLASSES)
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation that fails loses nothing
    return dataset_of(
        classes, samples, views, args.seed, renderer=args.views, skip_bad_images=args.skip_bad_images,
        threads=args.num_workers, check=check,
    )  # fmt: skip


def probe_identity(args: argparse.Namespace, dataset: ImageDataset | None) -> dict[str, Any]:
    """What a classifier was trained on, to compare with its checkpoint; without `dataset` only the mode."""
    identity = {"ds_mode": args.ds_mode}
    if dataset is not None:
        identity["training_images"] = describe_images(dataset)
    return identity


def describe_images(dataset: ImageDataset) -> str:
    """The number of images, and a hash of their classes and file names that does not depend on the folder."""
    names = sorted(f"{Path(path).parent.name}/{Path(path).name} {label}" for path, label in dataset.samples)
    return f"{len(names)} images ({short_hash(names)})"


# --- network -----------------------------------------------------------------------------------------------------------


def build_extractor(args: argparse.Namespace, pretrained: Pretrained, device: torch.device) -> FeatureExtractor:
    """Features of --else_part, of a frozen backbone or, in the other modes, of one that is trained."""
    train_backbone = args.ds_mode != "linear"
    backbone = build_trained_backbone(pretrained, device) if train_backbone else pretrained.backbone
    part = PARTS[args.else_part]
    shape = args.n_last_blocks, args.avgpool_patchtokens
    return FeatureExtractor(backbone, part, pretrained.hp1, *shape, train_backbone, stats=pretrained.stats)


def build_trained_backbone(pretrained: Pretrained, device: torch.device) -> nn.Module:
    """The pretrained backbone with gradients; batch norms are synchronised on GPUs."""
    backbone = pretrained.backbone
    if is_config_name(pretrained.arch):  # a VMamba is fine-tuned with its configuration's stochastic depth, as in the original
        backbone = build_backbone(pretrained.arch, drop_path_rate=None).to(device).eval()
        backbone.load_state_dict(pretrained.backbone.state_dict())
    backbone.requires_grad_(True)
    return synchronize_batch_norm([backbone], pretrained.arch, device)[0]


def build_optimizer(args: argparse.Namespace, classifier: nn.Module, backbone: nn.Module | None) -> torch.optim.Optimizer:
    """SGD with momentum 0.9: one group for the classifier, and one for the backbone if it is trained (not None)."""
    groups = [{"params": list(classifier.parameters()), "lr": args.lr * lr_scale(args)}]
    if backbone is not None:
        groups.append({"params": list(backbone.parameters()), "lr": args.backbone_lr * lr_scale(args)})
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)


# --- training and evaluation -------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, group: ProbeGroup, dataset: ImageDataset, test: ImageDataset) -> dict[str, float]:
    """Train, or resume the probe's checkpoint; its accuracies and effective learning rates."""
    (probe,) = group.probes
    backbone = probe.extractor.backbone if probe.extractor.train_backbone else None
    probe.optimizer = build_optimizer(args, probe.classifier, backbone)
    names = ("effective_lr", "effective_backbone_lr")
    rates = dict(zip(names, (params["lr"] for params in probe.optimizer.param_groups), strict=False))
    print(
        f"{args.ds_mode} of {args.else_part}: {probe.extractor.dim} features, {len(test.classes)} classes, "
        f"{len(dataset)} training images, {images_per_step(args)} per step, "
        + ", ".join(f"{name.removeprefix('effective_')} {rate:.4g}" for name, rate in rates.items())
    )
    result = group.fit(dataset, test)[probe]
    print(f"Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
    mean, best = result["mean_class_accuracy"], result["best_mean_class_accuracy"]
    print(f"Mean accuracy per class: last {mean:.2f}%, best {best:.2f}%")
    return result | rates | {"num_train_images": len(dataset)}


def main() -> None:
    args = resolve_args(get_args_parser().parse_args())
    device = init_distributed(args)
    pretrained = load_pretrained(args, device)
    pretrained.check_part(PARTS[args.else_part])
    extractor = build_extractor(args, pretrained, device)

    test = build_dataset(args, "test", eval_transform(args.test_aug_type, pretrained.img_size))
    print(f"{pretrained.net} {pretrained.arch}, {data_name(args)}, {len(test)} test images, perturbation {args.test_aug_type}")

    views = probe_train_transform(pretrained.img_size, args.crop_scale)
    dataset = None if args.evaluate else build_dataset(args, "train", views)
    path = checkpoint_path(args, pretrained.hp1)
    fixed = ("lr", "backbone_lr", "weight_decay", "epochs")
    identity = probe_identity(args, dataset)
    probe = build_probe(args, pretrained, extractor, test.classes, path, device, fixed, **identity)
    group = group_probes(args, [probe], device, per_class=True)
    name = classifier_name(path)
    if args.evaluate:
        checkpoint = args.final_eval_weights or path
        probe.load(checkpoint)
        result = group.evaluate(test)[probe]
        print(f"Accuracy of the network on the {result['num_test_images']} test images: {result['accuracy']:.2f}%")
        print(f"Mean accuracy per class: {result['mean_class_accuracy']:.2f}%")
        name = f"only_eval_{args.test_aug_type}_{classifier_name(checkpoint)}"
    else:
        check_same_classes(dataset, test)
        with locked(path):
            result = train(args, group, dataset, test)
    about = {"ds_mode": args.ds_mode, "dataset": data_name(args), "num_labels": len(test.classes)}
    write_result(path.with_name(f"{name}.json"), "downstream", args, pretrained, about | result)


if __name__ == "__main__":
    run_entry_point(main)
