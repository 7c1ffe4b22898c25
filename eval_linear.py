"""Linear probe of a frozen backbone, of its IR or of its EF, and its accuracy on perturbed images.

Train the probe of the invariant part, then measure it under rotation and colour jitter:
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part \\
        --evaluate --test_aug_type aug1_2
Several processes: torchrun --nproc_per_node=2 eval_linear.py ..., or torch.distributed.launch.

The classifier, its training loop and its files: classifier.py.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import distributed
import optim
import utils
from augmentations import eval_transform, probe_train_transform
from datasets import check_same_classes, labelled_dataset, shard
from evaluation.features import FeatureExtractor, extract_features
from evaluation.names import part_suffix
from evaluation.pretrained import add_backbone_arguments, check_part, load_pretrained
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
    train_one_epoch,
    validate,
    write_result,
)
from utils import InputError

CLASSES = {"Imagenet": 1000, "IN100": 100}


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    add_classifier_arguments(parser)
    add = parser.add_argument
    add("--data_path", required=True, help="folder with train/ and val/, a folder per class in each")
    add("--dataset_type", help="Imagenet (1000 classes) or IN100 (100): checks the folder; default: whatever it holds")
    add("--optimizer", default="sgd", choices=["sgd", "lars"])
    add("--output_dir", default=".", help="probe checkpoint and results")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written."""
    check_classifier_args(args)
    if args.dataset_type is not None and args.dataset_type not in CLASSES:
        raise InputError(f"--dataset_type {args.dataset_type!r}: must be one of {', '.join(CLASSES)}")
    utils.check_writable(args.output_dir)


def probe_name(args: argparse.Namespace, hp1: float) -> str:
    """linear[_hp<hp1>[_else]]_<lr>_<epochs>_<trial>, with lr, epochs and hp1 as they were typed."""
    return f"linear{part_suffix(args.else_part, hp1)}_{args.lr}_{args.epochs}_{args.trial_name}"


def build_dataset(args: argparse.Namespace, split: str, transform):
    """The images of one split; InputError if the number of classes is not the promised one."""
    folder = os.path.join(args.data_path, split)
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation has nothing to lose
    dataset = labelled_dataset(
        folder, transform, args.seed, skip_bad_images=args.skip_bad_images, check=check, threads=args.num_workers
    )
    check_class_count(args, folder, len(dataset.classes), CLASSES)
    return dataset


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> tuple[torch.optim.Optimizer, object]:
    """SGD with momentum 0.9 or LARS, no weight decay, and its cosine to 0 per epoch."""
    lr = args.lr * args.batch_size_per_gpu * distributed.get_world_size() / 256
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    else:
        optimizer = optim.LARS(model.parameters(), lr=lr, adapt_1d=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=0)


def train(args, pretrained, extractor, classifier, expected, dataset, val_features, val_labels, device) -> None:
    """Train the probe, or continue its own checkpoint; saves it every epoch and writes the result at the end."""
    name = probe_name(args, pretrained.hp1)
    world, rank = distributed.get_world_size(), distributed.get_rank()
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=args.seed)
    loader = build_loader(dataset, args, sampler=sampler)
    optimizer, scheduler = build_optimizer(args, classifier)
    model = DistributedDataParallel(classifier) if distributed.is_distributed() else classifier
    print(
        f"{args.else_part}: {extractor.dim} features, {expected['num_labels']} classes, {len(dataset)} training images, "
        f"lr {optimizer.param_groups[0]['initial_lr']:.4g} for {args.batch_size_per_gpu * world} images per step"
    )

    def train_epoch(epoch: int) -> float:
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        return train_one_epoch(extractor, model, optimizer, loader, epoch, device, args)["loss"]

    training = Training(
        path=Path(args.output_dir) / f"checkpoint_{name}.pth.tar", classifier=classifier, backbone=None,
        optimizer=optimizer, scheduler=scheduler, expected=expected, settings=(*SETTINGS, "optimizer"),
    )  # fmt: skip
    result = fit(args, training, train_epoch, lambda: validate(classifier, val_features, val_labels))
    print(f"Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
    result |= {"effective_lr": optimizer.param_groups[0]["initial_lr"], "num_labels": expected["num_labels"]}
    write_result(Path(args.output_dir) / f"{name}.json", "linear_probe", args, pretrained, result)


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    pretrained = load_pretrained(args, device)
    check_part(args.else_part, pretrained.net, pretrained.hp1, pretrained.backbone.embed_dim)
    extractor = FeatureExtractor(
        pretrained.backbone, args.else_part, pretrained.hp1, args.n_last_blocks, args.avgpool_patchtokens
    )
    views = pretrained.img_size, pretrained.mean, pretrained.std
    val = build_dataset(args, "val", eval_transform(args.test_aug_type, *views))
    dataset = None if args.evaluate else build_dataset(args, "train", probe_train_transform(*views))
    if dataset is not None:
        check_same_classes(dataset, val)
    utils.seed_everything(args.seed)
    classifier = LinearClassifier(extractor.dim, len(val.classes)).to(device)
    expected = {
        "part": args.else_part, "net": pretrained.net, "num_labels": len(val.classes), "dim": extractor.dim,
        "backbone": pretrained.fingerprint,
    }  # fmt: skip
    print(f"{pretrained.net} {pretrained.arch}, {len(val)} test images, perturbation {args.test_aug_type}")
    name = probe_name(args, pretrained.hp1)
    if args.evaluate:
        weights = args.final_eval_weights or Path(args.output_dir) / f"checkpoint_{name}.pth.tar"
        load_probe(weights, classifier, expected)
    own = shard(val, distributed.get_rank(), distributed.get_world_size())
    features, labels = extract_features(extractor, build_loader(own, args), device)
    if not args.evaluate:
        train(args, pretrained, extractor, classifier, expected, dataset, features, labels, device)
        return
    result = validate(classifier, features, labels)
    print(f"Accuracy of the network on the {result['num_test_images']} test images: {result['accuracy']:.2f}%")
    result["num_labels"] = len(val.classes)
    path = Path(args.output_dir) / f"only_eval_{args.test_aug_type}_{name}.json"
    write_result(path, "linear_probe", args, pretrained, result)


if __name__ == "__main__":
    distributed.run_entry_point(main)
