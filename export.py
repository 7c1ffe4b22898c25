"""A pretrained backbone for other libraries: a file, what it is (<out>.json), and a model card (<out>.md).

    python export.py --pretrained_weights R/checkpoint.pth --format timm --out exported/clever.pth
    python export.py --pretrained_weights R/checkpoint.pth --format onnx --part main_part --out exported/ir.onnx

Formats:
    timm          weights for timm.create_model(..., checkpoint_path=F), as .pth or .safetensors: ViT, ResNet, timm's models
    torchvision   weights (.pth) for torchvision's resnet18 and resnet50
    safetensors   weights of any backbone, with the arguments of the pretraining; `load_backbone` reads it, too
    onnx          a program (.onnx), from images [B, 3, S, S] to features
    torch_export  a program (.pt2) of torch.export, likewise
The model card says how to load the file. Before a file gets its name, it is read with the library that it is for, and its
features of random images are compared with those of the checkpoint.
"""

import argparse
import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch

from clever import arguments, utils
from clever.entry import describe_failure, run_entry_point
from clever.evaluation.export_formats import (
    FORMATS,
    Features,
    Format,
    Network,
)
from clever.evaluation.names import PARTS, part_flag
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, load_pretrained
from clever.locking import locked
from clever.models.heads import Split
from clever.utils import InputError, describe_error
from vmamba import is_config_name

TOLERANCE = 1e-5  # largest difference of features, as a fraction of the largest feature
BATCHES = (1, 3)  # numbers of random images to compare; programs are traced with another one


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--format", required=True, help=f"{', '.join(FORMATS)}; see above")
    add("--part", type=part_flag, default="ALL", help="ALL, main_part (IR) or else_part (EF): which part of the representation "
        "the file returns. A file of the format safetensors always holds the whole backbone; <out>.json says which columns "
        "are the part")  # fmt: skip
    add("--out", required=True, help="file to write")
    add("--overwrite", action="store_true", help="replace a file that exists")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values and missing packages, before anything is read or written."""
    arguments.check_choices("format", [args.format], FORMATS)
    arguments.check_choices("part", [args.part], PARTS)
    suffixes, suffix = FORMATS[args.format].suffixes, Path(args.out).suffix
    if suffix not in suffixes:
        raise InputError(f"--out {args.out}: with --format {args.format} its name must end with {' or '.join(suffixes)}")
    modules = (*FORMATS[args.format].packages, *(("safetensors",) if suffix == ".safetensors" else ()))
    arguments.check_installed(f"--format {args.format}", modules)
    arguments.check_writable(Path(args.out).parent, "--out")
    arguments.check_outputs(args, outputs(args.out))


def outputs(out: str | Path) -> tuple[Path, Path, Path]:
    """The file, its sidecar and its model card."""
    return Path(out), Path(f"{out}.json"), Path(f"{out}.md")


# --- the network and its description -------------------------------------------------------------------------------------


def column_ranges(pretrained: Pretrained) -> dict[str, list[int]]:
    """First column and end of each part in the representation. A dino network has only ALL."""
    dim = pretrained.backbone.embed_dim
    if not pretrained.has_parts:
        return {"ALL": [0, dim]}
    ir, _ = Split(dim, pretrained.hp1).widths
    return {"ALL": [0, dim], "IR": [0, ir], "EF": [ir, dim]}


def training_args(pretrained: Pretrained) -> dict[str, Any]:
    """Arguments of the pretraining, as far as the checkpoint has them, with those that loading the backbone needs."""
    needed = {
        "arch": pretrained.arch, "patch_size": pretrained.options["patch_size"], "net": pretrained.net,
        "hp1": float(pretrained.hp1), "global_crops_size": pretrained.options["img_size"], "mean": pretrained.mean,
        "std": pretrained.std,
    }  # fmt: skip
    return json.loads(json.dumps(pretrained.training_args | needed, default=str))  # the originals' contain other types


def network_to_export(args: argparse.Namespace, pretrained: Pretrained) -> Network:
    """What is exported. Raises InputError if the format cannot express it."""
    pretrained.check_part(PARTS[args.part], "--part")
    trained_size = pretrained.options["img_size"]
    if pretrained.img_size != trained_size and not FORMATS[args.format].is_program:
        raise InputError(f"--img_size {pretrained.img_size}: weights are exported for {trained_size} pixels, the size of the "
                         "pretraining; for another size choose onnx or torch_export")  # fmt: skip
    return Network(
        backbone=pretrained.backbone,
        arch=pretrained.arch,
        img_size=pretrained.img_size,
        columns=None if args.part == "ALL" else tuple(column_ranges(pretrained)[PARTS[args.part]]),
        description={"args": training_args(pretrained), "epoch": pretrained.epochs},
    )


def sidecar(args: argparse.Namespace, pretrained: Pretrained, target: Format, difference: float) -> dict[str, Any]:
    """What <out>.json says: everything that is needed to use the file, and where it comes from."""
    columns, size = column_ranges(pretrained), pretrained.img_size
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "torchvision", *target.packages)}
    return {
        "kind": "export", "format": args.format, "part": args.part, "file": Path(args.out).name,
        "usage": target.usage(Path(args.out).name).splitlines(), "model": target.model(),
        "input": {"img_size": size, "resize": round(size * 256 / 224), "interpolation": "bicubic",
                  "mean": list(pretrained.mean), "std": list(pretrained.std)},
        "dim": pretrained.backbone.embed_dim, "hp1": float(pretrained.hp1), "columns": columns[PARTS[args.part]],
        "ir_columns": columns.get("IR"), "ef_columns": columns.get("EF"), **pretrained.record(),
        "largest_difference": difference, "versions": versions,
        "training_args": training_args(pretrained),
    }  # fmt: skip


CARD = """\
# {name}

