"""A linear classifier on a backbone's features: its training, its files, its accuracy.

Serves the linear probe (eval_linear.py) and downstream classification (eval_linear_ds.py), which supply data and optimizer.

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
from datasets import ImageDataset, shard
from distributed import (
    all_reduce_sum,
    broadcast_buffers,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
    worker_count,
)
from evaluation.features import FeatureExtractor, extract_features
from evaluation.names import PARTS, part_flag
from evaluation.pretrained import Pretrained, result_record
from telemetry import TrainingProgress
from utils import InputError, TypedFloat, bool_flag

# Arguments that must be the same when a probe's training is resumed, since the name of its file does not contain them.
FIXED_ARGUMENTS = ("seed", "batch_size_per_gpu", "n_last_blocks", "avgpool_patchtokens", "img_size")
# Metrics whose best value over the epochs is kept, and their names in a checkpoint.
BEST = {"accuracy": "best_acc", "mean_class_accuracy": "best_mean_class_acc"}


# --- arguments ---------------------------------------------------------------------------------------------------------


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of every training of a classifier."""
    add = parser.add_argument
    add("--else_part", type=part_flag, default="ALL", help="part of the representation: ALL, main_part (IR), else_part (EF)")
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
    add("--test_aug_type", default="ori", help=f"perturbation of the test images: {', '.join(PERTURBATIONS)}")
    add("--final_eval_weights", help="classifier for --evaluate; default: the one in --output_dir")
    add("--trial_name", default="", help="last part of the file names")
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training")
    add("--skip_bad_images", type=bool_flag, default=False, help="leave unreadable images out instead of stopping")
    add("--seed", type=int, default=0, help="seed of the weights, the order of the images, and their augmentation")


