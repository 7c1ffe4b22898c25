"""Unsupervised saliency detection with TokenCut (arXiv 2202.11539), with and without the bilateral solver. No training.

The data sets of the TokenCut paper, in folders below --data_path (docs/evaluations.md shows the layouts):
    python eval_saliency.py --pretrained_weights R/checkpoint.pth --data_path data --dataset ECSSD DUTS DUT --output_dir R
A folder of images, with or without ground truth; or a single image:
    python eval_saliency.py --pretrained_weights R/checkpoint.pth --images photos --ground_truth masks --output_dir out
    python eval_saliency.py --pretrained_weights R/checkpoint.pth --image_path photo.jpg --output_dir out
Several processes share the images: torchrun --nproc_per_node=2 eval_saliency.py ...

Written to <output_dir> (with --dataset: <output_dir>/<data set>):
    masks/<image>.png     the mask of TokenCut, 0 or 255
    solver/<image>.png    the mask after the bilateral solver, 0..255; its scores are those of this soft mask
    objects/<image>.png   the largest connected object of the solver's mask, holes filled
    results.csv           scores of each image
    results.json          mean scores, the settings, and the images that could not be evaluated
    overview.png          the first --nb_vis images with all their masks

All feature dimensions are used: IR and EF are parts of the [CLS] token, and TokenCut uses patch tokens.
"""

import argparse
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from clever import arguments, distributed, utils
from clever.data.augmentations import ToNormalizedTensor
from clever.data.datasets import unchanged, worker_count, worker_options
from clever.entry import run_entry_point
from clever.evaluation.pretrained import (
    Pretrained,
    add_backbone_arguments,
    load_pretrained,
    result_record,
)
from clever.evaluation.saliency.data import (
    LAYOUTS,
    Example,
    ImageSet,
    Pair,
    ResizeToPatches,
    SaliencyDataset,
    dataset_folders,
    find_pairs,
)
from clever.evaluation.saliency.detection import FEATURES, Detector
from clever.evaluation.saliency.pictures import MASK_FOLDERS, draw_overview, save_masks
from clever.evaluation.saliency.results import (
    METHODS,
    SetResults,
    rounded,
    save_table,
)
from clever.progress import Progress
from clever.utils import InputError

MAX_PATCHES = 10000  # per image; their attention takes 2.4 GB in a ViT-S
IMAGE_ERRORS = (InputError, MemoryError, torch.OutOfMemoryError)  # may concern one image and not the next


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, parts=False)
    add = parser.add_argument
    add("--data_path", help="folder of the data sets, for --dataset")
    add("--dataset", nargs="+", choices=list(LAYOUTS), help="one or more of ECSSD, DUTS (DUTS-TE) and DUT (DUT-OMRON)")
    add("--images", help="instead of --dataset: a folder of images")
    add("--ground_truth", help="folder of ground truths, named as the images of --images except for the suffix; without it "
        "the masks are not scored")  # fmt: skip
    add("--image_path", "--img_path", help="instead of --dataset: a single image, which is not scored")
    add("--output_dir", default=".", help="folder of masks, scores and overview")
    add("--vit_feat", default="k", choices=FEATURES, help="patch features: keys, queries or values of the last block's "
        "attention, or all three")  # fmt: skip
    add("--tau", type=float, default=0.2, help="cosine similarity above which two patches are connected; raise it if the "
        "column `degenerate` says that all patches are alike")  # fmt: skip
    add("--sigma_spatial", type=float, default=16, help="bilateral solver: width of a grid cell in pixels; a smaller value "
        "gives finer masks")  # fmt: skip
    add("--sigma_luma", type=float, default=16, help="bilateral solver: width of a grid cell in levels of brightness")
    add("--sigma_chroma", type=float, default=8, help="bilateral solver: width of a grid cell in levels of colour")
    add("--gt_threshold", type=int, default=1, help="smallest grey level of a ground truth that counts as object: 1 as in "
        "TokenCut; most other tools use 128")  # fmt: skip
    add("--max_side", type=int, default=0, help="longest side in pixels of the image that the network sees; 0: no limit. "
        "Lower it if memory runs out")  # fmt: skip
    add("--nb_vis", type=int, default=12, help="number of images in overview.png; 0: no overview")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    sources = [name for name in ("dataset", "images", "image_path") if getattr(args, name)]
    if len(sources) != 1:
        given = ", ".join(f"--{name}" for name in sources) or "none"
        raise InputError(f"exactly one of --dataset, --images and --image_path must be given; given: {given}")
    if (args.data_path is None) != (args.dataset is None):
        raise InputError("--data_path and --dataset must be given together")
    if args.ground_truth and not args.images:
        raise InputError(f"--ground_truth {args.ground_truth}: can only be given with --images")
    if not -1 <= args.tau < 1:
        raise InputError(f"--tau {args.tau}: is a cosine, must lie in [-1, 1)")
    for name in ("sigma_spatial", "sigma_luma", "sigma_chroma"):
        if not 1 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or greater, and finite")
    if not 1 <= args.gt_threshold <= 255:
        raise InputError(f"--gt_threshold {args.gt_threshold}: must lie in 1..255")
    if not 0 <= args.nb_vis <= 50:
        raise InputError(f"--nb_vis {args.nb_vis}: must lie in 0..50")
    arguments.check_not_negative(args, "max_side", "num_workers")
    arguments.check_writable(args.output_dir)


