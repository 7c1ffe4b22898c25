"""CLeVER's objective: DINO's loss on the IR, different views made orthogonal on the EF, and the regulariser of the two heads.

Shapes: K, K2 outputs of the IR head and of the EF head; V views of the student; Q = 2 global views that the teacher sees.
"""

from typing import Any

import torch
import torch.nn as nn

from clever.methods.dino import DINOLoss
from clever.methods.pairs import COSINE


class CLeVERLoss(DINOLoss):
    """DINO's loss on the invariant representation (IR), and different views made orthogonal on the equivariant factor (EF).

    CLeVER (arXiv 2406.00262), section 3:

        DIR  = DINOLoss(student_ir, teacher_ir)
        t2   = softmax((teacher_ef - center2) / teacher_temp)        # Q, B, K2
        s2   = softmax(student_ef / student_temp)                    # V, B, K2
        DVR  = mean of cosine(t2[q], s2[v])   over q, v != q, and the batch
        reg  = | sum of head's parameters squared - sum of head2's parameters squared |
        loss = DIR + sep_lambd * DVR + reg_lambd * reg

    DVR in closed form, with p_hat[v] = s2[v] / |s2[v]| and R[v] the sum of t2[q] / |t2[q]| over q != v:

        DVR = 1/T * sum_v <R[v], p_hat[v]>
        d DVR / d student_ef[v] = p_hat[v] * (R[v] - <R[v], p_hat[v]> p_hat[v]) / (T * student_temp)

    Args:
        out_dim, DVR_out_dim: K and K2; each head has a centre of its own.
        sep_lambd: weight of DVR.
        reg_lambd: weight of the regulariser.
        heads: the student's IR head and EF head, for the regulariser; None: there is no such term.
        *args, **kwargs: the other arguments of `DINOLoss`.
    """

    def __init__(
        self,
        out_dim: int,
        DVR_out_dim: int,
        *args: Any,
        sep_lambd: float = 1.0,
        reg_lambd: float = 0.0,
        heads: tuple[nn.Module, nn.Module] | None = None,
        **kwargs: Any,
    ):
        super().__init__(out_dim, *args, **kwargs)
        self.sep_lambd, self.reg_lambd = sep_lambd, reg_lambd
        self.heads = heads  # in a tuple, which keeps their parameters out of this module's own
        self.register_buffer("center2", torch.zeros(1, DVR_out_dim))

    def forward(
        self,
        student: tuple[torch.Tensor, torch.Tensor],
        teacher: tuple[torch.Tensor, torch.Tensor],
        epoch: int,
        update_center: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Pairs (IR, EF) of logits, student [V*B, K] and [V*B, K2], teacher [Q*B, K] and [Q*B, K2] -> terms of the loss.

        Returns {"loss", "loss_DIR", "loss_DVR"}, and with `heads` also "loss_student_reg", which is already weighted.
        """
        (student_ir, student_ef), (teacher_ir, teacher_ef) = student, teacher
        loss_dir = self._cross_entropy_of_views(student_ir, teacher_ir, epoch)
        loss_dvr, _ = self._mean_over_pairs(student_ef, teacher_ef, self.center2, epoch, COSINE)
        self._update_center("center", teacher_ir, update_center)
        self._update_center("center2", teacher_ef, update_center)
        terms = {"loss": loss_dir + self.sep_lambd * loss_dvr, "loss_DIR": loss_dir, "loss_DVR": loss_dvr}
        if self.heads is not None:
            terms["loss_student_reg"] = self.reg_lambd * head_regularizer(*self.heads)
            terms["loss"] = terms["loss"] + terms["loss_student_reg"]
        return terms

    def telemetry(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As DINO's, for the IR head, and the norm of the EF head's centre."""
        return self._telemetry_of_head(terms["loss_DIR"]) | {"center2_norm": self.center2.norm()}


class _SquaredNorm(torch.autograd.Function):
    """Sum of squares: rows in the tensor's type, their sum in float64, without a temporary tensor of the same size."""

    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return torch.linalg.vector_norm(p, dim=-1).double().square().sum()

    @staticmethod
    def backward(ctx, grad_output):
        (p,) = ctx.saved_tensors
        return p * (2 * grad_output).to(p.dtype)


def head_regularizer(head: nn.Module, head2: nn.Module) -> torch.Tensor:
    """|sum p^2 over head - sum p^2 over head2| over all parameters, including the frozen `weight_g`.

    CLeVER (arXiv 2406.00262), section 3: the heads keep equal norms, so that neither of them collapses. The difference of two
    large sums is taken in float64; in float32 it can lose all of its digits.
    """
    squared_norms = [torch.stack([_SquaredNorm.apply(p) for p in h.parameters()]).sum() for h in (head, head2)]
    return (squared_norms[0] - squared_norms[1]).abs().float()
