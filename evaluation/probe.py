"""Linear classifiers on a backbone's features: their training, their files, their accuracies.

A Probe is one classifier with its optimizer and its checkpoint. A ProbeGroup trains and evaluates the probes of several parts
of the representation with one pass of the backbone. They serve the linear probe (eval_linear.py) and downstream classification
(eval_linear_ds.py, a group of one), which supply data and optimizers.

Shapes: D width of the features, C classes, M images.
"""

import argparse
import datetime
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import utils
from augmentations import PERTURBATIONS
from backbones import backbone_state, load_backbone_weights
from checkpoint import load_checkpoint, save_atomically, strip_prefix
from datasets import ImageDataset, make_loader, shard
from distributed import (
    all_reduce_sum,
    broadcast_buffers,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
)
from evaluation.features import FeatureExtractor, extract_parts
from evaluation.names import PARTS, part_flag
from evaluation.pretrained import Pretrained, result_record
from rendering import add_renderer_argument
from telemetry import TrainingProgress
from utils import InputError, TypedFloat, bool_flag

# Arguments that must be the same when a probe's training is resumed, since the name of its file does not contain them.
FIXED_ARGUMENTS = ("seed", "batch_size_per_gpu", "n_last_blocks", "avgpool_patchtokens", "img_size")
# Metrics whose best value over the epochs is kept, and their names in a checkpoint.
BEST = {"accuracy": "best_acc", "mean_class_accuracy": "best_mean_class_acc"}


# --- arguments ---------------------------------------------------------------------------------------------------------


def add_probe_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Flags of every training of a classifier. With `several`, --else_part and --test_aug_type are lists."""
    add = parser.add_argument
    part, perturbation = "part of the representation: ALL, main_part (IR), else_part (EF)", "perturbation of the test images"
    count = {"nargs": "+"} if several else {}
    if several:
        part += "; several parts share the passes of the backbone, each has its own files"
        perturbation += ", several only with --evaluate"
    add("--else_part", type=part_flag, default=["ALL"] if several else "ALL", help=part, **count)
    add("--n_last_blocks", type=int, default=4, help="ViT: concatenates the [CLS] tokens of the last n blocks. 4 suits small "
        "ViTs, 1 with --avgpool_patchtokens true ViT-B")  # fmt: skip
    add("--avgpool_patchtokens", type=bool_flag, default=False, help="ViT: also use the mean patch token")
    add("--num_labels", type=int, help="number of classes, to check the data; default: as many as there are")
    add("--epochs", type=int, default=100, help="epochs of training")
    add("--lr", type=TypedFloat, default=TypedFloat("0.001"), help="learning rate for 256 images per step; scaled linearly "
        "with their number. Try several: the best one depends on the scale of the features")  # fmt: skip
    add("--batch_size_per_gpu", type=int, default=128, help="images per process and step")
    add("--val_freq", type=int, default=1, help="epochs between validations")
    add("--evaluate", action="store_true", help="only evaluate a trained classifier")
    add("--test_aug_type", default=["ori"] if several else "ori", help=f"{perturbation}: {', '.join(PERTURBATIONS)}", **count)
    add("--final_eval_weights", help="classifier for --evaluate; default: the one in --output_dir")
    add("--trial_name", default="", help="last part of the file names")
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training")
    add("--skip_bad_images", type=bool_flag, default=False, help="leave unreadable images out instead of stopping")
    add("--seed", type=int, default=0, help="seed of the weights, the order of the images, and their augmentation")
    add_renderer_argument(parser)


def check_probe_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values of these flags."""
    for flag, choices in (("else_part", PARTS), ("test_aug_type", PERTURBATIONS)):
        value = getattr(args, flag)
        utils.check_choices(flag, value if isinstance(value, list) else [value], choices)
    if os.sep in args.trial_name:
        raise InputError(f"--trial_name {args.trial_name!r}: must not contain {os.sep}, it is part of a file name")
    utils.check_positive(args, "batch_size_per_gpu", "epochs", "val_freq", "lr", "n_last_blocks")
    utils.check_not_negative(args, "num_workers", "seed")


def check_class_count(args: argparse.Namespace, where: str, found: int, known: dict[str, int]) -> None:
    """Raise InputError unless --dataset_type, a key of `known`, and --num_labels agree with the number of classes `found`."""
    for flag, expected in (("dataset_type", known.get(args.dataset_type)), ("num_labels", args.num_labels)):
        if expected is not None and found != expected:
            raise InputError(f"--{flag} {getattr(args, flag)}: means {expected} classes, but {where} holds {found}")


