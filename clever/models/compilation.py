"""--compile: torch.compile for the blocks of a backbone."""

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from clever.arguments import bool_flag
from clever.utils import describe_error

MAX_VERSIONS = 64  # of one kind of block: widths, image sizes, training and evaluation


def add_compile_argument(parser: argparse._ActionsContainer) -> None:
    about = "compile the backbone's blocks with torch.compile, which takes minutes at the start; hardly faster on a CPU"
    parser.add_argument("--compile", type=bool_flag, default=False, help=about)


def compile_blocks(backbones: Sequence[nn.Module], device: torch.device) -> None:
    """Compiles the blocks of backbones in place, anew for every size of images; the names of weights stay as they are.

    Where torch.compile does not work, for lack of a C++ compiler or of Triton, a line says why, and nothing is changed.
    """
    blocks = [block for backbone in backbones for block in residual_blocks(backbone)]
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # whatever is missing, networks run without
        print(f"--compile true: torch.compile does not work here, the run goes on without it ({describe_error(error)[:300]})")
        return
    torch._dynamo.config.cache_size_limit = max(MAX_VERSIONS, torch._dynamo.config.cache_size_limit)
    for block in blocks:
        block.compile(dynamic=False)  # those of one kind share their code
    print(f"compiled blocks: {len(blocks)}; the first steps take minutes")


def residual_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose class is called ...Block or Bottleneck, ours, torchvision's or timm's."""
    for module in network.children():
        if type(module).__name__.endswith(("Block", "Bottleneck")):
            yield module
        else:
            yield from residual_blocks(module)
