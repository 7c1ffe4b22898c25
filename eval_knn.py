"""k-NN classification by the frozen features of a backbone, of its IR or of its EF (Wu et al., arXiv 1805.01978; DINO).

Nothing is trained: a test image takes the class for which its most similar training images vote. Several k and temperatures:
    python eval_knn.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --nb_knn 10 20 100 200
The features are those of the whole representation, so one extraction serves all parts:
    python eval_knn.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --dump_features R/features
    python eval_knn.py --load_features R/features --output_dir R --else_part main_part
Several processes: torchrun --nproc_per_node=2 eval_knn.py ..., or torch.distributed.launch.

Letters: D width of the representation, M training images, V test images, B test images at a time, C classes.
"""

import argparse
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import distributed
import utils
from augmentations import eval_transform
from checkpoint import save_atomically
from datasets import ImageDataset, check_same_classes, labelled_dataset, shard
from evaluation.features import FeatureExtractor, extract_features, gather_in_order, select_part
from evaluation.knn import MIN_TEMPERATURE, knn_scores, nearest_neighbors
from evaluation.names import PARTS, part_suffix
from evaluation.pretrained import add_backbone_arguments, agree, check_part, load_pretrained
from telemetry import progress
from utils import InputError, bool_flag

# DINO's names of the files in a folder of features; ours has a description beside them.
TENSORS = {"train": "trainfeat.pth", "test": "testfeat.pth", "train_labels": "trainlabels.pth", "test_labels": "testlabels.pth"}
DESCRIPTION = "features.json"


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser, required=False)
    add = parser.add_argument
    add("--else_part", default="ALL", help="ALL, main_part (IR) or else_part (EF)")
    add("--data_path", help="folder with train/ and val/, a folder per class in each")
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 is usually best")
    add("--temperature", type=float, nargs="+", default=[0.07], help="a neighbour of cosine s votes exp(s / temperature)")
    add("--batch_size_per_gpu", type=int, default=128)
    add("--use_cuda", type=bool_flag, default=True, help="false: look for neighbours on the CPU, where a GPU's memory is short")
    add("--dump_features", metavar="DIR", help="save the features there, L2-normalised, of all dimensions")
    add("--load_features", metavar="DIR", help="take such features, or DINO's, in place of weights and images")
    add("--output_dir", default=".", help="results")
    add("--trial_name", default="", help="last piece of the result file's name")
    add("--skip_bad_images", type=bool_flag, default=False, help="decode all images first, leave out those that cannot be")
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written."""
    if args.else_part not in PARTS:
        raise InputError(f"--else_part {args.else_part!r}: must be one of {', '.join(PARTS)}")
    if min(args.nb_knn) < 1:
        raise InputError(f"--nb_knn {min(args.nb_knn)}: must be 1 or more")
    for temperature in args.temperature:
        if not MIN_TEMPERATURE <= temperature < float("inf"):
            raise InputError(f"--temperature {temperature}: must be {MIN_TEMPERATURE} or more, and finite")
    if os.sep in args.trial_name:
        raise InputError(f"--trial_name {args.trial_name!r}: must hold no {os.sep}, it is a piece of a file's name")
    if args.load_features:
        for name in ("pretrained_weights", "arch", "patch_size", "img_size", "data_path", "dump_features"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} with --load_features: those features are made already; give one of the two")
    else:
        for name in ("pretrained_weights", "data_path"):
            if getattr(args, name) is None:
                raise InputError(f"--{name}: must be given, unless --load_features is")
    utils.check_positive(args, "batch_size_per_gpu")
    utils.check_not_negative(args, "num_workers")
    utils.check_writable(args.output_dir)
    if args.dump_features:
        utils.check_writable(args.dump_features)


@dataclass
class Features:
    """Features of the whole representation, L2-normalised, with their labels, and what they are of."""

    train: torch.Tensor  # M, D
    train_labels: torch.Tensor  # M
    test: torch.Tensor  # V, D
    test_labels: torch.Tensor  # V
    about: dict[str, Any]  # net, arch, hp1, img_size, pretrained_epochs, aug, backbone (fingerprint), classes


# --- features from images ----------------------------------------------------------------------------------------------


def compute_features(args: argparse.Namespace, device: torch.device) -> Features:
    """Features of the images below --data_path by the network of --pretrained_weights; the processes share the images."""
    pretrained = load_pretrained(args, device)
    check_part(args.else_part, pretrained.net, pretrained.hp1, pretrained.backbone.embed_dim)
    transform = eval_transform("ori", pretrained.img_size, pretrained.mean, pretrained.std)
    train, val = (
        labelled_dataset(
            os.path.join(args.data_path, split), transform, skip_bad_images=args.skip_bad_images,
            check=args.skip_bad_images, threads=args.num_workers,
        )
        for split in ("train", "val")
    )  # fmt: skip
    check_same_classes(train, val)
    extractor = FeatureExtractor(pretrained.backbone)
    print(f"{pretrained.net} {pretrained.arch}, {extractor.dim} dimensions, images of {pretrained.img_size} pixels", flush=True)
    about = {
        "net": pretrained.net, "arch": pretrained.arch, "hp1": pretrained.hp1, "img_size": pretrained.img_size,
        "pretrained_epochs": pretrained.epochs, "aug": pretrained.aug, "backbone": pretrained.fingerprint,
        "classes": train.classes,
    }  # fmt: skip
    return Features(
        *extract(extractor, train, args, device, "training features"),
        *extract(extractor, val, args, device, "test features"),
        about,
    )


def extract(
    extractor: FeatureExtractor, dataset: ImageDataset, args: argparse.Namespace, device: torch.device, header: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised features [M, D] and labels [M] of all images in their order, on every process."""
    loader = DataLoader(
        shard(dataset, distributed.get_rank(), distributed.get_world_size()),
        args.batch_size_per_gpu,
        num_workers=distributed.worker_count(args.num_workers),
        pin_memory=device.type == "cuda",
    )
    features, labels = (gather_in_order(rows, len(dataset)) for rows in extract_features(extractor, loader, device, header))
    if not features.isfinite().all():
        raise FloatingPointError(f"{header} of the network in {args.pretrained_weights}")
    return F.normalize(features, dim=-1), labels


