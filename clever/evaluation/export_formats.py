"""The file formats of export.py: how each writes a network, and the Python code with which users read it.

Weights (timm, torchvision, safetensors) are those of the whole backbone, for a network that the library builds; a part is a
slice of its output. Programs (onnx, torch_export) contain the network, and return the part. No reader needs this repository,
except for safetensors files of networks unknown to timm.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clever.checkpoint import SAFETENSORS_METADATA
from clever.models.backbones import is_ours, vit_names
from clever.utils import InputError
from vmamba.scan_doubling import selective_scan_2d_doubling

TIMM_VITS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}  # by width
RESNETS = ("resnet18", "resnet50")  # the same in timm and torchvision
Model = dict[str, Any]  # `name` and `options` with which a library builds a network


class Network(nn.Module):
    """What is exported: images [B, 3, S, S] -> the columns of a part of the representation, [B, P].

    Args:
        backbone: in eval mode, frozen, on the CPU.
        arch, img_size: its name, ours or timm's, and S.
        columns: first column and end of the part; None: the whole representation.
        description: what a safetensors file says about the pretraining, as `checkpoint.load_checkpoint` returns it.
    """

    def __init__(
        self, backbone: nn.Module, arch: str, img_size: int, columns: tuple[int, int] | None, description: dict[str, Any]
    ) -> None:
        super().__init__()
        self.backbone, self.arch, self.img_size = backbone, arch, img_size
        self.columns, self.description = columns, description
        self.slice = "[:, {}:{}]".format(*columns) if columns else ""  # the code that selects the part

    def forward(self, images: Tensor) -> Tensor:
        z = self.backbone(images)  # B, D
        return z[:, slice(*self.columns)] if self.columns else z


def write_weights(network: Network, path: Path) -> None:
    """*.safetensors, with the arguments of the pretraining, or else a state dict of torch.save."""
    state = {name: value.contiguous() for name, value in network.backbone.state_dict().items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save  # save_file makes files that only their owner can read

        path.write_bytes(save(state, metadata={"format": "pt", SAFETENSORS_METADATA: json.dumps(network.description)}))
    else:
        torch.save(state, path)


def timm_model(network: Network) -> Model | None:
    """The same network for timm.create_model; None for one that timm does not have."""
    arch, backbone = network.arch, network.backbone
    sizes = {}
    if arch in vit_names():
        patch_size = backbone.patch_embed.patch_size
        arch = TIMM_VITS.get(backbone.embed_dim, TIMM_VITS[192])
        if backbone.embed_dim not in TIMM_VITS:  # vit_micro
            sizes = {"embed_dim": backbone.embed_dim, "depth": len(backbone.blocks), "num_heads": backbone.num_heads}
        sizes |= {"patch_size": patch_size, "img_size": backbone.grid_size * patch_size}
    elif is_ours(arch) and arch not in RESNETS:
        return None
    elif hasattr(getattr(backbone, "patch_embed", None), "img_size"):  # timm's networks for images of one size
        sizes = {"img_size": network.img_size}
    return {"name": arch, "options": {"num_classes": 0, **sizes}}


def _create_timm(network: Network, model: Model, **options: str) -> str:
    images = {"input_size": (3, network.img_size, network.img_size), "interpolation": "bicubic", "crop_pct": 224 / 256}
    images |= {name: tuple(network.description["args"][name]) for name in ("mean", "std")}  # for timm.data
    options = model["options"] | {"pretrained_cfg_overlay": images} | options
    words = [repr(model["name"]), *(f"{name}={value!r}" for name, value in options.items())]
    return f"import timm\nmodel = timm.create_model({', '.join(words)}).eval()"


def timm_usage(network: Network, file: str) -> str:
    model = timm_model(network)
    if model is None:
        raise InputError(f"--format timm: timm has no {network.arch}; choose safetensors, onnx or torch_export")
    return f"{_create_timm(network, model, checkpoint_path=file)}\nfeatures = model(images){network.slice}"


def torchvision_usage(network: Network, file: str) -> str:
    if network.arch not in RESNETS:
        raise InputError(f"--format torchvision: only for {' and '.join(RESNETS)}, not {network.arch}; choose another format")
    return (f"import torch, torchvision\nmodel = torchvision.models.{network.arch}()\nmodel.fc = torch.nn.Identity()\n"
            f"model.load_state_dict(torch.load({file!r}, weights_only=True))\n"
            f"features = model.eval()(images){network.slice}")  # fmt: skip


def safetensors_usage(network: Network, file: str) -> str:
    model = timm_model(network)
    if model is None:
        return (f"from clever import load_backbone  # of this repository\nmodel = load_backbone({file!r}).network\n"
                f"features = model(images){network.slice}")  # fmt: skip
    return (f"from safetensors.torch import load_file\n{_create_timm(network, model)}\n"
            f"model.load_state_dict(load_file({file!r}))\nfeatures = model(images){network.slice}")  # fmt: skip


def trace(network: Network) -> torch.export.ExportedProgram:
    """The program that maps images [B, 3, S, S], for any B, to features [B, P], without operators of this repository."""
    images = torch.zeros(2, 3, network.img_size, network.img_size)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network.eval(), (images,), dynamic_shapes={"images": {0: batch}})
    scan = torch.ops.clever.selective_scan_2d.default
    if any(node.target is scan for node in program.graph.nodes):
        program = program.run_decompositions({scan: _scan_without_operator})
    return program


def _scan_without_operator(x, proj, dt_weight, A, D, dt_bias, backend):
    """The operator clever::selective_scan_2d in plain PyTorch: y, and no states for a backward pass."""
    return selective_scan_2d_doubling(x, proj, dt_weight, A, D, dt_bias), x.new_empty(0)


def torch_export_usage(network: Network, file: str) -> str:
    return f"import torch\nprogram = torch.export.load({file!r}).module()\nfeatures = program(images)"


def write_onnx(network: Network, path: Path) -> None:
    torch.onnx.export(
        trace(network), (), path, dynamo=True, external_data=False, verbose=False,
        input_names=["images"], output_names=["features"], dynamic_shapes={"images": {0: "batch"}},
    )  # fmt: skip


def onnx_usage(network: Network, file: str) -> str:
    return (f"import onnxruntime\nsession = onnxruntime.InferenceSession({file!r})\n"
            '(features,) = session.run(None, {"images": images.numpy()})')  # fmt: skip


class Format(NamedTuple):
    """A file format. Raises InputError from `usage` if it cannot hold the network."""

    suffixes: tuple[str, ...]
    write: Callable[[Network, Path], None]
    usage: Callable[[Network, str], str]  # network and file -> Python from `images` [B, 3, S, S] to `features` [B, P]
    packages: tuple[str, ...] = ()  # needed besides torch and torchvision
    is_program: bool = False  # the file contains the network, for images of one size, and returns the part


FORMATS = {
    "timm": Format((".pth", ".safetensors"), write_weights, timm_usage, ("timm", "safetensors")),
    "torchvision": Format((".pth",), write_weights, torchvision_usage),
    "safetensors": Format((".safetensors",), write_weights, safetensors_usage, ("safetensors", "timm")),
    "onnx": Format((".onnx",), write_onnx, onnx_usage, ("onnx", "onnxruntime", "onnxscript"), True),
    "torch_export": Format((".pt2",), lambda net, path: torch.export.save(trace(net), path), torch_export_usage, (), True),
}
