"""Self-supervised pretraining with DINO, CLeVER, or DINO and an equivariant term.

One process, on a GPU or a CPU:
    python main_dino.py --net CLeVER --arch vit_small --data_path data/IN100/train --output_dir results/clever
Four GPUs (torch.distributed.launch works as well as torchrun):
    torchrun --nproc_per_node=4 main_dino.py --net CLeVER --data_path data/IN100/train --output_dir results/clever
If output_dir contains checkpoint.pth, the run resumes from it; on a CPU with the same number of processes, bit-identical.

Objectives: clever/methods/. Training step: clever/training/pretraining.py. Networks: clever/models/. Views: clever/data/.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from clever import arguments, distributed, progress, signals
from clever.arguments import bool_flag, plain_args
from clever.checkpoint import load_checkpoint, save_atomically, valid_state
from clever.data.augmentations import MultiCropAugmentation, Views, check_crop_scale
from clever.data.datasets import UNLABELLED, CheckRecord, ImageDataset, keep_readable, make_loader
from clever.data.files import list_images
from clever.data.rendering import add_renderer_argument, choose_renderer, renderer_line
from clever.entry import run_entry_point
from clever.evaluation.online import OnlineEvaluation, add_online_arguments, check_online_args
from clever.locking import locked
from clever.methods import METHODS, add_method_arguments, resolve_method
from clever.methods.pairs import TEACHER_VIEWS
from clever.models.backbones import default_drop_path_rate
from clever.models.compilation import add_compile_argument
from clever.training import optim
from clever.training.build import build_networks, build_pretraining, images_per_step, peak_lr
from clever.training.loggers import Loggers, add_logger_argument, check_log_to
from clever.training.pretraining import EpochSampler, Pretraining
from clever.training.telemetry import CollapseWatch, append_log, epoch_line, read_log, truncate_log
from clever.utils import IMAGENET_MEAN, IMAGENET_STD, InputError, write_text_atomically

RESUME = "the same command goes on from there"
# Arguments that determine the tensors of a checkpoint: a run cannot resume with other ones.
TENSOR_ARGUMENTS = (
    "net", "arch", "patch_size", "use_bn_in_head", "norm_last_layer", "head_hidden_dim", "head_bottleneck_dim",
    "global_crops_size", "optimizer",
)  # fmt: skip


# --- arguments ---------------------------------------------------------------------------------------------------------


def add_network_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--net", default="CLeVER", help="; ".join(f"{name}: {method.about}" for name, method in METHODS.items()))
    add("--arch", default="vit_small", help="a backbone of clever/models/backbones.py, or any timm model by its name")
    add("--patch_size", type=int, default=16, help="side of a ViT's patches, pixels. Smaller patches: better features, more "
        "memory and time; if half precision then becomes unstable, use --use_fp16 false. Implied by timm's names")
    add("--drop_path_rate", type=float, help="stochastic depth of the student; default: 0.1, VMamba: its configuration's")
    add("--out_dim", type=int, default=65536, help="outputs of the head, CLeVER: of the IR head. Large values suit large data; "
        "for small data or little memory try 1024 to 4096")
    add("--norm_last_layer", type=bool_flag, default=True, help="keep the rows of the heads' last layers at length 1: more "
        "stable. false can be better for ViT-S; true if the loss diverges")
    add("--use_bn_in_head", type=bool_flag, default=False, help="batch norm in the heads")
    add("--head_hidden_dim", type=int, default=2048, help="width of the heads' hidden layers")
    add("--head_bottleneck_dim", type=int, default=256, help="width of the heads' bottlenecks")
    add("--init_from", help="checkpoint whose backbone the student starts from: ours, an original's, or another program's")
    add("--init_key", default="teacher", help="which network of --init_from, if there are several; a file without `teacher`: "
        "`model` or `state_dict`")


def add_optimization_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--momentum_teacher", type=float, default=0.996, help="momentum of the teacher's moving average at the start; rises to "
        "1 along a cosine. Use a higher value for small batches, e.g. 0.9995 for 256 images")
    add("--warmup_teacher_temp", type=float, default=0.04, help="teacher temperature at the start of its warm-up. Lower it if "
        "the loss does not decrease")
    add("--teacher_temp", type=float, default=0.04, help="teacher temperature after the warm-up. Above 0.07 training is often "
        "unstable; start with 0.04")
    add("--warmup_teacher_temp_epochs", type=int, default=0, help="linear warm-up of the teacher temperature, epochs")
    add("--optimizer", default="adamw", help="adamw, sgd or lars. adamw suits ViT and VMamba, lars ResNets and large batches")
    add("--batch_size_per_gpu", type=int, default=64, help="images per process and micro-batch")
    add("--accumulation", type=int, default=1, help="micro-batches per optimizer step, if memory is short; the centre and the "
        "teacher are updated once per step")
    add("--epochs", type=int, default=100, help="epochs of the whole run; 0 only writes the untrained network, for baselines")
    add("--lr", type=float, default=0.0005, help="peak learning rate for 256 images per step; scaled linearly with their "
        "number. Lower it if the loss rises or becomes NaN")
    add("--warmup_epochs", type=int, default=10, help="linear learning-rate warm-up, epochs")
    add("--min_lr", type=float, default=1e-6, help="learning rate at the end of the cosine schedule")
    add("--weight_decay", type=float, default=0.04, help="weight decay at the start. A smaller value suits ResNets")
    add("--weight_decay_end", type=float, default=0.4, help="weight decay at the end of its cosine schedule")
    add("--clip_grad", type=float, default=3.0, help="the gradient of each parameter is clipped to this norm; 0: no clipping. "
        "0.3 to 1 can help large ViTs")
    add("--freeze_last_layer", type=int, default=1, help="epochs during which the heads' last layers are fixed. Raise it if "
        "the loss does not decrease")
    add("--use_fp16", type=bool_flag, default=True, help="mixed precision. false (fp32) if the loss becomes NaN")
    add("--amp_dtype", default="auto", help="type of mixed precision: auto (the best that the hardware has), bf16, fp16, fp32")
    add("--activation_checkpointing", type=bool_flag, default=False, help="recompute activations in the backward pass: less "
        "memory, more time")
    add_compile_argument(group)
    add("--cuda_graph", type=bool_flag, default=False, help="record the networks' kernels once and start them together; for "
        "small networks and batches, where the GPU waits for the CPU. Needs a GPU, and one process")


def add_data_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data_path", required=True, help="folder of training images, flat or nested, or tar files; labels are not used")
    add("--aug", default="aug1_2", help="aug1 (BAug: DINO's views), aug1_2 (CAug: + rotation), aug1_4_2 (CAug+: + elastic)")
    add("--global_crops_scale", type=float, nargs="+", default=[0.4, 1.0], help="minimum and maximum share of the image's "
        "area in a global view. Without local views use a wider range, e.g. 0.14 1")
    add("--local_crops_scale", type=float, nargs="+", default=[0.05, 0.4], help="the same for a local view")
    add("--local_crops_number", type=int, default=8, help="local views per image; 0: global views only")
    add("--global_crops_size", type=int, default=224, help="side of a global view, pixels")
    add("--local_crops_size", type=int, default=96, help="side of a local view, pixels")
    add("--mean", type=float, nargs=3, default=list(IMAGENET_MEAN), help="mean of the channels, for pixels in 0..1")
    add("--std", type=float, nargs=3, default=list(IMAGENET_STD), help="standard deviation of the channels, likewise")
    add("--check_images", type=bool_flag, default=True, help="decode every image once before training. false for a quicker "
        "start, if all are known to be readable")
    add("--skip_bad_images", type=bool_flag, default=False, help="leave unreadable images out instead of stopping")
    add_renderer_argument(group)


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", default=".", help="folder for checkpoints and log.txt; if it contains checkpoint.pth, the run resumes")
    add("--saveckp_freq", type=int, default=20, help="epochs between kept checkpoints, checkpoint<epoch>.pth; 0: none")
    add("--print_freq", type=int, default=20, help="micro-batches between progress lines")
    add("--seed", type=int, default=0, help="seed of the weights, the order of the images, and the views")
    add_logger_argument(group)


def get_args_parser() -> argparse.ArgumentParser:
    parser = arguments.ArgumentParser(description=__doc__)
    add_network_arguments(parser.add_argument_group("network"))
    add_method_arguments(parser)
    add_optimization_arguments(parser.add_argument_group("teacher and optimisation"))
    add_data_arguments(parser.add_argument_group("data"))
    add_run_arguments(parser.add_argument_group("run"))
    add_online_arguments(parser.add_argument_group("evaluation while training"))
    distributed.add_distributed_arguments(parser)
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise InputError for invalid values, before anything is read or written."""
    arguments.check_choices("net", [args.net], METHODS)
    arguments.check_choices("amp_dtype", [args.amp_dtype], ("auto", "bf16", "fp16", "fp32"))
    arguments.check_positive(
        args, "head_hidden_dim", "head_bottleneck_dim", "batch_size_per_gpu", "accumulation", "patch_size",
        "global_crops_size", "local_crops_size", "print_freq", "warmup_teacher_temp", "teacher_temp",
    )  # fmt: skip
    for name in ("out_dim", "DVR_out_dim"):  # the softmax of a single output is constant, and ln(1) = 0
        if getattr(args, name) < 2:
            raise InputError(f"--{name} {getattr(args, name)}: must be 2 or greater")
    arguments.check_not_negative(
        args, "epochs", "local_crops_number", "num_workers", "warmup_epochs", "warmup_teacher_temp_epochs", "saveckp_freq",
        "lr", "min_lr", "clip_grad", "weight_decay", "weight_decay_end", "seed",
    )  # fmt: skip
    arguments.check_choices("optimizer", [args.optimizer], optim.OPTIMIZERS)
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
    check_online_args(args)
    arguments.check_writable(args.output_dir)
    check_log_to(args)