# --- building ----------------------------------------------------------------------------------------------------------


def find_image_sets(args: argparse.Namespace) -> list[ImageSet]:
    """The images to evaluate. Raises InputError if a file is missing, or if results would be written among the input."""
    if args.image_path:
        path = Path(args.image_path)
        if not path.is_file():
            raise InputError(f"--image_path {path}: {'is a folder; give --images' if path.is_dir() else 'no such file'}")
        sets = [ImageSet("", [path], [Pair(path.stem, str(path))])]
    elif args.images:
        sets = [find_pairs("", Path(args.images), Path(args.ground_truth) if args.ground_truth else None)]
    else:
        sets = [find_pairs(name, *dataset_folders(args.data_path, name)) for name in dict.fromkeys(args.dataset)]
    for images in sets:
        for folder in MASK_FOLDERS:
            output = Path(args.output_dir, images.name, folder).resolve()
            for path in map(Path.resolve, images.inputs):
                if output.is_relative_to(path) or path.is_relative_to(output):
                    raise InputError(f"--output_dir {args.output_dir}: its folder {folder} would mix with the input {path}")
    return sets


def build_detector(args: argparse.Namespace, pretrained: Pretrained, device: torch.device) -> Detector:
    sigmas = args.sigma_spatial, args.sigma_luma, args.sigma_chroma
    return Detector(pretrained.backbone, device, args.vit_feat, args.tau, sigmas)


def build_loader(args: argparse.Namespace, pretrained: Pretrained, images: ImageSet) -> DataLoader:
    """This process's share of the images, one by one: their sizes differ."""
    pairs = images.pairs[distributed.get_rank() :: distributed.get_world_size()]
    to_tensor = ToNormalizedTensor(pretrained.mean, pretrained.std)
    transform = ResizeToPatches(pretrained.backbone.patch_embed.patch_size, args.max_side, MAX_PATCHES, to_tensor)
    workers = min(worker_count(args.num_workers), max(len(pairs) - 1, 0))
    dataset = SaliencyDataset(pairs, transform, args.gt_threshold)
    return DataLoader(dataset, batch_size=None, collate_fn=unchanged, **worker_options(workers))


# --- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(detector: Detector, loader: DataLoader, output: Path, in_overview: set[str]) -> SetResults:
    """Detect, save and score the objects of these images, of which the named ones appear in the overview."""
    results = SetResults()
    progress = Progress("saliency", len(loader))
    for example in loader:
        evaluate_image(detector, example, output, in_overview, results)
        progress.advance()
    return results


def evaluate_image(detector: Detector, example: Example, output: Path, in_overview: set[str], results: SetResults) -> None:
    """Detect, save and score the object of one image; an error is recorded in the results."""
    name = example.pair.name
    if example.error:
        results.add_failure(name, example.error)
        return
    try:
        detection = detector(example)
    except IMAGE_ERRORS as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        results.add_failure(name, f"image {example.pair.image}: {message}")
        return
    save_masks(detection, output, name)
    results.add(example, detection, in_overview=name in in_overview)


def write_results(
    images: ImageSet, results: SetResults, output: Path, title: str, pretrained: Pretrained, args: argparse.Namespace
) -> None:
    """Write results.csv, results.json and overview.png of a set."""
    scored = results.meters[METHODS[0]]
    record = result_record(
        "saliency", {"dataset": title, **pretrained.record()}, args,
        **{method: rounded(means) for method, means in results.means().items()},
        num_images=len(images.pairs), num_scored=scored.images, num_scored_IoU=scored.iou_images,
        num_degenerate=results.num_degenerate, failed=results.failures,
    )  # fmt: skip
    save_table(results.rows, output / "results.csv")
    utils.save_json(record, output / "results.json")
    if results.overview:
        utils.save_png(draw_overview(results.overview), output / "overview.png")


def print_results(results: SetResults, name: str, output: Path) -> None:
    for method, means in results.means().items():
        scores = "  ".join(f"{score} {value:.4f}" for score, value in means.items())
        print(f"{name or 'all'}, {results.meters[method].images} images, {method}: {scores}")
    total = len(results.rows)
    if results.num_degenerate:
        print(f"{results.num_degenerate} of {total} images have no defined cut: their masks are empty (column degenerate)")
    print(f"wrote masks and results of {total - len(results.failures)} of {total} to {output}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    sets = find_image_sets(args)
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("TokenCut compares the keys of patches")
    detector = build_detector(args, pretrained, device)
    failures, total = [], 0
    for images in sets:
        title, output = images.name or args.images or args.image_path, Path(args.output_dir, images.name)
        print(f"{pretrained.net} {pretrained.arch}, {title}: {len(images.pairs)} image{'s' * (len(images.pairs) > 1)}")
        in_overview = {pair.name for pair in images.pairs[: args.nb_vis]}
        results = evaluate(detector, build_loader(args, pretrained, images), output, in_overview).gather()
        for name, reason in images.unpaired.items():
            results.add_failure(name, reason)
        failures += results.failures
        total += len(results.rows)
        if distributed.is_main_process():
            write_results(images, results, output, title, pretrained, args)
            print_results(results, images.name, output)
    distributed.barrier()
    if failures:
        more = "; ..." if len(failures) > 3 else ""
        raise InputError(f"{len(failures)} of {total} left out, all others are evaluated: {'; '.join(failures[:3])}{more}")


if __name__ == "__main__":
    run_entry_point(main)
