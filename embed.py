"""Features of all images in a folder as a table, for other programs: Parquet, NPZ or CSV, with the IR and the EF as columns.

    python embed.py --pretrained_weights R/checkpoint.pth --data_path photos/ --out photos.parquet
    python embed.py ... --out photos.npz --plot tsne                     # photos.tsne.png: a point per image, by class
    python embed.py ... --out photos.npz --plot pca --colour rotation    # images rotated by known angles, by angle
A row has the image's path below --data_path and its class: the name of the first folder on this path. Features are those of the
network, not normalised; a ViT's are its [CLS] token. Reading the table:
    pandas.read_parquet("photos.parquet"), polars.read_parquet("photos.parquet"), numpy.load("photos.npz")["ir"]
Several processes: torchrun --nproc_per_node=2 embed.py ..., or torch.distributed.launch; they write the same file.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

from clever import arguments, distributed
from clever.arguments import bool_flag
from clever.data.augmentations import eval_transform
from clever.data.datasets import UNLABELLED, ImageDataset, keep_readable
from clever.data.files import list_images
from clever.data.rendering import add_renderer_argument, choose_renderer
from clever.data.shards import file_of
from clever.entry import run_entry_point
from clever.evaluation.embeddings import MAX_CLASSES, REDUCTIONS, WRITERS, Embeddings, plot
from clever.evaluation.equivariance import extract_views
from clever.evaluation.features import FeatureExtractor, extract_all
from clever.evaluation.names import PARTS, part_flag
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, check_part, load_pretrained, result_record
from clever.evaluation.transforms import TRANSFORMS, TransformDataset
from clever.locking import locked
from clever.utils import InputError, printable

MIN_POINTS = 4  # of a picture


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--data_path", required=True, help="folder of images, flat or with sub-folders, or tar files")
    add("--out", required=True, help=f"file to write, {', '.join(WRITERS)}")
    add("--else_part", type=part_flag, default="ALL", choices=PARTS, help="the whole representation, its IR or its EF")
    add("--plot", choices=REDUCTIONS, help="also draw the embeddings in two dimensions: <out without suffix>.<plot>.png")
    add("--colour", default="class", choices=["class", "rotation"], help="of the points: the image's class, or the angle of a "
        "rotation, for which --plot_images images are rotated at random by up to 90 degrees, and cut to a disc")  # fmt: skip
    add("--plot_images", type=int, default=2000, help="number of images in the picture, drawn at random")
    add("--batch_size_per_gpu", type=int, default=128, help="images per process and pass of the network")
    add("--skip_bad_images", type=bool_flag, default=False, help="decode all images first, and leave unreadable ones out")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--seed", type=int, default=0, help="of the picture: which images, and their rotations")
    add_renderer_argument(parser)
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values and missing packages, before anything is read or written."""
    suffix = Path(args.out).suffix
    if suffix not in WRITERS:
        raise InputError(f"--out {args.out}: its name must end with {', '.join(WRITERS)}")
    if suffix == ".parquet":
        arguments.check_installed(f"--out {args.out}", ["pyarrow"])
    if args.plot:
        arguments.check_installed(f"--plot {args.plot}", [REDUCTIONS[args.plot]])
    arguments.check_positive(args, "batch_size_per_gpu", "plot_images")
    arguments.check_not_negative(args, "num_workers", "seed")
    arguments.check_writable(Path(args.out).parent, "--out")
    arguments.check_outputs(args, [Path(args.out), *([Path(args.out).with_suffix(f".{args.plot}.png")] if args.plot else [])])


def class_of(path: str) -> str | None:
    """The first folder of a relative path; None for an image in a tar file."""
    folder, _, rest = path.partition(os.sep)
    return folder if rest and file_of(path) == path else None


def relative(path: str, data_path: str) -> str:
    """A path below --data_path; for tar files, below their folder."""
    return path.removeprefix(os.path.join(data_path if os.path.isdir(data_path) else os.path.dirname(data_path), ""))


def split_parts(args: argparse.Namespace, pretrained: Pretrained, features: torch.Tensor) -> dict[str, np.ndarray]:
    """Whole representations [M, D] as the columns of the table."""
    z, split, part = features.cpu().numpy(), pretrained.split, PARTS[args.else_part]
    if split is None:
        return {"features": z}
    columns = {"IR": split.ir, "EF": split.ef}
    return {name.lower(): np.ascontiguousarray(z[:, cut]) for name, cut in columns.items() if part in ("ALL", name)}


