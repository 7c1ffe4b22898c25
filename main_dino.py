"""Self-supervised pretraining with DINO or CLeVER.

One process, GPU or CPU:
    python main_dino.py --net CLeVER --arch vit_small --data_path data/IN100/train --output_dir results/clever
Four GPUs (torch.distributed.launch does as well as torchrun):
    torchrun --nproc_per_node=4 main_dino.py --net CLeVER --data_path data/IN100/train --output_dir results/clever
A run whose output_dir holds a checkpoint.pth continues it (on a CPU with as many processes: bit for bit).

Letters: B batch, V views, D width of the backbone, K outputs of a head.
"""

import argparse
import contextlib
import json
import math
import os
import re
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import distributed
import optim
import utils
from augmentations import IMAGENET_MEAN, IMAGENET_STD, MultiCropAugmentation, check_crop_scale, eval_transform
from backbones import (
    build_backbone,
    check_timm_size,
    default_drop_path_rate,
    is_ours,
    load_backbone_file,
    synchronize_batch_norm,
)
from checkpoint import load_checkpoint, load_moments, load_strictly, save_atomically
from datasets import ImageDataset, check_same_classes, labelled_dataset, pretraining_dataset
from evaluation.knn import knn_accuracy
from heads import DINOHead, MultiCropWrapper, split_ir_ef, split_sizes
from losses import CLeVERLoss, DINOLoss, head_regularizer
from telemetry import CollapseWatch, TrainingProgress, append_log, epoch_line, feature_std, peak_memory_gib, truncate_log
from utils import InputError, bool_flag

NETS = ("dino", "CLeVER")
# Arguments that fix what a checkpoint's tensors are: a run cannot continue with others.
STRUCTURE = (
    "net", "arch", "patch_size", "out_dim", "use_bn_in_head", "norm_last_layer", "head_hidden_dim", "head_bottleneck_dim",
    "global_crops_size", "optimizer",
)  # fmt: skip
CLEVER_STRUCTURE = (*STRUCTURE, "hp1", "DVR_out_dim")


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("network").add_argument
    add("--net", default="CLeVER", help="dino, or CLeVER (IR and EF with a head each)")
    add("--arch", default="vit_small", help="a backbone of backbones.py or any timm model")
    add("--patch_size", type=int, default=16, help="side of a ViT's patches, pixels; names of timm imply it")
    add("--drop_path_rate", type=float, help="stochastic depth of the student; default: 0.1, a VMamba's its configuration's")
    add("--out_dim", type=int, default=65536, help="outputs of the head (of the IR head for CLeVER)")
    add("--norm_last_layer", type=bool_flag, default=True, help="keep the rows of the heads' last layers at length 1")
    add("--use_bn_in_head", type=bool_flag, default=False, help="batch norm in the heads")
    add("--head_hidden_dim", type=int, default=2048, help="width of the heads' hidden layers")
    add("--head_bottleneck_dim", type=int, default=256, help="width of the heads' bottlenecks")
    add("--hp1", type=float, default=0.8, help="CLeVER: share of the representation that is IR, in (0, 1)")
    add("--DVR_out_dim", type=int, default=16384, help="CLeVER: outputs of the EF head")
    add("--sep_lambd", type=float, default=1.0, help="CLeVER: weight of the EF loss")
    add("--reg_lambd", default="_reg0.001", help="CLeVER: weight of the head regulariser: _reg0.001, 0.001, or '' for none")
    add("--init_from", help="checkpoint whose backbone the networks start from")

    add = parser.add_argument_group("teacher").add_argument
    add("--momentum_teacher", type=float, default=0.996, help="of the moving average; rises to 1 along a cosine")
    add("--warmup_teacher_temp", type=float, default=0.04, help="the teacher's temperature at the start ...")
    add("--teacher_temp", type=float, default=0.04, help="... and after its linear warm-up")
    add("--warmup_teacher_temp_epochs", type=int, default=0)

    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", default="adamw", help="adamw, sgd or lars")
    add("--batch_size_per_gpu", type=int, default=64, help="images per process and micro-batch")
    add("--accumulation", type=int, default=1, help="micro-batches per optimizer step; centre and teacher move with the step")
    add("--epochs", type=int, default=100, help="0 only writes the untrained network, the baseline of every table")
    add("--lr", type=float, default=0.0005, help="peak rate for 256 images per step; scaled linearly to the actual number")
    add("--warmup_epochs", type=int, default=10, help="of the rate, linear from 0")
    add("--min_lr", type=float, default=1e-6, help="rate at the end of its cosine")
    add("--weight_decay", type=float, default=0.04)
    add("--weight_decay_end", type=float, default=0.4, help="weight decay at the end of its cosine")
    add("--clip_grad", type=float, default=3.0, help="largest norm of each parameter's gradient; 0: no clipping")
    add("--freeze_last_layer", type=int, default=1, help="epochs in which the heads' last layers stay fixed")
    add("--use_fp16", type=bool_flag, default=True, help="mixed precision; false means fp32")
    add("--amp_dtype", default="auto", help="auto (the best that the hardware has), bf16, fp16 or fp32")
    add("--activation_checkpointing", type=bool_flag, default=False, help="recompute activations: less memory, more time")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="folder of training images, nested or flat")
    add("--aug", default="aug1_2", help="aug1 (BAug), aug1_2 (CAug: + rotation), aug1_4_2 (CAug+: + elastic)")
    add("--global_crops_scale", type=float, nargs="+", default=[0.4, 1.0], help="share of the area, from and to")
    add("--local_crops_scale", type=float, nargs="+", default=[0.05, 0.4])
    add("--local_crops_number", type=int, default=8, help="0: global views only")
    add("--global_crops_size", type=int, default=224, help="pixels")
    add("--local_crops_size", type=int, default=96, help="pixels")
    add("--mean", type=float, nargs=3, default=list(IMAGENET_MEAN), help="of the channels, in 0..1")
    add("--std", type=float, nargs=3, default=list(IMAGENET_STD))
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training")
    add("--skip_bad_images", type=bool_flag, default=False, help="leave unreadable images out instead of stopping")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default=".", help="checkpoints and log.txt")
    add("--saveckp_freq", type=int, default=20, help="keep checkpoint<epoch>.pth every so many epochs; 0: never")
    add("--print_freq", type=int, default=20, help="steps between progress lines")
    add("--knn_data", help="labelled folder (train/ and val/) for a periodic k-NN check")
    add("--knn_freq", type=int, default=10, help="epochs between k-NN checks")
    add("--seed", type=int, default=0)
    distributed.add_distributed_arguments(parser)
    return parser