# --- the probe ---------------------------------------------------------------------------------------------------------


class LinearClassifier(nn.Module):
    """One linear layer, features [B, D] -> logits [B, C]; weights drawn from a normal distribution (0.01), biases 0."""

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # B, C


@dataclass(eq=False)
class Probe:
    """A linear classifier on the features of `extractor`, its optimizer, and the checkpoint file that its training writes.

    The backbone is trained as well if the extractor says so.

    Args:
        extractor: images -> features [B, D].
        classifier: features -> logits [B, C], on the device.
        path: the checkpoint, rewritten after every epoch.
        identity: what the probe was trained on; a checkpoint with other values is refused. The keys num_labels and dim are
            read off the weights of a file that does not have them.
        arguments: of the command line, recorded in the checkpoint.
        fixed_arguments: names of those that must be the same when training is resumed.
        optimizer: of the classifier, and of the backbone if that is trained; only training needs it.

    Attributes:
        epoch: the next one to run.
        best: best value of each metric so far.
        result: accuracies of the last evaluation.
    """

    extractor: FeatureExtractor
    classifier: LinearClassifier
    path: Path
    identity: dict[str, Any]
    arguments: dict[str, Any]
    fixed_arguments: tuple[str, ...] = FIXED_ARGUMENTS
    optimizer: torch.optim.Optimizer | None = None
    epoch: int = field(default=0, init=False)
    best: dict[str, float] = field(default_factory=lambda: {"accuracy": 0.0}, init=False)
    result: dict[str, float] = field(default_factory=dict, init=False)

    # --- training ---

    def start(self, epochs: int) -> None:
        """Prepare for training with a cosine schedule to 0 over `epochs`, from the checkpoint if there is one."""
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs, eta_min=0)
        if self.path.exists():
            self._resume()
        # What is trained: features -> logits, or images -> logits with the backbone; in a process group distributed.
        trained = self.extractor.train_backbone
        model = nn.Sequential(self.extractor, self.classifier) if trained else self.classifier
        self.model = DistributedDataParallel(model) if is_distributed() else model

    def step(self, loss: torch.Tensor) -> None:
        """One step of the optimizer."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def record(self, result: dict[str, float]) -> None:
        """Keep the accuracies of an evaluation during training."""
        self.result = result
        self.best |= {name: max(self.best.get(name, 0.0), result[name]) for name in BEST if name in result}

    def end_epoch(self, epoch: int) -> None:
        """Advance the schedule and write the checkpoint, in the first process."""
        self.scheduler.step()
        self.epoch = epoch + 1
        if is_main_process():
            self._save()

    # --- files ---

    def _save(self) -> None:
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
        missing = {"optimizer", "scheduler", "epoch", "best_acc"} - set(state)
        if missing:
            raise InputError(f"probe checkpoint {self.path}: cannot be resumed, lacks {', '.join(sorted(missing))}")
        stored = utils.plain_args(state.get("args", {}))
        for name in self.fixed_arguments:
            if name in stored and stored[name] != self.arguments[name]:
                raise InputError(
                    f"--{name} {self.arguments[name]}: the probe {self.path} was trained with {stored[name]}; continue it with "
                    "that, or give another --output_dir or --trial_name"
                )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.best = state["epoch"], {name: state[key] for name, key in BEST.items() if key in state}
        print(f"continuing {self.path} from epoch {self.epoch}")

    def load(self, path: str | Path) -> dict[str, Any]:
        """Load a trained probe, ours or an original's, and its backbone if that is trained; returns the checkpoint.

        Raises InputError if it is not one, or if its identity is another one.
        """
        checkpoint = load_checkpoint(path)
        state = strip_prefix(checkpoint["state_dict"]) if "state_dict" in checkpoint else {}
        if set(state) != {"linear.weight", "linear.bias"}:
            raise InputError(f"probe checkpoint {path}: contains no linear classifier")
        found = checkpoint | dict(zip(("num_labels", "dim"), state["linear.weight"].shape, strict=True))
        for name, value in self.identity.items():
            if name in found and found[name] != value:
                why = f"its {name} is {found[name]}, here it is {value}"
                if name == "backbone":
                    why = "was trained on other backbone weights; delete it, or move it away"
                raise InputError(f"probe checkpoint {path}: {why}")
        self.classifier.load_state_dict(state)
        if self.extractor.train_backbone:
            load_trained_backbone(path, checkpoint, self.extractor.backbone)
        elif "state_dict_model" in checkpoint:
            raise InputError(f"checkpoint {path}: contains a fine-tuned backbone; evaluate it in the mode it was trained in")
        return checkpoint


@dataclass
class ProbeGroup:
    """Probes of different parts of one backbone's representation, trained and evaluated together.

    Every image is read, and passes through the backbone, once for all probes. The result is that of training each of them in
    a group of its own: the order of the images and their views depend on the seed and the epoch alone, and each probe has its
    own optimizer and files. A probe that was interrupted, or is already finished, takes part only from its next epoch on.

    Args:
        probes: their extractors differ only in the part; a trained backbone belongs to a single one.
        device: of the backbone and the classifiers.
        epochs, batch_size, val_freq, seed: of the training; batch_size counts images per process.
        num_workers: data loading workers.
        per_class: also measure the mean accuracy over classes.
    """

    probes: list[Probe]
    device: torch.device
    epochs: int = 100
    batch_size: int = 128
    val_freq: int = 1
    seed: int = 0
    num_workers: int = 0
    per_class: bool = False

    def __post_init__(self):
        self.extractors = [probe.extractor for probe in self.probes]
        self.backbone, self.train_backbone = self.extractors[0].backbone, self.extractors[0].train_backbone
        self._kept: tuple[ImageDataset, tuple[list[torch.Tensor], torch.Tensor]] | None = None

    def loader(self, dataset, sampler=None) -> DataLoader:
        """Batches in the order of the sampler, or else of the data set."""
        return make_loader(dataset, self.batch_size, sampler, self.num_workers)

    # --- accuracy ---

    def evaluate(self, test: ImageDataset) -> dict[Probe, dict[str, float]]:
        """Accuracies of every probe on the test images, see `accuracies`."""
        features, labels = self._test_features(test)
        return {
            probe: accuracies(probe.classifier, x, labels, self.per_class)
            for probe, x in zip(self.probes, features, strict=True)
        }

    def _test_features(self, test: ImageDataset) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Features of each part, and labels. Those of a frozen backbone are kept until another data set is given."""
        if self._kept is not None and self._kept[0] is test:
            return self._kept[1]
        own = shard(test, get_rank(), get_world_size())
        found = extract_parts(self.extractors, self.loader(own), self.device, "test images")
        self._kept = None if self.train_backbone else (test, found)
        return found

    # --- training ---

    def fit(self, train: ImageDataset, test: ImageDataset) -> dict[Probe, dict[str, float]]:
        """Train all probes with a cosine schedule to 0, or resume their checkpoints.

        Returns the metrics of each, of the last epoch and, `best_*`, of the best. The checkpoints are rewritten after every
        epoch. A finished training is only evaluated.
        """
        for probe in self.probes:
            probe.start(self.epochs)
        if any(probe.epoch > 0 for probe in self.probes):
            for probe, result in self.evaluate(test).items():
                probe.result = result
        sampler = DistributedSampler(train, get_world_size(), get_rank(), shuffle=True, seed=self.seed)
        loader = self.loader(train, sampler)
        for epoch in range(min(probe.epoch for probe in self.probes), self.epochs):
            self._run_epoch([probe for probe in self.probes if probe.epoch <= epoch], loader, test, epoch)
        return {probe: probe.result | {f"best_{name}": value for name, value in probe.best.items()} for probe in self.probes}

    def _run_epoch(self, active: list[Probe], loader: DataLoader, test: ImageDataset, epoch: int) -> None:
        """Train the active probes for one epoch, validate them if it is time, and write their checkpoints."""
        start = time.perf_counter()
        self._start_epoch(loader, epoch)
        losses = self.train_one_epoch(active, loader, epoch)
        validated = (epoch + 1) % self.val_freq == 0 or epoch + 1 == self.epochs
        results = self.evaluate(test) if validated else {}
        left = round((time.perf_counter() - start) * (self.epochs - epoch - 1))
        for probe, loss in zip(active, losses, strict=True):
            if validated:
                probe.record(results[probe])
                self._print_epoch(probe, epoch, loss, left)
            probe.end_epoch(epoch)

    def _start_epoch(self, loader: DataLoader, epoch: int) -> None:
        """Random numbers, the order of the images and their views depend on the seed and the epoch alone."""
        utils.seed_everything(self.seed, epoch, get_rank())
        loader.sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        self.backbone.train(self.train_backbone)

    def train_one_epoch(self, active: list[Probe], loader: DataLoader, epoch: int) -> list[float]:
        """One pass over the training images for the active probes; the mean loss of each."""
        images_per_step = self.batch_size * get_world_size()
        progress = TrainingProgress(f"epoch {epoch}/{self.epochs}", len(loader), images_per_step, self.device, print_freq=50)
        names = [f"{self.prefix(probe)}loss" for probe in active]
        for images, labels in loader:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)  # B, 3, S, S and B
            losses = [F.cross_entropy(logits, labels) for logits in self._logits(active, images)]
            progress.update(**dict(zip(names, losses, strict=True)))
            for probe, loss in zip(active, losses, strict=True):
                probe.step(loss)
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

    def _print_epoch(self, probe: Probe, epoch: int, train_loss: float, seconds_left: int) -> None:
        prefix, left = self.prefix(probe), datetime.timedelta(seconds=seconds_left)
        accuracy, count, best = probe.result["accuracy"], probe.result["num_test_images"], probe.best["accuracy"]
        print(f"{prefix}Accuracy at epoch {epoch} of the network on the {count} test images: {accuracy:.2f}%")
        print(f"{prefix}Max accuracy so far: {best:.2f}%, training loss {train_loss:.4f}, left {left}", flush=True)


