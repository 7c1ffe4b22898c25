"""Weights of a backbone in checkpoints of this and other programs: found, renamed, checked, loaded."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clever.checkpoint import load_checkpoint, module_entries
from clever.models import vision_transformer as vit
from clever.models.backbones import is_ours, vit_names
from clever.utils import InputError, error_prefix

Rename = tuple[str, str | Callable[[re.Match[str]], str]]  # a regular expression, and what replaces what it matches

PREFIXES = re.compile(r"^((module|backbone)\.)+")
# Projection heads and classifiers. timm names the last layers of some backbones `head`, too: those are kept.
HEADS = re.compile(r"^(head2?|fc)\.(?!norm\.|pre_logits\.)")
# A network that has one of these beside the layers of ours computes other features: its weights do not fit.
CHANGE_FEATURES = {
    "cls_token", "pos_embed", "dist_token", "reg_token", "register_tokens", "storage_tokens", "norm", "norm_pre", "ln_pre",
    "fc_norm", "rel_pos_bias", "attn_pool", "attnpool", "stem", "conv2", "bn2", "conv3", "bn3",
}  # fmt: skip
STAGE = re.compile(r"(layer|stage|block)s?_?\d*")  # the same for a further stage
# First layers of ViTs, VMamba and ResNets, and of timm's and torchvision's other families.
FIRST_LAYERS = (
    "patch_embed.proj.weight", "patch_embed.0.weight", "conv1.weight", "conv_stem.weight", "stem.0.weight", "stem.conv.weight",
    "features.0.0.weight",
)  # fmt: skip


def _hugging_face_block(match: re.Match[str]) -> str:
    stage, block, layer, kind = int(match[1]) + 1, match[2], match[3], match[4]
    if layer == "shortcut":
        return f"layer{stage}.{block}.downsample.{0 if kind == 'convolution' else 1}."
    return f"layer{stage}.{block}.{'conv' if kind == 'convolution' else 'bn'}{int(layer.removeprefix('layer.')) + 1}."


# What other programs call the layers of ViTs and ResNets that are the same as ours, by a layer whose name shows the program.
RENAMES: dict[str, list[Rename]] = {
    # nn.Sequential(*resnet.children()) of torchvision's ResNet, as lightly, fastai and others cut it
    "4.0.conv1.weight": [(r"^0\.", "conv1."), (r"^1\.", "bn1."), *[(rf"^{i + 3}\.", f"layer{i}.") for i in (1, 2, 3, 4)]],
    # transformers' ViT; its names changed with version 5
    "embeddings.patch_embeddings.projection.weight": [
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.)?(query|q_proj|key|k_proj|value|v_proj)\.", lambda match: f".attn.{match[2][0]}."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"^layernorm\.", "norm."),
    ],
    # transformers' ResNet
    "embedder.embedder.convolution.weight": [
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.(layer\.\d|shortcut)\.(convolution|normalization)\.", _hugging_face_block),
    ],
    # torchvision's ViT
    "conv_proj.weight": [
        (r"^class_token", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.pos_embedding", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    ],
    # OpenMMLab's ViT
    "patch_embed.projection.weight": [
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^layers\.(\d+)\.", r"blocks.\1."),
        (r"(^|\.)ln([12])\.", r"\1norm\2."),
        (r"^norm1\.", "norm."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ],
}

NUMBERED, BLOCK = re.compile(r"(^|\.)\d+\."), re.compile(r"(^|\.)\d+\.[^.]+\.")
MAX_DEPTH, MAX_VISITS = 64, 4  # of nested dicts, and of each of them
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of weights that are read

# --- finding -----------------------------------------------------------------------------------------------------------


def backbone_state(
    checkpoint: dict[str, Any], checkpoint_key: str | None = "teacher", own: Collection[str] = ()
) -> dict[str, Tensor]:
    """Extracts the state dict of the backbone from a checkpoint of this or another program.

    Args:
        checkpoint: a pretraining checkpoint (ours, DINO's or CLeVER's: `{"teacher": {"module.backbone.X": tensor}}`), or any
            dict in which a network's tensors lie somewhere. For a plain state dict the key does not matter.
        checkpoint_key: entry that contains the network. Without an entry `teacher`, the key `teacher` means `model` or
            `state_dict`, as in released weights, or the only network that there is. If there are several networks, for
            example `encoder_q.X` and `encoder_k.X`, the key names one of them.
        own: names of the backbone's tensors, by which it is found if all are there; otherwise its first layer tells.

    Returns:
        State dict without prefixes such as `module.backbone.`, without other networks, heads (`head`, `head2`) and classifiers
        (`fc`), with our names of the layers (`RENAMES`).

    Raises:
        InputError: the checkpoint has no such key and is not a plain state dict, it holds several networks, or a tensor has
            no values.
    """
    entry = checkpoint.get(checkpoint_key) if checkpoint_key else None
    tensors = dict(_tensors(checkpoint if entry is None else entry))
    prefixes = _prefixes_of(own, tensors) or _network_prefixes(tensors)
    if entry is None and not _is_plain(checkpoint):
        prefixes = _named_networks(prefixes, checkpoint_key)
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if checkpoint_key in prefix.split(".")] or prefixes
    if len(prefixes) > 1:
        raise InputError(
            f"checkpoint key {checkpoint_key!r}: there are several networks; choose one of {_differences(prefixes)}"
        )
    if prefixes:
        (prefix,) = prefixes
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    else:  # a family of networks whose first layer is not known
        tensors = _plain_tensors(checkpoint, entry, checkpoint_key)
    if not tensors:
        present = ", ".join(map(str, checkpoint)) or "none"
        raise InputError(f"no state dict under checkpoint key {checkpoint_key!r}: the keys are {present}")
    state = {name: _readable(name, value) for name, value in _with_our_names(tensors).items()}
    return {name: value for name, value in state.items() if name in own or not HEADS.match(name)}


def _tensors(value: Any, names: tuple[str, ...] = (), visits: Counter[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts and pickled modules; the names of nested ones are joined by dots.

    A dict that lies in several places is listed MAX_VISITS times at most, which ends dicts that contain themselves, too.
    """
    visits = Counter() if visits is None else visits
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        with contextlib.suppress(TypeError):  # a kind of number that torch does not have
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if isinstance(value, Tensor):
        yield ".".join(names), value
    elif isinstance(value, dict) and visits[id(value)] < MAX_VISITS and len(names) < MAX_DEPTH:
        visits[id(value)] += 1
        for name, inner in (module_entries(value) or value).items():
            yield from _tensors(inner, (*names, str(name)), visits)


