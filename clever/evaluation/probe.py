"""Linear classifiers on a backbone's features: their training, their files, their accuracies.

A Probe is one classifier with its optimizer and its checkpoint. A ProbeGroup trains and evaluates the probes of several parts
of the representation with one pass of the backbone. They serve the linear probe (eval_linear.py) and downstream classification
(eval_linear_ds.py, a group of one), which supply data and optimizers.

Shapes: D width of the features, C classes, M images.
"""

import argparse
import datetime
import hashlib
import math
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from clever import arguments, signals, utils
from clever.checkpoint import load_checkpoint, save_atomically, strip_prefix, valid_state
from clever.data.datasets import ImageDataset, make_loader
from clever.distributed import all_reduce_sum, broadcast_buffers, get_rank, get_world_size, is_distributed, is_main_process
from clever.evaluation.features import FeatureExtractor, extract_parts, shard
from clever.evaluation.pretrained import Pretrained
from clever.models.backbones import has_batch_norm
from clever.models.weights import backbone_state, load_backbone_weights
from clever.training.telemetry import TrainingProgress
from clever.utils import InputError

# Arguments that must be the same when a probe's training is resumed, since the name of its file does not contain them.
FIXED_ARGUMENTS = ("seed", "batch_size_per_gpu", "n_last_blocks", "avgpool_patchtokens", "img_size", "crop_scale")
# Metrics whose best value over the epochs is kept, and their names in a checkpoint.
BEST = {"accuracy": "best_acc", "mean_class_accuracy": "best_mean_class_acc"}


class LinearClassifier(nn.Module):
    """One linear layer, features [B, D] -> logits [B, C]; weights drawn from a normal distribution (0.01), biases 0."""

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # B, C


