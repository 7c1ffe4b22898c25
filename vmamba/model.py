"""VMamba (Liu et al., arXiv 2401.10166): stages of 2D selective scan blocks, pooled features, no classifier.

All tensors inside are channels last: linear layers are plain matrix products, LayerNorm normalises the last dimension, and
convolutions compute on a permuted view. The original's norms `ln` and `ln2d` are therefore the same here.

Shapes: C channels of a stage, D width of the features.
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clever.models.layers import StochasticDepth, checkpointed
from vmamba.config import VSSMConfig, load_config
from vmamba.ss2d import ACTIVATIONS, SS2D, Conv2d, at_least_float32

NORMS: dict[str, Callable[[int], nn.Module]] = {"ln": nn.LayerNorm, "ln2d": nn.LayerNorm, "bn": nn.BatchNorm2d}


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm` over the channels of x [B, H, W, C], in float32: the residual stream stays in float32 under autocast.

    In a network that was converted to half precision as a whole, both are in half precision.

    A function rather than a module, because torch replaces batch norms by synchronised ones.
    """
    if norm.weight.dtype != x.dtype:
        x = at_least_float32(x)
    if isinstance(norm, nn.LayerNorm):
        return norm(x)
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvNorm(nn.Sequential):
    """Convolutions, norms and activations on [B, H, W, C], named by their indices in the original's nn.Sequential."""

    def __init__(self, **modules: nn.Module | None) -> None:
        present = {name: module for name, module in modules.items() if module is not None}
        super().__init__(OrderedDict((name.removeprefix("_"), module) for name, module in present.items()))

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x) if isinstance(module, Conv2d | nn.GELU) else normalize(module, x)
        return x


class PatchMerging(nn.Module):
    """Concatenates 2x2 neighbours, norm, linear: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), D]. Odd sizes are padded with 0."""

    def __init__(self, dim: int, out_dim: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = norm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)  # [B, H/2, W/2, 4C]
        return self.reduction(normalize(self.norm, x))


