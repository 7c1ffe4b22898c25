"""DINO's objective, from which others are made.

Shapes: K outputs of the head; V views of the student, the two global ones first; Q = 2 global views that the teacher sees.
"""

import argparse
import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from clever.distributed import all_reduce_sum, get_world_size
from clever.methods.pairs import TEACHER_VIEWS, cross_entropy_of_pairs


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's softmax, over all pairs of different views.

    DINO (arXiv 2104.14294), section 3.1:

        t = softmax((teacher - center) / teacher_temp)               # Q, B, K
        s = log_softmax(student / student_temp)                      # V, B, K
        loss = mean of -sum_k t[q] * s[v]   over q, v != q, and the batch
        center = m * center + (1 - m) * mean(teacher)                # after the loss; over all processes

    Args:
        out_dim, ncrops: K and V.
        warmup_teacher_temp, teacher_temp: the teacher's temperature rises linearly from the first to the second ...
        warmup_teacher_temp_epochs: ... during these epochs, the first of `nepochs`.
        center_momentum: m.
    """

    about: ClassVar[str] = "one head on the whole representation"
    split: ClassVar[bool] = False  # whether the representation is cut into IR and EF, which have a head each
    head_flags: ClassVar[tuple[str, ...]] = ("out_dim",)  # the flags that give the outputs of its heads

    def __init__(
        self, out_dim: int, ncrops: int, warmup_teacher_temp: float, teacher_temp: float, warmup_teacher_temp_epochs: int,
        nepochs: int, student_temp: float = 0.1, center_momentum: float = 0.9,
    ):  # fmt: skip
        super().__init__()
        self.ncrops, self.student_temp, self.center_momentum = ncrops, student_temp, center_momentum
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs).tolist()
        self.teacher_temps = warmup + [teacher_temp] * (nepochs - warmup_teacher_temp_epochs)
        self.teacher_entropy = torch.zeros(())  # of the last call, in nats, mean over views and batch
        self._pending: dict[str, list[Tensor]] = {}  # per centre, the teacher's means since its last update
        self.register_buffer("center", torch.zeros(1, out_dim))

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """The flags of this objective alone."""

    @staticmethod
    def check_args(args: argparse.Namespace) -> None:
        """Raise InputError for invalid values of these flags."""

    @classmethod
    def from_args(cls, args: argparse.Namespace, heads: list[nn.Module]) -> "DINOLoss":
        """The objective that the flags describe; `heads`: those of the student."""
        return cls(args.out_dim, **cls.options(args))

    @staticmethod
    def options(args: argparse.Namespace) -> dict[str, Any]:
        """Arguments that all objectives have."""
        return {
            "ncrops": TEACHER_VIEWS + args.local_crops_number,
            "warmup_teacher_temp": args.warmup_teacher_temp,
            "teacher_temp": args.teacher_temp,
            "warmup_teacher_temp_epochs": min(args.warmup_teacher_temp_epochs, args.epochs),
            "nepochs": args.epochs,
        }

    def forward(self, student: Tensor, teacher: Tensor, epoch: int, update_center: bool = True) -> dict[str, Tensor]:
        """Student logits [V*B, K] and teacher logits [Q*B, K] -> {"loss": 0-dim tensor}.

        `update_center` is False for all micro-batches of a step but the last, at which the centre moves by the mean over all.
        """
        loss = self.cross_entropy(student, teacher, epoch)
        self.update_center("center", teacher, update_center)
        return {"loss": loss}

    def cross_entropy(self, student: Tensor, teacher: Tensor, epoch: int) -> Tensor:
        """The loss above, without the centre's update; the teacher's entropy is kept for telemetry."""
        loss, self.teacher_entropy = cross_entropy_of_pairs(*self.pairs(student, teacher, self.center, epoch))
        return loss

    def pairs(self, student: Tensor, teacher: Tensor, center: Tensor, epoch: int) -> tuple[Tensor | float, ...]:
        """What means over pairs of views are made of: logits [V, B, K] and [Q, B, K], the centre, and both temperatures."""
        student, teacher = student.unflatten(0, (self.ncrops, -1)), teacher.unflatten(0, (TEACHER_VIEWS, -1))
        return student, teacher, center, self.student_temp, self.teacher_temps[epoch]

    @torch.no_grad()
    def update_center(self, name: str, teacher: Tensor, update: bool) -> None:
        """Note the mean of the teacher's logits [Q*B, K], and if `update`, move the centre `name` by all that were noted."""
        pending = self._pending.setdefault(name, [])
        pending.append(teacher.mean(0, keepdim=True, dtype=getattr(self, name).dtype))  # 1, K
        if update:
            mean = all_reduce_sum(torch.stack(pending).mean(0)) / get_world_size()  # 1, K
            getattr(self, name).lerp_(mean, 1 - self.center_momentum)
            pending.clear()

    def telemetry(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Figures to log about the last call, which returned `terms`; the first two can be compared between different K."""
        log_k = math.log(self.center.shape[1])
        return {
            "normalized_loss": terms.get("loss_DIR", terms["loss"]) / log_k,  # about 1 for a uniform output; can exceed 1
            "teacher_entropy": self.teacher_entropy / log_k,  # 1 for a uniform output
            "center_norm": self.center.norm(),
        }