def short_hash(lines: Iterable[str]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of some lines of text."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def images_per_step(args: argparse.Namespace) -> int:
    """Images per step of the optimizer, over all processes. Learning rates are given for 256 of them."""
    return args.batch_size_per_gpu * get_world_size()


def existing_probe(path: Path, pattern: str) -> Path:
    """`path`; if there is no such file but a single one beside it whose whole name matches the pattern, that one."""
    if not path.exists():
        found = [other for other in path.parent.glob("*.pth.tar") if re.fullmatch(pattern, other.name)]
        if len(found) == 1:
            print(f"there is no {path.name}: taking {found[0]}, the only probe of this part and trial name")
            return found[0]
    return path


class Probe:
    """A linear classifier on the features of `extractor`, its optimizer, and the checkpoint file that its training writes.

    The backbone is trained as well if the extractor says so. The first weights depend on --seed alone.

    Args:
        args: of the command line, recorded in the checkpoint; --else_part is a single part.
        extractor: images -> features [B, D].
        classes: their names, in the order of the labels.
        path: the checkpoint, rewritten after every epoch.
        fixed: names of further arguments that must be the same when training is resumed.
        identity: further values that say what the probe was trained on. A checkpoint with another identity is refused; values
            that it lacks are not compared. num_labels and dim are those of its weights.

    Attributes:
        optimizer: of the classifier, and of the backbone if that is trained; only training needs it.
        epoch: the next one to run.
        best: best value of each metric so far.
        result: accuracies of the last evaluation.
    """

    def __init__(
        self, args: argparse.Namespace, pretrained: Pretrained, extractor: FeatureExtractor, classes: Sequence[str], path: Path,
        fixed: tuple[str, ...], **identity: Any,
    ) -> None:  # fmt: skip
        utils.seed_everything(args.seed)
        device = next(extractor.backbone.parameters()).device
        self.extractor, self.path, self.arguments = extractor, path, arguments.plain_args(args)
        self.classifier = LinearClassifier(extractor.dim, len(classes)).to(device)
        self.identity = {
            "part": args.else_part, "net": pretrained.net, "num_labels": len(classes), "dim": extractor.dim,
            "classes": short_hash(classes), "backbone": pretrained.fingerprint, **identity,
        }  # fmt: skip
        if not args.evaluate:  # training, which must be continued with learning rates for the same number of images
            self.identity["images_per_step"] = images_per_step(args)
        self.fixed_arguments = (*FIXED_ARGUMENTS, *fixed)
        self.optimizer: torch.optim.Optimizer | None = None
        self.epoch, self.best, self.result = 0, {"accuracy": 0.0}, {}

    def start(self, epochs: int) -> None:
        """Prepare for training with a cosine schedule to 0 over `epochs`, from the checkpoint if there is one."""
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs, eta_min=0)
        if self.path.exists():
            self._resume()
        # What is trained: features -> logits, or images -> logits with the backbone; in a process group distributed.
        trained = self.extractor.train_backbone
        model = nn.Sequential(self.extractor, self.classifier) if trained else self.classifier
        self.model = DistributedDataParallel(model) if is_distributed() else model

    def end_epoch(self, epoch: int) -> None:
        """Advance the schedule and write the checkpoint, in the first process."""
        self.scheduler.step()
        self.epoch = epoch + 1
        if not is_main_process():
            return
        state = {
            "epoch": self.epoch, "state_dict": self.classifier.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "args": self.arguments, **self.identity,
        }  # fmt: skip
        state |= {BEST[name]: value for name, value in self.best.items()}
        if self.extractor.train_backbone:
            state["state_dict_model"] = self.extractor.backbone.state_dict()
        save_atomically(state, self.path)

    def _resume(self) -> None:
        """Load the checkpoint to continue its training. Raises InputError if it was made differently."""
        state = self.load(self.path)
        stored = arguments.plain_args(state["args"]) if isinstance(state.get("args"), (dict, argparse.Namespace)) else {}
        self._check_same(self.path, stored, {f: self.arguments[f] for f in self.fixed_arguments}, "--")
        with valid_state(self.path):
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.best = int(state["epoch"]), {name: float(state[key]) for name, key in BEST.items() if key in state}
        print(f"continuing {self.path} from epoch {self.epoch}")

    def load(self, path: str | Path) -> dict[str, Any]:
        """Load a trained probe, ours or an original's, and its backbone if that is trained; returns the checkpoint.

        Raises InputError if it is not one, or if its identity is another one.
        """
        checkpoint = load_checkpoint(path)
        state = strip_prefix(checkpoint["state_dict"]) if isinstance(checkpoint.get("state_dict"), dict) else {}
        weight = state.get("linear.weight")
        if set(state) != {"linear.weight", "linear.bias"} or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise InputError(f"probe checkpoint {path}: contains no linear classifier")
        self._check_same(path, checkpoint | dict(zip(("num_labels", "dim"), weight.shape, strict=True)), self.identity)
        if self.extractor.train_backbone != ("state_dict_model" in checkpoint):
            raise InputError(f"checkpoint {path}: must have been trained in the same mode, with or without the backbone")
        with valid_state(path):
            self.classifier.load_state_dict(state)
        if self.extractor.train_backbone:
            with utils.error_prefix(f"checkpoint {path}"):
                backbone = self.extractor.backbone
                load_backbone_weights(backbone, backbone_state(checkpoint, "state_dict_model", backbone.state_dict()))
        return checkpoint

    @staticmethod
    def _check_same(path: str | Path, found: dict[str, Any], expected: dict[str, Any], dashes: str = "") -> None:
        for name, value in expected.items():
            if name in found and found[name] != value:
                raise InputError(
                    f"{dashes}{name} {value}: the probe {path} was trained with {name} {found[name]}; take that, or another "
                    "--output_dir or --trial_name"
                )


