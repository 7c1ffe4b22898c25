"""The flags of the scripts that train classifiers, eval_linear.py and eval_linear_ds.py, and what both build from them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clever import arguments, utils
from clever.arguments import TypedFloat, bool_flag
from clever.data.augmentations import PERTURBATIONS, ViewDistribution, Views, check_crop_scale
from clever.data.datasets import ImageDataset, keep_readable
from clever.data.files import Sample
from clever.data.rendering import add_renderer_argument
from clever.distributed import is_main_process
from clever.evaluation.downstream_data import TORCHVISION
from clever.evaluation.names import PARTS, part_flag
from clever.evaluation.pretrained import Pretrained, check_trial_name, result_record
from clever.utils import InputError

IMAGENET_CLASSES = {"Imagenet": 1000, "IN100": 100}  # number of classes by --dataset_type, of image folders
CLASSES = IMAGENET_CLASSES | {"CUB200": 200} | {name: count for name, (_, count, *_) in TORCHVISION.items()}


def add_probe_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Flags of every training of a classifier. With `several`, --else_part and --test_aug_type are lists."""
    add = parser.add_argument
    part = "part of the representation: ALL, main_part (IR), else_part (EF)"
    perturbation = "perturbation of the test images, any but ori only with --evaluate"
    count = {"nargs": "+"} if several else {}
    if several:
        part += "; several parts share the passes of the backbone, each has its own files"
    add("--else_part", type=part_flag, default=["ALL"] if several else "ALL", help=part, **count)
    add("--n_last_blocks", type=int, default=4, help="ViT: concatenates the [CLS] tokens of the last n blocks. 4 suits small "
        "ViTs, 1 with --avgpool_patchtokens true ViT-B")  # fmt: skip
    add("--avgpool_patchtokens", type=bool_flag, default=False, help="ViT: also use the mean patch token")
    add("--num_labels", type=int, help="number of classes, to check the data; default: as many as there are")
    add("--epochs", type=int, default=100, help="epochs of training")
    add("--lr", type=TypedFloat, default=TypedFloat("0.001"), help="learning rate for 256 images per step; scaled linearly "
        "with their number. Try several: the best one depends on the scale of the features")  # fmt: skip
    add("--batch_size_per_gpu", type=int, default=128, help="images per process and step")
    add("--crop_scale", type=float, nargs="+", default=[0.08, 1.0], help="minimum and maximum share of the image's area in a "
        "training crop. Raise the minimum for small images, e.g. 0.5 1: crops must show what is to be recognised")  # fmt: skip
    add("--val_freq", type=int, default=1, help="epochs between validations")
    add("--evaluate", action="store_true", help="only evaluate a trained classifier")
    add("--test_aug_type", default=["ori"] if several else "ori", help=f"{perturbation}: {', '.join(PERTURBATIONS)}", **count)
    add("--final_eval_weights", help="checkpoint of the classifier for --evaluate; the results are named after this file. "
        "Default: the one in --output_dir")  # fmt: skip
    add("--trial_name", default="", help="last part of the file names")
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training")
    add("--skip_bad_images", type=bool_flag, default=False, help="leave unreadable images out instead of stopping")
    add("--seed", type=int, default=0, help="seed of the weights, the order of the images, and their augmentation")
    add_renderer_argument(parser)


def check_probe_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values of these flags."""
    parts, perturbations = (value if isinstance(value, list) else [value] for value in (args.else_part, args.test_aug_type))
    arguments.check_choices("else_part", parts, PARTS)
    arguments.check_choices("test_aug_type", perturbations, PERTURBATIONS)
    if perturbations != ["ori"] and not args.evaluate:
        raise InputError(f"--test_aug_type {' '.join(perturbations)}: only with --evaluate; otherwise it must be ori")
    check_trial_name(args.trial_name)
    check_crop_scale("crop_scale", args.crop_scale)
    arguments.check_positive(args, "batch_size_per_gpu", "epochs", "val_freq", "lr", "n_last_blocks")
    arguments.check_not_negative(args, "num_workers", "seed")


def probe_train_transform(size: int = 224, scale: Sequence[float] = (0.08, 1.0)) -> Views:
    """Training images of the linear probe and of fine-tuning: a random crop of this share of the area, flipped or not."""
    return Views([ViewDistribution(size, scale=tuple(scale), bicubic=False, flip_p=0.5)])


def probe_dataset(
    args: argparse.Namespace, classes: Sequence[str], samples: Sequence[Sample], views: Views, where: str
) -> ImageDataset:
    """The dataset of these samples, found in `where`.

    Raises InputError if --dataset_type or --num_labels mean another number of classes, or if images cannot be decoded.
    """
    for flag, expected in (("dataset_type", CLASSES.get(args.dataset_type)), ("num_labels", args.num_labels)):
        if expected is not None and len(classes) != expected:
            raise InputError(f"--{flag} {getattr(args, flag)}: means {expected} classes, but {where} holds {len(classes)}")
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation that fails loses nothing
    samples = keep_readable(samples, args.skip_bad_images, check, threads=args.num_workers)
    return ImageDataset(samples, views, args.seed, classes, args.views)


def write_result(path: Path, kind: str, args: argparse.Namespace, pretrained: Pretrained, result: dict[str, Any]) -> None:
    """One JSON file beside the checkpoint: the accuracy, and everything that it depends on."""
    if is_main_process():
        values = {"part": args.else_part, "hp1": float(pretrained.hp1), "test_aug_type": args.test_aug_type, **result}
        utils.save_json(result_record(kind, pretrained.record(), args, **values, seed=args.seed), path)
        print(f"wrote {path}")
