"""CLeVER's objective.

Shapes: K, K2 outputs of the IR head and of the EF head; V views of the student; Q = 2 global views that the teacher sees.
"""

import argparse
import math
import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clever.arguments import check_not_negative
from clever.methods.dino import DINOLoss
from clever.methods.pairs import cosine_of_pairs
from clever.utils import InputError


class CLeVERLoss(DINOLoss):
    """DINO's loss on the invariant representation (IR), and different views made orthogonal on the equivariant factor (EF).

    CLeVER (arXiv 2406.00262), section 3:

        DIR  = DINOLoss(student_ir, teacher_ir)
        t2   = softmax((teacher_ef - center2) / teacher_temp)        # Q, B, K2
        s2   = softmax(student_ef / student_temp)                    # V, B, K2
        DVR  = mean of cosine(t2[q], s2[v])   over q, v != q, and the batch
        reg  = | sum of head's parameters squared - sum of head2's parameters squared |
        loss = DIR + sep_lambd * DVR + reg_lambd * reg

    Args:
        out_dim, DVR_out_dim: K and K2; each head has a centre of its own.
        heads: the student's IR head and EF head, for the regulariser; None: there is no such term.
        *args, **kwargs: the other arguments of `DINOLoss`.
    """

    about: ClassVar[str] = "IR and EF with a head each"
    split: ClassVar[bool] = True
    head_flags: ClassVar[tuple[str, ...]] = ("out_dim", "DVR_out_dim")

    def __init__(
        self, out_dim: int, DVR_out_dim: int, *args: Any, sep_lambd: float = 1.0, reg_lambd: float = 0.0,
        heads: tuple[nn.Module, nn.Module] | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(out_dim, *args, **kwargs)
        self.sep_lambd, self.reg_lambd = sep_lambd, reg_lambd
        self.heads = heads  # in a tuple, which keeps their parameters out of this module's own
        self.register_buffer("center2", torch.zeros(1, DVR_out_dim))

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        add = group.add_argument
        add("--hp1", type=float, default=0.8, help="share of the IR, in (0, 1); also for sie and --equiv_part EF")
        add("--DVR_out_dim", type=int, default=16384, help="outputs of the EF head")
        add("--sep_lambd", type=float, default=1.0, help="weight of the EF loss (DVR)")
        add("--reg_lambd", default="_reg0.001", help="weight of the regulariser of the two heads: _reg0.001, 0.001, or '' for "
            "none. Raise it if one of the heads collapses")  # fmt: skip

    @staticmethod
    def check_args(args: argparse.Namespace) -> None:
        check_not_negative(args, "sep_lambd")
        parse_reg_lambd(args.reg_lambd)

    @classmethod
    def from_args(cls, args: argparse.Namespace, heads: list[nn.Module]) -> "CLeVERLoss":
        weights = {"sep_lambd": args.sep_lambd, "reg_lambd": parse_reg_lambd(args.reg_lambd)}
        return cls(args.out_dim, args.DVR_out_dim, **weights, heads=tuple(heads), **cls.options(args))

    def forward(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], epoch: int, update_center: bool = True
    ) -> dict[str, Tensor]:
        """Pairs (IR, EF) of logits, student [V*B, K] and [V*B, K2], teacher [Q*B, K] and [Q*B, K2] -> terms of the loss.

        Returns {"loss", "loss_DIR", "loss_DVR"}, and with `heads` also "loss_student_reg", which is already weighted.
        """
        (student_ir, student_ef), (teacher_ir, teacher_ef) = student, teacher
        loss_dir = self.cross_entropy(student_ir, teacher_ir, epoch)
        loss_dvr = cosine_of_pairs(*self.pairs(student_ef, teacher_ef, self.center2, epoch))
        self.update_center("center", teacher_ir, update_center)
        self.update_center("center2", teacher_ef, update_center)
        terms = {"loss": loss_dir + self.sep_lambd * loss_dvr, "loss_DIR": loss_dir, "loss_DVR": loss_dvr}
        if self.heads is not None:
            terms["loss_student_reg"] = self.reg_lambd * head_regularizer(*self.heads)
            terms["loss"] = terms["loss"] + terms["loss_student_reg"]
        return terms

    def telemetry(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().telemetry(terms) | {"center2_norm": self.center2.norm()}


def head_regularizer(head: nn.Module, head2: nn.Module) -> Tensor:
    """|sum p^2 over head - sum p^2 over head2| over all parameters, including the frozen `weight_g`.

    The heads keep equal norms, so that neither of them collapses. In float32 the difference could lose all of its digits.
    """
    squares, squares2 = (
        sum(torch.linalg.vector_norm(p, dim=-1).double().square().sum() for p in h.parameters()) for h in (head, head2)
    )
    return (squares - squares2).abs().float()


def parse_reg_lambd(text: str) -> float:
    """The weight in '_reg0.001' (the original's spelling), '0.001', or '' (none). Raises InputError for anything else."""
    number = re.sub(r"^_?reg", "", text.strip())
    try:
        value = float(number) if text.strip() else 0.0
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"--reg_lambd {text!r}: must be a number >= 0, such as _reg0.001 or 0.001, or empty for none")
    return value
