"""The parts of a pretraining run from the flags of main_dino.py: networks, schedules, and the run itself."""

import argparse

import numpy as np
import torch
import torch.nn as nn

from clever.distributed import get_world_size, resolve_amp_dtype
from clever.methods import METHODS
from clever.methods.term import WithTerm
from clever.models.backbones import build_backbone, check_timm_size, is_ours, synchronize_batch_norm
from clever.models.compilation import compile_blocks
from clever.models.heads import DINOHead, MultiCropWrapper, Split
from clever.models.weights import load_backbone_file
from clever.training import optim
from clever.training.pretraining import Pretraining
from clever.utils import InputError, seed_everything


def build_network(args: argparse.Namespace, drop_path_rate: float | None) -> MultiCropWrapper:
    """The backbone with the heads of --net."""
    backbone = build_backbone(
        args.arch, args.patch_size, args.global_crops_size, drop_path_rate, checkpointing=args.activation_checkpointing
    )
    check_crops(args, backbone)
    options = {
        "use_bn": args.use_bn_in_head,
        "norm_last_layer": args.norm_last_layer,
        "hidden_dim": args.head_hidden_dim,
        "bottleneck_dim": args.head_bottleneck_dim,
    }
    method = METHODS[args.net]
    is_split = method.is_split(args.equiv_part)
    widths = Split(backbone.embed_dim, args.hp1).widths if is_split else [backbone.embed_dim]
    flags = method.base.head_flags  # one head: on the IR, if the representation is split
    heads = [DINOHead(width, getattr(args, flag), **options) for width, flag in zip(widths, flags, strict=False)]
    return MultiCropWrapper(backbone, *heads, hp1=args.hp1 if is_split else 1.0)


def check_crops(args: argparse.Namespace, backbone: nn.Module) -> None:
    """Raise InputError unless the backbone accepts views of all sizes."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    sizes = {"--global_crops_size": args.global_crops_size}
    if args.local_crops_number:
        sizes["--local_crops_size"] = args.local_crops_size
    term = METHODS[args.net].term
    for view in term.extra_views(args)[:1] if term else []:
        sizes["the extra views' size"] = view.size
    for name, size in sizes.items():
        if size % patch:
            raise InputError(f"--patch_size {patch} does not divide {name} {size}")
        if not is_ours(args.arch):
            check_timm_size(args.arch, backbone, size)


def build_networks(
    args: argparse.Namespace, device: torch.device, resuming: bool = False
) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher on `device`, with equal weights; the teacher has no stochastic depth and no gradients."""
    seed_everything(args.seed)
    student, teacher = build_network(args, args.drop_path_rate), build_network(args, drop_path_rate=0.0)
    if args.init_from and not resuming:
        load_backbone_file(student.backbone, args.init_from, args.init_key)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student, teacher = (n.to(device) for n in synchronize_batch_norm([student, teacher], args.arch, device))
    if args.compile:
        compile_blocks([student.backbone, teacher.backbone], device)
    return student, teacher


def build_student(args: argparse.Namespace, student: MultiCropWrapper, device: torch.device) -> WithTerm:
    """The student with the term of --net. It is built after the networks, whose initial weights it leaves as they are."""
    kind, columns, dim = METHODS[args.net].term, slice(None), student.backbone.embed_dim
    if kind is None:
        return WithTerm(student, None)
    if args.equiv_part == "EF":
        columns, dim = Split(dim, args.hp1).ef, Split(dim, args.hp1).widths[1]
    (term,) = synchronize_batch_norm([kind(dim, args, args.equiv_params)], None, device)
    return WithTerm(student, term.to(device), columns)


def images_per_step(args: argparse.Namespace) -> int:
    """Images per optimizer step, over all processes and micro-batches."""
    return args.batch_size_per_gpu * get_world_size() * args.accumulation


def peak_lr(args: argparse.Namespace) -> float:
    """The learning rate after the warm-up, scaled to the number of images per step."""
    return args.lr * images_per_step(args) / 256


def build_schedules(args: argparse.Namespace, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Learning rate, weight decay and teacher momentum of every optimizer step."""
    warmup_epochs = min(args.warmup_epochs, args.epochs)
    return {
        "lr": optim.cosine_scheduler(peak_lr(args), args.min_lr, args.epochs, steps_per_epoch, warmup_epochs),
        "wd": optim.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps_per_epoch),
        "momentum": optim.cosine_scheduler(args.momentum_teacher, 1, args.epochs, steps_per_epoch),
    }


def build_pretraining(
    args: argparse.Namespace, student: MultiCropWrapper, teacher: MultiCropWrapper, device: torch.device, steps_per_epoch: int
) -> Pretraining:
    """The run: networks, objective, optimizer and schedules."""
    model = build_student(args, student, device)
    amp_dtype = resolve_amp_dtype(args.amp_dtype if args.use_fp16 else "fp32", device)
    return Pretraining(
        args=args,
        model=model,
        teacher=teacher,
        criterion=METHODS[args.net].base.from_args(args, student.heads).to(device),
        optimizer=optim.OPTIMIZERS[args.optimizer](optim.param_groups(model)),
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        schedules=build_schedules(args, steps_per_epoch),
        device=device,
        amp_dtype=amp_dtype,
        images_per_step=images_per_step(args),
    )
