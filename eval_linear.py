"""Linear probe of a frozen backbone, of its IR or of its EF, and its accuracy on perturbed images.

Train the probe of the invariant part, then measure it under rotation and colour jitter:
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part
    python eval_linear.py --pretrained_weights R/checkpoint.pth --data_path data/IN100 --output_dir R --else_part main_part \\
        --evaluate --test_aug_type aug1_2
Several processes: torchrun --nproc_per_node=2 eval_linear.py ..., or torch.distributed.launch.

Letters: B batch, D width of the features, C classes.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import utils
from augmentations import PERTURBATIONS, eval_transform, probe_train_transform
from datasets import check_same_classes, labelled_dataset, shard
from features import (
    PARTS,
    FeatureExtractor,
    Pretrained,
    add_backbone_arguments,
    check_part,
    extract_features,
    load_pretrained,
)
from telemetry import Progress
from utils import InputError, TypedFloat, bool_flag

CLASSES = {"Imagenet": 1000, "IN100": 100}


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_backbone_arguments(parser)
    add = parser.add_argument
    add("--else_part", default="ALL", help="ALL, main_part (IR) or else_part (EF)")
    add("--n_last_blocks", type=int, default=4, help="ViT: [CLS] tokens of so many last blocks side by side")
    add("--avgpool_patchtokens", type=bool_flag, default=False, help="ViT: the mean patch token too")
    add("--data_path", required=True, help="folder with train/ and val/, a folder per class in each")
    add("--dataset_type", help="Imagenet (1000 classes) or IN100 (100): checks the folder; default: whatever it holds")
    add("--num_labels", type=int, help="number of classes: checks the folder")
    add("--epochs", type=int, default=100)
    add("--lr", type=TypedFloat, default=TypedFloat("0.001"), help="for 256 images per step; scaled linearly")
    add("--optimizer", default="sgd", choices=["sgd", "lars"])
    add("--batch_size_per_gpu", type=int, default=128)
    add("--val_freq", type=int, default=1, help="epochs between validations")
    add("--evaluate", action="store_true", help="only measure a trained probe")
    add("--test_aug_type", default="ori", help=f"perturbation of the test images: {', '.join(PERTURBATIONS)}")
    add("--final_eval_weights", help="probe checkpoint for --evaluate; default: the one in --output_dir")
    add("--output_dir", default=".", help="probe checkpoint and results")
    add("--trial_name", default="", help="last piece of the file names")
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training")
    add("--skip_bad_images", type=bool_flag, default=False)
    add("--seed", type=int, default=0)
    utils.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written."""
    if args.else_part not in PARTS:
        raise InputError(f"--else_part {args.else_part!r}: must be one of {', '.join(PARTS)}")
    if args.test_aug_type not in PERTURBATIONS:
        raise InputError(f"--test_aug_type {args.test_aug_type!r}: must be one of {', '.join(PERTURBATIONS)}")
    if args.dataset_type is not None and args.dataset_type not in CLASSES:
        raise InputError(f"--dataset_type {args.dataset_type!r}: must be one of {', '.join(CLASSES)}")
    if os.sep in args.trial_name:
        raise InputError(f"--trial_name {args.trial_name!r}: must hold no {os.sep}, it is a piece of a file's name")
    utils.check_positive(args, "batch_size_per_gpu", "epochs", "val_freq", "lr", "n_last_blocks")
    utils.check_not_negative(args, "num_workers", "seed")
    utils.check_writable(args.output_dir)


def probe_name(args: argparse.Namespace, hp1: float) -> str:
    """linear[_hp<hp1>[_else]]_<lr>_<epochs>_<trial>, with lr, epochs and hp1 as they were typed."""
    part = {"ALL": "", "main_part": f"_hp{hp1}", "else_part": f"_hp{hp1}_else"}[args.else_part]
    return f"linear{part}_{args.lr}_{args.epochs}_{args.trial_name}"