class MLP(nn.Module):
    """Two linear layers with an activation between, [B, H, W, C] -> [B, H, W, C].

    Gated: the hidden layer is twice as wide, and one half of it, activated, multiplies the other half.
    """

    def __init__(self, dim: int, hidden_dim: int, act: str = "gelu", dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(dim, 2 * hidden_dim if gated else hidden_dim)
        self.act = ACTIVATIONS[act]()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return self.dropout(self.fc2(x * self.act(gate)))
        return self.dropout(self.fc2(self.dropout(self.act(x))))


class VSSBlock(nn.Module):
    """Norm and scan, then norm and MLP (unless mlp_ratio is 0), each a residual branch, as in a transformer block."""

    def __init__(self, config: VSSMConfig, dim: int, drop_path: float, backend: str) -> None:
        super().__init__()
        norm = NORMS[config.norm_layer]
        self.norm = norm(dim)
        self.op = SS2D(
            dim,
            d_state=config.ssm_d_state,
            ratio=config.ssm_ratio,
            dt_rank=config.ssm_dt_rank,
            act=config.ssm_act_layer,
            kernel=config.ssm_conv,
            conv_bias=config.ssm_conv_bias,
            dropout=config.ssm_drop_rate,
            forward_type=config.ssm_forwardtype,
            backend=backend,
        )
        self.drop_path = StochasticDepth(drop_path)
        self.mlp = None
        hidden_dim = int(dim * config.mlp_ratio)
        if hidden_dim > 0:
            self.norm2 = norm(dim)
            self.mlp = MLP(dim, hidden_dim, config.mlp_act_layer, config.mlp_drop_rate, config.gmlp)

    def forward(self, x: Tensor) -> Tensor:
        # Batch norm's statistics are those of the whole batch. On a GPU, cuDNN searches anew for the fastest convolution for
        # every number of kept samples, which takes longer than dropping them saves.
        all_samples = x.is_cuda or not isinstance(self.norm, nn.LayerNorm)
        x = self.drop_path(x, lambda x: self.op(normalize(self.norm, x)), all_samples)
        if self.mlp is not None:
            x = self.drop_path(x, lambda x: self.mlp(normalize(self.norm2, x)), all_samples)
        return x


class Stage(nn.Module):
    """Blocks, then down-sampling: [B, H, W, C] -> [B, H', W', C']."""

    def __init__(self, blocks: list[VSSBlock], downsample: nn.Module, checkpointing: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpointed(block, x, self.checkpointing)
        return self.downsample(x)


class VSSM(nn.Module):
    """VMamba: [B, 3, H, W] -> pooled features [B, D], D = `embed_dim`, with the original's state-dict names.

    Args:
        config: sizes and variants of its parts.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0 in the first block. None: the
            configuration's.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        backend: backend of the selective scan: auto, torch, cpp, triton or cuda.
    """

    def __init__(
        self,
        config: VSSMConfig,
        drop_path_rate: float | None = None,
        checkpointing: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dims, depths, norm = config.dims, config.depths, NORMS[config.norm_layer]
        rate = config.drop_path_rate if drop_path_rate is None else drop_path_rate
        drop_paths = iter([rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.embed_dim = dims[-1]

        self.patch_embed = _patch_embed(config.patchembed, config.in_chans, dims[0], norm if config.patch_norm else None)
        downsample = partial(_downsample, config.downsample, norm=norm)
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [VSSBlock(config, dim, next(drop_paths), backend) for _ in range(depth)]
            last = stage + 1 == len(depths)
            self.layers.append(Stage(blocks, nn.Identity() if last else downsample(dim, dims[stage + 1]), checkpointing))
        self.classifier = nn.ModuleDict({"norm": norm(dims[-1])})
        self.apply(_init_linear)
        self.register_load_state_dict_pre_hook(_convert_before_loading)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x.permute(0, 2, 3, 1))  # [B, H/4, W/4, C]
        for layer in self.layers:
            x = layer(x)  # [B, H/32, W/32, D] after the last
        return normalize(self.classifier["norm"], x).mean(dim=(1, 2))  # [B, D]

    def convert_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Converts the weights of other releases to the names and shapes of this network.

        Names of the first release are replaced, a classifier is dropped, and weights of 1x1 convolutions, [out, in, 1, 1],
        become weights of linear layers, [out, in].
        """
        own, converted = self.state_dict(), {}
        for name, value in state.items():
            for pattern, new in OLD_NAMES.items():
                name = re.sub(pattern, new, name)
            if name.startswith("classifier.head."):
                continue
            if name in own and value.shape == (*own[name].shape, 1, 1):
                value = value.flatten(1)
            converted[name] = value
        return converted


OLD_NAMES = {
    r"\.ln_1\.": ".norm.",
    r"\.self_attention\.": ".op.",
    r"^patch_embed\.proj\.": "patch_embed.0.",
    r"^patch_embed\.norm\.": "patch_embed.2.",
    r"^(norm|head)\.": r"classifier.\1.",
}


def _convert_before_loading(module: VSSM, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Makes `load_state_dict` convert as `convert_state_dict` does, also for a VSSM inside another module."""
    own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
    converted = module.convert_state_dict({name.removeprefix(prefix): value for name, value in own.items()})
    state.update({prefix + name: value for name, value in converted.items()})


def _patch_embed(version: str, in_chans: int, dim: int, norm: Callable[[int], nn.Module] | None) -> ConvNorm:
    """[B, H, W, in_chans] -> [B, H/4, W/4, dim]: one convolution (v1) or two overlapping ones (v2)."""
    norm = norm or (lambda _: None)
    if version == "v1":
        return ConvNorm(_0=Conv2d(in_chans, dim, kernel_size=4, stride=4), _2=norm(dim))
    first = Conv2d(in_chans, dim // 2, kernel_size=3, stride=2, padding=1)
    second = Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
    return ConvNorm(_0=first, _2=norm(dim // 2), _4=nn.GELU(), _5=second, _7=norm(dim))


def _downsample(version: str, dim: int, out_dim: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """[B, H, W, dim] -> [B, H/2, W/2, out_dim]; odd sizes are rounded up by v1 and v3, down by v2."""
    if version == "v1":
        return PatchMerging(dim, out_dim, norm)
    kernel = {"kernel_size": 2} if version == "v2" else {"kernel_size": 3, "padding": 1}
    return ConvNorm(_1=Conv2d(dim, out_dim, stride=2, **kernel), _3=norm(out_dim))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_vssm(
    name_or_config: str | VSSMConfig,
    drop_path_rate: float | None = None,
    checkpointing: bool = False,
    backend: str = "auto",
) -> VSSM:
    """A randomly initialised VMamba, by configuration or its name, such as vssm2-vmambav2_tiny_224; see `VSSM`.

    Raises:
        InputError: the name is unknown, or its file is not a valid configuration.
    """
    config = name_or_config if isinstance(name_or_config, VSSMConfig) else load_config(name_or_config)
    return VSSM(config, drop_path_rate, checkpointing, backend)
