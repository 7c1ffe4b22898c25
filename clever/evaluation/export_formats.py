"""The file formats of export.py: each writes a network, reads it with the library that users have, and says how.

Weights (timm, torchvision, safetensors) are loaded into a network that the library builds. Programs (onnx, torch_export)
contain the network themselves. No reader needs this repository, except for safetensors files of networks unknown to timm.

Shapes: S side of the images, D width of the representation, P columns of the exported part (D for all of it).
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clever.checkpoint import SAFETENSORS_METADATA
from clever.models.backbones import is_ours, vit_names
from clever.utils import InputError
from vmamba.scan_doubling import selective_scan_2d_doubling

Features = Callable[[Tensor], Tensor]  # images [B, 3, S, S] -> [B, P]


@dataclass(frozen=True)
class Network:
    """What is exported.

    Args:
        backbone: in eval mode, frozen, on the CPU.
        arch: its name in this repository, or a timm model's.
        img_size: S.
        columns: first column and end of the part in the representation; None: all of it.
        description: what a safetensors file says about the pretraining, as `checkpoint.load_checkpoint` returns it.
    """

    backbone: nn.Module
    arch: str
    img_size: int
    columns: tuple[int, int] | None
    description: dict[str, Any]

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, P]."""
        z = self.backbone(images)  # B, D
        return z if self.columns is None else z[:, slice(*self.columns)]

    @property
    def num_columns(self) -> int:
        """P if a part is exported, else 0: timm's `num_classes` for it."""
        return 0 if self.columns is None else self.columns[1] - self.columns[0]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name, value in self.backbone.state_dict().items()}

    def state_dict_with_classifier(self, name: str) -> dict[str, Tensor]:
        """The weights, with a classifier of this name whose outputs are the columns of the part: each row is a unit vector.

        So the library itself returns the part, exactly.
        """
        state = self.state_dict()
        if self.columns is not None:
            selection = torch.eye(self.backbone.embed_dim)[slice(*self.columns)].clone()  # P, D
            state |= {f"{name}.weight": selection, f"{name}.bias": torch.zeros(len(selection))}
        return state