def resolve_args(args: argparse.Namespace) -> argparse.Namespace:
    """Checked arguments, with defaults that depend on others filled in: checkpoints record what was used."""
    check_args(args)
    rate = default_drop_path_rate(args.arch) if args.drop_path_rate is None else args.drop_path_rate
    term = resolve_method(args, Views(build_views(args).distributions[:TEACHER_VIEWS]))
    rest = {"drop_path_rate": rate, "views": choose_renderer(args.views)} | term
    return argparse.Namespace(**vars(args) | rest)


# --- data --------------------------------------------------------------------------------------------------------------


def image_options(args: argparse.Namespace, record: CheckRecord) -> dict[str, Any]:
    """How images are rendered and checked."""
    return {
        "renderer": args.views, "skip_bad_images": args.skip_bad_images, "check": args.check_images,
        "threads": args.num_workers, "record": record,
    }  # fmt: skip


def build_views(args: argparse.Namespace) -> MultiCropAugmentation:
    """The views of --aug."""
    return MultiCropAugmentation(
        args.aug,
        global_crops_scale=args.global_crops_scale,
        local_crops_scale=args.local_crops_scale,
        local_crops_number=args.local_crops_number,
        global_crops_size=args.global_crops_size,
        local_crops_size=args.local_crops_size,
    )


