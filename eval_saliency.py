"""Unsupervised saliency detection: TokenCut on a ViT's features, with and without the bilateral solver, scored or only drawn.

The three data sets of the TokenCut paper, each in its folder below --data_path (saliency_data.py has the layouts):
    python eval_saliency.py --pretrained_weights R/checkpoint.pth --data_path data --dataset ECSSD DUTS DUT --output_dir R
Any folder of images, with a folder of ground truths of the same names if there is one; or a single image:
    python eval_saliency.py --pretrained_weights R/checkpoint.pth --images photos --ground_truth masks --output_dir out
    python eval_saliency.py --pretrained_weights R/checkpoint.pth --image_path photo.jpg --output_dir out
Several processes: torchrun --nproc_per_node=2 eval_saliency.py ..., or torch.distributed.launch.

<output_dir> (with --dataset: <output_dir>/<data set>/) gets, for each image under its own name:
    masks/      what TokenCut finds, 0 or 255
    solver/     the same after the bilateral solver: soft, 0..255; this is what its scores are of
    objects/    the solver's largest piece above one half, its holes filled
and results.csv (a line per image), results.json (their means, and all that they depend on), overview.png (--nb_vis images).

TokenCut's method and numbers: Wang et al., arXiv 2202.11539. All dimensions are used: IR and EF are cut in [CLS] only.

Letters: H W image size in pixels, h w grid of patches, D width of a feature.
"""

import argparse
import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import distributed
import utils
from augmentations import ToNormalizedTensor
from evaluation.pretrained import Pretrained, add_backbone_arguments, load_pretrained
from evaluation.saliency.bilateral_solver import bilateral_solver, largest_object
from evaluation.saliency.data import (
    LAYOUTS,
    Example,
    ImageSet,
    Pair,
    Preparation,
    SaliencyDataset,
    dataset_folders,
    find_pairs,
    no_batching,
)
from evaluation.saliency.metrics import Scores
from evaluation.saliency.tokencut import Cut, tokencut
from telemetry import progress
from utils import InputError

FEATURES = ("k", "q", "v", "kqv")
METHODS = ("TokenCut", "TokenCut + bilateral solver")
PICTURES = ("masks", "solver", "objects")
MAX_PATCHES = 10000  # of an image; its attention takes 2.4 GB in a ViT-S
# What may go wrong with one image and not with the next.
FAILURES = (InputError, MemoryError, torch.OutOfMemoryError)


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser, parts=False)
    add = parser.add_argument
    add("--data_path", help="folder that holds the data sets, for --dataset")
    add("--dataset", nargs="+", choices=list(LAYOUTS), help="ECSSD, DUTS (DUTS-TE) or DUT (DUT-OMRON); several: one by one")
    add("--images", help="instead: a folder of images")
    add("--ground_truth", help="a folder of ground truths with the names of --images, any suffix; default: nothing is scored")
    add("--image_path", "--img_path", help="instead: a single image, which is not scored")
    add("--output_dir", default=".")
    add("--vit_feat", default="k", choices=FEATURES, help="features of the patches: keys, queries or values of the last block")
    add("--tau", type=float, default=0.2, help="patches with a greater cosine are joined")
    add("--sigma_spatial", type=float, default=16, help="cells of the bilateral solver: pixels")
    add("--sigma_luma", type=float, default=16, help="levels of brightness")
    add("--sigma_chroma", type=float, default=8, help="levels of colour")
    add("--gt_threshold", type=int, default=1, help="ground truth from this value on is object; TokenCut: 1, others often 128")
    add("--max_side", type=int, default=0, help="the network sees larger images shrunk to so many pixels; 0: as they are")
    add("--nb_vis", type=int, default=12, help="images on overview.png; 0: none is drawn")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written."""
    sources = [name for name in ("dataset", "images", "image_path") if getattr(args, name)]
    if len(sources) != 1:
        given = ", ".join(f"--{name}" for name in sources) or "none"
        raise InputError(f"one of --dataset, --images and --image_path must be given: here {given}")
    if (args.data_path is None) != (args.dataset is None):
        raise InputError("--data_path and --dataset: one needs the other")
    if args.ground_truth and not args.images:
        raise InputError(f"--ground_truth {args.ground_truth}: goes with --images, a folder")
    if not -1 <= args.tau < 1:
        raise InputError(f"--tau {args.tau}: must lie in [-1, 1), it is a cosine")
    for name in ("sigma_spatial", "sigma_luma", "sigma_chroma"):
        if not 1 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or greater, and finite")
    if not 1 <= args.gt_threshold <= 255:
        raise InputError(f"--gt_threshold {args.gt_threshold}: must lie in 1..255")
    if not 0 <= args.nb_vis <= 50:
        raise InputError(f"--nb_vis {args.nb_vis}: must lie in 0..50")
    utils.check_not_negative(args, "max_side", "num_workers")
    utils.check_writable(args.output_dir)


def find_sets(args: argparse.Namespace) -> list[ImageSet]:
    """What to evaluate. Raises InputError if something is missing, or would be overwritten."""
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
        for kind in PICTURES:
            output = Path(args.output_dir, images.name, kind).resolve()
            for path in map(Path.resolve, images.inputs):
                if output.is_relative_to(path) or path.is_relative_to(output):
                    raise InputError(f"--output_dir {args.output_dir}: its folder {kind} would mix with the input {path}")
    return sets


# --- one image ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def patch_features(backbone: nn.Module, view: Tensor, kind: str) -> np.ndarray:
    """Features of the patches of an image [3, h*p, w*p], which are its last attention's keys, say: [h*w, D]."""
    queries, keys, values = backbone.get_last_qkv(view[None])  # 1, h*w, D
    chosen = {"k": [keys], "q": [queries], "v": [values], "kqv": [keys, queries, values]}[kind]
    return torch.cat(chosen, dim=-1)[0].float().cpu().numpy()