class LinearClassifier(nn.Module):
    """One linear layer on features [B, D]; weights normal 0.01, bias 0."""

    def __init__(self, dim: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(dim, num_labels)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # B, C


def build_dataset(args: argparse.Namespace, split: str, transform):
    """The images of one split; InputError if the number of classes is not the promised one."""
    folder = os.path.join(args.data_path, split)
    check = args.check_images and (args.skip_bad_images or not args.evaluate)  # an evaluation has nothing to lose
    dataset = labelled_dataset(
        folder, transform, args.seed, skip_bad_images=args.skip_bad_images, check=check, threads=args.num_workers
    )
    found = len(dataset.classes)
    for flag, expected in (("dataset_type", CLASSES.get(args.dataset_type)), ("num_labels", args.num_labels)):
        if expected is not None and found != expected:
            raise InputError(f"--{flag} {getattr(args, flag)}: means {expected} classes, but {folder} holds {found}")
    return dataset


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> tuple[torch.optim.Optimizer, object]:
    """SGD with momentum 0.9 or LARS, no weight decay, and its cosine to 0 per epoch."""
    lr = args.lr * args.batch_size_per_gpu * utils.get_world_size() / 256
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0)
    else:
        optimizer = utils.LARS(model.parameters(), lr=lr, adapt_1d=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=0)


