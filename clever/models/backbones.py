"""The registry of backbones."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clever.distributed import is_distributed
from clever.models import resnet
from clever.models import vision_transformer as vit
from clever.utils import InputError, describe_error

# Builders of our backbones, by the name that --arch takes; every file vmamba/configs/<folder>/<config>.yaml is one more,
# called <folder>-<config>. A builder takes those of `build_backbone`'s options (patch_size, img_size, drop_path_rate,
# checkpointing) that its network has, as keyword arguments, and returns a module with `.embed_dim` = D that maps images
# [B, 3, H, W] to features [B, D].
BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "vit_micro": vit.vit_micro,
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
    "deit_tiny": vit.vit_tiny,
    "deit_small": vit.vit_small,
    "resnet8": resnet.resnet8,
    "resnet18_small": resnet.resnet18_small,
    "resnet50_small": resnet.resnet50_small,
    "resnet18": resnet.resnet18,
    "resnet50": resnet.resnet50,
}


def build_backbone(
    arch: str,
    patch_size: int = 16,
    img_size: int = 224,
    drop_path_rate: float | None = 0.0,
    checkpointing: bool = False,
) -> nn.Module:
    """A randomly initialised backbone with `.embed_dim` = D: forward maps [B, 3, H, W] to [B, D].

    Args:
        arch: one of `backbone_names`, or a timm model. Weights are never downloaded.
        patch_size: patch size of our ViTs in pixels (timm's names imply theirs).
        img_size: side in pixels of the images that position embeddings are stored for, if there are any.
        drop_path_rate: stochastic depth rate, if the backbone has it. None: `default_drop_path_rate(arch)`.
        checkpointing: recompute activations in the backward pass, which takes less memory and more time.

    Raises:
        InputError: `arch` is unknown, or the backbone has no activation checkpointing.
    """
    builder = _find_builder(arch)
    if builder is None and not is_known(arch):
        raise InputError(f"unknown arch {arch!r}: choose one of {', '.join(backbone_names())}, or a timm model")
    if drop_path_rate is None:
        drop_path_rate = default_drop_path_rate(arch)
    if builder is None:
        return _build_timm(arch, img_size, drop_path_rate, checkpointing)
    options = dict(patch_size=patch_size, img_size=img_size, drop_path_rate=drop_path_rate, checkpointing=checkpointing)
    known = inspect.signature(builder).parameters
    if checkpointing and "checkpointing" not in known:
        raise InputError(f"{arch} has no activation checkpointing")
    return builder(**{name: value for name, value in options.items() if name in known})


def _find_builder(arch: str) -> Callable[..., nn.Module] | None:
    """The builder of one of our backbones; None for other names."""
    if arch in BACKBONES:
        return BACKBONES[arch]
    import vmamba  # here, so that others do without it

    return partial(vmamba.build_vssm, arch) if vmamba.is_config_name(arch) else None


def is_ours(arch: str) -> bool:
    """True if `arch` is a backbone of this repository, False if it can only be a timm model."""
    return _find_builder(arch) is not None


def is_known(arch: str) -> bool:
    """True if `build_backbone` can build `arch`: it is ours or timm's, maybe with the tag of one of timm's weights."""
    from timm.models import is_model, is_model_pretrained

    return is_ours(arch) or (is_model(arch) and ("." not in arch or is_model_pretrained(arch)))


def backbone_names() -> list[str]:
    """Names of all backbones of this repository."""
    import vmamba

    return [*BACKBONES, *vmamba.config_names()]


def vit_names() -> list[str]:
    """Names of our ViTs, the backbones whose patch tokens and attention can be evaluated."""
    return [name for name, builder in BACKBONES.items() if getattr(builder, "func", None) is vit.VisionTransformer]


def default_drop_path_rate(arch: str) -> float:
    """Stochastic depth rate in training if the user gives none: that of its configuration for a VMamba, otherwise 0.1."""
    if arch in BACKBONES:
        return 0.1
    import vmamba

    return vmamba.load_config(arch).drop_path_rate if vmamba.is_config_name(arch) else 0.1


def _build_timm(arch: str, img_size: int, drop_path_rate: float, checkpointing: bool) -> nn.Module:
    """A timm model without its classifier: pooled features. timm's activation checkpointing updates batch norms twice."""
    import timm

    create = partial(timm.create_model, arch, pretrained=False, num_classes=0)
    model = _call_with_known_options(create, img_size=img_size, dynamic_img_size=True, drop_path_rate=drop_path_rate)
    model.embed_dim = getattr(model, "head_hidden_size", model.num_features)
    if checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AssertionError, AttributeError):  # timm's errors for models without it
            raise InputError(f"timm's {arch} has no activation checkpointing") from None
    return model


def _call_with_known_options(function: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """Calls `function` with as many options as it accepts: which ones a timm model takes shows only when it is called."""
    for count in range(len(options), 0, -1):
        for names in combinations(options, count):
            with suppress(TypeError):
                return function(**{name: options[name] for name in names})
    return function()


@torch.no_grad()
def check_timm_size(arch: str, backbone: nn.Module, size: int) -> None:
    """Raises InputError unless a timm model returns one feature vector per image of this size: some accept one size only."""
    try:
        found = list(backbone.eval()(torch.zeros(1, 3, size, size)).shape)
    except (AssertionError, RuntimeError, ValueError) as error:
        found = describe_error(error)
    if found != [1, backbone.embed_dim]:
        raise InputError(f"--arch {arch}: crops of {size} pixels do not give one feature vector, but {found}")
    backbone.train()


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def synchronize_batch_norm(networks: list[nn.Module], arch: str | None, device: torch.device) -> list[nn.Module]:
    """Networks whose batch norms use the statistics of all processes; timm converts its own models. `arch` None: no backbone.

    Without a process group, or without batch norms, nothing changes. torch synchronises batch norms on GPUs only: on a CPU
    a line says that their statistics are computed per process.
    """
    if not is_distributed() or not any(map(has_batch_norm, networks)):
        return networks
    if device.type != "cuda":
        print("batch norm: statistics are computed per process (torch synchronises them on GPUs only)")
        return networks
    if arch is None or is_ours(arch):
        return [nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in networks]
    from timm.layers import convert_sync_batchnorm

    return [convert_sync_batchnorm(network) for network in networks]