def enlarge(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A value per patch [h, w] -> per pixel [H, W], by the nearest patch."""
    return F.interpolate(torch.from_numpy(values)[None, None].double(), size=shape, mode="nearest")[0, 0].numpy()


@dataclass
class Found:
    """What was found in an image of H by W pixels."""

    cut: Cut
    mask: np.ndarray  # H, W, 0 or 1
    soft: np.ndarray  # H, W, after the solver


def detect(pretrained: Pretrained, example: Example, args: argparse.Namespace, device: torch.device) -> Found:
    """TokenCut's mask of an image, and the bilateral solver's. Raises InputError if the features are not finite."""
    patch_size = pretrained.backbone.patch_embed.patch_size
    grid = tuple(side // patch_size for side in example.view.shape[1:])
    cut = tokencut(patch_features(pretrained.backbone, example.view.to(device), args.vit_feat), grid, args.tau)
    mask = enlarge(cut.mask, example.pixels.shape[:2])
    return Found(cut, mask, bilateral_solver(example.pixels, mask, args.sigma_spatial, args.sigma_luma, args.sigma_chroma))


def grey(values: np.ndarray) -> np.ndarray:
    """Values 0..1 as levels 0..255."""
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def tiles(example: Example, found: Found, height: int = 150) -> list[np.ndarray | None]:
    """The pictures of an image's row in the overview, all as RGB of one height: half a gigabyte of photos would not do."""
    y = found.cut.eigenvector
    spread = np.ptp(y) or 1.0
    colored = matplotlib.colormaps["viridis"](enlarge((y - y.min()) / spread, found.mask.shape), bytes=True)[..., :3]
    pictures = [example.pixels, colored, grey(found.mask), grey(found.soft)]
    pictures += [] if example.truth is None else [grey(example.truth.astype(float))]
    size = max(1, round(height * found.mask.shape[1] / found.mask.shape[0])), height
    return [np.asarray(Image.fromarray(picture).convert("RGB").resize(size)) for picture in pictures]


# --- a set of images ---------------------------------------------------------------------------------------------------


@dataclass
class Share:
    """What one process found in its images."""

    rows: list[dict[str, Any]]  # of results.csv
    scores: dict[str, Scores]  # by method
    drawn: list[tuple[str, list[np.ndarray]]]  # title and tiles of a row of the overview


def load_examples(pairs: list[Pair], pretrained: Pretrained, args: argparse.Namespace) -> Iterator[Example]:
    """The examples of these pairs, read ahead, while lines tell the progress."""
    to_tensor = ToNormalizedTensor(pretrained.mean, pretrained.std)
    prepare = Preparation(pretrained.backbone.patch_embed.patch_size, args.max_side, MAX_PATCHES, to_tensor)
    loader = DataLoader(
        SaliencyDataset(pairs, prepare, args.gt_threshold), batch_size=None, collate_fn=no_batching,
        num_workers=min(distributed.worker_count(args.num_workers), max(len(pairs) - 1, 0)),
    )  # fmt: skip
    for ((example,),) in progress(loader, "saliency", len(pairs)):
        yield example


def evaluate(images: ImageSet, pretrained: Pretrained, args: argparse.Namespace, device: torch.device) -> Share:
    """Detect, save and score this process's share of the images; an image that fails is a row with an error."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    share = Share([], {method: Scores() for method in METHODS}, [])
    drawn = {pair.name for pair in images.pairs[: args.nb_vis]}
    for example in load_examples(images.pairs[rank::world], pretrained, args):
        row: dict[str, Any] = {"image": example.pair.name, "error": example.error}
        share.rows.append(row)
        if example.error:
            continue
        try:
            found = detect(pretrained, example, args, device)
        except FAILURES as error:
            row["error"] = f"image {example.pair.image}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            continue
        save_pictures(found, example.pair.name, Path(args.output_dir, images.name))
        row |= describe(found)
        if example.truth is not None:
            for prefix, method, prediction in zip(("", "solver_"), METHODS, (found.mask, found.soft), strict=True):
                own = share.scores[method].add(prediction, example.truth)
                row |= {prefix + name: value for name, value in own.items()}
        if example.pair.name in drawn:
            share.drawn.append((caption(row), tiles(example, found)))
    return share


def save_pictures(found: Found, name: str, output: Path) -> None:
    """masks/, solver/ and objects/ of an image."""
    for kind, values in zip(PICTURES, (found.mask, found.soft, largest_object(found.soft)), strict=True):
        utils.save_png(grey(values), output / kind / f"{name}.png")


def describe(found: Found) -> dict[str, Any]:
    """Columns of results.csv that need no ground truth."""
    h, w = found.cut.mask.shape
    return {"patches": f"{w}x{h}", "foreground": float(found.mask.mean()), "degenerate": found.cut.degenerate}


def caption(row: dict[str, Any]) -> str:
    """Of a row of the overview."""
    lines = [row["image"]]
    if "IoU" in row:
        lines.append(f"IoU {row['IoU']:.3f}, solver {row['solver_IoU']:.3f}")
    return "\n".join(lines + ([row["degenerate"]] if row["degenerate"] else []))


def gather(share: Share) -> Share:
    """The shares of all processes as one, rows sorted by name."""
    shares = distributed.all_gather_objects(share)
    rows = sorted((row for part in shares for row in part.rows), key=lambda row: row["image"])
    drawn = sorted((item for part in shares for item in part.drawn), key=lambda item: item[0])
    return Share(rows, {method: sum((part.scores[method] for part in shares), Scores()) for method in METHODS}, drawn)


# --- results -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "image", "IoU", "accuracy", "F_max", "solver_IoU", "solver_accuracy", "solver_F_max", "patches", "foreground",
    "degenerate", "error",
)  # fmt: skip


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """A line per image; what does not apply is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        numbers = {key: f"{value:.6f}" for key, value in row.items() if isinstance(value, float)}
        writer.writerow(row | numbers)
    utils.write_text_atomically(text.getvalue(), path)


def draw_overview(drawn: list[tuple[str, list[np.ndarray]]], path: Path) -> None:
    """A row per image: image, eigenvector, mask, solver and, if there is one, ground truth."""
    titles = ["image", "eigenvector", "TokenCut", "+ bilateral solver", "ground truth"][: max(len(row) for _, row in drawn)]
    figure = Figure(figsize=(2 * len(titles) + 1.2, 1.7 * len(drawn) + 0.3), dpi=100, layout="constrained")
    grid = figure.subplots(len(drawn), len(titles), squeeze=False)
    for axes, (label, pictures) in zip(grid, drawn, strict=True):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow(picture)
            one.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label, fontsize=7)
    for one, title in zip(grid[0], titles, strict=True):
        one.set_title(title, fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    utils.save_png(np.asarray(canvas.buffer_rgba()), path)


def write_results(images: ImageSet, share: Share, pretrained: Pretrained, args: argparse.Namespace) -> list[str]:
    """results.csv, results.json and overview.png of a set; prints its means. Returns what failed."""
    output = Path(args.output_dir, images.name)
    output.mkdir(parents=True, exist_ok=True)
    rows = share.rows + [{"image": name, "error": why} for name, why in images.unpaired.items()]
    failed = [f"{row['image']} ({row['error']})" for row in rows if row["error"]]
    degenerate = sum(bool(row.get("degenerate")) for row in rows)
    scored = share.scores[METHODS[0]]
    record = {
        "kind": "saliency", "dataset": images.name or args.images or args.image_path, **pretrained.record(),
        **{method: rounded(scores.means()) for method, scores in share.scores.items() if scores.images},
        "num_images": len(share.rows), "num_scored": scored.images, "num_scored_IoU": scored.iou_images,
        "num_degenerate": degenerate, "failed": failed, "args": utils.plain_args(args),
    }  # fmt: skip
    write_csv(rows, output / "results.csv")
    utils.save_json(record, output / "results.json")
    if share.drawn:
        draw_overview(share.drawn, output / "overview.png")
    for method, scores in share.scores.items():
        if scores.images:
            means = "  ".join(f"{name} {value:.4f}" for name, value in scores.means().items())
            print(f"{images.name or 'all'}, {scores.images} images, {method}: {means}")
    if degenerate:
        print(f"{degenerate} of {len(rows)} images have no defined cut: their masks are empty (column degenerate)")
    print(f"wrote masks and results of {len(rows) - len(failed)} of {len(rows)} to {output}")
    return failed


def rounded(means: dict[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {name: None if math.isnan(value) else round(value, 6) for name, value in means.items()}


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    sets = find_sets(args)
    pretrained = load_pretrained(args, device)
    pretrained.check_patches("TokenCut compares the keys of patches")
    failed, total = [], 0
    for images in sets:
        count = f"{len(images.pairs)} image{'s' * (len(images.pairs) > 1)}"
        print(f"{pretrained.net} {pretrained.arch}, {images.name or args.images or args.image_path}: {count}")
        share = gather(evaluate(images, pretrained, args, device))
        total += len(share.rows) + len(images.unpaired)
        if distributed.is_main_process():
            failed += write_results(images, share, pretrained, args)
    distributed.barrier()
    if failed:
        more = "; ..." if len(failed) > 3 else ""
        raise InputError(f"{len(failed)} of {total} left out, all others are evaluated: {'; '.join(failed[:3])}{more}")


if __name__ == "__main__":
    distributed.run_entry_point(main)
