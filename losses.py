"""The objective: DINO's loss, CLeVER's loss, their centres, and the regulariser of CLeVER's two heads.

Shapes: K, K2 outputs of the head and of CLeVER's EF head; V views of the student, the two global ones first; Q = 2 global
views that the teacher sees.

Both losses are means over all pairs (q, v) of a teacher view and a different student view. They are computed in closed form,
which visits every student view once: written pair by pair they would need 18 softmaxes of the student at 10 views. On a GPU
loss_kernels.py computes them. Elsewhere the gradient is computed together with the value and kept for the backward pass.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from distributed import all_reduce_sum, get_world_size
from utils import InputError

TEACHER_VIEWS = 2


class _MeanOverPairs(torch.autograd.Function):
    """Mean over pairs of different views of a loss that is linear in the teacher's target.

    Because of the linearity, all pairs (q, v) with the same v need only the sum of their targets and one call of
    `view_loss(logits / temperature [B, K], summed targets [B, K], n)`. It returns the sum of the n pairs' losses over the
    batch, and its gradient with respect to the first argument. n is the number of teacher views that v is compared with:
    1 for a global view, which is not compared with itself, and 2 for a local view.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature: float, view_loss: Callable):
        views, batch, _ = student.shape  # V, B, K
        n_teacher = len(teacher)
        n_terms = (views - 1) * n_teacher * batch
        all_targets = teacher.sum(0)  # B, K
        total = torch.zeros((), device=student.device)
        grad = torch.empty_like(student)  # V, B, K
        # In half precision the gradient's entries, divided by n_terms, would underflow before the gradient scaler of the
        # backward pass can help: a power of two keeps them in range until then.
        ctx.grad_scale = 2.0 ** (round(math.log2(n_terms * temperature)) + 10) if student.dtype == torch.float16 else 1.0
        for v in range(views):
            targets, n = (all_targets - teacher[v], n_teacher - 1) if v < n_teacher else (all_targets, n_teacher)
            value, view_grad = view_loss(student[v].float() / temperature, targets, n)
            total += value
            grad[v] = view_grad.mul_(ctx.grad_scale / (n_terms * temperature))
        ctx.save_for_backward(grad)
        return total / n_terms

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        # In place, to save the memory of a second [V, B, K]. A second backward pass raises autograd's own error.
        return grad.mul_((grad_output / ctx.grad_scale).to(grad.dtype)), None, None, None


def _cross_entropy(logits, targets, n):
    """-<P, log softmax(x)> where the rows of P sum to n; gradient n softmax(x) - P."""
    log_p = F.log_softmax(logits, dim=-1)  # B, K
    value = -torch.dot(targets.flatten(), log_p.flatten())
    return value, log_p.exp_().mul_(n).sub_(targets)


def _cosine(logits, directions, n):
    """<R, p_hat> with p_hat = p / |p|, p = softmax(x), R the sum of n unit vectors; gradient p_hat * (R - <R, p_hat> p_hat)."""
    p_hat = F.normalize(F.softmax(logits, dim=-1), dim=-1)  # B, K
    cosine = torch.einsum("bk,bk->b", directions, p_hat)[:, None]  # B, 1
    return cosine.sum(), torch.addcmul(directions, cosine, p_hat, value=-1).mul_(p_hat)


class PairLoss(NamedTuple):
    """A loss of pairs of views that is linear in the teacher's target.

    view_loss: the function of student logits that `_MeanOverPairs` describes.
    power: the teacher's target is exp(p y - ...), normalised such that the sum of its p-th powers is 1: its softmax (1), or the
        softmax's direction (2).
    """

    view_loss: Callable
    power: int