def build_probe(
    args: argparse.Namespace,
    pretrained: Pretrained,
    extractor: FeatureExtractor,
    num_labels: int,
    path: Path,
    device: torch.device,
) -> Probe:
    """The probe of --else_part, a single one, whose weights depend on --seed alone."""
    utils.seed_everything(args.seed)
    return Probe(
        extractor=extractor,
        classifier=LinearClassifier(extractor.dim, num_labels).to(device),
        path=path,
        identity={
            "part": args.else_part, "net": pretrained.net, "num_labels": num_labels, "dim": extractor.dim,
            "backbone": pretrained.fingerprint,
        },
        arguments=utils.plain_args(args),
    )  # fmt: skip


def group_probes(args: argparse.Namespace, probes: list[Probe], device: torch.device, per_class: bool = False) -> ProbeGroup:
    """The probes as one group, with the settings of the command line."""
    return ProbeGroup(
        probes, device, args.epochs, args.batch_size_per_gpu, args.val_freq, args.seed, args.num_workers, per_class
    )


def lr_scale(args: argparse.Namespace) -> float:
    """Factor of the learning rates, which are given for 256 images per step over all processes."""
    return args.batch_size_per_gpu * get_world_size() / 256


def load_trained_backbone(path: str | Path, checkpoint: dict[str, Any], backbone: nn.Module) -> None:
    """Load the fine-tuned backbone of a classifier's checkpoint. Raises InputError if there is none, or another one."""
    if "state_dict_model" not in checkpoint:
        raise InputError(f"checkpoint {path}: contains no fine-tuned backbone, only a classifier")
    with utils.error_prefix(f"checkpoint {path}"):
        load_backbone_weights(backbone, backbone_state(checkpoint, "state_dict_model"))


