"""A pretrained backbone for other libraries: a file, what it is (<out>.json), and a model card (<out>.md).

    python export.py --pretrained_weights R/checkpoint.pth --format timm --out exported/clever.pth
    python export.py --pretrained_weights R/checkpoint.pth --format onnx --part main_part --out exported/ir.onnx

Formats:
    timm          weights for timm.create_model(..., checkpoint_path=F), as .pth or .safetensors: ViT, ResNet, timm's models
    torchvision   weights (.pth) for torchvision's resnet18 and resnet50
    safetensors   weights of any backbone, with the arguments of the pretraining; `load_backbone` reads it, too
    onnx          a program (.onnx), from images [B, 3, S, S] to features
    torch_export  a program (.pt2) of torch.export, likewise
The model card says how to load the file. Before the file gets its name, this code is run, and the features of random images are
compared with those of the checkpoint.
"""

import argparse
import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from clever import arguments, utils
from clever.entry import run_entry_point
from clever.evaluation.export_formats import FORMATS, Network, timm_model
from clever.evaluation.names import PARTS, part_flag
from clever.evaluation.pretrained import Pretrained, add_backbone_arguments, check_part, load_pretrained
from clever.locking import locked
from clever.utils import InputError

TOLERANCE = 1e-5  # largest difference of features, as a fraction of the largest feature
ENDINGS = (".json", ".md", "")  # of the description, the model card, and the file itself
BATCHES = (1, 3)  # numbers of random images to compare; programs are traced with another one


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_backbone_arguments(parser, compiles=False)
    add = parser.add_argument
    add("--format", required=True, choices=FORMATS, help="see above")
    add("--part", type=part_flag, default="ALL", choices=PARTS, help="ALL, main_part (IR) or else_part (EF): what programs "
        "return. Weights are those of the whole backbone, and the card selects the columns")  # fmt: skip
    add("--out", required=True, help="file to write")
    add("--overwrite", action="store_true", help="replace a file that exists")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values and missing packages, before anything is read or written."""
    suffixes, suffix = FORMATS[args.format].suffixes, Path(args.out).suffix
    if suffix not in suffixes:
        raise InputError(f"--out {args.out}: with --format {args.format} its name must end with {' or '.join(suffixes)}")
    arguments.check_installed(f"--format {args.format}", FORMATS[args.format].packages)
    arguments.check_writable(Path(args.out).parent, "--out")
    arguments.check_outputs(args, [Path(args.out + ending) for ending in ENDINGS])


def column_ranges(pretrained: Pretrained) -> dict[str, list[int]]:
    """First column and end of each part that the representation has."""
    dim, split = pretrained.backbone.embed_dim, pretrained.split
    return {"ALL": [0, dim]} | ({"IR": [0, split.ir.stop], "EF": [split.ir.stop, dim]} if split else {})


def training_args(pretrained: Pretrained) -> dict[str, Any]:
    """Arguments of the pretraining, as far as the checkpoint has them, with those that loading the backbone needs."""
    needed = {
        "arch": pretrained.arch, "patch_size": pretrained.options["patch_size"], "net": pretrained.net,
        "hp1": float(pretrained.hp1), "global_crops_size": pretrained.options["img_size"], "mean": pretrained.mean,
        "std": pretrained.std,
    }  # fmt: skip
    return json.loads(json.dumps(pretrained.training_args | needed, default=str))  # the originals' contain other types


def describe(args: argparse.Namespace, pretrained: Pretrained, network: Network, difference: float) -> dict[str, Any]:
    """What <out>.json says: everything that is needed to use the file, and where it comes from."""
    columns, size, packages = column_ranges(pretrained), pretrained.img_size, FORMATS[args.format].packages
    usage = FORMATS[args.format].usage(network, Path(args.out).name)
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "torchvision", *packages)}
    return {
        "kind": "export", "format": args.format, "part": args.part, "file": Path(args.out).name,
        "usage": usage.splitlines(), "model": timm_model(network) if "timm" in packages else None,
        "input": {"img_size": size, "resize": round(size * 256 / 224), "interpolation": "bicubic",
                  "mean": list(pretrained.mean), "std": list(pretrained.std)},
        "dim": pretrained.backbone.embed_dim, "hp1": float(pretrained.hp1), "columns": columns[PARTS[args.part]],
        "ir_columns": columns.get("IR"), "ef_columns": columns.get("EF"), **pretrained.record(),
        "largest_difference": difference, "versions": versions,
        "training_args": training_args(pretrained),
    }  # fmt: skip


CARD = """\
# {file}