def _is_plain(checkpoint: dict[str, Any]) -> bool:
    """True for a state dict; some programs put numbers beside the tensors. A checkpoint has dicts."""
    has_tensor = any(isinstance(value, (Tensor, np.ndarray)) for value in checkpoint.values())
    return has_tensor and not any(isinstance(value, dict) for value in checkpoint.values())


def _prefixes_of(own: Collection[str], tensors: dict[str, Tensor]) -> list[str]:
    """What stands before all of the backbone's names; batch norm's counters may be missing."""
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    if not needed:
        return []
    found = {name.removesuffix(needed[0]) for name in tensors if f".{name}".endswith(f".{needed[0]}")}
    return sorted(prefix for prefix in found if all(f"{prefix}{name}" in tensors for name in needed))


def _network_prefixes(tensors: dict[str, Tensor]) -> list[str]:
    """What stands before the names of each network, found by the name of its first layer; maybe [""]."""
    layers = (*FIRST_LAYERS, *RENAMES)
    found = {name.removesuffix(layer) for name in tensors for layer in layers if f".{name}".endswith(f".{layer}")}
    found = {prefix for prefix in found if not any(prefix != other and prefix.startswith(other) for other in found)}
    return sorted(prefix for prefix in found if not NUMBERED.search(prefix) or _is_network(prefix, tensors))