Features of images by {net} ([CLeVER](https://arxiv.org/abs/2406.00262), [DINO](https://arxiv.org/abs/2104.14294)), \
format {format}.

| | |
| --- | --- |
| architecture | {arch} |
| this file returns | {part} |
| representation | {dim} columns; {split} |
| images | {img_size} x {img_size} pixels |
| mean, std | {mean}, {std} (pixels in 0..1) |
| pretraining | {pretrained_epochs} epochs, views `{aug}`, seed {pretraining_seed} |
| fingerprint of the weights | `{backbone}` |

## Usage

```python
from torchvision import transforms

transform = transforms.Compose([
    transforms.Resize({resize}, interpolation=transforms.InterpolationMode.BICUBIC),
    transforms.CenterCrop({img_size}),
    transforms.ToTensor(),
    transforms.Normalize({mean}, {std}),
])
images = transform(image.convert("RGB"))[None]  # of a PIL image: [1, 3, {img_size}, {img_size}]
```

```python
{usage}
```

## Arguments of the pretraining

```json
{args}
```
"""


def model_card(record: dict[str, Any]) -> str:
    """Markdown from the sidecar."""
    part = {"ALL": "the whole representation", "IR": "the invariant representation (IR)", "EF": "the equivariant factor (EF)"}
    part = part[PARTS[record["part"]]]
    if record["format"] == "safetensors" and record["part"] != "ALL":
        part = "the whole representation; columns {}:{} are ".format(*record["columns"]) + part
    split = "no parts"
    if record["ir_columns"]:
        split = "IR {}:{}, ".format(*record["ir_columns"]) + "EF {}:{}".format(*record["ef_columns"]) + f", hp1 {record['hp1']}"
    texts = {"name": record["file"], "part": part, "split": split, "usage": "\n".join(record["usage"]),
             "args": json.dumps(record["training_args"], indent=1)}  # fmt: skip
    return CARD.format(**record | record["input"] | texts)


# --- writing and checking ------------------------------------------------------------------------------------------------


@torch.no_grad()
def largest_difference(network: Network, features: Features) -> float:
    """Largest difference between the features of random images and those of the checkpoint, relative to the largest feature."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch in BATCHES:
        images = torch.randn(batch, 3, network.img_size, network.img_size, generator=generator)
        expected, found = network.features(images), features(images)  # B, P
        if not expected.isfinite().all():
            raise InputError("--pretrained_weights: the features of random images are not finite, the network is damaged")
        if found.shape != expected.shape or not found.isfinite().all():
            return math.inf
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)))
    return worst


def export(args: argparse.Namespace, pretrained: Pretrained) -> float:
    """Writes the file, reads it, compares; only then it gets its name. Returns the largest difference of the features."""
    network = network_to_export(args, pretrained)
    target = FORMATS[args.format](network)
    out = Path(args.out)
    if target.is_program and is_config_name(network.arch):
        print(f"tracing {network.arch}: a large VMamba takes minutes", flush=True)
    with utils.unfinished(out) as folder:
        draft, draft_json, draft_card = outputs(folder / out.name)
        difference = write_and_compare(network, target, draft)
        record = sidecar(args, pretrained, target, difference)
        utils.save_json(record, draft_json)
        utils.write_text_atomically(model_card(record), draft_card)
        for source, final in zip((draft_json, draft_card, draft), (*outputs(out)[1:], out), strict=True):
            source.replace(final)  # the file itself last
    return difference


def write_and_compare(network: Network, target: Format, path: Path) -> float:
    """Writes the file, reads it with its library, and returns the largest difference of the features.

    Raises InputError, which names the format, if the library cannot hold the network or gives other features.
    """
    failed = f"--format {target.name}: {network.arch}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporters warn about themselves; what they wrote is checked
            target.write(path)
            difference = largest_difference(network, target.read(path))
    except InputError:
        raise
    except Exception as error:  # of many types, by the code of any network and library
        if describe_failure(error):  # such as a full disk: not the format's fault
            raise
        raise InputError(f"{failed} cannot be exported ({describe_error(error)[:300]}); choose another format") from error
    if not difference <= TOLERANCE:
        raise InputError(f"{failed} has other features there, which differ by {difference:.1e} of the largest; "
                         "choose another format")  # fmt: skip
    return difference


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    pretrained = load_pretrained(args, torch.device("cpu"))
    with locked(args.out):
        difference = export(args, pretrained)
    print(f"wrote {args.out}: {args.part} of {pretrained.net} {pretrained.arch}, format {args.format}; "
          f"largest difference {difference:.1e} of the largest feature")  # fmt: skip
    print(f"how to load it: {args.out}.md; everything about it: {args.out}.json")
    if args.format == "safetensors" and args.part != "ALL":
        first, end = column_ranges(pretrained)[PARTS[args.part]]
        print(f"the file holds the whole backbone; the part is columns {first}:{end} of its output")


if __name__ == "__main__":
    run_entry_point(main)
