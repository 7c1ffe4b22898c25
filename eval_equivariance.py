"""What the representation, its IR and its EF know about rotation, crop, colours, ... of an image, and how far these move them.

Regressors are fitted to frozen features of transformed views, and tell on other images how each view was transformed:
    python eval_equivariance.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R
    python eval_equivariance.py ... --transforms rotation crop --head linear mlp --input pair single
--data_path is any folder of images; labels are not used. All numbers stand beside controls: the same network without training,
shuffled targets, and as many random dimensions as the EF has. Several processes: torchrun --nproc_per_node=2 ...
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clever import arguments, distributed, utils
from clever.arguments import bool_flag
from clever.data.datasets import UNLABELLED, keep_readable
from clever.data.files import list_images
from clever.data.rendering import add_renderer_argument, choose_renderer
from clever.entry import run_entry_point
from clever.evaluation.equivariance import (
    GRAM_IMAGES,
    GRAM_VIEWS,
    HELD_OUT,
    Subspace,
    check_targets,
    extract_views,
    measure_gaps,
    regress,
    subspaces,
)
from clever.evaluation.features import FeatureExtractor
from clever.evaluation.names import PARTS, part_flag
from clever.evaluation.pretrained import (
    Pretrained,
    add_backbone_arguments,
    check_part,
    check_trial_name,
    load_pretrained,
    result_record,
)
from clever.evaluation.regression import LinearRegressor, MLPRegressor
from clever.evaluation.tables import plot, to_markdown
from clever.evaluation.transforms import TRANSFORMS, TransformDataset, with_half_angles
from clever.models.heads import Split
from clever.utils import InputError

# What a protocol sets, unless a flag sets it. SIE's is an MLP on pairs.
PROTOCOLS = {
    "own": {"head": ["linear"], "input": ["pair"], "mlp_epochs": 50},
    "sie": {"head": ["mlp"], "input": ["pair"], "mlp_epochs": 300},
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--data_path", required=True, help="folder of images. If it has train/ and val/, regressors are fitted to train/ and "
        "tested on val/, otherwise fitted to 80 %% of the images and tested on the others")  # fmt: skip
    add("--transforms", nargs="+", help=f"transformations: {', '.join(TRANSFORMS)}; default: all that the inputs allow")
    add("--parts", type=part_flag, nargs="+", help="parts of the representation: ALL, main_part (IR), else_part (EF); "
        "default: all that the network has")  # fmt: skip
    add("--head", nargs="+", help="regressors: linear (ridge regression, takes seconds), mlp (1024-1024, takes minutes per "
        "transformation on a CPU); default: linear")  # fmt: skip
    add("--input", nargs="+", help="what regressors get: pair (the features of the clean and the transformed view), single "
        "(of the transformed view); default: pair")  # fmt: skip
    add("--protocol", default="own", choices=PROTOCOLS, help="sie: mlp on pairs, 300 epochs, features not standardised, "
        "half angles")  # fmt: skip
    add("--mlp_epochs", type=int, help="epochs of the mlp; default: 50, with --protocol sie 300")
    add("--views_per_image", type=int, default=8, help="transformed views of each image; more make the numbers more precise")
    add("--num_images", type=int, default=5000, help="at most so many training images and as many test images, drawn at "
        "random; 0: all images")  # fmt: skip
    add("--random_subspaces", type=int, default=5, help="random sets of as many dimensions as the EF has (for dino: give "
        "--hp1); 0: none")  # fmt: skip
    add("--untrained", type=bool_flag, default=True, help="also measure the same network without training")
    add("--batch_size_per_gpu", type=int, default=256, help="views per process and pass of the network; if memory is short, "
        "take fewer")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the views, the choice of images, and all controls")
    add("--skip_bad_images", type=bool_flag, default=False, help="decode all images first, and leave unreadable ones out")
    add("--output_dir", default=".", help="folder for the results")
    add("--trial_name", default="", help="last part of the names of the result files")
    add_renderer_argument(parser)
    distributed.add_distributed_arguments(parser)
    return parser


def resolve_args(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with what the protocol sets. Raises InputError for invalid values, before anything is read or written."""
    for name, value in PROTOCOLS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    usable = [name for name, transform in TRANSFORMS.items() if set(args.input) & set(transform.inputs)]
    args.transforms = usable if args.transforms is None else args.transforms
    for name, choices in (("head", ("linear", "mlp")), ("input", ("pair", "single")), ("transforms", usable), ("parts", PARTS)):
        arguments.check_choices(name, getattr(args, name) or [], choices)
    arguments.check_positive(args, "views_per_image", "mlp_epochs", "batch_size_per_gpu")
    arguments.check_not_negative(args, "num_images", "random_subspaces", "num_workers", "seed")
    check_trial_name(args.trial_name)
    arguments.check_writable(args.output_dir)
    return args


