"""Linear probes of a frozen backbone, of its IR or of its EF, and their accuracy on perturbed images.

Train the probe of the IR, then evaluate it on rotated and jittered images:
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part \\
        --evaluate --test_aug_type aug1_2
Several parts, and several perturbations: images are read, and pass through the backbone, once for all parts. Results and files
are those of separate runs:
    python eval_linear.py ... --else_part ALL main_part else_part
    python eval_linear.py ... --else_part ALL main_part else_part --evaluate --test_aug_type ori basic aug1 aug1_2 aug1_4_2
Several processes: torchrun --nproc_per_node=2 eval_linear.py ..., or torch.distributed.launch.

The classifiers, their training loop and their files are in evaluation/probe.py.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.nn as nn

from clever import arguments
from clever.arguments import bool_flag
from clever.data.augmentations import Views, eval_transform, probe_train_transform
from clever.data.datasets import ImageDataset, check_same_classes, labelled_dataset
from clever.data.rendering import resolve_renderer
from clever.distributed import add_distributed_arguments, init_distributed
from clever.entry import run_entry_point
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.names import PARTS, classifier_name, linear_probe_name
from clever.evaluation.pretrained import (
    Pretrained,
    add_backbone_arguments,
    load_pretrained,
    single_run,
)
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
    write_result,
)
from clever.locking import locked
from clever.training import optim
from clever.utils import InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser)
    add_probe_arguments(parser, several=True)
    add = parser.add_argument
    add("--data_path", required=True, help="folder with train/ and val/, a folder per class in each")
    add("--dataset_type", help="Imagenet (1000 classes) or IN100 (100), to check the folder; default: any number of classes")
    add("--optimizer", default="sgd", choices=["sgd", "lars"], help="lars suits large batches")
    add("--per_image", type=bool_flag, default=False, help="with --evaluate: also write which test images were classified "
        "correctly, to compare networks image by image")  # fmt: skip
    add("--output_dir", default=".", help="folder for the probe's checkpoint and results")
    add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    check_probe_args(args)
    if len(args.else_part) > 1 and args.final_eval_weights is not None:
        raise InputError(f"--final_eval_weights {args.final_eval_weights}: only with one part, not {' '.join(args.else_part)}")
    if args.per_image and not args.evaluate:
        raise InputError("--per_image true: only with --evaluate")
    if args.dataset_type is not None and args.dataset_type not in IMAGENET_CLASSES:
        raise InputError(f"--dataset_type {args.dataset_type!r}: must be one of {', '.join(IMAGENET_CLASSES)}")
    arguments.check_writable(args.output_dir)


def build_dataset(args: argparse.Namespace, split: str, views: Views) -> ImageDataset:
    """The images of one split. Raises InputError if the number of classes differs from --dataset_type or --num_labels."""
    folder = os.path.join(args.data_path, split)
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation that fails loses nothing
    dataset = labelled_dataset(
        folder, views, args.seed, renderer=args.views, skip_bad_images=args.skip_bad_images, check=check,
        threads=args.num_workers,
    )  # fmt: skip
    check_class_count(args, folder, len(dataset.classes), IMAGENET_CLASSES)
    return dataset


def build_optimizer(args: argparse.Namespace, classifier: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or LARS; no weight decay."""
    lr = args.lr * lr_scale(args)
    if args.optimizer == "sgd":
        return torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    return optim.LARS(classifier.parameters(), lr=lr, adapt_1d=True)


def build_extractors(args: argparse.Namespace, pretrained: Pretrained) -> list[FeatureExtractor]:
    """Features of each part. Raises InputError for a part that the network does not have."""
    for part in args.else_part:
        pretrained.check_part(PARTS[part])
    shape = args.n_last_blocks, args.avgpool_patchtokens
    return [
        FeatureExtractor(pretrained.backbone, PARTS[part], pretrained.hp1, *shape, stats=pretrained.stats)
        for part in args.else_part
    ]


def build_probes(
    args: argparse.Namespace,
    pretrained: Pretrained,
    extractors: list[FeatureExtractor],
    classes: list[str],
    device: torch.device,
) -> ProbeGroup:
    """The probe of each part, as a run with this part alone builds it."""
    probes = []
    for part, extractor in zip(args.else_part, extractors, strict=True):
        name = linear_probe_name(PARTS[part], pretrained.hp1, args.lr, args.epochs, args.trial_name)
        path = Path(args.output_dir) / f"checkpoint_{name}.pth.tar"
        own = single_run(args, part, args.test_aug_type[0])
        probe = build_probe(own, pretrained, extractor, classes, path, device, fixed_arguments=("optimizer",))
        probe.optimizer = build_optimizer(args, probe.classifier)
        probes.append(probe)
    return group_probes(args, probes, device)


def train(
    args: argparse.Namespace, pretrained: Pretrained, group: ProbeGroup, dataset: ImageDataset, test: ImageDataset
) -> None:
    """Train the probes, or resume their checkpoints; write their accuracies and effective learning rate."""
    lr = args.lr * lr_scale(args)
    for probe in group.probes:
        print(
            f"{probe.identity['part']}: {probe.extractor.dim} features, {len(test.classes)} classes, {len(dataset)} training "
            f"images, lr {lr:.4g} for {images_per_step(args)} images per step"
        )
    for probe, result in group.fit(dataset, test).items():
        part = probe.identity["part"]
        print(f"{group.prefix(probe)}Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
        path = Path(args.output_dir) / f"{classifier_name(probe.path)}.json"
        values = result | {"effective_lr": lr, "num_labels": len(test.classes)}
        run = single_run(args, part, args.test_aug_type[0])
        write_result(path, "linear_probe", run, pretrained, values)


def evaluate(args: argparse.Namespace, pretrained: Pretrained, group: ProbeGroup, test: ImageDataset) -> None:
    """Evaluate trained probes on each perturbation of the test images, and write their accuracies."""
    checkpoints = {probe: args.final_eval_weights or probe.path for probe in group.probes}
    for probe, checkpoint in checkpoints.items():
        probe.load(checkpoint)
    for perturbation in args.test_aug_type:
        images = copy.copy(test)
        images.views = eval_transform(perturbation, pretrained.img_size)
        print(f"perturbation {perturbation}")
        for probe, result in group.evaluate(images, args.per_image).items():
            part, accuracy, count = probe.identity["part"], result["accuracy"], result["num_test_images"]
            print(f"{group.prefix(probe)}Accuracy of the network on the {count} test images: {accuracy:.2f}%")
            path = Path(args.output_dir) / f"only_eval_{perturbation}_{classifier_name(checkpoints[probe])}.json"
            values = result | {"num_labels": len(test.classes)}
            write_result(path, "linear_probe", single_run(args, part, perturbation), pretrained, values)


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    args = resolve_renderer(args)
    device = init_distributed(args)
    pretrained = load_pretrained(args, device)
    extractors = build_extractors(args, pretrained)

    test = build_dataset(args, "val", eval_transform(args.test_aug_type[0], pretrained.img_size))
    print(f"{pretrained.net} {pretrained.arch}, {len(test)} test images, perturbation {' '.join(args.test_aug_type)}")
    group = build_probes(args, pretrained, extractors, test.classes, device)
    if args.evaluate:
        evaluate(args, pretrained, group, test)
        return
    with locked(*(probe.path for probe in group.probes)):
        dataset = build_dataset(args, "train", probe_train_transform(pretrained.img_size, args.crop_scale))
        check_same_classes(dataset, test)
        train(args, pretrained, group, dataset, test)


if __name__ == "__main__":
    run_entry_point(main)