# --- features from files -----------------------------------------------------------------------------------------------


def dump_features(features: Features, folder: str | Path) -> None:
    """Write the features as DINO does, a tensor per file, and their description; other features there are replaced."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TENSORS.values(), DESCRIPTION):  # so that an interruption leaves no mixture
        (folder / name).unlink(missing_ok=True)
    for field, name in TENSORS.items():
        save_atomically(getattr(features, field).cpu(), folder / name)
    about = features.about | {"hp1": float(features.about["hp1"])}
    utils.save_json(about, folder / DESCRIPTION)
    print(f"wrote features to {folder}")


def load_features(args: argparse.Namespace) -> Features:
    """Features of --load_features, ours or DINO's. --net and --hp1 describe those without a description.

    Raises InputError if a file is missing or damaged, the tensors do not belong together, or a flag contradicts them.
    """
    folder = Path(args.load_features)
    tensors = {field: _read_tensor(folder / name) for field, name in TENSORS.items()}
    about = _read_description(folder / DESCRIPTION)
    about["net"] = agree("net", args.net, about.get("net"), "dino", "features were")
    stored = about.get("hp1") if about["net"] == "CLeVER" else None
    about["hp1"] = agree("hp1", args.hp1, stored, 1.0 if about["net"] == "dino" else None, "features were")
    if about["hp1"] is None:
        raise InputError("--hp1: the features do not say where IR and EF are cut; give the pretraining's hp1")
    if not 0 < about["hp1"] <= 1:
        raise InputError(f"--hp1 {about['hp1']}: must lie in (0, 1]")

    for split in ("train", "test"):
        x, labels = tensors[split], tensors[f"{split}_labels"]
        number = max(len(about.get("classes", [])), 1 + int(tensors["train_labels"].max()))
        shapes = f"features {list(x.shape)} and labels {list(labels.shape)} of {split}"
        if x.ndim != 2 or labels.ndim != 1 or len(x) != len(labels) or x.shape[1] != tensors["train"].shape[1]:
            raise InputError(f"--load_features {folder}: {shapes} do not belong together")
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < number:
            raise InputError(f"--load_features {folder}: labels of {split} must be whole numbers in 0..{number - 1}")
        if not x.is_floating_point() or not x.isfinite().all():
            raise InputError(f"--load_features {folder}: features of {split} are not finite numbers")
        tensors[split], tensors[f"{split}_labels"] = F.normalize(x.float(), dim=-1), labels.long()
    about.setdefault("classes", list(range(number)))
    check_part(args.else_part, about["net"], about["hp1"], tensors["train"].shape[1])
    return Features(**tensors, about=about)


def _read_tensor(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise InputError(f"--load_features {path.parent}: lacks {path.name}")
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, OSError) as error:
        raise InputError(f"--load_features {path}: damaged, or holds more than a tensor") from error
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        raise InputError(f"--load_features {path}: holds no tensor with numbers in it")
    return tensor


def _read_description(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"--load_features {path}: damaged ({error})") from error
    if not isinstance(about, dict):
        raise InputError(f"--load_features {path}: must hold a JSON object")
    return about


# --- classification ----------------------------------------------------------------------------------------------------


def classify(
    features: Features, part: str, neighbors: list[int], temperatures: list[float], device: torch.device, store: torch.device
) -> list[dict[str, float]]:
    """Top-1 and top-5 in percent for each k and temperature; the processes share the test images, each counts once.

    A class without any vote is never a hit: top-5 of k = 3 neighbours means their classes, three at most.
    The tensors to compare lie on `store`.
    """
    dim, hp1, num_classes = features.train.shape[1], features.about["hp1"], len(features.about["classes"])
    rank, world = distributed.get_rank(), distributed.get_world_size()
    train = F.normalize(select_part(features.train, dim, part, hp1), dim=-1).to(store)  # M, D or less
    test = F.normalize(select_part(features.test, dim, part, hp1), dim=-1)[rank::world].to(store)  # V / world, D or less
    train_labels, test_labels = features.train_labels.to(store), features.test_labels[rank::world].to(store)

    hits = torch.zeros(len(neighbors), len(temperatures), 2, dtype=torch.double, device=device)
    chunk = max(1, min(1024, 2**28 // len(train)))  # similarities of a chunk: 1 GiB at most
    batches = zip(test.split(chunk), test_labels.split(chunk), strict=True)
    for queries, labels in progress(batches, "nearest neighbours", len(test)):
        similarity, nearest = nearest_neighbors(train, queries, max(neighbors))  # B, k
        classes = train_labels[nearest]  # B, k
        for i, k in enumerate(neighbors):
            for j, temperature in enumerate(temperatures):
                scores = knn_scores(similarity[:, :k], classes[:, :k], num_classes, temperature)  # B, C
                best = scores.topk(min(5, num_classes), dim=-1)  # B, 5
                right = (best.indices == labels[:, None]) & (best.values > 0)
                hits[i, j] += torch.stack([right[:, 0].sum(), right.sum()]).to(device)
    percent = (100 * distributed.all_reduce_sum(hits) / len(features.test)).tolist()
    return [
        {"k": k, "temperature": temperature, "top1": percent[i][j][0], "top5": percent[i][j][1]}
        for i, k in enumerate(neighbors)
        for j, temperature in enumerate(temperatures)
    ]


def usable_neighbors(wanted: list[int], available: int) -> list[int]:
    """The numbers of neighbours in increasing order, cut to the `available` training images; a line says so."""
    for k in sorted(set(wanted)):
        if k > available:
            print(f"--nb_knn {k}: there are only {available} training images, all of them vote")
    return sorted({min(k, available) for k in wanted})


def write_result(args: argparse.Namespace, features: Features, results: list[dict[str, float]]) -> None:
    """knn[_hp<hp1>[_else]][_<trial>].json: the accuracies and everything that they depend on."""
    if not distributed.is_main_process():
        return
    about = features.about
    name = f"knn{part_suffix(args.else_part, about['hp1'])}{'_' if args.trial_name else ''}{args.trial_name}"
    known = {name: about.get(name) for name in ("arch", "img_size", "pretrained_epochs", "aug", "backbone")}
    record = {
        "kind": "knn", "net": about["net"], "part": args.else_part, "hp1": float(about["hp1"]), **known,
        "results": results, "num_train_images": len(features.train), "num_test_images": len(features.test),
        "num_labels": len(about["classes"]), "args": utils.plain_args(args),
    }  # fmt: skip
    path = Path(args.output_dir) / f"{name}.json"
    utils.save_json(record, path)
    print(f"wrote {path}")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = distributed.init_distributed(args)
    features = load_features(args) if args.load_features else compute_features(args, device)
    if args.dump_features and distributed.is_main_process():
        dump_features(features, args.dump_features)
    neighbors = usable_neighbors(args.nb_knn, len(features.train))
    temperatures = sorted(set(args.temperature))
    store = device if args.use_cuda else torch.device("cpu")
    print(
        f"{args.else_part}: {len(features.train)} training images, {len(features.test)} test images, "
        f"{len(features.about['classes'])} classes"
    )
    results = classify(features, args.else_part, neighbors, temperatures, device, store)
    for result in results:
        print(
            f"{result['k']}-NN classifier result: Top1: {result['top1']:.2f}, Top5: {result['top5']:.2f} "
            f"(temperature {result['temperature']})"
        )
    write_result(args, features, results)


if __name__ == "__main__":
    distributed.run_entry_point(main)
