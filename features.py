"""Frozen features for every evaluation: which network, which blocks, which part, and their k-NN classifier.

Letters: B batch, D width of the backbone, n number of last blocks, N patches, M training images, C classes.
"""

import argparse
import datetime
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from augmentations import IMAGENET_MEAN, IMAGENET_STD
from backbones import VITS, backbone_state, build_backbone, image_size_of, load_backbone_weights
from datasets import ImageDataset, shard
from heads import split_sizes
from utils import (
    InputError,
    TypedFloat,
    all_gather_rows,
    all_reduce_sum,
    broadcast_buffers,
    error_prefix,
    get_rank,
    get_world_size,
    load_checkpoint,
    plain_args,
)

PARTS = ("ALL", "main_part", "else_part")  # the whole representation, its IR, its EF


def select_part(x: torch.Tensor, dim: int, part: str, hp1: float) -> torch.Tensor:
    """Columns of `part` in features x [B, n*D], whose last `dim` = D columns are the last block's.

    The cut is in the last block only: `main_part` keeps all columns of the earlier blocks (the original's protocol).
    """
    if part == "ALL":
        return x
    _, ef = split_sizes(dim, hp1)
    return x[:, :-ef] if part == "main_part" else x[:, -ef:]


def part_suffix(part: str, hp1: float) -> str:
    """How names of files tell the parts apart, with hp1 as it was typed."""
    return {"ALL": "", "main_part": f"_hp{hp1}", "else_part": f"_hp{hp1}_else"}[part]


