"""What features know about the transformation of an image, and how far it moves them.

An image is seen as it is (clean) and in views that differ from the clean one by a single transformation with known parameters.
Regressors tell the parameters from the features of both. TRANSFORMS lists the transformations, one per line.

Shapes: M images, B of them in a batch, V transformed views of each, T targets, D width of the representation, S side of the
views, N tested views, d columns of a subspace.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from clever.data.augmentations import DINO_VIEW, Views, eval_transform
from clever.data.datasets import (
    draw_views,
    image_seed,
    make_loader,
    shard,
)
from clever.distributed import all_gather_objects, get_rank, get_world_size
from clever.evaluation.features import (
    FeatureExtractor,
    gather_in_order,
    in_eval_mode,
    select_part,
)
from clever.evaluation.regression import (
    LinearRegressor,
    accuracy,
    auc,
    mean_angle_error,
    pooled_r2,
    r2_per_target,
    sie_r2,
)
from clever.progress import with_progress
from clever.utils import InputError

HELD_OUT = 5  # one of so many training images is held out, to choose the strength of the ridge
GRAM_IMAGES, GRAM_VIEWS = 16, 2  # for the Gram gap, so many images are transformed alike, so many times

# --- transformations -----------------------------------------------------------------------------------------------------

# A target as a function of the parameters VIEW [B, V] and of the images' heights and widths [B, 1].
Target = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # -> B, V


@dataclass(frozen=True)
class Transform:
    """A transformation, and what is to be predicted about it.

    Args:
        changes: fields of ViewDistribution in which the transformed views differ from the clean one.
        targets: what is to be predicted.
        kind: `values` (scored by R2), `angle` (also by the error in degrees; the targets are sine and cosine), or `class`
            (also by accuracy and AUC; the target is 1 or -1).
        disc: all views, the clean one too, are black outside their inscribed circle.
        inputs: what regressors may get: `pair`, the features of the clean and the transformed view side by side, or
            `single`, those of the transformed view.
        factor: the targets are sine and cosine of this multiple of the angle.
    """

    changes: dict[str, Any]
    targets: dict[str, Target]
    kind: str = "values"
    disc: bool = False
    inputs: tuple[str, ...] = ("pair", "single")
    factor: float = 1.0


def _angle(factor: float = 1.0) -> dict[str, Target]:
    return {
        "sin": lambda views, heights, widths: np.sin(factor * np.deg2rad(views["angle"].astype(float))),
        "cos": lambda views, heights, widths: np.cos(factor * np.deg2rad(views["angle"].astype(float))),
    }


_BOX: dict[str, Target] = {  # as shares of the image
    "centre x": lambda views, heights, widths: (views["left"] + views["width"] / 2) / widths,
    "centre y": lambda views, heights, widths: (views["top"] + views["height"] / 2) / heights,
    "log width": lambda views, heights, widths: np.log(views["width"] / widths),
    "log height": lambda views, heights, widths: np.log(views["height"] / heights),
}
_COLOURS: dict[str, Target] = {  # as shares of the largest change
    "brightness": lambda views, heights, widths: (views["brightness"] - 1) / DINO_VIEW.brightness,
    "contrast": lambda views, heights, widths: (views["contrast"] - 1) / DINO_VIEW.contrast,
    "saturation": lambda views, heights, widths: (views["saturation"] - 1) / DINO_VIEW.saturation,
    "hue": lambda views, heights, widths: views["hue"] / DINO_VIEW.hue,
}
_RADIUS: dict[str, Target] = {"radius": lambda views, heights, widths: views["blur"].astype(float)}  # pixels


def _applied(name: str) -> dict[str, Target]:
    return {name: lambda views, heights, widths: 2.0 * views[name] - 1}


_JITTER = {name: getattr(DINO_VIEW, name) for name in ("brightness", "contrast", "saturation", "hue")}
TRANSFORMS = {
    "rotation": Transform({"rotation": 90.0}, _angle(), "angle", disc=True),
    "rotation_corners": Transform({"rotation": 90.0}, _angle(), "angle"),  # the black corners give the angle away
    "crop": Transform({"scale": DINO_VIEW.scale}, _BOX),
    "jitter": Transform({"jitter_p": 1.0, **_JITTER}, _COLOURS),
    "blur": Transform({"blur_p": 1.0}, _RADIUS),
    "flip": Transform({"flip_p": 0.5}, _applied("flip"), "class", inputs=("pair",)),
    "solarize": Transform({"solarize_p": 0.5}, _applied("solarize"), "class"),
    "grey": Transform({"grey_p": 0.5}, _applied("grey"), "class"),
}


def with_half_angles(transform: Transform) -> Transform:
    """The same with sine and cosine of half the angle, the quaternion of a rotation about one axis (SIE's targets)."""
    return replace(transform, targets=_angle(0.5), factor=0.5) if transform.kind == "angle" else transform


# --- views ---------------------------------------------------------------------------------------------------------------


class TransformDataset(Dataset):
    """Every image as its clean view and V transformed ones, with the targets of these.

    The views of an image are a function of (seed, stream, index): they depend neither on the number of processes nor on other
    transformations.

    Args:
        paths: files of the images.
        size: side of the views, pixels.
        views: V.
        stream: gives data sets with the same seed different draws.
        images_per_draw: so many consecutive images are transformed alike.
    """

    def __init__(
        self,
        paths: Sequence[str],
        transform: Transform,
        size: int,
        views: int = 8,
        seed: int = 0,
        stream: int = 0,
        renderer: str = "torchvision",
        images_per_draw: int = 1,
    ) -> None:
        (clean,) = eval_transform("ori", size).distributions
        self.views = Views([clean, *[replace(clean, **transform.changes)] * views])
        self.paths, self.transform, self.size, self.renderer = list(paths), transform, size, renderer
        self.seed, self.stream, self.images_per_draw = seed, stream, images_per_draw

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [B, 1+V, 3, S, S], the clean view first, and targets, float64 [B, V, T]."""
        seeds = [image_seed(self.seed, self.stream, index // self.images_per_draw) for index in indices]
        paths = [self.paths[index] for index in indices]
        (pixels,), parameters, sizes = draw_views(paths, seeds, self.views, self.renderer)  # 1+V, B, 3, S, S; B, 1+V
        if self.transform.disc:
            pixels *= inscribed_disc(self.size)
        heights, widths = (np.array(lengths)[:, None] for lengths in sizes)  # B, 1
        targets = np.stack([target(parameters[:, 1:], heights, widths) for target in self.transform.targets.values()], axis=-1)
        return pixels.transpose(0, 1), torch.from_numpy(targets)  # B, V, T


def inscribed_disc(size: int) -> Tensor:
    """1 for pixels whose centres lie within the inscribed circle of a square, else 0: uint8 [size, size]."""
    squares = (torch.arange(size) - (size - 1) / 2).square()
    return (squares[:, None] + squares <= (size / 2) ** 2).to(torch.uint8)


# --- features ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_views(
    networks: Sequence[FeatureExtractor],
    dataset: TransformDataset,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    header: str = "",
) -> tuple[list[Tensor], Tensor]:
    """Features [M, 1+V, D] of every network and targets [M, V, T], of all images on every process.

    The processes share the images; every view is rendered once for all networks. `batch_size` counts views. With a `header`,
    progress is printed. Raises FloatingPointError if features are not finite.
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
    """Some columns of the representation of one network.

    Args:
        part: ALL, IR or EF; EF also for the random subspaces, which have its width.
        control: None, `random_subspace` or `untrained`.
        network: 0 for the pretrained one, 1 for the untrained one.
        columns: [d].
    """

    part: str
    control: str | None
    network: int
    columns: Tensor


def part_columns(dim: int, part: str, hp1: float) -> Tensor:
    """The columns [d] of ALL, IR or EF in a representation of width `dim`."""
    return select_part(torch.arange(dim)[None], dim, part, hp1)[0]


def subspaces(
    dim: int, parts: Sequence[str], hp1: float, draws: int = 0, seed: int = 0, untrained: bool = False
) -> list[Subspace]:
    """The parts, then the controls: `draws` random sets of columns as many as EF has, and the parts of an untrained network.

    Columns are drawn, rather than directions, since EF itself is a set of columns.
    """
    columns = {part: part_columns(dim, part, hp1) for part in parts}
    chosen = [Subspace(part, None, 0, columns[part]) for part in parts]
    for draw in range(draws):
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(image_seed(seed, 0, draw)))
        width = len(part_columns(dim, "EF", hp1))
        chosen.append(Subspace("EF", "random_subspace", 0, order[:width].sort().values))
    return chosen + [Subspace(part, "untrained", 1, columns[part]) for part in parts if untrained]