def parse_reg_lambd(text: str) -> float:
    """Weight in '_reg0.001' (the original's spelling), '0.001', or '' (none)."""
    number = re.sub(r"^_?reg", "", text.strip())
    try:
        value = float(number) if text.strip() else 0.0
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise InputError(f"--reg_lambd {text!r}: must be a number >= 0, such as _reg0.001 or 0.001, or empty for none")
    return value


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything is read or written."""
    if args.net not in NETS:
        raise InputError(f"--net {args.net!r}: must be one of {', '.join(NETS)}")
    if args.amp_dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise InputError(f"--amp_dtype {args.amp_dtype!r}: must be one of auto, bf16, fp16, fp32")
    utils.check_positive(
        args, "out_dim", "DVR_out_dim", "head_hidden_dim", "head_bottleneck_dim", "batch_size_per_gpu", "accumulation",
        "patch_size", "global_crops_size", "local_crops_size", "print_freq", "knn_freq", "warmup_teacher_temp", "teacher_temp",
    )  # fmt: skip
    utils.check_not_negative(
        args, "epochs", "local_crops_number", "num_workers", "warmup_epochs", "warmup_teacher_temp_epochs", "saveckp_freq",
        "lr", "min_lr", "clip_grad", "weight_decay", "weight_decay_end", "sep_lambd", "seed",
    )  # fmt: skip
    if not 0 < args.hp1 <= 1:
        raise InputError(f"--hp1 {args.hp1}: must lie in (0, 1]")
    if not all(map(math.isfinite, args.mean)) or not all(0 < value < math.inf for value in args.std):
        raise InputError(f"--mean {args.mean}, --std {args.std}: must be finite numbers, those of --std greater than 0")
    if not 0 <= args.momentum_teacher <= 1:
        raise InputError(f"--momentum_teacher {args.momentum_teacher}: must lie in [0, 1]")
    if args.drop_path_rate is not None and not 0 <= args.drop_path_rate < 1:
        raise InputError(f"--drop_path_rate {args.drop_path_rate}: must lie in [0, 1)")
    for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
        if 0 < args.epochs < getattr(args, name):
            raise InputError(f"--{name} {getattr(args, name)}: longer than the run ({args.epochs} epochs)")
    check_crop_scale("global_crops_scale", args.global_crops_scale)
    check_crop_scale("local_crops_scale", args.local_crops_scale)
    parse_reg_lambd(args.reg_lambd)
    utils.check_writable(args.output_dir)


@dataclass
class Training:
    """Everything that a step changes, and that a checkpoint therefore holds."""

    student: MultiCropWrapper
    teacher: MultiCropWrapper
    criterion: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    reg_lambd: float

    def state(self, epoch: int, args: argparse.Namespace) -> dict:
        """What `checkpoint.pth` holds: plain values and tensors, names without `module.`; `epoch` is the next one to run."""
        state = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": epoch,
            "args": utils.plain_args(args),
            "dino_loss": self.criterion.state_dict(),
        }
        if self.scaler.is_enabled():
            state["fp16_scaler"] = self.scaler.state_dict()
        return state

    def load(self, state: dict) -> int:
        """Restore a checkpoint's state, ours or an original's; returns the epoch to go on with. InputError if it cannot."""
        for name, module in (("student", self.student), ("teacher", self.teacher), ("dino_loss", self.criterion)):
            load_strictly(module, state[name], f"{name} of the checkpoint to continue from")
        load_moments(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state.get("fp16_scaler"):
            self.scaler.load_state_dict(state["fp16_scaler"])
        return state["epoch"]


def build_network(args: argparse.Namespace, drop_path_rate: float | None) -> MultiCropWrapper:
    """Backbone with the head of --net dino, or the two heads of --net CLeVER."""
    backbone = build_backbone(
        args.arch,
        patch_size=args.patch_size,
        img_size=args.global_crops_size,
        drop_path_rate=drop_path_rate,
        checkpointing=args.activation_checkpointing,
    )
    check_crops(args, backbone)
    options = {
        "use_bn": args.use_bn_in_head,
        "norm_last_layer": args.norm_last_layer,
        "hidden_dim": args.head_hidden_dim,
        "bottleneck_dim": args.head_bottleneck_dim,
    }
    if args.net == "dino":
        return MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, args.out_dim, **options))
    ir, ef = split_sizes(backbone.embed_dim, args.hp1)
    head, head2 = DINOHead(ir, args.out_dim, **options), DINOHead(ef, args.DVR_out_dim, **options)
    return MultiCropWrapper(backbone, head, head2, args.hp1)


def check_crops(args: argparse.Namespace, backbone: nn.Module) -> None:
    """InputError unless the backbone takes crops of both sizes."""
    sizes = {"global_crops_size": args.global_crops_size}
    if args.local_crops_number:
        sizes["local_crops_size"] = args.local_crops_size
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[0]
    for name, size in sizes.items():
        if size % patch:
            raise InputError(f"--patch_size {patch} does not divide --{name} {size}")
        if not is_ours(args.arch):
            check_timm_size(args.arch, backbone, size)


def build_criterion(args: argparse.Namespace) -> DINOLoss:
    common = dict(
        ncrops=2 + args.local_crops_number,
        warmup_teacher_temp=args.warmup_teacher_temp,
        teacher_temp=args.teacher_temp,
        warmup_teacher_temp_epochs=min(args.warmup_teacher_temp_epochs, args.epochs),
        nepochs=args.epochs,
    )
    if args.net == "dino":
        return DINOLoss(args.out_dim, **common)
    return CLeVERLoss(args.out_dim, args.DVR_out_dim, sep_lambd=args.sep_lambd, **common)


def build_training(args: argparse.Namespace, device: torch.device, amp_dtype: torch.dtype, resuming: bool = False) -> Training:
    """Networks (the teacher a copy of the student), loss, optimizer and gradient scaler on `device`."""
    utils.seed_everything(args.seed)
    student, teacher = build_network(args, args.drop_path_rate), build_network(args, drop_path_rate=0.0)
    if args.init_from and not resuming:
        load_backbone_file(student.backbone, args.init_from)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    if distributed.is_distributed() and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules()):
        if device.type == "cuda":
            student, teacher = (synchronize_batch_norm(net, args.arch) for net in (student, teacher))
        else:
            print("batch norm: statistics are each process's own (torch synchronises them on GPUs only)")
    student, teacher = student.to(device), teacher.to(device)
    return Training(
        student=student,
        teacher=teacher,
        criterion=build_criterion(args).to(device),
        optimizer=optim.build_optimizer(args.optimizer, optim.param_groups(student)),
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        reg_lambd=parse_reg_lambd(args.reg_lambd) if args.net == "CLeVER" else 0.0,
    )


def build_dataset(args: argparse.Namespace) -> ImageDataset:
    """Training images under the recipe --aug; InputError if they do not fill one step."""
    views = MultiCropAugmentation(
        args.aug,
        global_crops_scale=args.global_crops_scale,
        local_crops_scale=args.local_crops_scale,
        local_crops_number=args.local_crops_number,
        global_crops_size=args.global_crops_size,
        local_crops_size=args.local_crops_size,
        mean=args.mean,
        std=args.std,
    )
    dataset = pretraining_dataset(
        args.data_path, views, args.seed, skip_bad_images=args.skip_bad_images, check=args.check_images,
        threads=args.num_workers,
    )  # fmt: skip
    if len(dataset) < images_per_step(args):
        raise InputError(
            f"batch of {images_per_step(args)} images ({args.batch_size_per_gpu} x {distributed.get_world_size()} processes x "
            f"{args.accumulation} micro-batches): larger than the data ({len(dataset)} images in {args.data_path})"
        )
    return dataset


def images_per_step(args: argparse.Namespace) -> int:
    return args.batch_size_per_gpu * distributed.get_world_size() * args.accumulation


def build_loader(dataset: ImageDataset, args: argparse.Namespace) -> DataLoader:
    """This process's share of every epoch. Together the processes see what a single one would see, batch by batch."""
    sampler = DistributedSampler(
        dataset, distributed.get_world_size(), distributed.get_rank(), shuffle=True, seed=args.seed, drop_last=True
    )
    return DataLoader(
        dataset,
        args.batch_size_per_gpu,
        sampler=sampler,
        num_workers=distributed.worker_count(args.num_workers),
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def build_schedules(args: argparse.Namespace, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """One value per optimizer step of the rate, the weight decay and the teacher's momentum."""
    lr, warmup_epochs = args.lr * images_per_step(args) / 256, min(args.warmup_epochs, args.epochs)
    return {
        "lr": optim.cosine_scheduler(lr, args.min_lr, args.epochs, steps_per_epoch, warmup_epochs),
        "wd": optim.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, steps_per_epoch),
        "momentum": optim.cosine_scheduler(args.momentum_teacher, 1, args.epochs, steps_per_epoch),
    }


def find_checkpoint(args: argparse.Namespace) -> dict | None:
    """The state that --output_dir holds, if any; InputError if it is of another network."""
    path = Path(args.output_dir) / "checkpoint.pth"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    missing = {"student", "teacher", "optimizer", "epoch", "args", "dino_loss"} - set(state)
    if missing:
        raise InputError(f"checkpoint {path}: no checkpoint of this script, lacks {', '.join(sorted(missing))}")
    stored = utils.plain_args(state["args"])
    for name in CLEVER_STRUCTURE if args.net == "CLeVER" else STRUCTURE:
        if name in stored and stored[name] != getattr(args, name):
            raise InputError(
                f"--{name} {getattr(args, name)}: the checkpoint in {args.output_dir} was made with {stored[name]}; "
                "continue it with that, or give another --output_dir"
            )
    changed = [n for n, v in sorted(vars(args).items()) if n in stored and stored[n] != v and n != "local_rank"]
    if changed:
        print("continuing with changed arguments:", ", ".join(f"{n} {stored[n]} -> {getattr(args, n)}" for n in changed))
    return state


def compute_losses(training: Training, model: nn.Module, views: list[torch.Tensor], epoch: int, update_center: bool, amp_dtype):
    """One forward pass of both networks: the loss terms and the telemetry by name, the loss first."""
    criterion, log_k = training.criterion, math.log(training.criterion.center.shape[1])
    with torch.autocast(views[0].device.type, amp_dtype, enabled=amp_dtype != torch.float32):  # not the losses
        with torch.no_grad():
            teacher_out, z = training.teacher(views[:2], return_features=True)  # 2*B, K; 2*B, D
        student_out = model(views)  # V*B, K
    if training.student.head2 is None:
        loss = criterion(student_out, teacher_out, epoch, update_center)
        terms = {"loss": loss, "normalized_loss": loss / log_k, "feature_std": feature_std(z)}
    else:
        loss, loss_dir, loss_dvr = criterion(*student_out, *teacher_out, epoch, update_center)
        reg = training.reg_lambd * head_regularizer(training.student.head, training.student.head2)
        ir, ef = split_ir_ef(z, training.student.hp1)
        terms = {"loss": loss + reg, "loss_DIR": loss_dir, "loss_DVR": loss_dvr, "loss_student_reg": reg}
        terms |= {"normalized_loss": loss_dir / log_k, "feature_std_IR": feature_std(ir), "feature_std_EF": feature_std(ef)}
        terms["center2_norm"] = criterion.center2.norm()
    return terms | {"teacher_entropy": criterion.teacher_entropy / log_k, "center_norm": criterion.center.norm()}


def train_one_epoch(training, model, loader, schedules, epoch, device, amp_dtype, args) -> dict[str, float]:
    """One pass over the data; returns the means of its losses and telemetry."""
    steps = len(loader) // args.accumulation
    progress = TrainingProgress(
        f"epoch {epoch}/{args.epochs}", steps * args.accumulation, images_per_step(args) // args.accumulation,
        device, args.print_freq,
    )  # fmt: skip
    parameters = [p for p in training.student.parameters() if p.requires_grad]
    heads = [head for head in (training.student.head, training.student.head2) if head is not None]
    for micro_step, (views, _) in enumerate(islice(loader, steps * args.accumulation)):
        step = epoch * steps + micro_step // args.accumulation  # of the optimizer, from 0
        stepping = (micro_step + 1) % args.accumulation == 0
        views = [view.to(device, non_blocking=True) for view in views]
        keep_local = contextlib.nullcontext() if stepping or model is training.student else model.no_sync()
        with keep_local:
            terms = compute_losses(training, model, views, epoch, update_center=stepping, amp_dtype=amp_dtype)
            progress.update(**terms)
            training.scaler.scale(terms["loss"] / args.accumulation).backward()
        if not stepping:
            continue
        training.scaler.unscale_(training.optimizer)
        optim.clip_gradients(parameters, args.clip_grad)
        if epoch < args.freeze_last_layer:
            for head in heads:
                head.last_layer.zero_grad()
        optim.set_schedules(training.optimizer, schedules["lr"][step], schedules["wd"][step])
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.optimizer.zero_grad()
        optim.update_teacher(training.teacher, training.student, schedules["momentum"][step])
    means = progress.finish()
    means |= {name: float(values[epoch * steps : (epoch + 1) * steps].mean()) for name, values in schedules.items()}
    return means | {"images_per_second": progress.rate}


def build_knn(args: argparse.Namespace) -> list[ImageDataset]:
    """Labelled train and val images for the k-NN check, under the evaluation transform."""
    transform = eval_transform("ori", args.global_crops_size, args.mean, args.std)
    datasets = [
        labelled_dataset(
            os.path.join(args.knn_data, split), transform, args.seed, skip_bad_images=args.skip_bad_images,
            check=args.check_images, threads=args.num_workers,
        )
        for split in ("train", "val")
    ]  # fmt: skip
    check_same_classes(*datasets)
    return datasets


def save(training: Training, epoch: int, args: argparse.Namespace) -> None:
    """Write checkpoint.pth as of the end of `epoch`, and checkpoint<epoch>.pth where --saveckp_freq divides it."""
    if not distributed.is_main_process():
        return
    state = training.state(epoch + 1, args)
    if epoch >= 0 and args.saveckp_freq and epoch % args.saveckp_freq == 0:
        save_atomically(state, Path(args.output_dir) / f"checkpoint{epoch:04}.pth")
    save_atomically(state, Path(args.output_dir) / "checkpoint.pth")


def main() -> None:
    args = get_args_parser().parse_args()
    check_args(args)
    if args.drop_path_rate is None:  # here, so that a checkpoint holds the rate itself
        args.drop_path_rate = default_drop_path_rate(args.arch)
    device = distributed.init_distributed(args)
    amp_dtype = distributed.resolve_amp_dtype(args.amp_dtype if args.use_fp16 else "fp32", device)

    state = find_checkpoint(args)
    training = build_training(args, device, amp_dtype, resuming=state is not None)
    dataset = build_dataset(args)
    loader = build_loader(dataset, args)
    knn_datasets = build_knn(args) if args.knn_data else None
    steps_per_epoch = len(loader) // args.accumulation
    schedules = build_schedules(args, steps_per_epoch)

    start_epoch = training.load(state) if state else 0
    log = Path(args.output_dir) / "log.txt"
    if distributed.is_main_process():
        os.makedirs(args.output_dir, exist_ok=True)
        truncate_log(log, start_epoch)
    print(f"arguments: {json.dumps(utils.plain_args(args))}")
    print(
        f"{args.net} {args.arch}: {sum(p.numel() for p in training.student.backbone.parameters()) / 1e6:.1f}M parameters, "
        f"width {training.student.backbone.embed_dim}; {len(dataset)} images, {distributed.get_world_size()} processes, "
        f"{steps_per_epoch} steps of {images_per_step(args)} images per epoch; "
        f"peak lr {args.lr * images_per_step(args) / 256:.3g}; {str(amp_dtype).removeprefix('torch.')} on {device}"
    )
    if state:
        print(f"continuing {args.output_dir} from epoch {start_epoch}")
    elif args.epochs == 0:
        save(training, -1, args)

    model = training.student
    if distributed.is_distributed():
        model = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    del state
    watch = CollapseWatch()
    for epoch in range(start_epoch, args.epochs):
        start = time.perf_counter()
        utils.seed_everything(args.seed, epoch, distributed.get_rank())
        loader.sampler.set_epoch(epoch)
        dataset.set_epoch(epoch)
        try:
            means = train_one_epoch(training, model, loader, schedules, epoch, device, amp_dtype, args)
            optim.check_weights(training.student, f"epoch {epoch}/{args.epochs}")
        except FloatingPointError as error:
            if distributed.is_main_process():
                save_atomically(training.state(epoch, args), Path(args.output_dir) / "nonfinite.pth")
            distributed.barrier()  # the first process to end is the end of all, and the file may be large
            last_good = f"the last good state is {args.output_dir}/checkpoint.pth" if epoch else "no epoch had ended yet"
            raise FloatingPointError(f"{error}; {last_good}, the state at the failure nonfinite.pth beside it") from error
        if knn_datasets and ((epoch + 1) % args.knn_freq == 0 or epoch + 1 == args.epochs):
            teacher, workers = training.teacher.backbone, distributed.worker_count(args.num_workers)
            means["knn_top1"] = knn_accuracy(teacher, *knn_datasets, device, args.batch_size_per_gpu, workers)
        for warning in watch.update(means):
            print(f"warning: {warning}")
        record = {name if name == "knn_top1" else f"train_{name}": value for name, value in means.items()}
        record |= {"epoch": epoch, "seconds": time.perf_counter() - start, "memory_gib": peak_memory_gib(device)}
        if distributed.is_main_process():
            append_log(log, record)
        save(training, epoch, args)
        print(epoch_line(epoch, args.epochs, record))
    print(f"done: {args.output_dir}")


if __name__ == "__main__":
    distributed.run_entry_point(main)
