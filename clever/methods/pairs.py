"""Means over all pairs (q, v) of a teacher view and a different student view: DINO's cross-entropy and CLeVER's cosine.

On a GPU pairs_triton.py computes them, without a tensor of the logits' size besides the gradient.

Shapes: K outputs of a head; V views of the student, the two global ones first; Q = 2 global views that the teacher sees.
"""

import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

TEACHER_VIEWS = 2


def cross_entropy_of_pairs(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """Mean of -<t[q], log s[v]>, and the mean entropy of t in nats; t and s are the softmax of teacher and student.

    Args:
        student: logits [V, B, K].
        teacher: logits [Q, B, K], without gradient.
        center: [1, K], subtracted from the teacher's logits.
    """
    if student.is_cuda and (kernels := _kernels()):
        return kernels.MeanOverPairs.apply(student, teacher, center, student_temp, teacher_temp, 1)
    log_t = F.log_softmax((at_least_float32(teacher) - center) / teacher_temp, dim=-1)  # Q, B, K
    log_s = F.log_softmax(at_least_float32(student) / student_temp, dim=-1)  # V, B, K
    t = log_t.exp()
    entropy = -(t * log_t).sum(-1).mean()
    return mean_of_different_views(-torch.einsum("qbk,vbk->qv", t, log_s), student.shape[1]), entropy


def cosine_of_pairs(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """Mean of the cosine between t[q] and s[v]; arguments as those of `cross_entropy_of_pairs`."""
    if student.is_cuda and (kernels := _kernels()):
        return kernels.MeanOverPairs.apply(student, teacher, center, student_temp, teacher_temp, 2)[0]
    t = F.softmax((at_least_float32(teacher) - center) / teacher_temp, dim=-1)  # Q, B, K
    s = F.softmax(at_least_float32(student) / student_temp, dim=-1)  # V, B, K
    cosines = torch.einsum("qbk,vbk->qv", F.normalize(t, dim=-1), F.normalize(s, dim=-1))
    return mean_of_different_views(cosines, student.shape[1])


def mean_of_different_views(sums: Tensor, batch: int) -> Tensor:
    """Sums over the batch of all pairs [Q, V] -> the mean over the pairs q != v and the batch."""
    n_teacher, n_student = sums.shape
    equal = torch.eye(n_teacher, n_student, dtype=torch.bool, device=sums.device)
    return sums.masked_fill(equal, 0).sum() / (n_teacher * (n_student - 1) * batch)


@functools.cache
def _kernels():
    """The module of the kernels; None where Triton is not installed."""
    has_triton = importlib.util.find_spec("triton") is not None
    return importlib.import_module("clever.methods.pairs_triton") if has_triton else None


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