# --- regression ----------------------------------------------------------------------------------------------------------


def check_targets(transform: str, names: Sequence[str], targets: Tensor, images: str) -> None:
    """Raise InputError if a target is the same in all views: targets [M, V, T] of the `images`, such as `test images`."""
    constant = (targets.flatten(0, 1).std(0, unbiased=False) == 0).tolist()
    for name, is_constant in zip(names, constant, strict=True):
        if is_constant:
            raise InputError(
                f"--transforms {transform}: {name} is the same in all views of the {len(targets)} {images}; take more images, "
                "or raise --views_per_image"
            )


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
    transform: Transform,
    make_regressor: Callable[[Tensor, Tensor, Tensor], Any],
    kind: str,
    spaces: Sequence[Subspace],
    train: tuple[Sequence[Tensor], Tensor],
    test: tuple[Sequence[Tensor], Tensor],
    seed: int,
) -> list[dict[str, Any]]:
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
    """Both gaps of every subspace.

    Args:
        test: features [M, 1+V, D] of each network.
        alike: the same, of images that are transformed alike in groups.
    """
    records = []
    for space in spaces:
        to_views, to_others = cosine_gap(test[space.network][..., space.columns])
        gaps = {"cosine_view": to_views, "cosine_other": to_others, "cosine_gap": to_views - to_others}
        gaps["gram_gap"] = gram_gap(alike[space.network][..., space.columns])
        records.append({"part": space.part, "control": space.control, **gaps})
    return average_draws(records)


# --- while training ------------------------------------------------------------------------------------------------------


def linear_r2(
    backbone: nn.Module,
    train: TransformDataset,
    test: TransformDataset,
    parts: Sequence[str],
    hp1: float,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    stats: tuple[Sequence[float], Sequence[float]],
    kind: str = "pair",
) -> dict[str, float]:
    """Pooled R2 on the views of `test` of linear regressors that were fitted to those of `train`: {part: R2}.

    The backbone may be in training; it is left in the mode in which it was. The processes share the work.
    """
    network = FeatureExtractor(backbone, stats=stats)
    with in_eval_mode(backbone):
        fitted, tested = (extract_views([network], views, device, batch_size, num_workers) for views in (train, test))
    spaces = subspaces(network.dim, parts, hp1)
    records = regress(train.transform, LinearRegressor, kind, spaces, fitted, tested, train.seed)
    return {record["part"]: record["r2"] for record in records if record["control"] is None}
