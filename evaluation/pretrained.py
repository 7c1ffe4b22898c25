"""The pretrained network under evaluation: its flags, its checkpoint, its parts."""

import argparse
import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn

from augmentations import IMAGENET_MEAN, IMAGENET_STD
from backbones import VITS, backbone_state, build_backbone, image_size_of, load_backbone_weights
from checkpoint import load_checkpoint
from heads import split_sizes
from utils import InputError, TypedFloat, error_prefix, plain_args


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