class FeatureExtractor(nn.Module):
    """Images [B, 3, H, W] -> features [B, self.dim] of a frozen backbone.

    A ViT gives the [CLS] tokens of its last n blocks, each after the final norm, side by side; with `avgpool` the mean patch
    token of the last block stands behind them (interleaved for ALL with n = 1, as DINO's published linear weights expect).
    Other backbones give their pooled features. `part` cuts [CLS] (of the last block) and mean token alike.

    Raises InputError for an unknown part, an empty one, or blocks that the backbone does not have.
    """

    def __init__(self, backbone: nn.Module, part="ALL", hp1=1.0, n_last_blocks=1, avgpool=False):
        super().__init__()
        if part not in PARTS:
            raise InputError(f"part {part!r}: must be one of {', '.join(PARTS)}")
        self.is_vit = hasattr(backbone, "get_intermediate_layers") and hasattr(backbone, "get_last_selfattention")
        if avgpool and not self.is_vit:
            raise InputError("--avgpool_patchtokens true: only a ViT has patch tokens; this backbone's features are pooled")
        if self.is_vit and not 1 <= n_last_blocks <= len(backbone.blocks):
            raise InputError(f"--n_last_blocks {n_last_blocks}: must lie in 1..{len(backbone.blocks)}")
        self.backbone, self.part, self.hp1, self.avgpool = backbone, part, hp1, avgpool
        self.n_last_blocks = n_last_blocks if self.is_vit else 1
        width = backbone.embed_dim
        self.dim = self._select(torch.empty(1, self.n_last_blocks * width)).shape[1]
        if avgpool:
            self.dim += self._select(torch.empty(1, width)).shape[1]

    def _select(self, x: torch.Tensor) -> torch.Tensor:
        return select_part(x, self.backbone.embed_dim, self.part, self.hp1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.is_vit:
            return self._select(self.backbone(images))  # B, dim
        blocks = self.backbone.get_intermediate_layers(images, self.n_last_blocks)  # n tensors B, 1+N, D
        cls = torch.cat([tokens[:, 0] for tokens in blocks], dim=-1)  # B, n*D
        if not self.avgpool:
            return self._select(cls)  # B, dim
        mean = blocks[-1][:, 1:].mean(1)  # B, D
        if self.part == "ALL" and self.n_last_blocks == 1:
            return torch.stack([cls, mean], dim=-1).flatten(1)  # B, 2*D: c0, m0, c1, m1, ...
        return torch.cat([self._select(cls), self._select(mean)], dim=-1)  # B, dim


@dataclass
class Pretrained:
    """A backbone in eval mode with its weights, and what its checkpoint says about it."""

    backbone: nn.Module
    arch: str
    net: str  # dino or CLeVER
    hp1: float
    img_size: int  # side of the images it was trained on
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int | None  # of pretraining so far; None if the checkpoint does not say
    aug: str | None  # recipe of the pretraining, likewise
    fingerprint: str  # of the weights

    def record(self) -> dict:
        """What a file of results says about it."""
        return {
            "net": self.net, "arch": self.arch, "pretrained_epochs": self.epochs, "aug": self.aug, "backbone": self.fingerprint
        }  # fmt: skip

    def check_patches(self, need: str) -> None:
        """Raise InputError, which names the `need`, unless the backbone is one of our ViTs: others pool their features."""
        if self.arch not in VITS:
            raise InputError(f"--arch {self.arch}: its features are pooled, and {need}; choose one of {', '.join(VITS)}")


def agree(name: str, given, stored, default, what: str = "checkpoint was"):
    """The flag if given, else what the checkpoint says, else the default; InputError if the first two differ."""
    if given is not None and stored is not None and given != stored:
        raise InputError(f"--{name} {given}: the {what} made with {name} {stored}")
    return next((value for value in (given, stored, default) if value is not None), None)


def add_backbone_arguments(parser: argparse.ArgumentParser, required: bool = True, parts: bool = True) -> None:
    """Flags that name the network under evaluation; what is not given comes from the checkpoint.

    `required`: --pretrained_weights is; `parts`: flags for IR and EF and the size of the images too.
    """
    parser.add_argument("--pretrained_weights", required=required, help="checkpoint, ours or an original's")
    parser.add_argument("--checkpoint_key", default="teacher", help="which network of the checkpoint; without a teacher: model")
    parser.add_argument("--arch", help="default: the checkpoint's, else vit_small")
    parser.add_argument("--patch_size", type=int, help="default: the checkpoint's, else 16")
    if not parts:
        parser.set_defaults(net=None, hp1=None, img_size=None)
        return
    parser.add_argument("--net", choices=["dino", "CLeVER"], help="default: the checkpoint's, else dino")
    parser.add_argument("--hp1", type=TypedFloat, help="default: the checkpoint's")
    parser.add_argument("--img_size", type=int, help="side of the images; default: the pretraining's global crops, else 224")


def load_pretrained(args: argparse.Namespace, device: torch.device) -> Pretrained:
    """The backbone of --pretrained_weights; flags that contradict the checkpoint are an InputError."""
    checkpoint = load_checkpoint(args.pretrained_weights)
    stored = plain_args(checkpoint.get("args", {}))
    arch = agree("arch", args.arch, stored.get("arch"), "vit_small")
    patch_size = agree("patch_size", args.patch_size, stored.get("patch_size"), 16)
    net = agree("net", args.net, stored.get("net"), "dino")
    hp1 = agree("hp1", args.hp1, stored.get("hp1") if net == "CLeVER" else None, 1.0 if net == "dino" else None)
    if hp1 is None:
        raise InputError("--hp1: the checkpoint does not say where IR and EF are cut; give the pretraining's hp1")
    if not 0 < hp1 <= 1:
        raise InputError(f"--hp1 {hp1}: must lie in (0, 1]")
    if args.img_size is not None and args.img_size < 1:
        raise InputError(f"--img_size {args.img_size}: must be 1 or more")
    with error_prefix(f"--pretrained_weights {args.pretrained_weights}"):
        state = backbone_state(checkpoint, args.checkpoint_key)
        # Only our ViTs take the patch size from its flag; the name of a timm model implies it.
        vit_size = image_size_of(state, patch_size) if arch in VITS else None
        trained_size = vit_size or stored.get("global_crops_size") or 224
        backbone = build_backbone(arch, patch_size=patch_size, img_size=trained_size)
        load_backbone_weights(backbone, state)
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return Pretrained(
        backbone=backbone.eval().requires_grad_(False).to(device),
        arch=arch,
        net=net,
        hp1=hp1,
        img_size=args.img_size or trained_size,
        mean=tuple(stored.get("mean", IMAGENET_MEAN)),
        std=tuple(stored.get("std", IMAGENET_STD)),
        epochs=checkpoint.get("epoch"),
        aug=stored.get("aug"),
        fingerprint=digest.hexdigest()[:16],
    )


def check_part(part: str, net: str, hp1: float, dim: int) -> None:
    """InputError unless `part` exists: a dino checkpoint has no IR and EF, and hp1 may leave one empty."""
    if part == "ALL":
        return
    if net == "dino":
        raise InputError(f"--else_part {part}: a dino checkpoint has no parts, only ALL")
    split_sizes(dim, hp1)


def report(batches: Iterable[tuple], header: str, total: int, seconds: float = 5.0) -> Iterator[tuple]:
    """Pass `batches` on; every few seconds and at the end, a line tells how many of `total` images, the rate and the time left.

    A process counts its own share, without waiting for the others; the first one speaks for all.
    """
    start = last = time.monotonic()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[0])
        now = time.monotonic()
        if done and (now - last >= seconds or done == total):
            last, rate = now, done / max(now - start, 1e-9)
            left = datetime.timedelta(seconds=round((total - done) / rate))
            world = get_world_size()
            share = f" of each of {world} processes" if world > 1 else ""
            print(f"{header} {done}/{total}{share}  {rate * world:.{1 if rate < 10 else 0}f} img/s  left {left}", flush=True)