class Format(ABC):
    """A file format. Subclasses check in `__init__` whether they can express the network, and raise InputError if not.

    Args:
        network: what is exported.
    """

    name: str
    suffixes: tuple[str, ...]
    packages: tuple[str, ...] = ()  # needed besides torch and torchvision
    is_program = False  # whether the file contains the network, for images of one size

    def __init__(self, network: Network) -> None:
        self.network = network

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the file."""

    @abstractmethod
    def read(self, path: Path) -> Features:
        """The features of a file, by the library that it is for."""

    @abstractmethod
    def usage(self, file: str) -> str:
        """Lines of Python that do the same: from `images` [B, 3, S, S] to `features` [B, P]."""

    def model(self) -> dict[str, Any] | None:
        """Name and options with which the library builds the network, if it does."""
        return None


# --- timm --------------------------------------------------------------------------------------------------------------

TIMM_VITS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}  # by width
TIMM_RESNETS = ("resnet18", "resnet50")


def timm_model(network: Network) -> tuple[str, dict[str, Any]] | None:
    """Name and options of timm.create_model for the same network; None for one that timm does not have."""
    if network.arch in vit_names():
        return _timm_vit(network.backbone)
    if network.arch in TIMM_RESNETS:
        return network.arch, {}
    return None if is_ours(network.arch) else (network.arch, _timm_size(network.arch, network.img_size))


def _timm_vit(vit: nn.Module) -> tuple[str, dict[str, Any]]:
    options = {}
    if vit.embed_dim not in TIMM_VITS:  # vit_micro
        options = {"embed_dim": vit.embed_dim, "depth": len(vit.blocks), "num_heads": vit.num_heads}
    patch_size = vit.patch_embed.patch_size
    sizes = {"patch_size": patch_size, "img_size": vit.grid_size * patch_size}
    options |= {name: size for name, size in sizes.items() if size != {"patch_size": 16, "img_size": 224}[name]}
    return TIMM_VITS.get(vit.embed_dim, TIMM_VITS[192]), options


def _timm_size(arch: str, img_size: int) -> dict[str, int]:
    """The option `img_size` of a timm model, if it has one and needs it."""
    import timm

    if timm.get_pretrained_cfg(arch).input_size[-1] == img_size:
        return {}
    try:
        timm.create_model(arch, img_size=img_size)
    except TypeError:  # a network for images of any size
        return {}
    return {"img_size": img_size}


class Timm(Format):
    """Weights for timm.create_model(..., checkpoint_path=file). A part is what the model's classifier returns."""

    name, suffixes, packages = "timm", (".pth", ".safetensors"), ("timm",)

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        found = timm_model(network)
        if found is None:
            raise InputError(f"--format timm: timm has no {network.arch}; choose safetensors, onnx or torch_export")
        self.model_name, self.options = found

    def write(self, path: Path) -> None:
        state = self.network.state_dict_with_classifier("" if self.network.columns is None else self._classifier())
        if path.suffix == ".safetensors":
            _save_safetensors(state, path, self.network.description)
        else:
            torch.save(state, path)

    def _classifier(self) -> str:
        """Name of the model's classifier. Raises InputError unless it is one linear layer on the representation."""
        model = self._create(num_classes=self.network.num_columns)
        classifier = model.get_classifier()
        if not isinstance(classifier, nn.Linear) or classifier.in_features != self.network.backbone.embed_dim:
            raise InputError(f"--part with --format timm: the classifier of timm's {self.model_name} cannot return a part; "
                             "choose safetensors, onnx or torch_export, or --part ALL")  # fmt: skip
        return next(name for name, module in model.named_modules() if module is classifier)

    def _create(self, **options: Any) -> nn.Module:
        import timm

        return timm.create_model(self.model_name, **options, **self.options).eval()

    def read(self, path: Path) -> Features:
        return self._create(num_classes=self.network.num_columns, checkpoint_path=str(path))

    def usage(self, file: str) -> str:
        options = self.model()["options"] | {"checkpoint_path": file}
        return f"import timm\nmodel = timm.create_model({_call(self.model_name, options)}).eval()\nfeatures = model(images)"

    def model(self) -> dict[str, Any]:
        return {"name": self.model_name, "options": {"num_classes": self.network.num_columns, **self.options}}


# --- torchvision -------------------------------------------------------------------------------------------------------


class Torchvision(Format):
    """Weights for torchvision's ResNets: without `fc`, or with an `fc` that returns the part."""

    name, suffixes = "torchvision", (".pth",)

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        if network.arch not in TIMM_RESNETS:
            others = "timm, " if timm_model(network) else ""
            raise InputError(f"--format torchvision: only for {' and '.join(TIMM_RESNETS)}, not for {network.arch}; "
                             f"choose {others}safetensors, onnx or torch_export")  # fmt: skip

    def write(self, path: Path) -> None:
        torch.save(self.network.state_dict_with_classifier("fc"), path)

    def read(self, path: Path) -> Features:
        import torchvision

        model = torchvision.models.get_model(self.network.arch, num_classes=self.network.num_columns or 1000)
        if self.network.columns is None:
            model.fc = nn.Identity()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def usage(self, file: str) -> str:
        classes = "" if self.network.columns is None else f"num_classes={self.network.num_columns}"
        lines = ["import torch, torchvision", f"model = torchvision.models.{self.network.arch}({classes})"]
        if self.network.columns is None:
            lines.append("model.fc = torch.nn.Identity()")
        return "\n".join([*lines, f"model.load_state_dict(torch.load({file!r}, weights_only=True))",
                          "features = model.eval()(images)"])  # fmt: skip

    def model(self) -> dict[str, Any]:
        return {"name": self.network.arch, "options": {}}


# --- safetensors -------------------------------------------------------------------------------------------------------