def build_dataset(args: argparse.Namespace, record: CheckRecord) -> ImageDataset:
    """Training images with the views of --aug. Raises InputError if they do not fill one optimizer step."""
    samples = [(path, UNLABELLED) for path in list_images(args.data_path)]
    samples = keep_readable(samples, args.skip_bad_images, args.check_images, args.num_workers, record)
    term = METHODS[args.net].term
    options = {} if term is None else {"extra": Views(term.extra_views(args)), "images_per_draw": term.images_per_draw(args)}
    dataset = ImageDataset(samples, build_views(args), args.seed, renderer=args.views, **options)
    if len(dataset) < images_per_step(args):
        raise InputError(
            f"batch of {images_per_step(args)} images ({args.batch_size_per_gpu} x {distributed.get_world_size()} processes x "
            f"{args.accumulation} micro-batches): larger than the data ({len(dataset)} images in {args.data_path})"
        )
    return dataset


def build_loader(dataset: ImageDataset, args: argparse.Namespace) -> DataLoader:
    """This process's share of every epoch. Together, the processes see the same batches as a single one would."""
    sampler = EpochSampler(
        dataset, distributed.get_world_size(), distributed.get_rank(), shuffle=True, seed=args.seed, drop_last=True
    )
    return make_loader(dataset, args.batch_size_per_gpu, sampler, args.num_workers, drop_last=True)


# --- the run -----------------------------------------------------------------------------------------------------------


