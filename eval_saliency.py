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
    overview.png          the first --nb_vis images: image, the three masks, ground truth

All feature dimensions are used: IR and EF are parts of the [CLS] token, and TokenCut uses patch tokens.
"""

import argparse
import itertools
import os
from pathlib import Path

from torch.utils.data import DataLoader

from clever import arguments, distributed, utils
from clever.data.datasets import make_loader
from clever.data.files import read_image
from clever.entry import run_entry_point
from clever.evaluation.images import ToNormalizedTensor, check_failures
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, load_pretrained, result_record
from clever.evaluation.saliency.data import LAYOUTS, Pair, SaliencyDataset, dataset_folders, find_pairs
from clever.evaluation.saliency.detection import FEATURES, Detector
from clever.evaluation.saliency.pictures import MASK_FOLDERS, save_masks, save_overview
from clever.evaluation.saliency.results import Row, result_row, save_table, set_means
from clever.progress import progress
from clever.utils import InputError

MAX_PATCHES_PER_SIDE = 100  # the attention of 100 x 100 patches takes 2.4 GB in a ViT-S


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, parts=False)
    add = parser.add_argument
    add("--data_path", help="folder of the data sets, for --dataset")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", nargs="+", choices=list(LAYOUTS), help="one or more of ECSSD, DUTS (DUTS-TE) and DUT "
        "(DUT-OMRON)")  # fmt: skip
    source.add_argument("--images", help="a folder of images")
    source.add_argument("--image_path", "--img_path", help="a single image, which is not scored")
    add("--ground_truth", help="folder of ground truths, named as the images of --images except for the suffix; without it "
        "the masks are not scored")  # fmt: skip
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
    add("--max_side", type=int, help="longest side in pixels of the image that the network sees; 0: no limit. Default: "
        f"{MAX_PATCHES_PER_SIDE} patches")  # fmt: skip
    add("--nb_vis", type=int, default=12, help="number of images in overview.png; 0: no overview")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    if bool(args.data_path) != bool(args.dataset) or (args.ground_truth and not args.images):
        raise InputError("--data_path must be given with --dataset, and --ground_truth with --images only")
    arguments.check_positive(args, "sigma_spatial", "sigma_luma", "sigma_chroma", "gt_threshold")
    arguments.check_not_negative(args, "nb_vis", "num_workers")
    arguments.check_writable(args.output_dir)


def find_sets(args: argparse.Namespace) -> dict[str, list[Pair]]:
    """The images of each data set by its name; a folder and a single image have the name ""."""
    if args.image_path:
        read_image(args.image_path)  # an error ends the run here
        return {"": [Pair(Path(args.image_path).stem, args.image_path)]}
    if args.images:
        return {"": find_pairs(args.images, args.ground_truth)}
    return {name: find_pairs(*dataset_folders(args.data_path, name)) for name in args.dataset}


def check_output(sets: dict[str, list[Pair]], output_dir: str) -> None:
    """Raise InputError if an image or ground truth lies where masks will be written."""
    for (name, pairs), folder in itertools.product(sets.items(), MASK_FOLDERS):
        masks = os.path.join(os.path.realpath(output_dir), name, folder, "")
        for path in (path for pair in pairs for path in (pair.image, pair.truth) if path):
            if os.path.realpath(path).startswith(masks):
                raise InputError(f"--output_dir {output_dir}: masks in {masks} would mix with the input {path}")


def build_loader(args: argparse.Namespace, pretrained: Pretrained, pairs: list[Pair]) -> DataLoader:
    """This process's share of the images, one by one: their sizes differ."""
    pairs = pairs[distributed.get_rank() :: distributed.get_world_size()]
    patch_size = pretrained.backbone.patch_embed.patch_size
    max_side = MAX_PATCHES_PER_SIDE * patch_size if args.max_side is None else args.max_side
    dataset = SaliencyDataset(pairs, patch_size, ToNormalizedTensor(*pretrained.stats), max_side, args.gt_threshold)
    return make_loader(dataset, batch_size=None, num_workers=args.num_workers)


def evaluate(detector: Detector, loader: DataLoader, output: Path) -> list[Row]:
    """Detect, save and score the objects of this process's images; returns the rows of all processes, sorted by name."""
    rows: list[Row] = []
    with progress("saliency", len(loader)) as bar:
        for example in loader:
            if example.error:
                rows.append({"image": example.pair.name, "error": example.error})
            else:
                detection = detector(example)
                save_masks(detection, output, example.pair.name)
                rows.append(result_row(example, detection))
            bar.update()
    return sorted((row for part in distributed.all_gather_objects(rows) for row in part), key=lambda row: row["image"])


def write_results(
    rows: list[Row], title: str, pairs: list[Pair], output: Path, pretrained: Pretrained, args: argparse.Namespace
) -> None:
    """Write results.csv, results.json and overview.png of a set, and print its scores."""
    failures = {row["image"]: row["error"] for row in rows if "error" in row}
    degenerate, means = sum(bool(row.get("degenerate")) for row in rows), set_means(rows)
    record = result_record(
        "saliency", {"dataset": title, **pretrained.record()}, args, **means, num_images=len(rows),
        num_scored=sum("scores" in row for row in rows), num_scored_IoU=sum(row.get("IoU") is not None for row in rows),
        num_degenerate=degenerate, failed=[f"{name} ({reason})" for name, reason in failures.items()],
    )  # fmt: skip
    save_table(rows, output / "results.csv")
    utils.save_json(record, output / "results.json")
    save_overview([pair for pair in pairs if pair.name not in failures][: args.nb_vis], output)
    for method, scores in means.items() if record["num_scored"] else ():
        values = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if value is not None)
        print(f"{title}, {record['num_scored']} images, {method}: {values}")
    if degenerate:
        print(f"{degenerate} of {len(rows)} images have no defined cut: their masks are empty (column degenerate)")
    print(f"wrote masks and results of {len(rows) - len(failures)} of {len(rows)} images to {output}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    sets = find_sets(args)
    check_output(sets, args.output_dir)
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("TokenCut compares the keys of patches")
    sigmas = args.sigma_spatial, args.sigma_luma, args.sigma_chroma
    detector = Detector(pretrained.backbone, device, args.vit_feat, args.tau, sigmas)
    failures: dict[str, str] = {}
    for name, pairs in sets.items():
        title, output = name or args.images or args.image_path, Path(args.output_dir, name)
        print(f"{pretrained.net} {pretrained.arch}, {title}: {len(pairs)} images")
        rows = evaluate(detector, build_loader(args, pretrained, pairs), output)
        failures |= {str(Path(name, row["image"])): row["error"] for row in rows if "error" in row}
        if distributed.is_main_process():
            write_results(rows, title, pairs, output, pretrained, args)
    distributed.barrier()
    check_failures(failures, sum(map(len, sets.values())))


if __name__ == "__main__":
    run_entry_point(main)