class ProbeGroup:
    """Probes of different parts of one backbone's representation, trained and evaluated together.

    Every image is read, and passes through the backbone, once for all probes. The result is that of training each of them in
    a group of its own. A probe that was interrupted, or is already finished, takes part only from its next epoch on.

    Args:
        args: epochs, batch_size_per_gpu, val_freq, seed and num_workers of the training.
        probes: their extractors differ only in the part; a trained backbone belongs to a single one.
        device: of the backbone and the classifiers.
        per_class: also measure the mean accuracy over classes.
    """

    def __init__(self, args: argparse.Namespace, probes: list[Probe], device: torch.device, per_class: bool = False) -> None:
        self.args, self.probes, self.device, self.per_class = args, probes, device, per_class
        self.extractors = [probe.extractor for probe in probes]
        self.backbone, self.train_backbone = self.extractors[0].backbone, self.extractors[0].train_backbone
        self._kept: tuple[ImageDataset, tuple[list[torch.Tensor], torch.Tensor]] | None = None

    @torch.no_grad()
    def evaluate(self, test: ImageDataset) -> dict[Probe, dict[str, Any]]:
        """Accuracies of every probe on the test images, see `accuracies`."""
        features, labels = self._test_features(test)
        probes = zip(self.probes, features, strict=True)
        return {probe: accuracies(probe.classifier, x, labels, self.per_class) for probe, x in probes}

    def _test_features(self, test: ImageDataset) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Features of each part, and labels. Those of a frozen backbone are kept until another data set is given."""
        if self._kept is not None and self._kept[0] is test:
            return self._kept[1]
        own = shard(test, get_rank(), get_world_size())
        loader = make_loader(own, self.args.batch_size_per_gpu, num_workers=self.args.num_workers)
        found = extract_parts(self.extractors, loader, self.device, "test images")
        self._kept = None if self.train_backbone else (test, found)
        return found

    def fit(self, train: ImageDataset, test: ImageDataset) -> dict[Probe, dict[str, float]]:
        """Train all probes with a cosine schedule to 0, or resume their checkpoints.

        Returns the metrics of each, of the last epoch and, `best_*`, of the best. The checkpoints are rewritten after every
        epoch. A finished training is only evaluated.
        """
        for probe in self.probes:
            probe.start(self.args.epochs)
        if any(probe.epoch > 0 for probe in self.probes):
            for probe, result in self.evaluate(test).items():
                probe.result = result
        loader = self._training_loader(train)
        with signals.allowed("the same command goes on from the end of the last epoch", 0):
            for epoch in range(min(probe.epoch for probe in self.probes), self.args.epochs):
                self._run_epoch([probe for probe in self.probes if probe.epoch <= epoch], loader, test, epoch)
        return {probe: probe.result | {f"best_{name}": value for name, value in probe.best.items()} for probe in self.probes}

    def _training_loader(self, train: ImageDataset) -> DataLoader:
        """This process's share of the training images, shuffled.

        If the backbone's batch norms are trained and the last batch would be a single image, which has no statistics of its
        own, this batch is left out; it is another image in every epoch.
        """
        sampler = DistributedSampler(train, get_world_size(), get_rank(), shuffle=True, seed=self.args.seed)
        trains_batch_norms = self.train_backbone and has_batch_norm(self.backbone)
        drop_last = trains_batch_norms and len(sampler) % self.args.batch_size_per_gpu == 1
        return make_loader(train, self.args.batch_size_per_gpu, sampler, self.args.num_workers, drop_last)

    def _run_epoch(self, active: list[Probe], loader: DataLoader, test: ImageDataset, epoch: int) -> None:
        """Train the active probes for one epoch, validate them if it is time, and write their checkpoints."""
        start = time.perf_counter()
        # Random numbers, the order of the images and their views depend on the seed and the epoch alone.
        utils.seed_everything(self.args.seed, epoch, get_rank())
        loader.sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        self.backbone.train(self.train_backbone)
        losses = self.train_one_epoch(active, loader, epoch)
        validated = (epoch + 1) % self.args.val_freq == 0 or epoch + 1 == self.args.epochs
        results = self.evaluate(test) if validated else {}
        left = datetime.timedelta(seconds=round((time.perf_counter() - start) * (self.args.epochs - epoch - 1)))
        with signals.deferred():
            for probe, loss in zip(active, losses, strict=True):
                if validated:
                    probe.result = results[probe]
                    probe.best |= {n: max(probe.best.get(n, 0.0), probe.result[n]) for n in BEST if n in probe.result}
                    prefix, count = self.prefix(probe), probe.result["num_test_images"]
                    print(f"{prefix}Accuracy at epoch {epoch} of the network on the {count} test images: "
                          f"{probe.result['accuracy']:.2f}%")  # fmt: skip
                    best = probe.best["accuracy"]
                    print(f"{prefix}Max accuracy so far: {best:.2f}%, training loss {loss:.4f}, left {left}", flush=True)
                probe.end_epoch(epoch)

    def train_one_epoch(self, active: list[Probe], loader: DataLoader, epoch: int) -> list[float]:
        """One pass over the training images for the active probes; the mean loss of each."""
        header, images, after = f"epoch {epoch}/{self.args.epochs}", images_per_step(self.args), self.args.epochs - epoch - 1
        progress = TrainingProgress(header, len(loader), images, self.device, print_freq=50, epochs_after=after)
        names = [f"{self.prefix(probe)}loss" for probe in active]
        for images, labels in loader:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)  # B, 3, S, S and B
            losses = [F.cross_entropy(logits, labels) for logits in self._logits(active, images)]
            progress.update(**dict(zip(names, losses, strict=True)))
            for probe, loss in zip(active, losses, strict=True):
                probe.optimizer.zero_grad()
                loss.backward()
                probe.optimizer.step()
        self.backbone.eval()
        if self.train_backbone:
            broadcast_buffers(self.backbone)
        means = progress.finish()
        return [means[name] for name in names]

    def _logits(self, active: list[Probe], images: torch.Tensor) -> list[torch.Tensor]:
        """Logits [B, C] of each active probe, with gradients of what it trains."""
        if self.train_backbone:
            return [probe.model(images) for probe in active]
        tokens = self.extractors[0].tokens(images)
        return [probe.model(probe.extractor.select(tokens)) for probe in active]

    def prefix(self, probe: Probe) -> str:
        """Names the probe's part in printed lines, if there are several probes."""
        return f"{probe.identity['part']}: " if len(self.probes) > 1 else ""


