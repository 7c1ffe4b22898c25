"""Optimizers, schedules, gradient clipping and the teacher's moving average."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn


def cosine_scheduler(
    base: float, final: float, epochs: int, niter_per_ep: int, warmup_epochs: int = 0, start_warmup_value: float = 0
) -> np.ndarray:
    """One value per iteration [epochs * niter_per_ep]: linear warm-up to `base`, then half a cosine to `final` (DINO)."""
    warmup = np.linspace(start_warmup_value, base, warmup_epochs * niter_per_ep)
    steps = (epochs - warmup_epochs) * niter_per_ep
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1)))
    return np.concatenate([warmup, cosine])


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups: with scheduled weight decay, and without any (1-D parameters and those named `*.bias`)."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim == 1 or name.endswith(".bias") else decayed).append(p)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "fixed_weight_decay": True}]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per tensor to trust * |p| / |g + wd p| (You et al., arXiv 1708.03888).

    1-D tensors are neither scaled nor decayed unless `adapt_1d`.
    """

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001, adapt_1d=False):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust, adapt_1d=adapt_1d))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; `closure` is ignored."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1 or group["adapt_1d"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, u_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
                    ratio = group["trust"] * p_norm / u_norm
                    update = update * torch.where((p_norm > 0) & (u_norm > 0), ratio, torch.ones_like(ratio))
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


# Made from the groups alone: `set_schedules` sets the learning rate and the weight decay before every step.
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.0, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.0, momentum=0.9),
    "lars": LARS,
}


def set_schedules(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups, and the weight decay of those that have one."""
    for group in optimizer.param_groups:
        group["lr"] = float(lr)  # schedules hold numpy scalars, checkpoints plain values
        if not group.get("fixed_weight_decay"):
            group["weight_decay"] = float(weight_decay)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Clip each gradient separately to norm `max_norm` (0: no clipping), without synchronising with the GPU."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if max_norm > 0 and grads:
        scales = (max_norm / (torch.stack(torch._foreach_norm(grads)) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, scales.unbind())


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for parameters; each network keeps its own buffers (DINO)."""
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in student.parameters()], 1 - momentum)


def check_weights(student: nn.Module, when: str) -> None:
    """Raise FloatingPointError if weights are not finite: a finite loss can have an infinite gradient."""
    norms = torch.stack(torch._foreach_norm([p.detach() for p in student.parameters()]))
    if not norms.isfinite().all():
        bad = [name for (name, _), norm in zip(student.named_parameters(), norms, strict=True) if not norm.isfinite()]
        raise FloatingPointError(f"{when}, after its last step: weights {', '.join(bad[:3])}")