@torch.no_grad()
def accuracies(
    classifier: nn.Module, features: torch.Tensor, labels: torch.Tensor, per_class: bool = False
) -> dict[str, float]:
    """Accuracies on features [M, D] with labels [M], summed over all processes.

    Returns the mean loss `test_loss`, the top-1 `accuracy` and, from 5 classes on, `top5`, in percent; with `per_class` also
    `mean_class_accuracy`, the mean over the classes of the accuracy on the images of the class.
    """
    logits = classifier(features)  # M, C
    num_labels = logits.shape[1]
    hits = logits.topk(min(5, num_labels)).indices == labels[:, None]  # M, 5
    loss = F.cross_entropy(logits, labels, reduction="sum")
    sums = torch.stack([loss, hits[:, :1].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)]).double()
    loss, top1, top5, count = all_reduce_sum(sums).tolist()
    result = {"accuracy": 100 * top1 / count, "test_loss": loss / count, "num_test_images": int(count)}
    if num_labels >= 5:
        result["top5"] = 100 * top5 / count
    if per_class:
        counts = torch.stack([x.bincount(minlength=num_labels) for x in (labels[hits[:, 0]], labels)])  # 2, C
        right, images = all_reduce_sum(counts).double()
        result["mean_class_accuracy"] = 100 * (right / images)[images > 0].mean().item()
    return result


def write_result(path: Path, kind: str, args: argparse.Namespace, pretrained: Pretrained, result: dict[str, Any]) -> None:
    """One JSON file beside the checkpoint: the accuracy, and everything that it depends on."""
    if not is_main_process():
        return
    values = {"part": args.else_part, "hp1": float(pretrained.hp1), "test_aug_type": args.test_aug_type, **result}
    utils.save_json(result_record(kind, pretrained.record(), args, **values, seed=args.seed), path)
    print(f"wrote {path}")