def print_summary(args: argparse.Namespace, run: Pretraining, images: int, steps_per_epoch: int) -> None:
    """The arguments, and what follows from them."""
    backbone = run.student.backbone
    print(f"arguments: {json.dumps(run.arguments)}")
    parameters, dtype = sum(p.numel() for p in backbone.parameters()), str(run.amp_dtype).removeprefix("torch.")
    print(
        f"{args.net} {args.arch}: {parameters / 1e6:.1f}M parameters, width {backbone.embed_dim}; {images} images, "
        f"{steps_per_epoch} steps per epoch of {run.images_per_step} images, processes: {distributed.get_world_size()}; "
        f"peak lr {peak_lr(args):.3g}; {dtype} on {run.device}"
    )
    print(renderer_line(args.views))
    moments = (2 if args.optimizer == "adamw" else 1) * sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    weights = [value for network in (run.model, run.teacher) for value in network.state_dict().values()]
    megabytes = (4 * moments + sum(value.nbytes for value in weights)) / 1e6
    kept = math.ceil(args.epochs / args.saveckp_freq) if args.saveckp_freq else 0
    print(f"a checkpoint has {megabytes:.0f} MB; checkpoint.pth, and {kept} that are kept (--saveckp_freq {args.saveckp_freq})")
    smaller = dict.fromkeys(METHODS[args.net].base.head_flags, 1024) | {"local_crops_number": 2, "global_crops_size": 96}
    flags = [f"--{name} {few} (now {getattr(args, name)})" for name, few in smaller.items() if getattr(args, name) > few]
    if flags and run.device.type == "cpu":
        print(f"on a CPU, less time and memory, which the first progress line shows, would need {', '.join(flags)}")


def run_epoch(run: Pretraining, loader: DataLoader, epoch: int, args: argparse.Namespace) -> dict[str, float]:
    """One epoch; means of its losses.

    If a value is not finite or SIGTERM comes, the state is saved, and FloatingPointError or Interrupted raised.
    """
    loader.sampler.set_epoch(epoch)
    loader.sampler.start = run.steps_done(epoch) * args.accumulation * args.batch_size_per_gpu
    loader.dataset.set_epoch(epoch)
    try:
        means = run.train_one_epoch(loader, epoch)
        optim.check_weights(run.model, f"epoch {epoch}/{args.epochs}")
    except FloatingPointError as error:
        if distributed.is_main_process():
            save_atomically(run.state_dict(epoch), Path(args.output_dir) / "nonfinite.pth")
        distributed.barrier()  # the launcher ends all processes with the first one, and writing the file may take long
        last_good = f"the last good state is {args.output_dir}/checkpoint.pth" if epoch else "no epoch had ended yet"
        raise FloatingPointError(f"{error}; {last_good}, the state at the failure is nonfinite.pth beside it") from error
    except signals.Interrupted as stop:
        run.save(args.output_dir, epoch - 1)
        distributed.barrier()
        raise signals.Interrupted(f"{stop}, saved in {args.output_dir}; {RESUME}", 0) from None
    return means


def load_resumable(path: Path, args: argparse.Namespace, fixed: Iterable[str]) -> dict[str, Any] | None:
    """The checkpoint of a pretraining to resume, or None if there is no such file; prints which arguments have changed.

    Raises InputError if the file is not such a checkpoint, or was made with other values of the arguments `fixed`.
    """
    if not path.exists():
        return None
    state = load_checkpoint(path)
    with valid_state(path):
        stored = plain_args(state["args"])
        if state["epoch"] < 0:
            raise ValueError(f"epoch {state['epoch']}")
    for name in fixed:
        if name in stored and stored[name] != getattr(args, name):
            raise InputError(
                f"--{name} {getattr(args, name)}: the checkpoint in {path.parent} was made with {stored[name]}; "
                "continue it with that, or give another --output_dir"
            )
    changed = [n for n, v in sorted(vars(args).items()) if n in stored and stored[n] != v and n != "local_rank"]
    if changed:
        print("continuing with changed arguments:", ", ".join(f"{n} {stored[n]} -> {getattr(args, n)}" for n in changed))
    return state


def set_aside(path: Path) -> None:
    """Give a file that is not empty another name, log.txt for example log.1.txt, and say so."""
    if path.exists() and path.stat().st_size:
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        new = next(name for name in names if not name.exists())
        path.rename(new)
        print(f"{path} is kept as {new.name}")