@torch.no_grad()
def extract_features(
    model: FeatureExtractor, loader: DataLoader, device: torch.device, header: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, dim] and labels [M] of this process's share of the data, which may be empty, on `device`.

    With a `header` the progress is printed.
    """
    features, labels = [torch.empty(0, model.dim, device=device)], [torch.empty(0, dtype=torch.long)]
    for images, batch_labels in report(loader, header, len(loader.dataset)) if header else loader:
        features.append(model(images.to(device, non_blocking=True)).float())
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels).to(device)


def gather_in_order(rows: torch.Tensor, total: int) -> torch.Tensor:
    """The `total` rows of a dataset, in its order, from the rows of each process's `shard`; every process gets all."""
    world = get_world_size()
    order = torch.cat([torch.arange(rank, total, world) for rank in range(world)]).to(rows.device)
    gathered = all_gather_rows(rows)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def nearest_neighbors(train_features: torch.Tensor, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and indices [B, k] of the k training features most similar to each feature, most similar first.

    Both sets are L2-normalised, M and B rows of D. k is cut to the training set's size.
    """
    return (features @ train_features.T).topk(min(k, len(train_features)), dim=-1)


def knn_scores(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, temperature: float = 0.07) -> torch.Tensor:
    """Class scores [B, C], in float64: each of k neighbours, of cosine s and a class, both [B, k], votes exp(s / temperature).

    float64 holds the votes of temperatures from MIN_TEMPERATURE on.
    """
    votes = (similarity.double() / temperature).exp()  # B, k
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, labels, votes)  # B, C


MIN_TEMPERATURE = 0.002  # exp(1 / 0.002) is 1e217


def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    features: torch.Tensor,
    k: int,
    num_classes: int,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> torch.Tensor:
    """Class scores [B, C] by weighted votes of the k most similar training images (Wu et al., arXiv 1805.01978).

    Features are L2-normalised here; a neighbour of cosine s votes exp(s / temperature). k is cut to the training set's size.
    """
    train = F.normalize(train_features, dim=-1)  # M, D
    scores = []
    for queries in F.normalize(features, dim=-1).split(chunk):
        similarity, nearest = nearest_neighbors(train, queries, k)  # B, k
        scores.append(knn_scores(similarity, train_labels[nearest], num_classes, temperature))  # B, C
    return torch.cat(scores)


def knn_accuracy(
    backbone: nn.Module,
    train: ImageDataset,
    val: ImageDataset,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    k: int = 20,
) -> float:
    """Top-1 in percent of a k-NN classifier on a backbone's features; the processes share the images, each counts once."""
    was_training = backbone.training
    broadcast_buffers(backbone)
    extractor = FeatureExtractor(backbone.eval())

    def extract(dataset):
        own = shard(dataset, get_rank(), get_world_size())
        return extract_features(extractor, DataLoader(own, batch_size, num_workers=num_workers), device)

    train_features, train_labels = map(all_gather_rows, extract(train))
    features, labels = extract(val)
    scores = knn_predict(train_features, train_labels, features, k, len(train.classes))
    backbone.train(was_training)
    return 100 * all_reduce_sum((scores.argmax(-1) == labels).sum().float()).item() / len(val)
