"""k-NN classification with the frozen features of a backbone, of its IR or of its EF (Wu et al., arXiv 1805.01978; DINO).

Nothing is trained: the nearest training images vote for the class of a test image. Several k and temperatures:
    python eval_knn.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --nb_knn 10 20 100 200
Features are extracted from the whole representation, so that one extraction serves all parts, now or later:
    python eval_knn.py ... --else_part ALL main_part else_part
    python eval_knn.py ... --test_aug_type ori aug1_2          # clean and perturbed test images
    python eval_knn.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --dump_features R/features
    python eval_knn.py --load_features R/features --output_dir R --else_part main_part
Several processes: torchrun --nproc_per_node=2 eval_knn.py ..., or torch.distributed.launch.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clever import arguments, distributed, utils
from clever.arguments import bool_flag
from clever.data.augmentations import PERTURBATIONS, eval_transform
from clever.data.datasets import labelled_dataset
from clever.data.rendering import add_renderer_argument, choose_renderer
from clever.entry import run_entry_point
from clever.evaluation.downstream_data import check_same_classes
from clever.evaluation.feature_files import FeatureSet, load_features, save_features
from clever.evaluation.features import FeatureExtractor, extract_all, select_part
from clever.evaluation.knn import MIN_TEMPERATURE, knn_accuracies
from clever.evaluation.names import PARTS, part_flag, part_suffix
from clever.evaluation.pretrained import (
    add_backbone_arguments,
    check_part,
    check_trial_name,
    load_pretrained,
    resolve_net_and_hp1,
    result_record,
    single_run,
    split_of,
)
from clever.locking import locked
from clever.methods import FLAGS
from clever.utils import InputError


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, required=False)
    add = parser.add_argument
    add("--else_part", type=part_flag, nargs="+", default=["ALL"], help="parts of the representation: ALL, main_part (IR), "
        "else_part (EF); each has its own result file")  # fmt: skip
    add("--test_aug_type", nargs="+", default=["ori"], help=f"perturbations of the test images: {', '.join(PERTURBATIONS)}; "
        "each has its own result file")  # fmt: skip
    add("--data_path", help="folder with train/ and val/, a folder per class in each")
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add("--temperature", type=float, nargs="+", default=[0.07], help="a neighbour with cosine s votes exp(s / temperature)")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process and pass of the network")
    add("--use_cuda", type=bool_flag, default=True, help="false: search the neighbours on the CPU, if GPU memory is short")
    add("--dump_features", metavar="DIR", help="save the features there: L2-normalised, of the whole representation")
    add("--load_features", metavar="DIR", help="use features saved there, or by DINO, instead of weights and images")
    add("--output_dir", default=".", help="folder for the results")
    add("--trial_name", default="", help="last part of the result file's name")
    add("--skip_bad_images", type=bool_flag, default=False, help="decode all images first, and leave unreadable ones out")
    add_renderer_argument(parser)
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    arguments.check_choices("else_part", args.else_part, PARTS)
    arguments.check_choices("test_aug_type", args.test_aug_type, PERTURBATIONS)
    if (args.load_features or args.dump_features) and args.test_aug_type != ["ori"]:
        raise InputError(f"--test_aug_type {' '.join(args.test_aug_type)}: saved features are those of ori, the clean images")
    if min(args.nb_knn) < 1 or not all(MIN_TEMPERATURE <= t < float("inf") for t in args.temperature):
        raise InputError(f"--nb_knn {args.nb_knn}, --temperature {args.temperature}: at least 1, and {MIN_TEMPERATURE}")
    check_trial_name(args.trial_name)
    needed, others = ("pretrained_weights", "data_path"), ("arch", "patch_size", "img_size", "dump_features")
    for name in needed + others:
        given = getattr(args, name) is not None
        if args.load_features and given or not args.load_features and not given and name in needed:
            raise InputError(f"--{name}: give --pretrained_weights and --data_path, or --load_features in their place")
    arguments.check_positive(args, "batch_size_per_gpu")
    arguments.check_not_negative(args, "num_workers")
    arguments.check_writable(args.output_dir)
    if args.dump_features:
        arguments.check_writable(args.dump_features)


def compute_features(args: argparse.Namespace, device: torch.device) -> dict[str, FeatureSet]:
    """Features of the images below --data_path from the network of --pretrained_weights, for each perturbation.

    The training images are clean. The processes share the images.
    """
    pretrained = load_pretrained(args, device)
    for part in args.else_part:
        check_part(PARTS[part], pretrained.split)
    train, val = (
        labelled_dataset(
            os.path.join(args.data_path, split), eval_transform("ori", pretrained.img_size), renderer=args.views,
            skip_bad_images=args.skip_bad_images, check=args.skip_bad_images, threads=args.num_workers,
        )
        for split in ("train", "val")
    )  # fmt: skip
    check_same_classes(train, val)
    extractor = FeatureExtractor(pretrained.backbone, stats=pretrained.stats)
    print(f"{pretrained.net} {pretrained.arch}, {extractor.dim} dimensions, images of {pretrained.img_size} pixels", flush=True)
    description = pretrained.record() | {
        "hp1": float(pretrained.hp1), "img_size": pretrained.img_size, "classes": train.classes
    }  # fmt: skip

    def extract(dataset, header):
        features, labels = extract_all(extractor, dataset, device, args.batch_size_per_gpu, args.num_workers, header)
        return F.normalize(features, dim=-1), labels  # M, D and M

    clean, sets = extract(train, "training features"), {}
    for perturbation in args.test_aug_type:
        val.views = eval_transform(perturbation, pretrained.img_size)
        header = f"test features{'' if perturbation == 'ori' else f', {perturbation}'}"
        sets[perturbation] = FeatureSet(*clean, *extract(val, header), description)
    return sets


def read_features(args: argparse.Namespace) -> FeatureSet:
    """The features of --load_features. --net and --hp1 describe features that were saved without a description."""
    features = load_features(args.load_features)
    net, hp1 = resolve_net_and_hp1(args, features.description)
    features.description |= {"net": net, "hp1": float(hp1)}
    for part in args.else_part:
        check_part(PARTS[part], split_of(net, hp1, features.train.shape[1], features.description.get("equiv_part")))
    return features


def classify(
    args: argparse.Namespace, features: FeatureSet, neighbors: list[int], device: torch.device
) -> list[dict[str, Any]]:
    """Accuracies of --else_part, a single one, for every k and temperature; prints them in DINO's words."""
    about, part = features.description, PARTS[args.else_part]
    split = split_of(about["net"], about["hp1"], features.train.shape[1], about.get("equiv_part"))
    results = knn_accuracies(
        select_part(features.train, part, split),
        features.train_labels,
        select_part(features.test, part, split),
        features.test_labels,
        num_classes=len(about["classes"]),
        device=device,
        neighbors=neighbors,
        temperatures=sorted(set(args.temperature)),
        search_device=device if args.use_cuda else torch.device("cpu"),
        header="nearest neighbours",
    )
    images = "test images" if args.test_aug_type == "ori" else f"test images perturbed by {args.test_aug_type}"
    counts = f"{len(features.train)} training images, {len(features.test)} {images}, {len(about['classes'])} classes"
    print(f"{args.else_part}: {counts}")
    for result in results:
        accuracies = f"Top1: {result['top1']:.2f}, Top5: {result['top5']:.2f}"
        print(f"{result['k']}-NN classifier result: {accuracies} (temperature {result['temperature']})")
    return results