def check_probe_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values of these flags."""
    if args.else_part not in PARTS:
        raise InputError(f"--else_part {args.else_part!r}: must be one of {', '.join(PARTS)}")
    if args.test_aug_type not in PERTURBATIONS:
        raise InputError(f"--test_aug_type {args.test_aug_type!r}: must be one of {', '.join(PERTURBATIONS)}")
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


@dataclass
class Probe:
    """A linear classifier on the features of `extractor`, and the checkpoint file that its training writes.

    The backbone is trained as well if the extractor says so.

    Args:
        extractor: images -> features [B, D].
        classifier: features -> logits [B, C], on the device.
        device: of both.
        path: the checkpoint, rewritten after every epoch.
        identity: what the probe was trained on; a checkpoint with other values is refused. The keys num_labels and dim are
            read off the weights of a file that does not have them.
        arguments: of the command line, recorded in the checkpoint.
        fixed_arguments: names of those that must be the same when training is resumed.
        epochs, batch_size, val_freq, seed: of the training; batch_size counts images per process.
        num_workers: data loading workers.
        per_class: also measure the mean accuracy over classes.
    """

    extractor: FeatureExtractor
    classifier: LinearClassifier
    device: torch.device
    path: Path
    identity: dict[str, Any]
    arguments: dict[str, Any]
    fixed_arguments: tuple[str, ...] = FIXED_ARGUMENTS
    epochs: int = 100
    batch_size: int = 128
    val_freq: int = 1
    seed: int = 0
    num_workers: int = 0
    per_class: bool = False
    _frozen_features: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)

    def loader(self, dataset, sampler=None) -> DataLoader:
        """Batches in the order of the sampler, or else of the data set."""
        workers, pin_memory = worker_count(self.num_workers), torch.cuda.is_available()
        return DataLoader(dataset, self.batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory)

    # --- accuracy ---

    def evaluate(self, test: ImageDataset) -> dict[str, float]:
        """Accuracies on the test images, see `accuracies`. The features of a frozen backbone are computed only once."""
        features = self._frozen_features
        if features is None:
            own = shard(test, get_rank(), get_world_size())
            features = extract_features(self.extractor, self.loader(own), self.device, "test images")
            if not self.extractor.train_backbone:
                self._frozen_features = features
        return accuracies(self.classifier, *features, self.per_class)

    # --- training ---

    def fit(self, optimizer: torch.optim.Optimizer, train: ImageDataset, test: ImageDataset) -> dict[str, float]:
        """Train with a cosine schedule to 0, or resume the checkpoint; metrics of the last epoch and, `best_*`, of the best.

        The checkpoint is rewritten after every epoch. A finished training is only evaluated.
        """
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs, eta_min=0)
        start_epoch, best, result = 0, {"accuracy": 0.0}, {}
        if self.path.exists():
            state = self._resume(optimizer, scheduler)
            start_epoch, best = state["epoch"], {name: state[key] for name, key in BEST.items() if key in state}
            result = self.evaluate(test)
            print(f"continuing {self.path} from epoch {start_epoch}")
        sampler = DistributedSampler(train, get_world_size(), get_rank(), shuffle=True, seed=self.seed)
        loader = self.loader(train, sampler)
        model = self._trained_model()
        for epoch in range(start_epoch, self.epochs):
            start = time.perf_counter()
            self._start_epoch(loader, epoch)
            train_loss = self.train_one_epoch(model, optimizer, loader, epoch)
            scheduler.step()
            if (epoch + 1) % self.val_freq == 0 or epoch + 1 == self.epochs:
                result = self.evaluate(test)
                best |= {name: max(best.get(name, 0.0), result[name]) for name in BEST if name in result}
                self._print_epoch(epoch, result, best, train_loss, time.perf_counter() - start)
            if is_main_process():
                self._save(epoch + 1, optimizer, scheduler, best)
        return result | {f"best_{name}": value for name, value in best.items()}

    def _trained_model(self) -> nn.Module:
        """What is trained: features -> logits, or images -> logits with the backbone; in a process group distributed."""
        model = nn.Sequential(self.extractor, self.classifier) if self.extractor.train_backbone else self.classifier
        return DistributedDataParallel(model) if is_distributed() else model

    def _start_epoch(self, loader: DataLoader, epoch: int) -> None:
        """Random numbers, the order of the images and their views depend on the seed and the epoch alone."""
        utils.seed_everything(self.seed, epoch, get_rank())
        loader.sampler.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
        self.extractor.backbone.train(self.extractor.train_backbone)

    def train_one_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader, epoch: int) -> float:
        """One pass over the training images; mean loss."""
        trained = self.extractor.train_backbone
        images_per_step = self.batch_size * get_world_size()
        progress = TrainingProgress(f"epoch {epoch}/{self.epochs}", len(loader), images_per_step, self.device, print_freq=50)
        for images, labels in loader:
            images = images.to(self.device, non_blocking=True)  # B, 3, S, S
            logits = model(images if trained else self.extractor(images))  # B, C
            loss = F.cross_entropy(logits, labels.to(self.device))
            progress.update(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.extractor.backbone.eval()
        if trained:
            broadcast_buffers(self.extractor.backbone)
        return progress.finish()["loss"]

    def _print_epoch(self, epoch: int, result: dict, best: dict, train_loss: float, seconds: float) -> None:
        left = datetime.timedelta(seconds=round(seconds * (self.epochs - epoch - 1)))
        accuracy, count = result["accuracy"], result["num_test_images"]
        print(f"Accuracy at epoch {epoch} of the network on the {count} test images: {accuracy:.2f}%")
        print(f"Max accuracy so far: {best['accuracy']:.2f}%, training loss {train_loss:.4f}, left {left}", flush=True)

    # --- files ---

    def _save(self, epoch: int, optimizer, scheduler, best: dict[str, float]) -> None:
        """Write the checkpoint; `epoch` is the next one to run."""
        state = {
            "epoch": epoch, "state_dict": self.classifier.state_dict(), "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(), "args": self.arguments, **self.identity,
        }  # fmt: skip
        state |= {BEST[name]: value for name, value in best.items()}
        if self.extractor.train_backbone:
            state["state_dict_model"] = self.extractor.backbone.state_dict()
        save_atomically(state, self.path)

    def _resume(self, optimizer, scheduler) -> dict[str, Any]:
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
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        return state

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


def build_probe(
    args: argparse.Namespace,
    pretrained: Pretrained,
    extractor: FeatureExtractor,
    num_labels: int,
    path: Path,
    device: torch.device,
    per_class: bool = False,
) -> Probe:
    """The probe of --else_part, whose weights depend on --seed alone."""
    utils.seed_everything(args.seed)
    return Probe(
        extractor=extractor,
        classifier=LinearClassifier(extractor.dim, num_labels).to(device),
        device=device,
        path=path,
        identity={
            "part": args.else_part, "net": pretrained.net, "num_labels": num_labels, "dim": extractor.dim,
            "backbone": pretrained.fingerprint,
        },
        arguments=utils.plain_args(args),
        epochs=args.epochs,
        batch_size=args.batch_size_per_gpu,
        val_freq=args.val_freq,
        seed=args.seed,
        num_workers=args.num_workers,
        per_class=per_class,
    )  # fmt: skip


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
