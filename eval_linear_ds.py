"""Downstream classification with a pretrained backbone: a linear classifier on it, frozen or fine-tuned, whole, IR or EF.

    python eval_linear_ds.py --ds_mode linear --dataset_type Food101 --data_path data --pretrained_weights R/checkpoint.pth \\
        --output_dir R/ds --epochs 200 --batch_size_per_gpu 256
    python eval_linear_ds.py --ds_mode ds_ft --dataset_type CUB200 --data_path data/CUB200 --backbone_lr 0.001 \\
        --weight_decay 1e-4 --pretrained_weights R/checkpoint.pth --output_dir R/ds
    python eval_linear_ds.py --ds_mode semi_1 --dataset_type IN100 --data_path data/IN100 --semi_list IN100_1percent.txt ...
Several processes: torchrun --nproc_per_node=2 eval_linear_ds.py ... All ten jobs: scripts/downstream.sh.

linear: the backbone is frozen. ds_ft: all is trained on the training images. semi_1, semi_10: all is trained on the listed
share of them (1 or 10 percent). Tested on all test images. The classifier and its files: classifier.py.
"""

import argparse
import hashlib
import inspect
import os
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import distributed
import utils
from augmentations import eval_transform, probe_train_transform
from backbones import build_backbone, synchronize_batch_norm
from datasets import ImageDataset, check_same_classes, dataset_of, labelled_samples, shard
from evaluation.downstream_data import TORCHVISION, listed_samples, torchvision_samples
from evaluation.features import FeatureExtractor, extract_features
from evaluation.names import part_suffix
from evaluation.pretrained import Pretrained, add_backbone_arguments, check_part, load_pretrained
from evaluation.probe import (
    SETTINGS,
    LinearClassifier,
    Training,
    add_classifier_arguments,
    build_loader,
    check_class_count,
    check_classifier_args,
    fit,
    load_probe,
    load_trained_backbone,
    train_one_epoch,
    validate,
    write_result,
)
from utils import InputError, TypedFloat, bool_flag
from vmamba import is_config_name

MODES = ("linear", "ds_ft", "semi_1", "semi_10")
CLASSES = {"Imagenet": 1000, "IN100": 100, "CUB200": 200} | {name: count for name, (_, count, *_) in TORCHVISION.items()}
FOLDERS = {"train": "train", "test": "val"}  # sub-folders of an image folder
CHECKPOINT = ".pth.tar"


