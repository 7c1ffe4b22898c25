"""The pretrained network that is evaluated: its flags, its checkpoint, its parts."""

import argparse
import hashlib
import os
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
import torch.nn as nn

from clever.arguments import TypedFloat, plain_args
from clever.checkpoint import load_checkpoint
from clever.evaluation.names import part_flag
from clever.evaluation.stored import stored_arguments
from clever.methods import FLAGS, METHODS
from clever.models.backbones import BACKBONES, build_backbone, is_known, is_ours, vit_names
from clever.models.compilation import add_compile_argument, compile_blocks
from clever.models.heads import Split
from clever.models.weights import backbone_state, load_backbone_weights
from clever.utils import IMAGENET_MEAN, IMAGENET_STD, InputError, error_prefix, seed_everything

MAX_TRIAL_NAME = 100  # bytes: file systems allow 255 for a whole name
# Modules of timm whose networks are plain ViTs: a grid of patches, with position embeddings for each.
PLAIN_VITS = ("vision_transformer", "deit", "eva")


@dataclass
class Pretrained:
    """A backbone in eval mode, and what its checkpoint says about it; None: it does not say."""

    backbone: nn.Module  # frozen, on the device, with the pretrained weights
    arch: str
    net: str  # a key of METHODS
    hp1: float
    img_size: int  # side of the images to evaluate on, pixels
    mean: tuple[float, ...]  # of the channels, for pixels in 0..1
    std: tuple[float, ...]
    epochs: int | None  # of the pretraining so far
    aug: str | None  # recipe of the pretraining's views
    fingerprint: str  # hash of the weights
    options: dict[str, int] = field(default_factory=dict)  # patch_size and img_size, with which the backbone was built
    pretraining_seed: int | None = None
    training_args: dict[str, Any] = field(default_factory=dict)  # of the pretraining, as far as the checkpoint has them

    @property
    def stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels."""
        return self.mean, self.std

    @property
    def split(self) -> Split | None:
        """Where IR and EF are cut; None: the representation has no parts."""
        return split_of(self.net, self.hp1, self.backbone.embed_dim, self.training_args.get("equiv_part"))

    def record(self) -> dict[str, Any]:
        """What a result file says about the network."""
        record = {
            "net": self.net, "arch": self.arch, "pretrained_epochs": self.epochs, "aug": self.aug,
            "pretraining_seed": self.pretraining_seed, "backbone": self.fingerprint,
        }  # fmt: skip
        term = {name: self.training_args[name] for name in FLAGS if name in self.training_args}
        return record | term

    def check_patches(self, reason: str) -> None:
        """Raise InputError, which gives the `reason`, unless the backbone is one of our ViTs: others pool their features."""
        if self.arch not in vit_names():
            vits = ", ".join(vit_names())
            raise InputError(f"--arch {self.arch}: its features are pooled, and {reason}; choose one of {vits}")

    def untrained(self, seed: int) -> nn.Module:
        """The same architecture at random initialisation: frozen, in eval mode, on the same device."""
        seed_everything(seed)
        device = next(self.backbone.parameters()).device
        return build_backbone(self.arch, **self.options).eval().requires_grad_(False).to(device)


# --- parts and files -----------------------------------------------------------------------------------------------------


def split_of(net: str, hp1: float, dim: int, equiv_part: str | None) -> Split | None:
    """Where IR and EF are cut in a representation of width `dim`. This is the one place that knows which networks have parts.

    None if the pretraining did not divide the representation (dino), or if an hp1 near 0 or 1 leaves a part empty.
    `equiv_part`: --equiv_part of the pretraining.
    """
    return Split(dim, hp1) if METHODS[net].is_split(equiv_part) and Split.leaves_both(dim, hp1) else None


def check_part(part: str, split: Split | None, flag: str = "--else_part") -> None:
    """Raise InputError, which names the flag, unless the representation has the part: ALL, IR or EF."""
    if part != "ALL" and split is None:
        raise InputError(f"{flag} {part_flag(part)}: the representation has no parts, only ALL (dino, or hp1 near 0 or 1)")


def result_record(kind: str, network: dict[str, Any], args: argparse.Namespace, **values: Any) -> dict[str, Any]:
    """What every evaluation writes as JSON: its kind, the network (`Pretrained.record()`), results, and the arguments."""
    return {"kind": kind, **network, **values, "args": plain_args(args)}


def single_run(args: argparse.Namespace, part: str, perturbation: str) -> argparse.Namespace:
    """The arguments of a run with only this part and this perturbation, of those that were given as lists."""
    return argparse.Namespace(**vars(args) | {"else_part": part, "test_aug_type": perturbation})


def check_trial_name(name: str) -> None:
    """Raise InputError unless --trial_name can be the last part of a file name."""
    if os.sep in name or len(os.fsencode(name)) > MAX_TRIAL_NAME:
        raise InputError(f"--trial_name {name!r}: must have no {os.sep} and at most {MAX_TRIAL_NAME} bytes, for a file's name")


# --- flags and loading -----------------------------------------------------------------------------------------------------


def add_backbone_arguments(
    parser: argparse.ArgumentParser, required: bool = True, parts: bool = True, compiles: bool = True
) -> None:
    """Flags that name the network to evaluate; what is not given is taken from the checkpoint.

    Args:
        required: whether --pretrained_weights is required.
        parts: also add the flags for IR and EF and for the size of the images.
        compiles: with those, --compile.
    """
    add = parser.add_argument
    add("--pretrained_weights", required=required, help="checkpoint of a pretraining, ours, an original's or another program's")
    add("--checkpoint_key", default="teacher", help="which network of the checkpoint, if there are several; a file without "
        "`teacher`: `model` or `state_dict`")  # fmt: skip
    add("--arch", help="backbone; default: the checkpoint's, else vit_small")
    add("--patch_size", type=int, help="side of a ViT's patches, pixels; default: the checkpoint's, else 16")
    if not parts:
        parser.set_defaults(net=None, hp1=None, img_size=None)
        return
    add("--net", choices=METHODS, help="how it was pretrained; default: the checkpoint's, else dino")
    add("--hp1", type=TypedFloat, help="share of the representation that is IR; default: the checkpoint's")
    add("--img_size", type=int, help="side of the images, pixels; default: the pretraining's global crops, else 224 or timm's")
    if compiles:
        add_compile_argument(parser)


def resolve_option(name: str, given: Any, stored: Any, default: Any) -> Any:
    """The value of a flag: as given, else as stored with the weights or features, else the default.

    Raises InputError if the flag contradicts what is stored.
    """
    if given is not None and stored is not None and given != stored:
        raise InputError(f"--{name} {given}: the checkpoint was made with {name} {stored}")
    return next((value for value in (given, stored, default) if value is not None), None)


def resolve_arch(given: str | None, stored: str | None) -> str:
    """--arch, or what the checkpoint says if it is a name that we know; two names of one backbone agree."""
    is_same = given in BACKBONES and BACKBONES[given] is BACKBONES.get(stored)
    if given is None or stored is None or not is_ours(stored) or is_same:
        return given or (stored if stored and is_known(stored) else "vit_small")
    return resolve_option("arch", given, stored, None)


def resolve_net_and_hp1(args: argparse.Namespace, stored: dict[str, Any]) -> tuple[str, float]:
    """--net and --hp1, or what is stored. Raises InputError if nothing says where the representation is cut."""
    net = resolve_option("net", args.net, stored.get("net"), "dino")
    stored_hp1, default = (stored.get("hp1"), None) if METHODS[net].is_split(stored.get("equiv_part")) else (None, 1.0)
    hp1 = resolve_option("hp1", args.hp1, stored_hp1, default)
    if hp1 is None or not 0 < hp1 <= 1:
        raise InputError(f"--hp1 {hp1}: must lie in (0, 1]; give the pretraining's hp1, which cuts IR and EF")
    return net, hp1


def trained_image_size(arch: str, state: dict[str, torch.Tensor]) -> int | None:
    """Side in pixels of the images that a ViT's position embeddings were trained for; None for other backbones."""
    if is_ours(arch):
        is_vit = arch in vit_names()
    else:
        from timm.models import is_model_in_modules

        is_vit = is_model_in_modules(arch, PLAIN_VITS)
    if not is_vit or "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return None
    dim, *_, patch_size = state["patch_embed.proj.weight"].shape
    return isqrt(state["pos_embed"].numel() // dim) * patch_size  # the root of 1 + g*g rounds down to g


def image_defaults(arch: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side in pixels, channel means and standard deviations of the images that a backbone is made for: 224 pixels and
    ImageNet's, or what timm says of its model.
    """
    from timm.models import get_pretrained_cfg

    config = None if is_ours(arch) else get_pretrained_cfg(arch)
    return (config.input_size[-1], tuple(config.mean), tuple(config.std)) if config else (224, IMAGENET_MEAN, IMAGENET_STD)


def load_pretrained(args: argparse.Namespace, device: torch.device) -> Pretrained:
    """The backbone of --pretrained_weights. Raises InputError if flags contradict the checkpoint or weights do not fit."""
    checkpoint = load_checkpoint(args.pretrained_weights)
    stored = stored_arguments(checkpoint)
    arch = resolve_arch(args.arch, stored.get("arch"))
    patch_size = resolve_option("patch_size", args.patch_size, stored.get("patch_size"), 16)
    net, hp1 = resolve_net_and_hp1(args, stored)
    if args.img_size is not None and args.img_size < 1:
        raise InputError(f"--img_size {args.img_size}: must be 1 or more")
    with error_prefix(f"--pretrained_weights {args.pretrained_weights}"):
        with torch.device("meta" if is_ours(arch) else "cpu"):  # for its names
            own = build_backbone(arch).state_dict()
        state = backbone_state(checkpoint, args.checkpoint_key, own)
        size, mean, std = image_defaults(arch)
        trained_size = trained_image_size(arch, state) or stored.get("global_crops_size") or size
        options = {"patch_size": patch_size, "img_size": trained_size}
        backbone = build_backbone(arch, **options)
        load_backbone_weights(backbone, state)
    backbone = backbone.eval().requires_grad_(False).to(device)
    if getattr(args, "compile", False):  # not every script has the flag
        compile_blocks([backbone], device, dynamic=None)
    return Pretrained(
        backbone=backbone,
        arch=arch,
        net=net,
        hp1=hp1,
        img_size=args.img_size or trained_size,
        mean=tuple(stored.get("mean", mean)),
        std=tuple(stored.get("std", std)),
        epochs=checkpoint["epoch"] if isinstance(checkpoint.get("epoch"), int) else None,
        aug=stored.get("aug"),
        fingerprint=fingerprint(state),
        options=options,
        pretraining_seed=stored.get("seed"),
        training_args=stored,
    )


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