class Safetensors(Format):
    """Weights of the whole backbone under the names of this repository, with the arguments of the pretraining.

    The names are timm's where timm has the network. A part is a slice of its output. `load_backbone` reads the file, too.
    """

    name, suffixes, packages = "safetensors", (".safetensors",), ("safetensors", "timm")

    def write(self, path: Path) -> None:
        _save_safetensors(self.network.state_dict(), path, self.network.description)

    def read(self, path: Path) -> Features:
        z = self._read_whole(path)
        return (lambda images: z(images)[:, slice(*self.network.columns)]) if self.network.columns else z

    def _read_whole(self, path: Path) -> Features:
        found = timm_model(self.network)
        if found is None:
            from clever.evaluation.loading import load_backbone

            return load_backbone(path).network
        import timm
        from safetensors.torch import load_file

        model = timm.create_model(found[0], num_classes=0, **found[1])
        model.load_state_dict(load_file(path))
        return model.eval()

    def usage(self, file: str) -> str:
        part = "[:, {}:{}]".format(*self.network.columns) if self.network.columns else ""
        model = self.model()
        if model is None:
            return (f"from clever import load_backbone  # of this repository\n"
                    f"network, transform, split = load_backbone({file!r})\nfeatures = network(images){part}")  # fmt: skip
        return (f"import timm\nfrom safetensors.torch import load_file\n"
                f"model = timm.create_model({_call(model['name'], model['options'])})\n"
                f"model.load_state_dict(load_file({file!r}))\nfeatures = model.eval()(images){part}")  # fmt: skip

    def model(self) -> dict[str, Any] | None:
        found = timm_model(self.network)
        return found and {"name": found[0], "options": {"num_classes": 0, **found[1]}}


def _save_safetensors(state: dict[str, Tensor], path: Path, description: dict[str, Any]) -> None:
    from safetensors.torch import save

    # Not save_file, whose files only their owner can read.
    path.write_bytes(save(state, metadata={"format": "pt", SAFETENSORS_METADATA: json.dumps(description)}))


def _call(name: str, options: dict[str, Any]) -> str:
    """Arguments of a call of timm.create_model as Python code."""
    return ", ".join([repr(name), *(f"{option}={value!r}" for option, value in options.items())])


# --- programs ----------------------------------------------------------------------------------------------------------


class _Program(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.features = network.features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def trace(network: Network) -> torch.export.ExportedProgram:
    """The program that maps images [B, 3, S, S], for any B, to features [B, P], without operators of this repository."""
    images = torch.zeros(2, 3, network.img_size, network.img_size)
    batch = torch.export.Dim("batch")
    program = torch.export.export(_Program(network).eval(), (images,), dynamic_shapes={"images": {0: batch}})
    scan = torch.ops.clever.selective_scan_2d.default
    if any(node.target is scan for node in program.graph.nodes):
        program = program.run_decompositions({scan: _scan_without_operator})
    return program


def _scan_without_operator(x, proj, dt_weight, A, D, dt_bias, backend):
    """The operator clever::selective_scan_2d in plain PyTorch: y, and no states for a backward pass."""
    return selective_scan_2d_doubling(x, proj, dt_weight, A, D, dt_bias), x.new_empty(0)


class TorchExport(Format):
    """A program of torch.export."""

    name, suffixes, is_program = "torch_export", (".pt2",), True

    def write(self, path: Path) -> None:
        torch.export.save(trace(self.network), path)

    def read(self, path: Path) -> Features:
        return torch.export.load(path).module()

    def usage(self, file: str) -> str:
        return f"import torch\nprogram = torch.export.load({file!r}).module()\nfeatures = program(images)"


class Onnx(Format):
    """A program for ONNX runtimes: input `images`, output `features`."""

    name, suffixes, is_program = "onnx", (".onnx",), True
    packages = ("onnx", "onnxruntime", "onnxscript")
    max_bytes = 2**31 - 2**24  # a file of 2 GiB or more would need its weights in a second file

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        size = sum(value.nbytes for value in network.backbone.state_dict().values())
        if size > self.max_bytes:
            raise InputError(f"--format onnx: {size / 2**30:.1f} GiB of weights, a file holds less than 2; choose torch_export")

    def write(self, path: Path) -> None:
        torch.onnx.export(
            trace(self.network), (), path, dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["features"], dynamic_shapes={"images": {0: "batch"}},
        )  # fmt: skip

    def read(self, path: Path) -> Features:
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    def usage(self, file: str) -> str:
        return (f"import onnxruntime\nsession = onnxruntime.InferenceSession({file!r})\n"
                '(features,) = session.run(None, {"images": images.numpy()})')  # fmt: skip


FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (Timm, Torchvision, Safetensors, Onnx, TorchExport)}