def embed(args: argparse.Namespace, pretrained: Pretrained, dataset: ImageDataset, device: torch.device) -> Embeddings:
    """The table, on every process; they share the images."""
    extractor = FeatureExtractor(pretrained.backbone, stats=pretrained.stats)
    features, _ = extract_all(extractor, dataset, device, args.batch_size_per_gpu, args.num_workers, "embeddings")  # M, D
    paths = [printable(relative(path, args.data_path)) for path, _ in dataset.samples]
    about = result_record("embeddings", pretrained.record(), args, hp1=float(pretrained.hp1), img_size=pretrained.img_size,
                          mean=list(pretrained.mean), std=list(pretrained.std))  # fmt: skip
    return Embeddings(paths, [class_of(path) for path in paths], split_parts(args, pretrained, features), about)


def check_picture(args: argparse.Namespace, dataset: ImageDataset) -> None:
    """Raise InputError, before features are computed, unless the images can be drawn."""
    count = min(len(dataset), args.plot_images)
    if count < MIN_POINTS:
        raise InputError(f"--plot {args.plot}, --plot_images {args.plot_images}: {count} images, a picture needs {MIN_POINTS}")
    classes = {class_of(relative(path, args.data_path)) for path, _ in dataset.samples}
    if args.colour == "class" and (None in classes or len(classes) > MAX_CLASSES):
        raise InputError(f"--colour class: {args.data_path} must have 1 to {MAX_CLASSES} folders with all images below them; "
                         "or choose --colour rotation")  # fmt: skip


def draw(
    args: argparse.Namespace, pretrained: Pretrained, dataset: ImageDataset, table: Embeddings, device: torch.device
) -> None:
    """Write the picture of --plot: of the table's rows, or of each image rotated at random."""
    chosen = np.random.default_rng(args.seed).permutation(len(table.paths))[: args.plot_images]
    title = f"{pretrained.net} {pretrained.arch}: {len(chosen)} images of {os.path.basename(os.path.abspath(args.data_path))}"
    if args.colour == "class":
        parts = {name: rows[chosen] for name, rows in table.parts.items()}
        colours = {"classes": [table.classes[i] for i in chosen]}
    else:
        paths = [dataset.samples[i][0] for i in chosen]
        views = TransformDataset(paths, TRANSFORMS["rotation"], pretrained.img_size, 1, args.seed, renderer=args.views)
        extractor = FeatureExtractor(pretrained.backbone, stats=pretrained.stats)
        (features,), targets = extract_views(
            [extractor], views, device, args.batch_size_per_gpu, args.num_workers, "rotated images"
        )  # M, 2, D; M, 1, 2
        sin, cos = targets[:, 0].cpu().numpy().T
        parts, colours = split_parts(args, pretrained, features[:, 1]), {"angles": np.rad2deg(np.arctan2(sin, cos))}
    if distributed.is_main_process():
        picture = Path(args.out).with_suffix(f".{args.plot}.png")
        plot(parts, args.plot, picture, title, args.seed, **colours)
        print(f"wrote {picture}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    args.views = choose_renderer(args.views)
    device = distributed.init_distributed(args)
    pretrained = load_pretrained(args, device)
    check_part(PARTS[args.else_part], pretrained.split)
    samples = [(path, UNLABELLED) for path in list_images(args.data_path)]
    samples = keep_readable(samples, args.skip_bad_images, check=args.skip_bad_images, threads=args.num_workers)
    dataset = ImageDataset(samples, eval_transform("ori", pretrained.img_size), renderer=args.views)
    if args.plot:
        check_picture(args, dataset)
    print(f"{pretrained.net} {pretrained.arch}, {len(dataset)} images of {pretrained.img_size} pixels", flush=True)
    with locked(args.out):
        table = embed(args, pretrained, dataset, device)
        if distributed.is_main_process():
            WRITERS[Path(args.out).suffix](table, Path(args.out))
            columns = ", ".join(f"{name} [{rows.shape[1]}]" for name, rows in table.parts.items())
            print(f"wrote {args.out}: {len(table.paths)} rows, columns path, class, {columns}")
        if args.plot:
            draw(args, pretrained, dataset, table, device)


if __name__ == "__main__":
    run_entry_point(main)
