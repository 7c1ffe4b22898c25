"""--compile: torch.compile for the blocks of a backbone."""

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from clever.arguments import bool_flag
from clever.distributed import is_distributed
from clever.models.backbones import has_batch_norm
from clever.utils import describe_error


def add_compile_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--compile", type=bool_flag, default=False, help="torch.compile for the blocks; a CPU gains little")


def compile_blocks(backbones: Sequence[nn.Module], device: torch.device, dynamic: bool | None = False) -> None:
    """Compiles the blocks of backbones in place, for every shape of their input; the names of weights stay as they are.

    Where that is not possible, a line says why, and nothing is changed. `dynamic` None, for evaluations, whose last batch is
    smaller: from the second shape on, for all of them.
    """
    blocks = [block for backbone in backbones for block in residual_blocks(backbone)]
    reason = "" if blocks else "no blocks are known in this backbone"
    if is_distributed() and any(map(has_batch_norm, backbones)):
        reason = "torch.compile does not support batch norm over several processes"
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
    except Exception as error:  # no C++ compiler, no Triton, an old GPU: networks run without
        reason = f"torch.compile does not work here ({describe_error(error)[:300]})"
    if reason:
        print(f"--compile true: {reason}; nothing is compiled")
        return
    versions = 64 + 4 * len(blocks)  # at most, of one kind of block; timm's differ in their rate of stochastic depth
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = versions
    for block in blocks:
        block.compile(dynamic=dynamic)
    print(f"compiled blocks: {len(blocks)}; the first steps take minutes")


def residual_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose class is called ...Block or Bottleneck, ours, torchvision's or timm's."""
    for module in network.children():
        is_block = type(module).__name__.endswith(("Block", "Bottleneck"))
        yield from [module] if is_block else residual_blocks(module)