Features of images by {net} ([CLeVER](https://arxiv.org/abs/2406.00262), [DINO](https://arxiv.org/abs/2104.14294)).

| | |
| --- | --- |
| architecture | {arch}, format {format} |
| part, columns of the representation | {part}, {columns} of {dim} |
| IR, EF | {ir_columns}, {ef_columns}, hp1 {hp1} |
| pretraining | {pretrained_epochs} epochs, views `{aug}`, seed {pretraining_seed}; more in {file}.json |
| fingerprint of the weights | `{backbone}` |

```python
from torchvision import transforms

transform = transforms.Compose([
    transforms.Resize({resize}, interpolation=transforms.InterpolationMode.BICUBIC),
    transforms.CenterCrop({img_size}),
    transforms.ToTensor(),
    transforms.Normalize({mean}, {std}),
])
images = transform(image.convert("RGB"))[None]  # of a PIL image: [1, 3, {img_size}, {img_size}]

{code}
```
"""


@torch.no_grad()
def largest_difference(network: Network, usage: str) -> float:
    """Largest difference of features by the lines of a card from the network's, for random images, by the largest feature."""
    generator, differences = torch.Generator().manual_seed(0), []
    for batch in BATCHES:
        scope = {"images": torch.randn(batch, 3, network.img_size, network.img_size, generator=generator)}
        exec(usage, scope)
        expected = network(scope["images"])  # B, P
        differences.append((torch.as_tensor(scope["features"]) - expected).abs().max() / expected.abs().max())
    return float(torch.stack(differences).nan_to_num(torch.inf).max())


def export(args: argparse.Namespace, network: Network, pretrained: Pretrained) -> float:
    """Writes the file, reads it, compares; only then it gets its name. Returns the largest difference of the features."""
    out, target = Path(args.out), FORMATS[args.format]
    with utils.unfinished(out) as folder:
        draft = folder / out.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporters warn about themselves; what they wrote is checked
            usage = target.usage(network, str(draft))
            target.write(network, draft)
            difference = largest_difference(network, usage)
        if difference > TOLERANCE:
            raise InputError(f"--format {args.format}: {network.arch} has other features there (difference {difference:.1e} of "
                             "the largest); choose another format")  # fmt: skip
        record = describe(args, pretrained, network, difference)
        utils.save_json(record, f"{draft}.json")
        card = CARD.format(**record | record["input"], code="\n".join(record["usage"]))
        utils.write_text_atomically(card, f"{draft}.md")
        for ending in ENDINGS:
            Path(f"{draft}{ending}").replace(f"{out}{ending}")
    return difference


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    pretrained = load_pretrained(args, torch.device("cpu"))
    check_part(PARTS[args.part], pretrained.split, "--part")
    trained_size = pretrained.options["img_size"]
    if pretrained.img_size != trained_size and not FORMATS[args.format].is_program:
        raise InputError(f"--img_size {pretrained.img_size}: weights are exported for the pretraining's {trained_size} pixels; "
                         "for another size choose onnx or torch_export")  # fmt: skip
    columns = None if args.part == "ALL" else tuple(column_ranges(pretrained)[PARTS[args.part]])
    description = {"args": training_args(pretrained), "epoch": pretrained.epochs}
    network = Network(pretrained.backbone, pretrained.arch, pretrained.img_size, columns, description)
    with locked(args.out):
        difference = export(args, network, pretrained)
    print(f"wrote {args.out}: largest difference {difference:.1e} of the largest feature; how to load it: {args.out}.md")


if __name__ == "__main__":
    run_entry_point(main)
