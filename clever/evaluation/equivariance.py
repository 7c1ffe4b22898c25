"""What features know about the transformation of an image, and how far it moves them.

Regressors tell the parameters of a transformation (transforms.py) from the features of clean and transformed views.

Shapes: M images, V transformed views of each, N tested views, T targets, D width of the representation, d columns of a part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clever.data.datasets import image_seed, make_loader
from clever.distributed import all_gather_objects, get_rank, get_world_size
from clever.evaluation.features import FeatureExtractor, gather_in_order, in_eval_mode, select_part, shard
from clever.evaluation.regression import (
    LinearRegressor,
    accuracy,
    auc,
    mean_angle_error,
    pooled_r2,
    r2_per_target,
    sie_r2,
)
from clever.evaluation.transforms import Transform, TransformDataset
from clever.models.heads import Split
from clever.progress import with_progress
from clever.utils import InputError

HELD_OUT = 5  # one of so many training images is held out, to choose the strength of the ridge
GRAM_IMAGES, GRAM_VIEWS = 16, 2  # for the Gram gap, so many images are transformed alike, so many times

# --- features ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_views(
    networks: Sequence[FeatureExtractor], dataset: TransformDataset, device: torch.device, batch_size: int, num_workers: int,
    header: str = "",
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Features [M, 1+V, D] of every network and targets [M, V, T], of all images on every process; they share the images.

    `batch_size` counts views. With a `header`, progress is printed. Raises FloatingPointError if features are not finite.
    """
    own, V = shard(dataset, get_rank(), get_world_size()), len(dataset.views) - 1
    loader = make_loader(own, max(1, batch_size // (1 + V)), num_workers=num_workers)
    features = [[torch.empty(0, 1 + V, network.dim, device=device)] for network in networks]
    targets = [torch.empty(0, V, len(dataset.transform.targets), dtype=torch.float64)]
    for pixels, batch_targets in with_progress(loader, header, len(own)) if header else loader:
        images = pixels.flatten(0, 1).to(device, non_blocking=True)  # B*(1+V), 3, S, S
        for rows, network in zip(features, networks, strict=True):
            rows.append(network(images).float().unflatten(0, pixels.shape[:2]))  # B, 1+V, D
        targets.append(batch_targets.clone())  # a tensor of a worker lies in shared memory and keeps a file open
    gathered = [gather_in_order(torch.cat(rows), len(dataset)) for rows in (*features, [t.to(device) for t in targets])]
    for rows in gathered:
        if not rows.isfinite().all():
            raise FloatingPointError(f"features of {header or 'the views'}")
    return gathered[:-1], gathered[-1]


def regression_input(features: Tensor, kind: str) -> Tensor:
    """What a regressor gets for each transformed view: features [M, 1+V, D] -> [M*V, 2*D] (`pair`) or [M*V, D] (`single`)."""
    views = features[:, 1:]  # M, V, D
    if kind == "pair":
        views = torch.cat([features[:, :1].expand_as(views), views], dim=-1)  # M, V, 2*D
    return views.flatten(0, 1)


def input_columns(columns: Tensor, dim: int, kind: str) -> Tensor:
    """Where columns [d] of a representation of width `dim` stand in the `regression_input`."""
    return torch.cat([columns, columns + dim]) if kind == "pair" else columns


# --- subspaces -----------------------------------------------------------------------------------------------------------


@dataclass
class Subspace:
    """Some columns of the representation of one network."""

    part: str  # ALL, IR or EF; EF also for the random subspaces, which have its width
    control: str | None  # `random_subspace` or `untrained`
    network: int  # 0: the pretrained one, 1: the untrained one
    columns: Tensor  # d


def subspaces(
    dim: int, parts: Sequence[str], split: Split | None, draws: int = 0, seed: int = 0, untrained: bool = False
) -> list[Subspace]:
    """The parts, then the controls: `draws` random sets of columns as many as EF has, and the parts of an untrained network.

    Columns are drawn, rather than directions, since EF itself is a set of columns.
    """
    columns = {part: select_part(torch.arange(dim)[None], part, split)[0] for part in parts}
    chosen = [Subspace(part, None, 0, columns[part]) for part in parts]
    for draw in range(draws):
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(image_seed(seed, 0, draw)))
        _, width = split.widths
        chosen.append(Subspace("EF", "random_subspace", 0, order[:width].sort().values))
    return chosen + [Subspace(part, "untrained", 1, columns[part]) for part in parts if untrained]


# --- regression ----------------------------------------------------------------------------------------------------------


def check_targets(transform: str, names: Sequence[str], targets: Tensor, images: str) -> None:
    """Raise InputError if a target is the same in all views: targets [M, V, T] of the `images`, such as `test images`."""
    constant = (targets.flatten(0, 1).std(0, unbiased=False) == 0).tolist()
    if any(constant):
        raise InputError(f"--transforms {transform}: {names[constant.index(True)]} is the same in all views of the "
                         f"{len(targets)} {images}; take more images, or raise --views_per_image")  # fmt: skip


def hold_out(images: int, seed: int) -> Tensor:
    """A random fifth of the images: bool [M]."""
    held_out = torch.zeros(images, dtype=torch.bool)
    held_out[torch.randperm(images, generator=torch.Generator().manual_seed(seed))[: images // HELD_OUT]] = True
    return held_out


def shuffle_by_image(targets: Tensor, seed: int) -> Tensor:
    """Targets [M, V, T] in which every image has those of another one."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).to(targets.device)
    return torch.empty_like(targets).index_copy_(0, order, targets[order.roll(1)])


def regress(
    transform: Transform, make_regressor: Callable[[Tensor, Tensor, Tensor], Any], kind: str, spaces: Sequence[Subspace],
    train: tuple[Sequence[Tensor], Tensor], test: tuple[Sequence[Tensor], Tensor], seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Scores of regressors on every subspace and, for the parts of the pretrained network, with shuffled targets.

    The processes share the subspaces; all get the same records, which have the fields of `score`, `part` and `control`.

    Args:
        make_regressor: (x, y, held_out) -> regressor, as in evaluation/regression.py.
        kind: of the input, pair or single.
        train, test: what extract_views returns, with the features of as many networks as the subspaces name.
    """
    (train_features, train_targets), (test_features, test_targets) = train, test
    M, V, _ = train_targets.shape
    groups = torch.stack([train_targets, shuffle_by_image(train_targets, seed)], dim=2).flatten(0, 1)  # M*V, 2, T
    held_out = hold_out(M, seed).repeat_interleave(V).to(groups.device)  # M*V
    truth = test_targets.flatten(0, 1)  # N, T
    records: dict[int, list[dict[str, Any]]] = {}
    for network, (x, test_x) in enumerate(zip(train_features, test_features, strict=True)):
        own = [i for i, space in enumerate(spaces) if space.network == network][get_rank() :: get_world_size()]
        if not own:
            continue
        dim, test_x = x.shape[-1], regression_input(test_x, kind)
        regressor = make_regressor(regression_input(x, kind), groups, held_out)
        for i in own:
            columns = input_columns(spaces[i].columns, dim, kind).to(x.device)
            controls = ("shuffled",) if spaces[i].control is None else ()
            predictions = regressor.predict(test_x, columns, 1 + len(controls)).unbind(1)  # N, T for each control
            records[i] = [
                {"part": spaces[i].part, "control": control, **score(transform, predicted, truth)}
                for control, predicted in zip((spaces[i].control, *controls), predictions, strict=True)
            ]
    shares = {i: share for process in all_gather_objects(records) for i, share in process.items()}
    return average_draws([record for i in sorted(shares) for record in shares[i]])


def score(transform: Transform, predictions: Tensor, truth: Tensor) -> dict[str, Any]:
    """R2, and what suits the targets besides it, others None; predictions and truth [N, T]."""
    per_target = dict(zip(transform.targets, r2_per_target(predictions, truth).tolist(), strict=True))
    scores = {"r2": pooled_r2(predictions, truth), "r2_sie": sie_r2(predictions, truth), "r2_per_target": per_target}
    scores |= dict.fromkeys(("mae_degrees", "accuracy", "auc"))
    if transform.kind == "angle":
        scores["mae_degrees"] = mean_angle_error(predictions, truth) / transform.factor
    if transform.kind == "class":
        scores |= {"accuracy": accuracy(predictions[:, 0], truth[:, 0]), "auc": auc(predictions[:, 0], truth[:, 0])}
    return scores


def average_draws(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replaces the records of the random subspaces by one: the mean of every number, its standard deviation `<name>_std`."""
    draws = [record for record in records if record["control"] == "random_subspace"]
    if not draws:
        return records
    mean = dict(draws[0], draws=len(draws))
    for name, value in draws[0].items():
        if isinstance(value, float):
            values = [record[name] for record in draws]
            mean |= {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=min(1, len(values) - 1)))}
        elif isinstance(value, dict):
            mean[name] = {key: float(np.mean([record[name][key] for record in draws])) for key in value}
    place = records.index(draws[0])
    others = [record for record in records if record["control"] != "random_subspace"]
    return others[:place] + [mean] + others[place:]


# --- gaps ----------------------------------------------------------------------------------------------------------------


def cosine_gap(features: Tensor) -> tuple[float, float]:
    """Mean cosine similarity of a clean view to a transformed view of its image, and to the clean view of another image.

    Their difference is the cosine gap (CASSLE, arXiv 2306.06082). features [M, 1+V, d].
    """
    unit = F.normalize(features.double(), dim=-1)
    clean, views = unit[:, :1], unit[:, 1:]
    M = len(unit)
    to_views = (clean * views).sum(-1).mean()
    to_others = (clean.sum(0).square().sum() - clean.square().sum()) / (M * (M - 1))  # mean over all pairs of images
    return to_views.item(), to_others.item()


def gram_gap(features: Tensor) -> float:
    """Mean squared change of the cosine similarity of two images when both are transformed alike (CARE, arXiv 2306.13924).

    features [M, 1+V, d], of consecutive groups of GRAM_IMAGES images that are transformed alike.
    """
    squares, pairs = 0.0, 0
    for group in F.normalize(features.double(), dim=-1).split(GRAM_IMAGES):
        gram = torch.einsum("avd,bvd->vab", group, group)  # 1+V, images, images
        squares += (gram[1:] - gram[0]).square().sum().item()  # 0 on the diagonal, or between vectors of length 0
        pairs += (gram.shape[0] - 1) * len(group) * (len(group) - 1)
    return squares / pairs


def measure_gaps(spaces: Sequence[Subspace], test: Sequence[Tensor], alike: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Both gaps of every subspace, from features [M, 1+V, D] of each network; `alike`: transformed alike in groups."""
    records = []
    for space in spaces:
        to_views, to_others = cosine_gap(test[space.network][..., space.columns])
        gaps = {"cosine_view": to_views, "cosine_other": to_others, "cosine_gap": to_views - to_others}
        gaps["gram_gap"] = gram_gap(alike[space.network][..., space.columns])
        records.append({"part": space.part, "control": space.control, **gaps})
    return average_draws(records)


# --- while training ------------------------------------------------------------------------------------------------------


def linear_r2(
    backbone: nn.Module, train: TransformDataset, test: TransformDataset, device: torch.device, batch_size: int,
    num_workers: int, stats: tuple[Sequence[float], Sequence[float]], parts: Sequence[str], split: Split | None,
) -> dict[str, float]:  # fmt: skip
    """Pooled R2 on the views of `test` of linear regressors that were fitted to those of `train`: {part: R2}.

    The backbone may be in training; it is left in the mode in which it was. The processes share the work.
    """
    network = FeatureExtractor(backbone, stats=stats)
    with in_eval_mode(backbone):
        fitted, tested = (extract_views([network], views, device, batch_size, num_workers) for views in (train, test))
    spaces = subspaces(network.dim, parts, split)
    records = regress(train.transform, LinearRegressor, "pair", spaces, fitted, tested, train.seed)
    return {record["part"]: record["r2"] for record in records if record["control"] is None}