def write_files(given: argparse.Namespace, log: Path, start_epoch: int, is_new: bool) -> None:
    """The flags as config.yaml, and log.txt as far as the run has come. A new run keeps older files under other names."""
    config, text = log.with_name("config.yaml"), arguments.config_text(given)
    if is_new:
        if [record["epoch"] for record in read_log(log)] != [0]:  # left by a run that ended before its first checkpoint
            set_aside(log)
        if not (config.exists() and config.read_bytes() == text.encode()):
            set_aside(config)
    truncate_log(log, start_epoch)
    write_text_atomically(text, config)


def pretrain(given: argparse.Namespace, args: argparse.Namespace, device: torch.device) -> None:
    """Start the run, or continue it from its checkpoint. `given`: the arguments before their defaults were filled in."""
    method = METHODS[args.net]
    of_parts = ["hp1"] if method.is_split(args.equiv_part) else []
    fixed = (*TENSOR_ARGUMENTS, *method.base.head_flags, *of_parts, "equiv_part", "equiv_params", "sie_width")
    state = load_resumable(Path(args.output_dir) / "checkpoint.pth", args, fixed)
    student, teacher = build_networks(args, device, resuming=state is not None)
    readable = CheckRecord(Path(args.output_dir) / "checked_images.npy")
    dataset = build_dataset(args, readable)
    loader = build_loader(dataset, args)
    online = OnlineEvaluation(args, image_options(args, readable), device)
    steps_per_epoch = len(loader) // args.accumulation
    run = build_pretraining(args, student, teacher, device, steps_per_epoch)

    with valid_state(Path(args.output_dir) / "checkpoint.pth"):
        start_epoch = run.load_state_dict(state) if state else 0
    if distributed.is_main_process():
        os.makedirs(args.output_dir, exist_ok=True)
        readable.save()
        write_files(given, Path(args.output_dir) / "log.txt", start_epoch, is_new=state is None)
    print_summary(args, run, len(dataset), steps_per_epoch)
    if state:
        finished = ", which is the end of the run" * (start_epoch >= args.epochs)
        print(f"continuing {args.output_dir} from epoch {start_epoch}, step {run.steps_done(start_epoch)}{finished}")
    elif args.epochs == 0:
        run.save(args.output_dir, -1)
    del state

    run.prepare(dataset)
    with Loggers(args.log_to, args.output_dir, run.arguments, start_epoch) as loggers, signals.deferred():
        train(run, loader, online, loggers, start_epoch, args)
    print(f"done: {args.output_dir}")


def train(
    run: Pretraining, loader: DataLoader, online: OnlineEvaluation, loggers: Loggers, start_epoch: int, args: argparse.Namespace
) -> None:
    """The epochs from `start_epoch` on; after each a line in log.txt, then the checkpoint."""
    watch = CollapseWatch()
    for epoch in range(start_epoch, args.epochs):
        start = time.perf_counter() - run.seconds_spent(epoch)
        means = run_epoch(run, loader, epoch, args)
        record = {f"train_{name}": value for name, value in means.items()} | measure(run, online, epoch, args)
        record |= {"epoch": epoch, "seconds": time.perf_counter() - start, "memory_gib": progress.peak_memory_gib(run.device)}
        for warning in watch.update(means):
            print(f"warning: {warning}")
        if distributed.is_main_process():
            append_log(Path(args.output_dir) / "log.txt", record)
        run.save(args.output_dir, epoch, args.saveckp_freq)
        loggers.send(record)
        print(epoch_line(epoch, args.epochs, record))


def measure(run: Pretraining, online: OnlineEvaluation, epoch: int, args: argparse.Namespace) -> dict[str, float]:
    """What is measured after this epoch, which is saved first: measuring may take minutes, and SIGTERM ends it at once."""
    if not online.is_due(epoch):
        return {}
    run.save(args.output_dir, epoch - 1)
    with signals.allowed(f"epoch {epoch} is trained and saved; {RESUME}", 0):
        return online.measure(run.teacher.backbone, epoch)


def main() -> None:
    given = get_args_parser().parse_args()
    args = resolve_args(given)
    device = distributed.init_distributed(args)
    with locked(Path(args.output_dir) / "checkpoint.pth"):
        pretrain(given, args, device)


if __name__ == "__main__":
    run_entry_point(main)