def train_one_epoch(extractor, model, optimizer, loader, epoch, device, args) -> dict[str, float]:
    """One pass over the training images; mean loss."""
    world = utils.get_world_size()
    progress = Progress(f"epoch {epoch}/{args.epochs}", len(loader), args.batch_size_per_gpu * world, device, 50)
    for images, labels in loader:
        logits = model(extractor(images.to(device, non_blocking=True)))  # B, C
        loss = F.cross_entropy(logits, labels.to(device))
        progress.update(loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return progress.finish()


@torch.no_grad()
def validate(classifier: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean loss, top-1 and, from 5 classes on, top-5 in percent over the shares of all processes, every image once."""
    logits = classifier(features)  # images, C
    num_labels = logits.shape[1]
    hits = logits.topk(min(5, num_labels)).indices == labels[:, None]  # images, 5
    loss = F.cross_entropy(logits, labels, reduction="sum")
    sums = torch.stack([loss, hits[:, :1].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)]).double()
    loss, top1, top5, count = utils.all_reduce_sum(sums).tolist()
    result = {"accuracy": 100 * top1 / count, "test_loss": loss / count, "num_test_images": int(count)}
    return result | ({"top5": 100 * top5 / count} if num_labels >= 5 else {})


def load_probe(path: str | Path, classifier: LinearClassifier, expected: dict) -> dict:
    """Load a probe, ours or an original's, into the classifier; returns its checkpoint.

    Raises InputError unless it is of the `expected` part, number of classes, feature width and backbone weights.
    """
    checkpoint = utils.load_checkpoint(path)
    state = utils.strip_prefix(checkpoint["state_dict"]) if "state_dict" in checkpoint else {}
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


def check_settings(args: argparse.Namespace, stored: dict, path: Path) -> None:
    """InputError if the probe to continue was trained with other settings than those that its file name tells."""
    for name in ("seed", "optimizer", "batch_size_per_gpu", "n_last_blocks", "avgpool_patchtokens", "img_size"):
        if name in stored and stored[name] != getattr(args, name):
            raise InputError(
                f"--{name} {getattr(args, name)}: the probe {path} was trained with {stored[name]}; continue it with that, "
                "or give another --output_dir or --trial_name"
            )


def write_result(path: Path, args: argparse.Namespace, pretrained: Pretrained, result: dict) -> None:
    """One JSON file beside the checkpoint: the accuracy and everything that it depends on."""
    if not utils.is_main_process():
        return
    record = {
        "kind": "linear_probe", "net": pretrained.net, "arch": pretrained.arch, "part": args.else_part,
        "hp1": float(pretrained.hp1), "pretrained_epochs": pretrained.epochs, "aug": pretrained.aug,
        "test_aug_type": args.test_aug_type, **result, "seed": args.seed,
        "backbone": pretrained.fingerprint, "args": utils.plain_args(args),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    utils.write_text_atomically(json.dumps(record, indent=1) + "\n", path)
    print(f"wrote {path}")


def train(args, pretrained, extractor, classifier, expected, dataset, val_features, val_labels, device) -> None:
    """Train the probe, or continue its own checkpoint; saves it every epoch and writes the result at the end."""
    name = probe_name(args, pretrained.hp1)
    path = Path(args.output_dir) / f"checkpoint_{name}.pth.tar"
    world, rank = utils.get_world_size(), utils.get_rank()
    sampler = DistributedSampler(dataset, world, rank, shuffle=True, seed=args.seed)
    loader = build_loader(dataset, args, sampler=sampler)
    optimizer, scheduler = build_optimizer(args, classifier)
    start_epoch, best, result = 0, 0.0, {}
    if path.exists():
        state = load_probe(path, classifier, expected)
        missing = {"optimizer", "scheduler", "epoch", "best_acc"} - set(state)
        if missing:
            raise InputError(f"probe checkpoint {path}: cannot be continued, lacks {', '.join(sorted(missing))}")
        check_settings(args, utils.plain_args(state.get("args", {})), path)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        start_epoch, best = state["epoch"], state["best_acc"]
        result = validate(classifier, val_features, val_labels)
        print(f"continuing {path} from epoch {start_epoch}")
    os.makedirs(args.output_dir, exist_ok=True)
    model = DistributedDataParallel(classifier) if utils.is_distributed() else classifier
    effective_lr = optimizer.param_groups[0]["initial_lr"]
    print(
        f"{args.else_part}: {extractor.dim} features, {expected['num_labels']} classes, {len(dataset)} training images, "
        f"lr {effective_lr:.4g} for {args.batch_size_per_gpu * world} images per step"
    )

    for epoch in range(start_epoch, args.epochs):
        utils.seed_everything(args.seed, epoch, rank)
        sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        train_loss = train_one_epoch(extractor, model, optimizer, loader, epoch, device, args)["loss"]
        scheduler.step()
        if (epoch + 1) % args.val_freq == 0 or epoch + 1 == args.epochs:
            result = validate(classifier, val_features, val_labels)
            best = max(best, result["accuracy"])
            accuracy, count = result["accuracy"], result["num_test_images"]
            print(f"Accuracy at epoch {epoch} of the network on the {count} test images: {accuracy:.2f}%")
            print(f"Max accuracy so far: {best:.2f}%, training loss {train_loss:.4f}")
        if utils.is_main_process():
            state = {
                "epoch": epoch + 1, "state_dict": classifier.state_dict(), "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "best_acc": best, "args": utils.plain_args(args), **expected,
            }  # fmt: skip
            utils.save_atomically(state, path)
    print(f"Top-1 test accuracy: last {result['accuracy']:.2f}%, best {best:.2f}%")
    result |= {"best_accuracy": best, "effective_lr": effective_lr, "num_labels": expected["num_labels"]}
    write_result(Path(args.output_dir) / f"{name}.json", args, pretrained, result)


def build_loader(dataset, args: argparse.Namespace, sampler=None) -> DataLoader:
    return DataLoader(
        dataset,
        args.batch_size_per_gpu,
        sampler=sampler,
        num_workers=utils.worker_count(args.num_workers),
        pin_memory=torch.cuda.is_available(),
    )


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    device = utils.init_distributed(args)
    pretrained = load_pretrained(args, device)
    check_part(args.else_part, pretrained.net, pretrained.hp1, pretrained.backbone.embed_dim)
    extractor = FeatureExtractor(
        pretrained.backbone, args.else_part, pretrained.hp1, args.n_last_blocks, args.avgpool_patchtokens
    )
    views = pretrained.img_size, pretrained.mean, pretrained.std
    val = build_dataset(args, "val", eval_transform(args.test_aug_type, *views))
    dataset = None if args.evaluate else build_dataset(args, "train", probe_train_transform(*views))
    if dataset is not None:
        check_same_classes(dataset, val)
    utils.seed_everything(args.seed)
    classifier = LinearClassifier(extractor.dim, len(val.classes)).to(device)
    expected = {
        "part": args.else_part, "net": pretrained.net, "num_labels": len(val.classes), "dim": extractor.dim,
        "backbone": pretrained.fingerprint,
    }  # fmt: skip
    print(f"{pretrained.net} {pretrained.arch}, {len(val)} test images, perturbation {args.test_aug_type}")
    name = probe_name(args, pretrained.hp1)
    if args.evaluate:
        weights = args.final_eval_weights or Path(args.output_dir) / f"checkpoint_{name}.pth.tar"
        load_probe(weights, classifier, expected)
    own = shard(val, utils.get_rank(), utils.get_world_size())
    features, labels = extract_features(extractor, build_loader(own, args), device)
    if not args.evaluate:
        train(args, pretrained, extractor, classifier, expected, dataset, features, labels, device)
        return
    result = validate(classifier, features, labels)
    print(f"Accuracy of the network on the {result['num_test_images']} test images: {result['accuracy']:.2f}%")
    result["num_labels"] = len(val.classes)
    write_result(Path(args.output_dir) / f"only_eval_{args.test_aug_type}_{name}.json", args, pretrained, result)


if __name__ == "__main__":
    utils.run_entry_point(main)
