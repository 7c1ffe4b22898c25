"""Time of the losses, forward and backward, beside the limit of the memory and the losses written pair by pair.

    python -m scripts.bench.losses                                    # batch 8, this machine
    python -m scripts.bench.losses --batch_size 64 --dtype bf16       # on a GPU

Columns, in milliseconds:
- ours: what training computes (on a GPU by the Triton kernels), with the update of the centres.
- plain PyTorch: the same closed form without the kernels, as on a CPU.
- pair by pair: a softmax and a log-softmax for each of the pairs of views, as the originals write it.
- memory: lower bound, the time to read the logits of student and teacher once and to write the gradient once, in the logits'
  type, at the rate of a copy measured in the same run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from clever.arguments import ArgumentParser, check_positive
from clever.entry import run_entry_point
from clever.methods import pairs
from clever.methods.clever import CLeVERLoss
from clever.methods.dino import DINOLoss
from clever.utils import save_json
from scripts.bench.pretrain import StraightforwardLoss
from scripts.bench.scan import DTYPES, copy_rate, fastest

TEMPERATURES = (0.04, 0.04, 0, 1)  # of the teacher: at the start, at the end, epochs of warm-up, epochs


def get_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", choices=("dino", "CLeVER"), default=["dino", "CLeVER"])
    parser.add_argument("--out_dim", type=int, default=65536, help="outputs of the head, CLeVER: of the IR head")
    parser.add_argument("--DVR_out_dim", type=int, default=16384, help="outputs of CLeVER's EF head")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--views", type=int, default=10, help="views per image, 2 of which are global")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the logits")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions on a CPU; the fastest counts")
    parser.add_argument("--output", type=Path, help="JSON file to save the numbers in")
    args = parser.parse_args()
    check_positive(args, "out_dim", "DVR_out_dim", "batch_size", "views", "repeats")
    return args


def loss_functions(sizes: list[int], args: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], int]:
    """The three implementations, forward and backward on random logits of heads with `sizes` outputs; and the bytes to move."""
    like = {"device": args.device, "dtype": DTYPES[args.dtype]}
    students = [(0.2 * torch.randn(args.views * args.batch_size, k, **like)).requires_grad_() for k in sizes]
    teachers = [0.2 * torch.randn(2 * args.batch_size, k, **like) for k in sizes]
    ours = DINOLoss(*sizes, args.views, *TEMPERATURES) if len(sizes) == 1 else CLeVERLoss(*sizes, args.views, *TEMPERATURES)
    ours, plain = ours.to(args.device), StraightforwardLoss(args.views, sizes, TEMPERATURES[0])

    def run_ours() -> object:
        inputs = (students[0], teachers[0]) if len(sizes) == 1 else (students, teachers)
        return torch.autograd.grad(ours(*inputs, epoch=0)["loss"], students)

    def run_plain() -> object:
        with mock.patch.object(pairs, "runs_triton", lambda _: False):
            return run_ours()

    def run_pairs() -> object:
        return torch.autograd.grad(plain(students, teachers), students)

    moved = 2 * sum(each.nbytes for each in students) + sum(each.nbytes for each in teachers)
    return {"ours": run_ours, "plain PyTorch": run_plain, "pair by pair": run_pairs}, moved


def main() -> None:
    args = get_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rate = copy_rate(args.device)
    print(f"torch {torch.__version__}, {device}, {rate / 1e9:.0f} GB/s (copy); {args.dtype}, batch {args.batch_size}, "
          f"{args.views} views, out_dim {args.out_dim}, DVR_out_dim {args.DVR_out_dim}; milliseconds\n")  # fmt: skip
    print("| net | ours | plain PyTorch | pair by pair | memory | ours / memory | pair by pair / ours |\n" + "|---" * 7 + "|")
    rows = {}
    for net in args.net:
        functions, moved = loss_functions([args.out_dim] + [args.DVR_out_dim] * (net == "CLeVER"), args)
        times = fastest(functions, args.repeats, args.device) | {"memory": moved / rate}
        ratios = times["ours"] / times["memory"], times["pair by pair"] / times["ours"]
        print(f"| {net} | " + " | ".join(f"{1e3 * each:.3f}" for each in times.values())
              + f" | {ratios[0]:.2f} | {ratios[1]:.1f} |", flush=True)  # fmt: skip
        rows[net] = times
    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        settings |= {"machine": device, "torch": torch.__version__}
        save_json({"kind": "bench_losses", **settings, "seconds": rows}, args.output)


if __name__ == "__main__":
    run_entry_point(main)