@torch.no_grad()
def accuracies(
    classifier: nn.Module, features: torch.Tensor, labels: torch.Tensor, per_class: bool = False
) -> dict[str, float]:
    """Accuracies on features [M, D] with labels [M], summed over all processes.

    Returns the mean loss `test_loss`, the top-1 `accuracy` and, from 5 classes on, `top5`, in percent; with `per_class` also
    `mean_class_accuracy`, the mean over the classes of the accuracy on the images of the class.

    Raises FloatingPointError if the classifier has diverged.
    """
    logits = classifier(features)  # M, C
    num_labels = logits.shape[1]
    hits = logits.topk(min(5, num_labels)).indices == labels[:, None]  # M, 5
    loss = F.cross_entropy(logits, labels, reduction="sum")
    sums = torch.stack([loss, hits[:, :1].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)]).double()
    loss, top1, top5, count = all_reduce_sum(sums).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError("loss on test images")
    result = {"accuracy": 100 * top1 / count, "test_loss": loss / count, "num_test_images": int(count)}
    if num_labels >= 5:
        result["top5"] = 100 * top5 / count
    if per_class:
        counts = torch.stack([x.bincount(minlength=num_labels) for x in (labels[hits[:, 0]], labels)])  # 2, C
        right, images = all_reduce_sum(counts).double()
        result["mean_class_accuracy"] = 100 * (right / images)[images > 0].mean().item()
    return result
