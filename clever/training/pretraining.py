"""A pretraining run: the student, its teacher and all that changes from step to step."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from clever import signals
from clever.arguments import plain_args
from clever.checkpoint import load_moments, save_atomically, strip_prefix
from clever.data.datasets import ImageDataset
from clever.distributed import any_process, get_rank, is_distributed, is_main_process
from clever.methods.dino import DINOLoss
from clever.methods.pairs import TEACHER_VIEWS
from clever.methods.term import Term, WithTerm
from clever.models.heads import MultiCropWrapper
from clever.models.layers import StochasticDepth, normalize
from clever.training.optim import clip_gradients, set_schedules, update_teacher
from clever.training.telemetry import TrainingProgress, feature_std
from clever.utils import seed_everything


class EpochSampler(DistributedSampler):
    """This process's share of an epoch without its first `start` images: those of an interrupted epoch that are done."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)


@dataclass
class Pretraining:
    """Networks, objective, optimizer and schedules of a run, on one device and at one precision."""

    args: argparse.Namespace  # of main_dino.py, with their defaults filled in
    model: WithTerm  # the student, with the term of an equivariant method if there is one
    teacher: MultiCropWrapper  # the same network as the student, not trained by gradients
    criterion: DINOLoss
    optimizer: torch.optim.Optimizer  # of the model's parameters
    scaler: torch.amp.GradScaler  # of the gradients, enabled for fp16 only
    schedules: dict[str, np.ndarray]  # one value per step of "lr", "wd" (weight decay) and "momentum" (of the teacher)
    device: torch.device
    amp_dtype: torch.dtype  # that autocast computes in; float32 means no autocast
    images_per_step: int  # summed over processes and micro-batches
    so_far: dict[str, Any] = field(default_factory=dict, init=False)  # last "epoch", its "images" so far, their "averages"

    def __post_init__(self) -> None:
        self.student: MultiCropWrapper = self.model.student
        self.term: Term | None = self.model.term
        self.arguments = plain_args(self.args)  # as checkpoints record them

    def prepare(self, dataset: ImageDataset) -> None:
        """Before the first step: average gradients over the processes of the group, if there is one; record graphs if asked."""
        if is_distributed():
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.model, device_ids=device_ids, gradient_as_bucket_view=True)
        if self.args.cuda_graph:
            self.capture(*dataset[0])

    def capture(self, views: list[Tensor], codes: Tensor) -> None:
        """Record the passes of both networks as CUDA graphs, whose kernels the CPU starts all at once, or print what they need.

        Weights and buffers stay as they are. Raises RuntimeError if an operation waits for the GPU, or memory is short.

        views, codes: of one image, [V', 3, S, S] per resolution and [2 + E, P], for their shapes.
        """
        batch, recomputes = self.args.batch_size_per_gpu, self.args.activation_checkpointing
        if not torch.cuda.is_available() or self.images_per_step > batch or recomputes:
            print("--cuda_graph true: needs a GPU, one process, and neither --accumulation nor --activation_checkpointing")
            return
        views = [self.normalized(view[:, None].repeat(1, batch, 1, 1, 1).to(self.device)) for view in views]
        global_views, inputs = self.inputs(views, codes[None].repeat(batch, *[1] * codes.ndim))
        buffers = [(buffer, buffer.clone()) for network in (self.model, self.teacher) for buffer in network.buffers()]
        StochasticDepth.has_fixed_shapes = True
        self.run_teacher = torch.cuda.make_graphed_callables(self.run_teacher, (global_views,))
        # Autocast begins and ends within what is recorded: the backward pass runs without, and no cast outlives the graph.
        self.model.forward = self.autocast()(self.model.forward)
        torch.cuda.make_graphed_callables(self.model, inputs, allow_unused_input=True)  # in place
        StochasticDepth.has_fixed_shapes = False
        for buffer, before in buffers:  # the networks run several times before they are recorded
            buffer.copy_(before)

    def train_one_epoch(self, loader: DataLoader, epoch: int) -> dict[str, float]:
        """One pass over the data; means of the loss terms, of the telemetry and of the schedules.

        If the epoch was interrupted before, the loader yields the rest of it: see `steps_done`.
        Raises FloatingPointError if a term of the loss is not finite, and Interrupted after the step in which a process has
        received SIGTERM, unless this is the last one.
        """
        epochs, per_step = self.args.epochs, self.args.accumulation  # micro-batches
        steps, first = len(loader) // per_step, self.steps_done(epoch)
        header, images = f"epoch {epoch}/{epochs}", self.images_per_step // per_step
        progress = TrainingProgress(header, steps * per_step, images, self.device, self.args.print_freq, epochs - epoch - 1)
        if first:
            progress.resume(self.so_far["averages"], first * per_step)
        batches = iter(loader)
        for step in range(first, steps):
            # Each step has random numbers of its own: a run that goes on in the middle of an epoch draws the same ones.
            seed_everything(self.args.seed, epoch, step, get_rank())
            self.train_step(islice(batches, per_step), progress, epoch, epoch * steps + step)
            if any_process(signals.is_requested()):
                break
        means, done = progress.finish(), progress.done // per_step
        self.so_far = {"epoch": epoch, "images": done * self.images_per_step, "averages": progress.state()}
        if done < steps:
            raise signals.Interrupted(f"after step {done} of {steps} of {header}", 0)
        of_epoch = slice(epoch * steps, (epoch + 1) * steps)
        rates = {name: float(values[of_epoch].mean()) for name, values in self.schedules.items()}
        return means | rates | {"images_per_second": progress.rate}

    def train_step(self, batches: Iterable[tuple], progress: TrainingProgress, epoch: int, step: int) -> None:
        """One step of the optimizer, with the gradients of all micro-batches, then of the teacher.

        batches: for each micro-batch the views, one tensor [V', B, 3, S, S] per resolution, the global ones first, a term's own
            last; and their codes, which only a term reads.
        """
        set_schedules(self.optimizer, self.schedules["lr"][step], self.schedules["wd"][step])
        for micro_batch, (views, codes) in enumerate(batches, start=1):
            last = micro_batch == self.args.accumulation  # after which processes average their gradients
            views = [self.normalized(view.to(self.device, non_blocking=True)) for view in views]
            with self.model.no_sync() if is_distributed() and not last else contextlib.nullcontext():
                terms = self.compute_loss(views, codes, epoch, update_center=last)
                progress.update(**terms)  # stops the run if a term is not finite
                self.scaler.scale(terms["loss"] / self.args.accumulation).backward()
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.model.parameters(), self.args.clip_grad)
        if epoch < self.args.freeze_last_layer:
            for head in self.student.heads:
                head.last_layer.zero_grad()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        update_teacher(self.teacher, self.student, self.schedules["momentum"][step])

    def compute_loss(self, views: list[Tensor], codes: Tensor, epoch: int, update_center: bool) -> dict[str, Tensor]:
        """Forward pass of both networks: terms of the loss, "loss" first, then telemetry."""
        global_views, inputs = self.inputs(views, codes)
        teacher_output, z = self.run_teacher(global_views)  # 2*B, K; 2*B, D
        with self.autocast():
            student_output, values = self.model(*inputs)  # V*B, K
        terms = self.criterion(student_output, teacher_output, epoch, update_center)
        telemetry = self.criterion.telemetry(terms)
        if self.term is not None:
            terms["loss_base"], terms["loss_term"] = terms["loss"], values.pop("term")
            terms["loss"] = terms["loss_base"] + self.args.equiv_lambd * terms["loss_term"]
        spread = {f"feature_std{part}": feature_std(features) for part, features in self.teacher.split(z).items()}
        return terms | values | telemetry | spread

    def inputs(self, views: list[Tensor], codes: Tensor) -> tuple[Tensor, tuple]:
        """What the teacher gets of a batch, and the arguments of the model; without a term, the crops alone."""
        told: tuple[Tensor, ...] = ()
        if self.term is not None:
            told = (codes.to(self.device, non_blocking=True),)  # B, 2 + E, P
            if codes.shape[1] > TEACHER_VIEWS:
                *views, extra = views
                told += (extra,)  # E, B, 3, S, S
        return views[0][:TEACHER_VIEWS].flatten(0, 1), ([view.flatten(0, 1) for view in views], *told)  # 2*B, 3, S, S

    def run_teacher(self, global_views: Tensor) -> tuple:
        """Global views [2*B, 3, S, S] -> logits [2*B, K] of every head, and representations [2*B, D]."""
        with torch.no_grad(), self.autocast():
            return self.teacher(global_views, return_features=True)

    def autocast(self) -> torch.autocast:
        """Mixed precision, if the run has it."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype != torch.float32)

    def normalized(self, views: Tensor) -> Tensor:
        """Views as the networks take them: uint8 pixels are normalised, float ones are so already."""
        return normalize(views, self.args.mean, self.args.std) if views.dtype == torch.uint8 else views

    def steps_done(self, epoch: int) -> int:
        """How many steps of this epoch were made before an interruption; 0 for another epoch."""
        return self.so_far["images"] // self.images_per_step if self.so_far.get("epoch") == epoch else 0

    def seconds_spent(self, epoch: int) -> float:
        """Time that the epoch took before an interruption; 0 for another epoch."""
        return self.so_far["averages"]["seconds"] if self.steps_done(epoch) else 0.0

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
        if self.so_far.get("epoch") == epoch:  # which has been interrupted, or is not yet measured
            state["epoch_so_far"] = self.so_far
        if self.term is not None:
            state["term"] = self.term.state_dict()
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

        Raises RuntimeError if names or shapes differ, and other errors if entries are of another kind.
        """
        for name, module in (("student", self.student), ("teacher", self.teacher), ("dino_loss", self.criterion)):
            module.load_state_dict(strip_prefix(state[name]))
        if self.term is not None:
            self.term.load_state_dict(state["term"])
        load_moments(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state.get("fp16_scaler"):
            self.scaler.load_state_dict(state["fp16_scaler"])
        self.so_far = state.get("epoch_so_far", {})
        self.seconds_spent(state["epoch"])  # an error here, unless it is whole
        return state["epoch"]