def write_result(args: argparse.Namespace, features: FeatureSet, results: list[dict[str, Any]]) -> None:
    """knn[_<perturbation>][_hp<hp1>[_else]][_<trial>].json: the accuracies, and everything that they depend on."""
    about = features.description
    hp1 = args.hp1 if args.hp1 is not None else about["hp1"]  # in the name as it was typed
    perturbation = "" if args.test_aug_type == "ori" else f"_{args.test_aug_type}"
    name = "_".join(filter(None, [f"knn{perturbation}{part_suffix(PARTS[args.else_part], hp1)}", args.trial_name]))
    fields = ("net", "arch", "img_size", "pretrained_epochs", "aug", "pretraining_seed", "backbone")
    term = {key: about[key] for key in FLAGS if key in about}  # of an equivariant method
    record = result_record(
        "knn", {key: about.get(key) for key in fields} | term, args, part=args.else_part, hp1=about["hp1"],
        test_aug_type=args.test_aug_type, results=results, num_train_images=len(features.train),
        num_test_images=len(features.test), num_labels=len(about["classes"]),
    )  # fmt: skip
    path = Path(args.output_dir) / f"{name}.json"
    utils.save_json(record, path)
    print(f"wrote {path}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    args.views = choose_renderer(args.views)
    device = distributed.init_distributed(args)
    sets = {"ori": read_features(args)} if args.load_features else compute_features(args, device)
    if args.dump_features:
        with locked(Path(args.dump_features) / "features"):
            if distributed.is_main_process():
                save_features(sets["ori"], args.dump_features)
    available = len(next(iter(sets.values())).train)
    for k in (k for k in args.nb_knn if k > available):
        print(f"--nb_knn {k}: there are only {available} training images, all of them vote")
    neighbors = sorted({min(k, available) for k in args.nb_knn})
    for perturbation, features in sets.items():
        for part in args.else_part:
            run = single_run(args, part, perturbation)
            results = classify(run, features, neighbors, device)
            if distributed.is_main_process():
                write_result(run, features, results)


if __name__ == "__main__":
    run_entry_point(main)
