"""A linear classifier on a backbone's features: arguments, training with resume, validation, checkpoints, results.

Shared by the linear probe (eval_linear.py) and the downstream tasks (eval_linear_ds.py).
Letters: B batch, D width of the features, C classes, M images.
"""

import argparse
import datetime
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

import distributed
import utils
from augmentations import PERTURBATIONS
from backbones import backbone_state, load_backbone_weights
from checkpoint import load_checkpoint, save_atomically, strip_prefix
from evaluation.names import PARTS
from evaluation.pretrained import Pretrained
from telemetry import TrainingProgress
from utils import InputError, TypedFloat, bool_flag

# What makes two runs different although their files have the same name.
SETTINGS = ("seed", "batch_size_per_gpu", "n_last_blocks", "avgpool_patchtokens", "img_size")
# Metrics whose best value over the epochs is kept, and their names in a checkpoint.
BEST = {"accuracy": "best_acc", "mean_class_accuracy": "best_mean_class_acc"}


# --- arguments ---------------------------------------------------------------------------------------------------------


def add_classifier_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that every training of a classifier has."""
    add = parser.add_argument
    add("--else_part", default="ALL", help="ALL, main_part (IR) or else_part (EF)")
    add("--n_last_blocks", type=int, default=4, help="ViT: [CLS] tokens of so many last blocks side by side")
    add("--avgpool_patchtokens", type=bool_flag, default=False, help="ViT: the mean patch token too")
    add("--num_labels", type=int, help="number of classes: checks the data")
    add("--epochs", type=int, default=100)
    add("--lr", type=TypedFloat, default=TypedFloat("0.001"), help="for 256 images per step; scaled linearly")
    add("--batch_size_per_gpu", type=int, default=128)
    add("--val_freq", type=int, default=1, help="epochs between validations")
    add("--evaluate", action="store_true", help="only measure what was trained")
    add("--test_aug_type", default="ori", help=f"perturbation of the test images: {', '.join(PERTURBATIONS)}")
    add("--final_eval_weights", help="checkpoint for --evaluate; default: the one in --output_dir")
    add("--trial_name", default="", help="piece of the file names")
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training")
    add("--skip_bad_images", type=bool_flag, default=False)
    add("--seed", type=int, default=0)


def check_classifier_args(args: argparse.Namespace) -> None:
    """Raise InputError for values of these flags that cannot work."""
    if args.else_part not in PARTS:
        raise InputError(f"--else_part {args.else_part!r}: must be one of {', '.join(PARTS)}")
    if args.test_aug_type not in PERTURBATIONS:
        raise InputError(f"--test_aug_type {args.test_aug_type!r}: must be one of {', '.join(PERTURBATIONS)}")
    if os.sep in args.trial_name:
        raise InputError(f"--trial_name {args.trial_name!r}: must hold no {os.sep}, it is a piece of a file's name")
    utils.check_positive(args, "batch_size_per_gpu", "epochs", "val_freq", "lr", "n_last_blocks")
    utils.check_not_negative(args, "num_workers", "seed")


def check_class_count(args: argparse.Namespace, where: str, found: int, known: dict[str, int]) -> None:
    """InputError unless the `found` classes are as many as --dataset_type, one of `known`, and --num_labels promise."""
    for flag, expected in (("dataset_type", known.get(args.dataset_type)), ("num_labels", args.num_labels)):
        if expected is not None and found != expected:
            raise InputError(f"--{flag} {getattr(args, flag)}: means {expected} classes, but {where} holds {found}")


# --- network and data --------------------------------------------------------------------------------------------------


class LinearClassifier(nn.Module):
    """One linear layer on features [B, D]; weights normal 0.01, bias 0."""

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # B, C


def build_loader(dataset, args: argparse.Namespace, sampler=None) -> DataLoader:
    """Batches in the order of the sampler, or else of the data set."""
    return DataLoader(
        dataset,
        args.batch_size_per_gpu,
        sampler=sampler,
        num_workers=distributed.worker_count(args.num_workers),
        pin_memory=torch.cuda.is_available(),
    )


# --- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """What a checkpoint holds; it may be continued if it is as `expected` and has the same arguments `settings`."""

    path: Path
    classifier: LinearClassifier
    backbone: nn.Module | None  # None where it is frozen
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    expected: dict
    settings: tuple[str, ...] = SETTINGS


def train_one_epoch(extractor, model, optimizer, loader, epoch, device, args) -> dict[str, float]:
    """One pass over the training images; mean loss."""
    world = distributed.get_world_size()
    progress = TrainingProgress(f"epoch {epoch}/{args.epochs}", len(loader), args.batch_size_per_gpu * world, device, 50)
    for images, labels in loader:
        logits = model(extractor(images.to(device, non_blocking=True)))  # B, C
        loss = F.cross_entropy(logits, labels.to(device))
        progress.update(loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return progress.finish()


def fit(
    args: argparse.Namespace, training: Training, train_epoch: Callable[[int], float], measure: Callable[[], dict]
) -> dict[str, float]:
    """Train, or continue the training's own checkpoint, which is rewritten every epoch; last and best metrics.

    `train_epoch(epoch)` gives the mean training loss, `measure()` what `validate` gives.
    """
    path, rank = training.path, distributed.get_rank()
    start_epoch, best, result = 0, {"accuracy": 0.0}, {}
    if path.exists():
        state = _load_training(args, training)
        start_epoch, best = state["epoch"], {name: state[key] for name, key in BEST.items() if key in state}
        result = measure()
        print(f"continuing {path} from epoch {start_epoch}")
    path.parent.mkdir(parents=True, exist_ok=True)

    for epoch in range(start_epoch, args.epochs):
        start = time.perf_counter()
        utils.seed_everything(args.seed, epoch, rank)
        train_loss = train_epoch(epoch)
        training.scheduler.step()
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            result = measure()
            best |= {name: max(best.get(name, 0.0), result[name]) for name in BEST if name in result}
            accuracy, count = result["accuracy"], result["num_test_images"]
            print(f"Accuracy at epoch {epoch} of the network on the {count} test images: {accuracy:.2f}%")
            left = datetime.timedelta(seconds=round((time.perf_counter() - start) * (args.epochs - epoch - 1)))
            print(f"Max accuracy so far: {best['accuracy']:.2f}%, training loss {train_loss:.4f}, left {left}", flush=True)
        if distributed.is_main_process():
            _save_training(args, training, epoch + 1, best)
    return result | {f"best_{name}": value for name, value in best.items()}


def _save_training(args, training, epoch, best):
    state = {
        "epoch": epoch, "state_dict": training.classifier.state_dict(), "optimizer": training.optimizer.state_dict(),
        "scheduler": training.scheduler.state_dict(), "args": utils.plain_args(args), **training.expected,
    }  # fmt: skip
    state |= {BEST[name]: value for name, value in best.items()}
    if training.backbone is not None:
        state["state_dict_model"] = training.backbone.state_dict()
    save_atomically(state, training.path)


def _load_training(args, training):
    path = training.path
    state = load_probe(path, training.classifier, training.expected)
    if training.backbone is not None:
        load_trained_backbone(path, state, training.backbone)
    missing = {"optimizer", "scheduler", "epoch", "best_acc"} - set(state)
    if missing:
        raise InputError(f"probe checkpoint {path}: cannot be continued, lacks {', '.join(sorted(missing))}")
    check_settings(args, utils.plain_args(state.get("args", {})), path, training.settings)
    training.optimizer.load_state_dict(state["optimizer"])
    training.scheduler.load_state_dict(state["scheduler"])
    return state


def load_probe(path: str | Path, classifier: LinearClassifier, expected: dict) -> dict:
    """Load a probe, ours or an original's, into the classifier; returns its checkpoint.

    Raises InputError unless it is of the `expected` part, number of classes, feature width and backbone weights.
    """
    checkpoint = load_checkpoint(path)
    state = strip_prefix(checkpoint["state_dict"]) if "state_dict" in checkpoint else {}
    if set(state) != {"linear.weight", "linear.bias"}:
        raise InputError(f"probe checkpoint {path}: holds no linear classifier")
    found = checkpoint | dict(zip(("num_labels", "dim"), state["linear.weight"].shape, strict=True))
    for name, value in expected.items():
        if name in found and found[name] != value:
            if name == "backbone":
                raise InputError(f"probe checkpoint {path}: was trained on other backbone weights; delete it, or move it away")
            raise InputError(f"probe checkpoint {path}: its {name} is {found[name]}, here it is {value}")
    classifier.load_state_dict(state)
    return checkpoint


def load_trained_backbone(path: str | Path, checkpoint: dict, backbone: nn.Module) -> None:
    """Load the fine-tuned backbone of a classifier's checkpoint. Raises InputError if there is none, or another one."""
    if "state_dict_model" not in checkpoint:
        raise InputError(f"checkpoint {path}: holds no fine-tuned backbone, only a classifier")
    with utils.error_prefix(f"checkpoint {path}"):
        load_backbone_weights(backbone, backbone_state(checkpoint, "state_dict_model"))


