"""Downstream classification: a linear classifier on a pretrained backbone, frozen or fine-tuned, on ALL, IR or EF.

    python eval_linear_ds.py --ds_mode linear --dataset_type Food101 --data_path data --pretrained_weights R/checkpoint.pth \\
        --output_dir R/ds --epochs 200 --batch_size_per_gpu 256
    python eval_linear_ds.py --ds_mode ds_ft --dataset_type CUB200 --data_path data/CUB200 --backbone_lr 0.001 \\
        --weight_decay 1e-4 --pretrained_weights R/checkpoint.pth --output_dir R/ds
    python eval_linear_ds.py --ds_mode semi_1 --dataset_type IN100 --data_path data/IN100 --semi_list IN100_1percent.txt ...
Several processes: torchrun --nproc_per_node=2 eval_linear_ds.py ... All ten jobs: scripts/downstream.sh.

linear: the backbone is frozen. ds_ft: the backbone is fine-tuned, on all training images. semi_1, semi_10: the backbone is
fine-tuned, on a list of 1 or 10 percent of them. Accuracies are those on all test images. The classifier, its training loop
and its files are in clever/evaluation/probe.py, the data sets in downstream_data.py.
"""

import argparse
import os
import re
from pathlib import Path

import torch
import torch.nn as nn

from clever import arguments
from clever.arguments import TypedFloat, bool_flag
from clever.data.augmentations import Views, eval_transform
from clever.data.datasets import ImageDataset
from clever.data.files import labelled_samples
from clever.data.rendering import choose_renderer
from clever.distributed import add_distributed_arguments, init_distributed
from clever.entry import run_entry_point
from clever.evaluation.downstream_data import TORCHVISION, check_same_classes, listed_samples, torchvision_samples
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.names import NUMBER, PARTS, classifier_name, downstream_name
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, check_part, load_pretrained
from clever.evaluation.probe import Probe, ProbeGroup, existing_probe, images_per_step, short_hash
from clever.evaluation.probe_arguments import (
    CLASSES,
    add_probe_arguments,
    check_probe_args,
    probe_dataset,
    probe_train_transform,
    write_result,
)
from clever.locking import locked
from clever.models.backbones import build_backbone, synchronize_batch_norm
from clever.utils import InputError
from vmamba import is_config_name

MODES = ("linear", "ds_ft", "semi_1", "semi_10")
FOLDERS = {"train": "train", "test": "val"}  # sub-folders of an image folder
CHECKPOINT = ".pth.tar"


# --- arguments ---------------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, compiles=False)
    add_probe_arguments(parser)
    add = parser.add_argument
    add("--ds_mode", default="linear", choices=MODES, help="see above")
    add("--dataset_type", choices=CLASSES, help="default: an image folder with any number of classes")
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
    """Arguments with the default of --backbone_lr. Raises InputError for invalid ones, before anything is read or written."""
    frozen = args.ds_mode == "linear"
    if args.backbone_lr is None:
        args.backbone_lr = TypedFloat("0" if frozen else "0.1")
    check_probe_args(args)
    arguments.check_not_negative(args, "backbone_lr", "weight_decay")
    semi, from_torchvision = args.ds_mode.startswith("semi"), args.dataset_type in TORCHVISION
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    for wrong, message in (
        (semi and from_torchvision, f"--ds_mode {args.ds_mode}: its list names files, {args.dataset_type} has none"),
        (args.semi_list and not semi, f"--semi_list {args.semi_list}: only with --ds_mode semi_1 or semi_10"),
        (args.download and not from_torchvision, f"--download: only with --dataset_type {', '.join(TORCHVISION)}"),
        (args.download and several, "--download: with one process only; start it once without a launcher"),
        (args.train_on_val and args.dataset_type != "Flowers102", "--train_on_val true: only with --dataset_type Flowers102"),
        (frozen and args.backbone_lr > 0, f"--backbone_lr {args.backbone_lr}: must be 0 with --ds_mode linear"),
        (frozen and args.weight_decay > 0, f"--weight_decay {args.weight_decay}: must be 0 with --ds_mode linear"),
    ):
        if wrong:
            raise InputError(message)
    arguments.check_writable(output_folder(args))
    args.views = choose_renderer(args.views)
    return args


def data_name(args: argparse.Namespace) -> str:
    """Name of the data in file names."""
    return (args.dataset_type or Path(args.data_path).resolve().name) + ("_trainval" if args.train_on_val else "")


def output_folder(args: argparse.Namespace) -> str:
    return os.path.dirname(args.output_dir) or "." if args.output_dir.endswith(CHECKPOINT) else args.output_dir


