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
"""

import argparse
import copy
import os
import re
from pathlib import Path

import torch
import torch.nn as nn

from clever import arguments
from clever.data.augmentations import Views, eval_transform
from clever.data.datasets import ImageDataset
from clever.data.files import labelled_samples
from clever.data.rendering import choose_renderer
from clever.distributed import add_distributed_arguments, init_distributed
from clever.entry import run_entry_point
from clever.evaluation.downstream_data import check_same_classes
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.names import NUMBER, PARTS, classifier_name, linear_probe_name
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, check_part, load_pretrained, single_run
from clever.evaluation.probe import Probe, ProbeGroup, existing_probe, images_per_step
from clever.evaluation.probe_arguments import (
    IMAGENET_CLASSES,
    add_probe_arguments,
    check_probe_args,
    probe_dataset,
    probe_train_transform,
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
    add("--dataset_type", choices=IMAGENET_CLASSES, help="to check the folder's classes, 1000 or 100; default: any number")
    add("--optimizer", default="sgd", choices=["sgd", "lars"], help="lars suits large batches")
    add("--output_dir", default=".", help="folder for the probe's checkpoint and results")
    add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    check_probe_args(args)
    if len(args.else_part) > 1 and args.final_eval_weights is not None:
        raise InputError(f"--final_eval_weights {args.final_eval_weights}: only with one part, not {' '.join(args.else_part)}")
    arguments.check_writable(args.output_dir)


def build_dataset(args: argparse.Namespace, split: str, views: Views) -> ImageDataset:
    """The images of one split. Raises InputError if the number of classes differs from --dataset_type or --num_labels."""
    folder = os.path.join(args.data_path, split)
    return probe_dataset(args, *labelled_samples(folder), views, folder)


def build_optimizer(args: argparse.Namespace, classifier: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or LARS; no weight decay. --lr is given for 256 images per step."""
    lr = args.lr * (images_per_step(args) / 256)
    if args.optimizer == "sgd":
        return torch.optim.SGD(classifier.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    return optim.LARS(classifier.parameters(), lr=lr, adapt_1d=True)


def build_probes(args: argparse.Namespace, pretrained: Pretrained, classes: list[str], device: torch.device) -> ProbeGroup:
    """The probe of each part, as a run with this part alone builds it.

    With --evaluate, the only probe of a part and --trial_name is taken if there is none with this --lr, --epochs and --hp1.
    """
    probes = []
    for flag in args.else_part:
        part, own = PARTS[flag], single_run(args, flag, args.test_aug_type[0])
        extractor = FeatureExtractor(
            pretrained.backbone, part, pretrained.split, args.n_last_blocks, args.avgpool_patchtokens, stats=pretrained.stats
        )
        name = linear_probe_name(part, pretrained.hp1, args.lr, args.epochs, args.trial_name)
        path = Path(args.output_dir) / f"checkpoint_{name}.pth.tar"
        if args.evaluate:
            pattern = linear_probe_name(part, NUMBER, NUMBER, NUMBER, re.escape(args.trial_name))
            path = Path(args.final_eval_weights or existing_probe(path, f"checkpoint_{pattern}.pth.tar"))
        probe = Probe(own, pretrained, extractor, classes, path, fixed=("optimizer",))
        probe.optimizer = build_optimizer(args, probe.classifier)
        probes.append(probe)
    return ProbeGroup(args, probes, device)


def train(
    args: argparse.Namespace, pretrained: Pretrained, group: ProbeGroup, dataset: ImageDataset, test: ImageDataset
) -> None:
    """Train the probes, or resume their checkpoints; write their accuracies and effective learning rate."""
    lr = args.lr * (images_per_step(args) / 256)
    for probe in group.probes:
        print(
            f"{probe.identity['part']}: {probe.extractor.dim} features, {len(test.classes)} classes, {len(dataset)} training "
            f"images, lr {lr:.4g} for {images_per_step(args)} images per step"
        )
    for probe, result in group.fit(dataset, test).items():
        print(f"{group.prefix(probe)}Top-1 test accuracy: last {result['accuracy']:.2f}%, best {result['best_accuracy']:.2f}%")
        path = Path(args.output_dir) / f"{classifier_name(probe.path)}.json"
        run = single_run(args, probe.identity["part"], args.test_aug_type[0])
        write_result(path, "linear_probe", run, pretrained, result | {"effective_lr": lr, "num_labels": len(test.classes)})


def evaluate(args: argparse.Namespace, pretrained: Pretrained, group: ProbeGroup, test: ImageDataset) -> None:
    """Evaluate trained probes on each perturbation of the test images, and write their accuracies."""
    for probe in group.probes:
        probe.load(probe.path)
    for perturbation in args.test_aug_type:
        images = copy.copy(test)
        images.views = eval_transform(perturbation, pretrained.img_size)
        print(f"perturbation {perturbation}")
        for probe, result in group.evaluate(images).items():
            accuracy, count = result["accuracy"], result["num_test_images"]
            print(f"{group.prefix(probe)}Accuracy of the network on the {count} test images: {accuracy:.2f}%")
            path = Path(args.output_dir) / f"only_eval_{perturbation}_{classifier_name(probe.path)}.json"
            run = single_run(args, probe.identity["part"], perturbation)
            write_result(path, "linear_probe", run, pretrained, result | {"num_labels": len(test.classes)})


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    args.views = choose_renderer(args.views)
    device = init_distributed(args)

    pretrained = load_pretrained(args, device)
    for part in args.else_part:
        check_part(PARTS[part], pretrained.split)
    test = build_dataset(args, "val", eval_transform(args.test_aug_type[0], pretrained.img_size))
    print(f"{pretrained.net} {pretrained.arch}, {len(test)} test images, perturbation {' '.join(args.test_aug_type)}")
    group = build_probes(args, pretrained, test.classes, device)
    if args.evaluate:
        evaluate(args, pretrained, group, test)
        return
    with locked(*(probe.path for probe in group.probes)):
        dataset = build_dataset(args, "train", probe_train_transform(pretrained.img_size, args.crop_scale))
        check_same_classes(dataset, test)
        train(args, pretrained, group, dataset, test)


if __name__ == "__main__":
    run_entry_point(main)