# --- arguments ---------------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    add_classifier_arguments(parser)
    add = parser.add_argument
    add("--ds_mode", default="linear", help=", ".join(MODES))
    add("--dataset_type", help=f"{', '.join(CLASSES)}; default: an image folder, with as many classes as it holds")
    add(
        "--data_path",
        required=True,
        help="folder with train/ and val/, a folder per class in each; torchvision's sets: its root",
    )
    add("--download", action="store_true", help="torchvision's sets: fetch them to --data_path first (network)")
    add(
        "--train_on_val", type=bool_flag, default=False, help="Flowers102: train on its splits train and val, not on train only"
    )
    add("--semi_list", help="semi_*: images to train on; default: <data_path>/<data set>_<1 or 10>percent.txt")
    add("--backbone_lr", type=TypedFloat, help="of a trained backbone, for 256 images per step; default 0.1")
    add("--weight_decay", type=float, default=0.0, help="of everything that is trained; linear: 0")
    add("--output_dir", default=".", help=f"folder for checkpoint and results, or the checkpoint's name, *{CHECKPOINT}")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written; fills in --backbone_lr."""
    check_classifier_args(args)
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
    if args.backbone_lr is None:
        args.backbone_lr = TypedFloat("0" if frozen else "0.1")
    utils.check_not_negative(args, "backbone_lr", "weight_decay")
    for name in ("backbone_lr", "weight_decay"):
        if frozen and getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)}: must be 0 with --ds_mode linear")
    if os.path.isdir(args.output_dir) and args.output_dir.endswith(CHECKPOINT):
        raise InputError(f"--output_dir {args.output_dir}: is a folder, but names a checkpoint (*{CHECKPOINT})")
    utils.check_writable(Path(args.output_dir).parent if args.output_dir.endswith(CHECKPOINT) else args.output_dir)


def data_name(args: argparse.Namespace) -> str:
    """Of the data in file names."""
    return (args.dataset_type or Path(args.data_path).resolve().name) + ("_trainval" if args.train_on_val else "")


def checkpoint_path(args: argparse.Namespace, hp1: float) -> Path:
    """<output_dir>/ds_<mode>_<data>_linear[_hp<hp1>[_else]]_<trial>_sgd_lr<lr>_lrbk<lr>_ep<epochs>_bs<batch>_li_aug1.pth.tar.

    Numbers as they were typed. As in CLeVER's script, --output_dir may also be that file itself.
    """
    if args.output_dir.endswith(CHECKPOINT):
        return Path(args.output_dir)
    recipe = f"sgd_lr{args.lr}_lrbk{args.backbone_lr}_ep{args.epochs}_bs{args.batch_size_per_gpu}_li_aug1"
    pieces = ["ds", args.ds_mode, data_name(args), f"linear{part_suffix(args.else_part, hp1)}", args.trial_name, recipe]
    return Path(args.output_dir) / ("_".join(filter(None, pieces)) + CHECKPOINT)


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


def build_dataset(args: argparse.Namespace, split: str, transform) -> ImageDataset:
    """The images of `split`, train or test; InputError if the number of classes is not the promised one."""
    classes, samples = find_images(args, split)
    folder = args.data_path if args.dataset_type in TORCHVISION else os.path.join(args.data_path, FOLDERS[split])
    check_class_count(args, folder, len(classes), CLASSES)
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation has nothing to lose
    return dataset_of(classes, samples, transform, args.seed, args.skip_bad_images, args.num_workers, check)


def describe_images(dataset: ImageDataset) -> str:
    """How many images a data set has, and a fingerprint of which, wherever they lie."""
    names = sorted(f"{Path(path).parent.name}/{Path(path).name} {label}" for path, label in dataset.samples)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return f"{len(names)} images ({digest})"


# --- network -----------------------------------------------------------------------------------------------------------


class TrainedExtractor(FeatureExtractor):
    """The same features, with gradients."""

    forward = inspect.unwrap(FeatureExtractor.forward)  # without the no_grad around it


def build_extractor(args: argparse.Namespace, pretrained: Pretrained, device: torch.device) -> FeatureExtractor:
    """Frozen, or unfrozen where the mode trains the backbone; its batch norms are then synchronised on GPUs."""
    backbone, kind = pretrained.backbone, FeatureExtractor
    if args.ds_mode != "linear":
        kind = TrainedExtractor
        if is_config_name(pretrained.arch):  # a VMamba keeps its configuration's stochastic depth, as in the original
            backbone = build_backbone(pretrained.arch, drop_path_rate=None).to(device).eval()
            backbone.load_state_dict(pretrained.backbone.state_dict())
        backbone.requires_grad_(True)
        if distributed.is_distributed() and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()):
            if device.type == "cuda":
                backbone = synchronize_batch_norm(backbone, pretrained.arch)
            else:
                print("batch norm: statistics are each process's own (torch synchronises them on GPUs only)")
    return kind(backbone, args.else_part, pretrained.hp1, args.n_last_blocks, args.avgpool_patchtokens)


def build_optimizer(
    args: argparse.Namespace, classifier: nn.Module, backbone: nn.Module | None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """SGD with momentum 0.9: a group for the classifier and one for a trained backbone, and their cosine to 0 per epoch."""
    scale = args.batch_size_per_gpu * distributed.get_world_size() / 256
    groups = [{"params": list(classifier.parameters()), "lr": args.lr * scale}]
    if backbone is not None:
        groups.append({"params": list(backbone.parameters()), "lr": args.backbone_lr * scale})
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=args.weight_decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=0)


# --- training and evaluation -------------------------------------------------------------------------------------------


def train(args, path, extractor, classifier, expected, dataset, measure, device) -> dict:
    """Train, or continue the checkpoint at `path`; metrics of the last epoch and of the best ones, and effective rates."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=args.seed)
    loader = build_loader(dataset, args, sampler=sampler)
    backbone = None if args.ds_mode == "linear" else extractor.backbone
    optimizer, scheduler = build_optimizer(args, classifier, backbone)
    frozen, trained = (extractor, classifier) if backbone is None else (nn.Identity(), nn.Sequential(extractor, classifier))
    model = DistributedDataParallel(trained) if distributed.is_distributed() else trained
    step = args.batch_size_per_gpu * world
    rates = dict(
        zip(("effective_lr", "effective_backbone_lr"), (group["lr"] for group in optimizer.param_groups), strict=False)
    )
    print(
        f"{args.ds_mode} of {args.else_part}: {extractor.dim} features, {expected['num_labels']} classes, "
        f"{len(dataset)} training images, {step} per step, "
        + ", ".join(f"{name.removeprefix('effective_')} {rate:.4g}" for name, rate in rates.items())
    )

    def train_epoch(epoch: int) -> float:
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        extractor.backbone.train(backbone is not None)
        loss = train_one_epoch(frozen, model, optimizer, loader, epoch, device, args)["loss"]
        extractor.backbone.eval()
        if backbone is not None:
            distributed.broadcast_buffers(backbone)
        return loss

    training = Training(
        path=path, classifier=classifier, backbone=backbone, optimizer=optimizer, scheduler=scheduler,
        expected=expected | {"training_images": describe_images(dataset), "images_per_step": step},
        settings=(*SETTINGS, "lr", "backbone_lr", "weight_decay", "epochs"),
    )  # fmt: skip
    return fit(args, training, train_epoch, measure) | rates | {"num_train_images": len(dataset)}


