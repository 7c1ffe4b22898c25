"""DINO's and CLeVER's losses, their centres, and the regulariser of the two heads.

Letters: B batch, K outputs of a head, V views of the student (two global ones first, then the local ones), Q = 2 views of the
teacher, T number of terms: pairs (q, v) of different views, times B.

Both losses are closed forms that visit every student view once (each pair on its own would need 18 softmaxes of the student at
10 crops). Their gradients are worked out together with their values and kept instead of activations.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from distributed import all_reduce_sum, get_world_size
from utils import InputError

TEACHER_VIEWS = 2


class _SumOverViews(torch.autograd.Function):
    """Mean over the T terms of a loss that falls apart into one part per student view.

    `view_loss(logits / temperature [B, K], targets [B, K], n)` returns the sum of the terms of one view and its gradient;
    targets is the sum over the n teacher views that show another crop.
    """

    @staticmethod
    def forward(ctx, student, teacher, temperature: float, view_loss: Callable):
        views, batch, _ = student.shape  # V, B, K
        n_teacher = len(teacher)
        n_terms = (views - 1) * n_teacher * batch
        all_targets = teacher.sum(0)  # B, K
        total = torch.zeros((), device=student.device)
        grad = torch.empty_like(student)  # V, B, K
        # Half precision would lose entries divided by T before the loss scaling of backward: a power of two holds them up.
        ctx.shift = 2.0 ** (round(math.log2(n_terms * temperature)) + 10) if student.dtype == torch.float16 else 1.0
        for v in range(views):
            targets, n = (all_targets - teacher[v], n_teacher - 1) if v < n_teacher else (all_targets, n_teacher)
            value, view_grad = view_loss(student[v].float() / temperature, targets, n)
            total += value
            grad[v] = view_grad.mul_(ctx.shift / (n_terms * temperature))
        ctx.save_for_backward(grad)
        return total / n_terms

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        # In place, to spare the memory of a second [V, B, K]; a second backward raises autograd's own error.
        return grad.mul_((grad_output / ctx.shift).to(grad.dtype)), None, None, None


def _cross_entropy(logits, targets, n):
    """-<P, log softmax(x)>, where P sums to n; gradient n softmax(x) - P."""
    log_p = F.log_softmax(logits, dim=-1)  # B, K
    value = -torch.dot(targets.flatten(), log_p.flatten())
    return value, log_p.exp_().mul_(n).sub_(targets)


def _cosine(logits, directions, n):
    """<R, p> / |p| with p = softmax(x) and R the sum of n unit vectors; gradient p * (R / |p| - <R, p> p / |p|^3)."""
    p = F.softmax(logits, dim=-1)  # B, K
    p = F.normalize(p, dim=-1)  # unit length from here on: the cosine does not see the scale
    cosine = torch.einsum("bk,bk->b", directions, p)[:, None]  # B, 1
    return cosine.sum(), torch.addcmul(directions, cosine, p, value=-1).mul_(p)


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centred, sharpened softmax and the student's, over all pairs of different views.

    DINO (arXiv 2104.14294), section 3.1. Works with and without a process group; the centre is averaged over processes.

    Args:
        out_dim: K; ncrops: V; student_temp, warmup_teacher_temp -> teacher_temp: temperatures, the teacher's rising linearly
        over warmup_teacher_temp_epochs of nepochs; center_momentum: of the moving average of the teacher's mean output.

    Raises InputError if the temperature's warm-up is longer than the run.
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
        self._pending: dict[str, list[torch.Tensor]] = {}  # teacher means since the last update of a centre
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: torch.Tensor, teacher: torch.Tensor, epoch: int, update_center: bool = True) -> torch.Tensor:
        """Student logits [V*B, K], teacher logits [2*B, K] -> loss.

        With gradient accumulation `update_center` is False but for the last micro-batch: the centre then moves once, by the
        mean over all of them.
        """
        loss = self._invariance(student, teacher, epoch)
        self._move_center("center", teacher, update_center)
        return loss

    def _invariance(self, student, teacher, epoch):
        log_p = F.log_softmax((teacher.float() - self.center) / self.teacher_temps[epoch], dim=-1)  # Q*B, K
        p = log_p.exp()
        self.teacher_entropy = -torch.einsum("bk,bk->b", p, log_p).mean()
        return self._over_pairs(student, p, _cross_entropy)

    def _over_pairs(self, student, targets, view_loss):
        student = student.unflatten(0, (self.ncrops, -1))  # V, B, K
        targets = targets.unflatten(0, (TEACHER_VIEWS, -1))  # Q, B, K
        return _SumOverViews.apply(student, targets, self.student_temp, view_loss)

    @torch.no_grad()
    def _move_center(self, name: str, teacher: torch.Tensor, update: bool) -> None:
        pending = self._pending.setdefault(name, [])
        pending.append(teacher.float().mean(0, keepdim=True))  # 1, K
        if update:
            mean = all_reduce_sum(torch.stack(pending).mean(0)) / get_world_size()  # 1, K
            getattr(self, name).lerp_(mean, 1 - self.center_momentum)
            pending.clear()


class CLeVERLoss(DINOLoss):
    """DINO's loss on the invariant part, and orthogonality of different views on the equivariant factor.

    CLeVER (arXiv 2406.00262), section 3: loss = DIR + sep_lambd * DVR, where DVR is the mean over the same pairs of the cosine
    between the teacher's centred, sharpened softmax of the EF head and the student's softmax. The third term of the objective,
    `head_regularizer`, depends on the weights alone and is added by the training loop.

    Args (besides DINOLoss's): DVR_out_dim: outputs of the EF head, which has a centre of its own; sep_lambd: weight of DVR.
    """

    def __init__(
        self,
        out_dim: int,
        DVR_out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        sep_lambd: float = 1.0,
    ):
        super().__init__(
            out_dim,
            ncrops,
            warmup_teacher_temp,
            teacher_temp,
            warmup_teacher_temp_epochs,
            nepochs,
            student_temp,
            center_momentum,
        )
        self.sep_lambd = sep_lambd
        self.register_buffer("center2", torch.zeros(1, DVR_out_dim))

    def forward(self, student_ir, student_ef, teacher_ir, teacher_ef, epoch: int, update_center: bool = True):
        """Logits of the two heads, student [V*B, K] and [V*B, K2], teacher [2*B, K] and [2*B, K2] -> loss, DIR, DVR."""
        loss_dir = self._invariance(student_ir, teacher_ir, epoch)
        p = F.softmax((teacher_ef.float() - self.center2) / self.teacher_temps[epoch], dim=-1)  # Q*B, K2
        loss_dvr = self._over_pairs(student_ef, F.normalize(p, dim=-1), _cosine)
        self._move_center("center", teacher_ir, update_center)
        self._move_center("center2", teacher_ef, update_center)
        return loss_dir + self.sep_lambd * loss_dvr, loss_dir, loss_dvr


class _SquaredNorm(torch.autograd.Function):
    """Sum of squares, rows in the tensor's type and their sum in float64, without a temporary of the tensor's size."""

    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return torch.linalg.vector_norm(p, dim=-1).double().square().sum()

    @staticmethod
    def backward(ctx, grad_output):
        (p,) = ctx.saved_tensors
        return p * (2 * grad_output).to(p.dtype)


def head_regularizer(head: nn.Module, head2: nn.Module) -> torch.Tensor:
    """|sum p^2 over head - sum p^2 over head2| over all parameters, the frozen `weight_g` too (design of CLeVER's loss).

    A difference of two large sums: it is taken in float64, as a float32 one loses up to all of its digits.
    """
    squared_norms = [torch.stack([_SquaredNorm.apply(p) for p in h.parameters()]).sum() for h in (head, head2)]
    return (squared_norms[0] - squared_norms[1]).abs().float()
