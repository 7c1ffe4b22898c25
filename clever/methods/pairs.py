"""Means over pairs of different views, which DINO's and CLeVER's losses are.

Shapes: K, K2 outputs of the head and of CLeVER's EF head; V views of the student, the two global ones first; Q = 2 global
views that the teacher sees.

Both losses are means over all pairs (q, v) of a teacher view and a different student view. They are computed in closed form,
which visits every student view once: written pair by pair they would need 18 softmaxes of the student at 10 views. On a GPU
pairs_triton.py computes them. Elsewhere the gradient is computed together with the value and kept for the backward pass.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

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
        kernels: use the Triton kernels (pairs_triton.py); default: if the logits are on a GPU.
    """
    if (student.is_cuda and _has_triton()) if kernels is None else kernels:
        from clever.methods import pairs_triton

        return pairs_triton.mean_over_pairs(student, teacher, center, student_temp, teacher_temp, pair_loss.power)
    log_t = F.log_softmax((teacher.float() - center) / teacher_temp, dim=-1)  # Q, B, K
    t = log_t.exp()
    if pair_loss.power == 1:
        targets, entropy = t, -torch.einsum("qbk,qbk->qb", t, log_t).mean()
    else:
        targets, entropy = F.normalize(t, dim=-1), None
    return _MeanOverPairs.apply(student, targets, student_temp, pair_loss.view_loss), entropy