def checkpoint_path(args: argparse.Namespace, hp1: float) -> Path:
    """`downstream_name` in --output_dir; or --output_dir itself, if that names a checkpoint, as in CLeVER's script.

    With --evaluate, the only checkpoint of this mode, data, part and --trial_name is taken if there is none with these rates,
    epochs, batches and hp1.
    """
    if args.output_dir.endswith(CHECKPOINT):
        return Path(args.output_dir)
    kind, part, trial = (args.ds_mode, data_name(args)), PARTS[args.else_part], args.trial_name
    name = downstream_name(*kind, part, hp1, trial, args.lr, args.backbone_lr, args.epochs, args.batch_size_per_gpu)
    path = Path(args.output_dir) / f"{name}{CHECKPOINT}"
    if not args.evaluate:
        return path
    pattern = downstream_name(*map(re.escape, kind), part, NUMBER, re.escape(trial), NUMBER, NUMBER, NUMBER, NUMBER)
    return existing_probe(path, pattern + re.escape(CHECKPOINT))


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
        raise InputError(f"--data_path {args.data_path}: is CUB-200-2011 as published; "
                         "python -m scripts.data.make_cub200 makes train/ and val/")  # fmt: skip
    if split == "train" and args.ds_mode.startswith("semi"):
        percent = args.ds_mode.removeprefix("semi_")
        return listed_samples(args.semi_list or os.path.join(args.data_path, f"{data_name(args)}_{percent}percent.txt"), root)
    return labelled_samples(root)


def build_dataset(args: argparse.Namespace, split: str, views: Views) -> ImageDataset:
    """The images of `split`, train or test. Raises InputError if --dataset_type or --num_labels give another class count."""
    folder = args.data_path if args.dataset_type in TORCHVISION else os.path.join(args.data_path, FOLDERS[split])
    return probe_dataset(args, *find_images(args, split), views, folder)


def build_extractor(args: argparse.Namespace, pretrained: Pretrained, device: torch.device) -> FeatureExtractor:
    """Features of --else_part, of a frozen backbone or, in the other modes, of one that is trained."""
    train, part, shape = args.ds_mode != "linear", PARTS[args.else_part], (args.n_last_blocks, args.avgpool_patchtokens)
    backbone = build_trained_backbone(pretrained, device) if train else pretrained.backbone
    return FeatureExtractor(backbone, part, pretrained.split, *shape, train, pretrained.stats)


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
    scale = images_per_step(args) / 256
    groups = [{"params": list(classifier.parameters()), "lr": args.lr * scale}]
    if backbone is not None:
        groups.append({"params": list(backbone.parameters()), "lr": args.backbone_lr * scale})
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)


# --- training and evaluation -------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, group: ProbeGroup, dataset: ImageDataset, test: ImageDataset) -> dict[str, float]:
    """Train, or resume the probe's checkpoint; its accuracies and effective learning rates."""
    (probe,) = group.probes
    backbone = probe.extractor.backbone if probe.extractor.train_backbone else None
    probe.optimizer = build_optimizer(args, probe.classifier, backbone)
    names = ("effective_lr", "effective_backbone_lr")
    rates = dict(zip(names, (params["lr"] for params in probe.optimizer.param_groups), strict=False))
    shown = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    print(f"{args.ds_mode} of {args.else_part}: {probe.extractor.dim} features, {len(test.classes)} classes, {len(dataset)} "
          f"training images, {images_per_step(args)} per step, {shown}")  # fmt: skip
    result = group.fit(dataset, test)[probe]
    print(f"Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
    print("Mean accuracy per class: last {mean_class_accuracy:.2f}%, best {best_mean_class_accuracy:.2f}%".format(**result))
    return result | rates | {"num_train_images": len(dataset)}


def main() -> None:
    args = resolve_args(get_args_parser().parse_args())
    device = init_distributed(args)
    pretrained = load_pretrained(args, device)
    check_part(PARTS[args.else_part], pretrained.split)
    extractor = build_extractor(args, pretrained, device)

    test = build_dataset(args, "test", eval_transform(args.test_aug_type, pretrained.img_size))
    print(f"{pretrained.net} {pretrained.arch}, {data_name(args)}, {len(test)} test images, perturbation {args.test_aug_type}")
    identity, name, dataset = {"ds_mode": args.ds_mode}, "", None
    if not args.evaluate:
        dataset = build_dataset(args, "train", probe_train_transform(pretrained.img_size, args.crop_scale))
        check_same_classes(dataset, test)
        names = sorted(f"{Path(path).parent.name}/{Path(path).name} {label}" for path, label in dataset.samples)
        identity["training_images"] = f"{len(names)} images ({short_hash(names)})"  # wherever the folder lies
    path = Path(args.evaluate and args.final_eval_weights or checkpoint_path(args, pretrained.hp1))
    fixed = ("lr", "backbone_lr", "weight_decay", "epochs")
    probe = Probe(args, pretrained, extractor, test.classes, path, fixed, **identity)
    group = ProbeGroup(args, [probe], device, per_class=True)
    if args.evaluate:
        probe.load(path)
        result = group.evaluate(test)[probe]
        print(f"Accuracy of the network on the {result['num_test_images']} test images: {result['accuracy']:.2f}%")
        print(f"Mean accuracy per class: {result['mean_class_accuracy']:.2f}%")
        name = f"only_eval_{args.test_aug_type}_"
    else:
        with locked(path):
            result = train(args, group, dataset, test)
    about = {"ds_mode": args.ds_mode, "dataset": data_name(args), "num_labels": len(test.classes)}
    result_path = Path(output_folder(args)) / f"{name}{classifier_name(path)}.json"
    write_result(result_path, "downstream", args, pretrained, about | result)


if __name__ == "__main__":
    run_entry_point(main)