def choose_images(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Training and test images. Raises InputError if there are too few."""
    rng = np.random.default_rng(args.seed)
    folders = [os.path.join(args.data_path, split) for split in ("train", "val")]
    if all(map(os.path.isdir, folders)):
        train, test = map(list_images, folders)
    else:
        paths = list_images(args.data_path)
        is_test = rng.permutation(len(paths)) < round(len(paths) / 5)
        train, test = ([path for path, chosen in zip(paths, is_test, strict=True) if chosen == part] for part in (False, True))
    train, test = (draw_images(paths, args, rng) for paths in (train, test))
    if len(train) < HELD_OUT or len(test) < 2:  # a cosine gap needs another image
        raise InputError(f"--data_path {args.data_path}: {len(train)} images to fit regressors to, {len(test)} to test them "
                         f"on; at least {HELD_OUT} and 2 are needed")  # fmt: skip
    return train, test


def draw_images(paths: list[str], args: argparse.Namespace, rng: np.random.Generator) -> list[str]:
    """At most --num_images of the images, in their order; with --skip_bad_images those of them that can be read."""
    if 0 < args.num_images < len(paths):
        paths = [paths[i] for i in np.sort(rng.permutation(len(paths))[: args.num_images])]
    if args.skip_bad_images and paths:
        samples = keep_readable([(path, UNLABELLED) for path in paths], skip_bad_images=True, threads=args.num_workers)
        paths = [path for path, _ in samples]
    return paths


def choose_subspaces(args: argparse.Namespace, pretrained: Pretrained) -> list[Subspace]:
    """The parts and the controls that are measured. Raises InputError for parts that the network does not have."""
    dim, split = pretrained.backbone.embed_dim, pretrained.split
    parts = [PARTS[flag] for flag in args.parts] if args.parts else ["ALL", "IR", "EF"] if split else ["ALL"]
    for part in parts:
        check_part(part, split, "--parts")
    if split is None and Split.leaves_both(dim, pretrained.hp1):  # dino with --hp1: as wide as CLeVER's EF
        split = Split(dim, pretrained.hp1)
    if args.random_subspaces and split is None:
        print("no random subspaces: the width of the EF is not known (--hp1)")
    return subspaces(dim, parts, split, args.random_subspaces if split else 0, args.seed, args.untrained)


def measure(
    name: str, args: argparse.Namespace, networks: list[FeatureExtractor], spaces: list[Subspace],
    images: tuple[list[str], list[str]], size: int, device: torch.device,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Results of all regressors, and gaps, for one transformation; `images` are those for training and for testing."""
    transform = TRANSFORMS[name] if args.protocol == "own" else with_half_angles(TRANSFORMS[name])
    make = partial(TransformDataset, transform=transform, size=size, seed=args.seed, renderer=args.views)
    train, test = (make(paths, views=args.views_per_image, stream=stream) for stream, paths in enumerate(images))
    alike = make(images[1], views=GRAM_VIEWS, stream=2, images_per_draw=GRAM_IMAGES)
    extract = partial(extract_views, networks, device=device, batch_size=args.batch_size_per_gpu, num_workers=args.num_workers)
    fitted, tested = extract(train, header=f"{name}, training images"), extract(test, header=f"{name}, test images")
    for (_, targets), kind in ((fitted, "training images"), (tested, "test images")):
        check_targets(name, list(transform.targets), targets, kind)
    mlp = partial(MLPRegressor, epochs=args.mlp_epochs, seed=args.seed, standardize=args.protocol == "own")
    results = [
        {"transform": name, "head": head, "input": kind, **record}
        for head in args.head
        for kind in args.input
        if kind in transform.inputs
        for record in regress(transform, mlp if head == "mlp" else LinearRegressor, kind, spaces, fitted, tested, args.seed)
    ]
    gaps = measure_gaps(spaces, tested[0], extract(alike)[0])
    return results, [{"transform": name, **record} for record in gaps]


def write_results(args: argparse.Namespace, pretrained: Pretrained, results: list, gaps: list, images: tuple) -> None:
    """equivariance[_<trial>].json, .md and .png."""
    record = result_record(
        "equivariance", pretrained.record(), args, hp1=float(pretrained.hp1), img_size=pretrained.img_size,
        num_train_images=len(images[0]), num_test_images=len(images[1]), protocol=args.protocol, results=results, gaps=gaps,
    )  # fmt: skip
    stem = Path(args.output_dir) / "_".join(filter(None, ["equivariance", args.trial_name]))
    table = to_markdown(record)
    print(f"\n{table}\n")
    utils.save_json(record, f"{stem}.json")
    utils.write_text_atomically(table + "\n", f"{stem}.md")
    plot(record, f"{stem}.png")
    print(f"wrote {stem}.json, .md and .png")


def main() -> None:
    args = resolve_args(get_args_parser().parse_args())
    args.views = choose_renderer(args.views)
    device = distributed.init_distributed(args)
    images = choose_images(args)
    pretrained = load_pretrained(args, device)
    spaces = choose_subspaces(args, pretrained)
    backbones = [pretrained.backbone, *([pretrained.untrained(args.seed)] if args.untrained else [])]
    networks = [FeatureExtractor(backbone, stats=pretrained.stats) for backbone in backbones]
    counts = f"{len(images[0])} training images, {len(images[1])} test images, {args.views_per_image} views of each"
    print(f"{pretrained.net} {pretrained.arch}, images of {pretrained.img_size} pixels; {counts}", flush=True)
    found = [measure(name, args, networks, spaces, images, pretrained.img_size, device) for name in args.transforms]
    results, gaps = (sum(records, []) for records in zip(*found, strict=True))
    if distributed.is_main_process():
        write_results(args, pretrained, results, gaps, images)


if __name__ == "__main__":
    run_entry_point(main)