def _is_network(prefix: str, tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors below a prefix with a number, such as `layer1.0.`, are those of a network, not of a single block."""
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    return any(BLOCK.search(name) for name in names) or not RENAMES.keys().isdisjoint(names)


def _named_networks(prefixes: list[str], key: str | None) -> list[str]:
    """Those of the networks of a whole checkpoint that the key means."""
    named = [prefix for prefix in prefixes if key in prefix.split(".")]
    if named or key != "teacher":
        return named
    for usual in ("model.", "state_dict."):
        if any(prefix.startswith(usual) for prefix in prefixes):
            return [prefix for prefix in prefixes if prefix.startswith(usual)]
    if len(prefixes) == 1 and prefixes[0]:
        print(f"the checkpoint has no `teacher`: weights are taken from `{prefixes[0].rstrip('.')}`")
    return prefixes


def _plain_tensors(checkpoint: dict[str, Any], entry: Any, key: str | None) -> dict[str, Tensor]:
    usual = (checkpoint.get("model"), checkpoint.get("state_dict")) if key == "teacher" else ()
    for state in (entry,) if entry is not None else (*usual, checkpoint):
        if isinstance(state, dict) and (_is_plain(state) or module_entries(state)):
            return {PREFIXES.sub("", name): value for name, value in _tensors(state)}
    return {}


def _differences(prefixes: list[str]) -> str:
    """The parts of each prefix that the others do not have, as a list of choices."""
    parts = [prefix.rstrip(".").split(".") for prefix in prefixes]
    count = Counter(part for each in parts for part in set(each))
    own = [next((part for part in each if count[part] == 1), ".".join(each)) for each in parts]
    return ", ".join(own)


def _with_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = next((renames for layer, renames in RENAMES.items() if layer in tensors), None)
    if renames is None:
        return tensors
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return _join_query_key_value(renamed)


def _join_query_key_value(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*\.attn)\.([qkv])\.(weight|bias)", name)
        if not match:
            joined[name] = value
        elif match[2] == "q":
            parts = [state.get(f"{match[1]}.{part}.{match[3]}") for part in "qkv"]
            if all(part is not None and part.shape == value.shape for part in parts):
                joined[f"{match[1]}.qkv.{match[3]}"] = torch.cat(parts)
    return joined


def _readable(name: str, value: Tensor) -> Tensor:
    """A dense tensor with values."""
    if value.is_meta:
        raise InputError(f"{name} has no values (a tensor on the device meta)")
    value = value.dequantize() if value.is_quantized else value
    return value.to_dense() if value.layout != torch.strided else value


# --- loading -----------------------------------------------------------------------------------------------------------


def load_backbone_weights(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict from `backbone_state`. All layers must be there, with all their tensors, and no further ones.

    Batch norm's `num_batches_tracked` may be missing. Beside the backbone's layers, other programs store classifiers, decoders,
    prototypes and mask tokens: they are left out, and a line names them. If the backbone has a method `convert_state_dict`
    (VMamba: weights of other releases), it is applied first.

    Raises:
        InputError: names or shapes differ, or weights are not finite; the message counts them and lists the first three.
    """
    if hasattr(backbone, "convert_state_dict"):
        state = backbone.convert_state_dict(state)
    own = backbone.state_dict()
    layers = {name.split(".")[0] for name in own} | CHANGE_FEATURES
    tops = {name: name.split(".")[0] for name in state if name not in own}
    beside = {name: top for name, top in tops.items() if top not in layers and not STAGE.fullmatch(top)}
    state = {name: value for name, value in state.items() if name not in beside}
    _check_fit(own, state)
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:
        raise InputError(f"NaN or infinite values in {len(broken)} of {len(state)} weights: {_first(broken)}")
    if beside:
        names = list(dict.fromkeys(beside.values()))
        print(f"left out, as the backbone has no such layers: {_first(names)} (number of tensors: {len(beside)})")
    backbone.load_state_dict(state)


def _check_fit(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misshaped = [
        f"{name} ({list(state[name].shape)} in the file, {list(value.shape)} in the backbone)"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    mistyped = [
        f"{name} ({str(state[name].dtype).removeprefix('torch.')} in the file)"
        for name, value in own.items()
        if name in state and value.is_floating_point() and state[name].dtype not in FLOATS
    ]
    mismatches = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped, "of another type": mistyped}
    problems = [f"{len(names)} {kind}: {_first(names)}" for kind, names in mismatches.items() if names]
    if problems:
        raise InputError(f"the weights do not fit the backbone ({len(own)} tensors); {'; '.join(problems)}")


def _first(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def load_backbone_file(backbone: nn.Module, path: str, checkpoint_key: str | None = "teacher") -> None:
    """Loads the weights of a backbone from a checkpoint file. Raises InputError naming the file if they do not match.

    Position embeddings that a ViT has learned for images of another size are interpolated.
    """
    checkpoint = load_checkpoint(path)
    with error_prefix(path):
        state = backbone_state(checkpoint, checkpoint_key, backbone.state_dict())
        if "pos_embed" in state:
            state["pos_embed"] = _fit_positions(backbone, state["pos_embed"])
        load_backbone_weights(backbone, state)


def _fit_positions(backbone: nn.Module, pos_embed: Tensor) -> Tensor:
    """Position embeddings for the image size of one of our ViTs or timm's; as they are for other backbones."""
    if pos_embed.ndim != 3:
        return pos_embed
    if isinstance(backbone, vit.VisionTransformer):
        return vit.resize_positions(pos_embed, backbone.grid_size)
    own = getattr(backbone, "pos_embed", None)
    if not isinstance(own, Tensor) or own.shape == pos_embed.shape or not hasattr(backbone, "num_prefix_tokens"):
        return pos_embed
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if getattr(backbone, "no_embed_class", False) else backbone.num_prefix_tokens
    patches = pos_embed.shape[1] - prefix
    if patches < 1 or isqrt(patches) ** 2 != patches:
        return pos_embed
    return resample_abs_pos_embed(pos_embed, list(backbone.patch_embed.grid_size), num_prefix_tokens=prefix)


def image_size_of(state: dict[str, Tensor], patch_size: int | None = None) -> int | None:
    """Side in pixels of the images that the position embeddings of a ViT were trained for; None for other state dicts.

    Raises:
        InputError: the weights were trained with another patch size.
    """
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return None
    shape = state["patch_embed.proj.weight"].shape
    if len(shape) != 4 or 0 in shape:
        return None  # these weights fit no ViT, which loading them says
    dim, *_, trained_patch_size = shape
    if trained_patch_size != (patch_size or trained_patch_size):
        raise InputError(f"patch size {patch_size}: the weights were trained with patch size {trained_patch_size}")
    tokens = state["pos_embed"].numel() // dim
    return isqrt(tokens) * trained_patch_size  # the root of 1 + g*g rounds down to g


# Modules of timm whose networks are plain ViTs: a grid of patches, with position embeddings for each.
TIMM_VITS = ("vision_transformer", "deit", "eva")


def trained_image_size(arch: str, state: dict[str, Tensor], patch_size: int) -> int | None:
    """`image_size_of` for the ViTs among the backbones; None for others. timm's names imply the patch size."""
    if arch in vit_names():
        return image_size_of(state, patch_size)
    if is_ours(arch):
        return None
    from timm.models import is_model_in_modules

    return image_size_of(state) if is_model_in_modules(arch, TIMM_VITS) else None