def check_settings(args: argparse.Namespace, stored: dict, path: Path, names: Iterable[str]) -> None:
    """InputError if the probe to continue was trained with other settings `names`."""
    for name in names:
        if name in stored and stored[name] != getattr(args, name):
            raise InputError(
                f"--{name} {getattr(args, name)}: the probe {path} was trained with {stored[name]}; continue it with that, "
                "or give another --output_dir or --trial_name"
            )


# --- measuring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(classifier: nn.Module, features: torch.Tensor, labels: torch.Tensor, per_class: bool = False) -> dict[str, float]:
    """Mean loss, top-1 and, from 5 classes on, top-5 in percent over the shares of all processes, every image once.

    With `per_class` also the mean over classes of the share of the class's images that are right.
    """
    logits = classifier(features)  # M, C
    num_labels = logits.shape[1]
    hits = logits.topk(min(5, num_labels)).indices == labels[:, None]  # M, 5
    loss = F.cross_entropy(logits, labels, reduction="sum")
    sums = torch.stack([loss, hits[:, :1].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)]).double()
    loss, top1, top5, count = distributed.all_reduce_sum(sums).tolist()
    result = {"accuracy": 100 * top1 / count, "test_loss": loss / count, "num_test_images": int(count)}
    if num_labels >= 5:
        result["top5"] = 100 * top5 / count
    if per_class:
        counts = torch.stack([x.bincount(minlength=num_labels) for x in (labels[hits[:, 0]], labels)])  # 2, C
        right, images = distributed.all_reduce_sum(counts).double()
        result["mean_class_accuracy"] = 100 * (right / images)[images > 0].mean().item()
    return result


def write_result(path: Path, kind: str, args: argparse.Namespace, pretrained: Pretrained, result: dict) -> None:
    """One JSON file beside the checkpoint: the accuracy and everything that it depends on."""
    if not distributed.is_main_process():
        return
    record = {
        "kind": kind, **pretrained.record(), "part": args.else_part, "hp1": float(pretrained.hp1),
        "test_aug_type": args.test_aug_type, **result, "seed": args.seed, "args": utils.plain_args(args),
    }  # fmt: skip
    utils.save_json(record, path)
    print(f"wrote {path}")