CROSS_ENTROPY, COSINE = PairLoss(_cross_entropy, 1), PairLoss(_cosine, 2)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def mean_over_pairs(
    student: torch.Tensor,
    teacher: torch.Tensor,
    center: torch.Tensor,
    student_temp: float,
    teacher_temp: float,
    pair_loss: PairLoss,
    kernels: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mean of `pair_loss` over all pairs of different views, and of CROSS_ENTROPY the teacher's mean entropy in nats.

    Args:
        student: logits [V, B, K], the global views first.
        teacher: logits [Q, B, K] of the global views.
        center: [1, K], subtracted from the teacher's logits.
        kernels: use the Triton kernels (loss_kernels.py); default: if the logits are on a GPU.
    """
    if (student.is_cuda and _has_triton()) if kernels is None else kernels:
        import loss_kernels

        return loss_kernels.mean_over_pairs(student, teacher, center, student_temp, teacher_temp, pair_loss.power)
    log_t = F.log_softmax((teacher.float() - center) / teacher_temp, dim=-1)  # Q, B, K
    t = log_t.exp()
    if pair_loss.power == 1:
        targets, entropy = t, -torch.einsum("qbk,qbk->qb", t, log_t).mean()
    else:
        targets, entropy = F.normalize(t, dim=-1), None
    return _MeanOverPairs.apply(student, targets, student_temp, pair_loss.view_loss), entropy


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's softmax, over all pairs of different views.

    DINO (arXiv 2104.14294), section 3.1:

        t = softmax((teacher - center) / teacher_temp)               # Q, B, K
        s = log_softmax(student / student_temp)                      # V, B, K
        loss = mean of -sum_k t[q] * s[v]   over q, v != q, and the batch
        center = m * center + (1 - m) * mean(teacher)                # after the loss

    In closed form, with P[v] the sum of t[q] over the n[v] views q != v and x[v] = student[v] / student_temp:

        loss = 1/T * sum_v ( n[v] * logsumexp(x[v]) - <P[v], x[v]> ),    T the number of pairs times the batch size
        d loss / d student[v] = (n[v] * softmax(x[v]) - P[v]) / (T * student_temp)

    Works with and without a process group; the centre is averaged over processes.

    Args:
        out_dim: K.
        ncrops: V.
        warmup_teacher_temp, teacher_temp: the teacher's temperature rises linearly from the first to the second ...
        warmup_teacher_temp_epochs: ... during these epochs, the first of `nepochs`.
        student_temp: the student's temperature.
        center_momentum: m, of the centre's moving average.

    Raises:
        InputError: the temperature's warm-up is longer than the run.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        if warmup_teacher_temp_epochs > nepochs:
            raise InputError(f"warmup_teacher_temp_epochs {warmup_teacher_temp_epochs}: longer than the run ({nepochs} epochs)")
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.teacher_temps = np.concatenate([warmup, np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp)])
        self.teacher_entropy = torch.zeros(())  # of the last call, in nats, mean over views and batch
        self._pending: dict[str, list[torch.Tensor]] = {}  # per centre, the teacher's means since its last update
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self, student: torch.Tensor, teacher: torch.Tensor, epoch: int, update_center: bool = True
    ) -> dict[str, torch.Tensor]:
        """Student logits [V*B, K] and teacher logits [Q*B, K] -> {"loss": 0-dim tensor}.

        With gradient accumulation, `update_center` is False for all micro-batches but the last: the centre is then
        updated once per optimizer step, with the mean over all micro-batches.
        """
        loss = self._cross_entropy_of_views(student, teacher, epoch)
        self._update_center("center", teacher, update_center)
        return {"loss": loss}

    def telemetry(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Figures to log about the last call, which returned `terms`; the first two can be compared between different K.

        normalized_loss: the cross-entropy divided by ln K. It is about 1 for a uniform output, and can exceed 1.
        teacher_entropy: the entropy of t divided by ln K; 1 for a uniform output.
        center_norm: the norm of the centre.
        """
        return self._telemetry_of_head(terms["loss"])

    def _telemetry_of_head(self, cross_entropy: torch.Tensor) -> dict[str, torch.Tensor]:
        log_k = math.log(self.center.shape[1])
        return {
            "normalized_loss": cross_entropy / log_k,
            "teacher_entropy": self.teacher_entropy / log_k,
            "center_norm": self.center.norm(),
        }

    def _cross_entropy_of_views(self, student, teacher, epoch):
        loss, self.teacher_entropy = self._mean_over_pairs(student, teacher, self.center, epoch, CROSS_ENTROPY)
        return loss

    def _mean_over_pairs(self, student, teacher, center, epoch, pair_loss):
        student = student.unflatten(0, (self.ncrops, -1))  # V, B, K
        teacher = teacher.unflatten(0, (TEACHER_VIEWS, -1))  # Q, B, K
        return mean_over_pairs(student, teacher, center, self.student_temp, float(self.teacher_temps[epoch]), pair_loss)

    @torch.no_grad()
    def _update_center(self, name: str, teacher: torch.Tensor, update: bool) -> None:
        pending = self._pending.setdefault(name, [])
        pending.append(teacher.mean(0, keepdim=True, dtype=torch.float32))  # 1, K
        if update:
            mean = all_reduce_sum(torch.stack(pending).mean(0)) / get_world_size()  # 1, K
            getattr(self, name).lerp_(mean, 1 - self.center_momentum)
            pending.clear()


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
