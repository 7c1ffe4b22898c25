"""Weights of a backbone in checkpoints of this and other programs: found, checked, loaded."""

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from clever.checkpoint import load_checkpoint
from clever.models import vision_transformer as vit
from clever.utils import InputError, error_prefix

# Projection heads and classifiers. timm names the last layers of some backbones `head`, too: those are kept.
HEADS = re.compile(r"(head2?|fc)\.")
# What other programs store beside the layers of a backbone. All else that the backbone does not have changes the features.
BESIDE = re.compile(r"\w*head\w*|fc|classifier|last_linear|(project|predict|prototype|decoder|mask|queue)\w*")


def backbone_state(checkpoint: dict[str, Any], checkpoint_key: str, own: Collection[str]) -> dict[str, Tensor]:
    """Extracts the state dict of the backbone from a checkpoint of this or another program.

    It is found by the backbone's names, whatever stands before them: keys of nested dicts, and prefixes such as
    `module.backbone.`, `model.`, `encoder_q.` or `_orig_mod.`.

    Args:
        checkpoint: a pretraining checkpoint (ours, DINO's or CLeVER's: `{"teacher": {"module.backbone.X": tensor}}`), or any
            dict in which a network's tensors lie somewhere.
        checkpoint_key: the network, if there are several: a key, or a part of the prefix. For a plain state dict with one
            network it does not matter. Without an entry `teacher`, the key `teacher` means `model` or `state_dict`, as in
            released weights, or the only network that there is.
        own: names of the backbone's tensors.

    Returns:
        State dict without prefix and without the heads `head`, `head2` and `fc`. If no name is the backbone's: all tensors.

    Raises:
        InputError: the key names no network, or several.
    """
    keys = (checkpoint_key, "model", "state_dict") if checkpoint_key == "teacher" else (checkpoint_key,)
    place = next((checkpoint[key] for key in keys if dict(_tensors(checkpoint.get(key)))), checkpoint)
    tensors = dict(_tensors(place))
    networks = _networks(tensors, own) or [""] * bool(tensors)
    found = [network for network in networks if f".{checkpoint_key}." in f".{network}"]
    is_plain = not any(isinstance(value, dict) for value in checkpoint.values())
    if not found and (place is not checkpoint or is_plain or checkpoint_key == "teacher"):
        found = networks
        if place is checkpoint and not is_plain and len(found) == 1:
            print(f"the checkpoint has no `{checkpoint_key}`: weights are taken from `{found[0].rstrip('.')}`")
    if len(found) != 1:
        choices = ", ".join([network.rstrip(".") for network in networks if network] or map(str, checkpoint))
        raise InputError(f"no state dict under checkpoint key {checkpoint_key!r}, or several; choose one of {choices}")
    (prefix,) = found
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value for name, value in state.items() if name in own or not HEADS.match(name)}


def _tensors(value: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts; the names of nested ones are joined by dots."""
    if isinstance(value, Tensor):
        yield ".".join(names), value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _tensors(inner, (*names, str(name)))


def _networks(tensors: dict[str, Tensor], own: Collection[str]) -> list[str]:
    """What stands before the backbone's names, for each network that has most of them; maybe [""]."""
    count: Counter[str] = Counter()
    for name in tensors:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        count.update(name[:start] for start in starts if name[start:] in own)
    most = max(count.values(), default=0)
    return [prefix for prefix in count if count[prefix] == most > len(own) / 2]


def load_backbone_weights(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a state dict from `backbone_state`. All layers must be there, with all their tensors, and no further ones.

    Batch norm's `num_batches_tracked` may be missing. Classifiers, decoders, prototypes and mask tokens are left out, which a
    line says. Weights of other releases of VMamba, and those that timm can convert for its model, are converted.

    Raises:
        InputError: names or shapes differ, or weights are not finite; the message counts them and lists the first three.
    """
    own = backbone.state_dict()
    state = _converted(backbone, state)
    beside = [name for name in state if name not in own and BESIDE.fullmatch(name.split(".")[0])]
    state = {name: value for name, value in state.items() if name not in beside}
    common = [name for name in own if name in state]
    problems = {
        "missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} ({list(state[name].shape)} in the file, {list(own[name].shape)} in the backbone)"
            for name in common
            if state[name].shape != own[name].shape
        ],
        "NaN or infinite": [name for name in common if not state[name].isfinite().all()],
    }
    if any(problems.values()):
        lists = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in problems.items() if names)
        raise InputError(f"the weights do not fit the backbone ({len(own)} tensors); {lists}")
    if beside:
        names = list(dict.fromkeys(name.split(".")[0] for name in beside))
        print(f"left out, as the backbone has no such layers: {_first(names)} (number of tensors: {len(beside)})")
    backbone.load_state_dict(state)


def _converted(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the backbone's names and shapes, as far as VMamba or timm know how."""
    if hasattr(backbone, "convert_state_dict"):  # VMamba
        return backbone.convert_state_dict(state)
    own = backbone.state_dict()
    fits = all(name in state and state[name].shape == value.shape for name, value in own.items())
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)  # timm's
    if fits or convert is None:
        return state
    try:
        return convert(state, backbone)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # weights of another network
        return state


def _first(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def load_backbone_file(backbone: nn.Module, path: str, checkpoint_key: str = "teacher") -> None:
    """Loads the weights of a backbone from a checkpoint file. Raises InputError naming the file if they do not match.

    Position embeddings that a ViT has learned for images of another size are interpolated.
    """
    checkpoint = load_checkpoint(path)
    with error_prefix(path):
        state = backbone_state(checkpoint, checkpoint_key, backbone.state_dict())
        if isinstance(backbone, vit.VisionTransformer) and "pos_embed" in state:
            state["pos_embed"] = vit.resize_positions(state["pos_embed"], backbone.grid_size)
        load_backbone_weights(backbone, state)