def load_trained(args: argparse.Namespace, path: Path, extractor, classifier, expected: dict) -> None:
    """Load what was trained, for an evaluation. Raises InputError if the file is not of this mode, part, backbone, ..."""
    checkpoint = load_probe(path, classifier, expected)
    if args.ds_mode != "linear":
        load_trained_backbone(path, checkpoint, extractor.backbone)
    elif "state_dict_model" in checkpoint:
        raise InputError(
            f"checkpoint {path}: holds a fine-tuned backbone, --ds_mode linear has none; give the mode it was made with"
        )


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    pretrained = load_pretrained(args, device)
    check_part(args.else_part, pretrained.net, pretrained.hp1, pretrained.backbone.embed_dim)
    extractor = build_extractor(args, pretrained, device)
    path = checkpoint_path(args, pretrained.hp1)
    views = pretrained.img_size, pretrained.mean, pretrained.std
    test = build_dataset(args, "test", eval_transform(args.test_aug_type, *views))
    dataset = None if args.evaluate else build_dataset(args, "train", probe_train_transform(*views))
    if dataset is not None:
        check_same_classes(dataset, test)
    utils.seed_everything(args.seed)
    classifier = LinearClassifier(extractor.dim, len(test.classes)).to(device)
    expected = {
        "ds_mode": args.ds_mode, "part": args.else_part, "net": pretrained.net, "num_labels": len(test.classes),
        "dim": extractor.dim, "backbone": pretrained.fingerprint,
    }  # fmt: skip
    print(f"{pretrained.net} {pretrained.arch}, {data_name(args)}, {len(test)} test images, perturbation {args.test_aug_type}")

    loader = build_loader(shard(test, distributed.get_rank(), distributed.get_world_size()), args)
    frozen_features = []

    def measure() -> dict:
        """Accuracies now. Features of a frozen backbone are computed once: nothing random comes before them."""
        features = frozen_features or extract_features(extractor, loader, device, "test images")
        if args.ds_mode == "linear":
            frozen_features[:] = features
        return validate(classifier, *features, per_class=True)

    name = path.name.removesuffix(CHECKPOINT)
    if args.evaluate:
        load_trained(args, Path(args.final_eval_weights or path), extractor, classifier, expected)
        result = measure()
        print(f"Accuracy of the network on the {result['num_test_images']} test images: {result['accuracy']:.2f}%")
        print(f"Mean accuracy per class: {result['mean_class_accuracy']:.2f}%")
        name = f"only_eval_{args.test_aug_type}_{name}"
    else:
        result = train(args, path, extractor, classifier, expected, dataset, measure, device)
        print(f"Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
        mean, best = result["mean_class_accuracy"], result["best_mean_class_accuracy"]
        print(f"Mean accuracy per class: last {mean:.2f}%, best {best:.2f}%")
    about = {"ds_mode": args.ds_mode, "dataset": data_name(args), "num_labels": len(test.classes)}
    write_result(path.with_name(f"{name}.json"), "downstream", args, pretrained, about | result)


if __name__ == "__main__":
    distributed.run_entry_point(main)
