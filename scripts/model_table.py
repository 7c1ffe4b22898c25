"""Parameters and GFLOPs of the backbones, counted as in the paper.

    python -m scripts.model_table
    python -m scripts.model_table vit_tiny resnet18 convnext_tiny --img_size 96 > models.md

GFLOPs are counted by fvcore, in train mode and per image: a multiply-add is one operation, and normalisation and pooling
are included. So is attention, which consists of two plain matrix products on a CPU. As in the paper, VMamba's selective scan
is not included; the last column adds it, counted as by VMamba's authors (whose 4.91 for the tiny model includes a
classifier of 1000 classes).
"""

import sys
from collections import Counter

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from clever.arguments import ArgumentParser, check_positive
from clever.entry import run_entry_point
from clever.evaluation.tables import align
from clever.models.backbones import backbone_names, build_backbone
from clever.utils import InputError
from vmamba.selective_scan import scan_flops

HEADER = ("backbone", "dimensions", "params (M)", "GFLOPs", "with scan")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _count_scan(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of one 2D scan, separately for the projection of delta, which it contains, and for the scan itself."""
    x, _, dt_weight, A, *_ = (value.type().sizes() if value.isCompleteTensor() else None for value in inputs)
    batch, height, width, channels = x
    projection = batch * height * width * dt_weight[0] * dt_weight[1] * dt_weight[2]
    return Counter(linear=projection, scan=scan_flops(batch, 4, channels, height * width, A[1]))


def count_flops(model: nn.Module, img_size: int) -> tuple[float, float]:
    """Multiply-adds of one image's forward pass in train mode, on a CPU: without selective scans, and of the scans alone."""
    images = torch.randn(2, 3, img_size, img_size)  # batch norm needs more than one value per channel
    analysis = FlopCountAnalysis(model.train(), images)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.set_op_handle("clever::selective_scan_2d", _count_scan)
    total, scan = analysis.total(), analysis.by_operator()["scan"]
    return (total - scan) / len(images), scan / len(images)


def table_row(arch: str, img_size: int) -> tuple[str, ...]:
    """One row of the table, as text."""
    model = build_backbone(arch, img_size=img_size)
    params, (flops, scan) = count_parameters(model), count_flops(model, img_size)
    with_scan = f"{(flops + scan) / 1e9:.2f}" if scan else "-"
    return arch, str(model.embed_dim), f"{params / 1e6:.1f}", f"{flops / 1e9:.2f}", with_scan


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="ours or timm's; default: all of ours that support --img_size")
    parser.add_argument("--img_size", type=int, default=224, help="side of the square images, pixels")
    args = parser.parse_args()
    check_positive(args, "img_size")
    rows = []
    for arch in args.names or backbone_names():
        try:
            rows.append(table_row(arch, args.img_size))
        except InputError as error:
            if args.names:
                raise
            print(f"{arch} left out: {error}", file=sys.stderr)
    print(align([HEADER, *rows]))


if __name__ == "__main__":
    run_entry_point(main)
