"""DINO's objective and the centre of its teacher.

Shapes: K outputs of the head; V views of the student, the two global ones first; Q = 2 global views that the teacher sees.
"""

import math

import numpy as np
import torch
import torch.nn as nn

from clever.distributed import all_reduce_sum, get_world_size
from clever.methods.pairs import CROSS_ENTROPY, TEACHER_VIEWS, mean_over_pairs
from clever.utils import InputError


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
