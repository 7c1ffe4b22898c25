"""A pretraining run: the student, its teacher and all that changes from step to step.

One step: normalised views -> both networks -> loss -> clipped gradients -> optimizer -> teacher = moving average of student.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from clever.checkpoint import load_moments, load_strictly, save_atomically
from clever.data.augmentations import IMAGENET_MEAN, IMAGENET_STD, normalize
from clever.distributed import (
    all_gather_objects,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
)
from clever.methods.dino import DINOLoss
from clever.methods.pairs import TEACHER_VIEWS
from clever.models.heads import MultiCropWrapper
from clever.signals import Interrupted
from clever.training.optim import clip_gradients, set_schedules, update_teacher
from clever.training.telemetry import TrainingProgress, feature_std


class EpochSampler(DistributedSampler):
    """This process's share of an epoch without its first `start` images: those of an interrupted epoch that are done."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


@dataclass
class Pretraining:
    """Networks, objective, optimizer and schedules of a run, on one device and at one precision.

    Args:
        student, teacher: the same network; the teacher is not trained by gradients.
        criterion: (student's output, teacher's output, epoch, update_center) -> terms of the loss, "loss" first.
        optimizer: of the student's parameters.
        scaler: of the gradients, enabled for fp16 only.
        schedules: one value per optimizer step of "lr", "wd" (weight decay) and "momentum" (of the teacher).
        device: of the networks and the criterion.
        amp_dtype: type that autocast computes in; float32 means no autocast.
        epochs: number of epochs of the run.
        images_per_step: images per optimizer step, summed over processes and micro-batches.
        accumulation: micro-batches per optimizer step.
        clip_grad: the gradient of each parameter is clipped to this norm; 0: no clipping.
        freeze_last_layer: number of epochs during which the heads' last layers do not move.
        print_freq: micro-batches between progress lines.
        mean, std: of the channels, for pixels in 0..1; views arrive as uint8 and are normalised on the device.
        arguments: of the command line, recorded in checkpoints.

    Attributes:
        part_of_epoch: what has been done of an epoch, from which an interrupted one continues: see `_part_of_epoch`.
    """

    student: MultiCropWrapper
    teacher: MultiCropWrapper
    criterion: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedules: dict[str, np.ndarray]
    device: torch.device
    amp_dtype: torch.dtype
    epochs: int
    images_per_step: int
    accumulation: int = 1
    clip_grad: float = 3.0
    freeze_last_layer: int = 1
    print_freq: int = 20
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    arguments: dict[str, Any] = field(default_factory=dict)
    part_of_epoch: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.model: nn.Module = self.student  # called in training: the student, or DistributedDataParallel around it
        self.trainable_parameters = [p for p in self.student.parameters() if p.requires_grad]

    def distribute(self) -> None:
        """Average the student's gradients over the processes of the group, if there is one."""
        if is_distributed():
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.student, device_ids=device_ids, gradient_as_bucket_view=True)

    def train_one_epoch(self, loader: DataLoader, epoch: int) -> dict[str, float]:
        """One pass over the data; means of the loss terms, of the telemetry and of the schedules.

        If the epoch was interrupted before, the loader yields the rest of it: see `micro_steps_done`.
        Raises FloatingPointError, which names the term, if a term of the loss is not finite, and Interrupted after the step in
        which a process has received SIGTERM, unless this is the last one.
        """
        steps = len(loader) // self.accumulation
        micro_steps, done = steps * self.accumulation, self.micro_steps_done(epoch)
        progress = self._progress(epoch, micro_steps, done)
        for micro_step, (views, _) in enumerate(islice(loader, micro_steps - done), done):
            last = (micro_step + 1) % self.accumulation == 0  # micro-batch of this step
            views = [self.normalized(view.to(self.device, non_blocking=True)) for view in views]
            with contextlib.nullcontext() if last or self.model is self.student else self.model.no_sync():
                terms = self.compute_loss(views, epoch, update_center=last)
                progress.update(**terms)
                self.scaler.scale(terms["loss"] / self.accumulation).backward()
            if last:
                self.update_weights(epoch, step=epoch * steps + micro_step // self.accumulation)
                if progress.stop_requested:
                    break
        means = progress.finish()
        self.part_of_epoch = self._part_of_epoch(epoch, progress)
        if progress.done < micro_steps:
            raise Interrupted(f"after step {progress.done // self.accumulation} of {steps} of epoch {epoch}/{self.epochs}", 0)
        of_epoch = slice(epoch * steps, (epoch + 1) * steps)
        rates = {name: float(values[of_epoch].mean()) for name, values in self.schedules.items()}
        return means | rates | {"images_per_second": progress.rate}

    def _progress(self, epoch: int, micro_steps: int, done: int) -> TrainingProgress:
        """Averages of the epoch, which continue those of an interrupted one."""
        header, images = f"epoch {epoch}/{self.epochs}", self.images_per_step // self.accumulation
        after = (self.epochs - epoch - 1) * micro_steps
        progress = TrainingProgress(header, micro_steps, images, self.device, self.print_freq, after)
        if done:
            progress.resume(self.part_of_epoch["progress"], done)
            self._set_generators(self.part_of_epoch["generators"])
        return progress

    # --- an interrupted epoch ---

    def micro_steps_done(self, epoch: int) -> int:
        """How many micro-batches of this epoch were used before an interruption, in whole steps; 0 for another epoch."""
        if self.part_of_epoch.get("epoch") != epoch:
            return 0
        return self.part_of_epoch["images"] // self.images_per_step * self.accumulation

    def seconds_spent(self, epoch: int) -> float:
        """Time that the epoch took before an interruption; 0 for another epoch."""
        return self.part_of_epoch["progress"]["seconds"] if self.micro_steps_done(epoch) else 0.0

    def _part_of_epoch(self, epoch: int, progress: TrainingProgress) -> dict[str, Any]:
        """The images that were used, over all processes, the sums of the averages, and all processes' random generators."""
        images = progress.done * self.images_per_step // self.accumulation
        states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])
        return {"epoch": epoch, "images": images, "progress": progress.state(), "generators": all_gather_objects(states)}

    def _set_generators(self, states: list[list[torch.Tensor]]) -> None:
        """Continue this process's random numbers, which stochastic depth draws, unless the number of processes has changed."""
        if len(states) != get_world_size():
            return
        cpu, *gpu = states[get_rank()]
        torch.set_rng_state(cpu)
        if self.device.type == "cuda" and gpu:
            torch.cuda.set_rng_state(gpu[0], self.device)

    # --- one step ---

    def normalized(self, views: torch.Tensor) -> torch.Tensor:
        """Views as the networks take them: uint8 pixels are normalised, float ones are so already."""
        return normalize(views, self.mean, self.std) if views.dtype == torch.uint8 else views

    def compute_loss(self, views: list[torch.Tensor], epoch: int, update_center: bool = True) -> dict[str, torch.Tensor]:
        """Forward pass of both networks: terms of the loss, "loss" first, then telemetry.

        `views` holds one tensor [V', B, 3, S, S] per resolution, the two global views first.
        """
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32):
            with torch.no_grad():
                global_views = views[0][:TEACHER_VIEWS].flatten(0, 1)  # 2*B, 3, S, S
                teacher_output, z = self.teacher(global_views, return_features=True)  # 2*B, K; 2*B, D
            student_output = self.model([view.flatten(0, 1) for view in views])  # V*B, K
        terms = self.criterion(student_output, teacher_output, epoch, update_center)
        spread = {f"feature_std{part}": feature_std(features) for part, features in self.teacher.split(z).items()}
        return terms | self.criterion.telemetry(terms) | spread

    def update_weights(self, epoch: int, step: int) -> None:
        """One step of the optimizer, with clipped gradients and the schedules' values at `step`, then of the teacher."""
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.trainable_parameters, self.clip_grad)
        if epoch < self.freeze_last_layer:
            for head in self.student.heads:
                head.last_layer.zero_grad()
        set_schedules(self.optimizer, self.schedules["lr"][step], self.schedules["wd"][step])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        update_teacher(self.teacher, self.student, self.schedules["momentum"][step])

    def state_dict(self, epoch: int) -> dict[str, Any]:
        """Training state saved in checkpoints: tensors and plain values; `epoch` is the next one to run, or to continue."""
        state = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "args": self.arguments,
            "dino_loss": self.criterion.state_dict(),
        }
        if self.scaler.is_enabled():
            state["fp16_scaler"] = self.scaler.state_dict()
        if self.part_of_epoch.get("epoch") == epoch:
            state["part_of_epoch"] = self.part_of_epoch
        return state

    def save(self, folder: str | Path, epoch: int, saveckp_freq: int = 0) -> None:
        """Write checkpoint.pth after `epoch`, and checkpoint<epoch>.pth if `saveckp_freq` divides it (0: never)."""
        if not is_main_process():
            return
        is_kept = saveckp_freq and epoch % saveckp_freq == 0
        keep_as = Path(folder) / f"checkpoint{epoch:04}.pth" if is_kept else None
        save_atomically(self.state_dict(epoch + 1), Path(folder) / "checkpoint.pth", keep_as)

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Restore the state of a checkpoint, ours or an original's, and return the epoch to continue with.

        Raises InputError if names or shapes differ, and other errors if entries are of another kind.
        """
        for name, module in (("student", self.student), ("teacher", self.teacher), ("dino_loss", self.criterion)):
            load_strictly(module, state[name], f"{name} of the checkpoint to continue from")
        load_moments(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state.get("fp16_scaler"):
            self.scaler.load_state_dict(state["fp16_scaler"])
        part = state.get("part_of_epoch", {})
        if not isinstance(part, dict) or (part and not {"epoch", "images", "progress", "generators"} <= set(part)):
            raise ValueError("part_of_epoch is not what an interrupted epoch leaves")
        self.part_of_epoch = part
        return state["epoch"]
