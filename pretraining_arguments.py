"""The flags of main_dino.py."""

import argparse

from arguments import bool_flag
from augmentations import IMAGENET_MEAN, IMAGENET_STD
from loggers import add_logger_argument
from rendering import add_renderer_argument


def add_network_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--net", default="CLeVER", help="dino: one head on the whole representation; CLeVER: IR and EF with a head each")
    add("--arch", default="vit_small", help="a backbone of backbones.py, or any timm model by its name")
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
    add("--hp1", type=float, default=0.8, help="CLeVER: share of the representation that is IR, in (0, 1)")
    add("--DVR_out_dim", type=int, default=16384, help="CLeVER: outputs of the EF head")
    add("--sep_lambd", type=float, default=1.0, help="CLeVER: weight of the EF loss (DVR)")
    add("--reg_lambd", default="_reg0.001", help="CLeVER: weight of the regulariser of the two heads: _reg0.001, 0.001, or "
        "'' for none. Raise it if one of the heads collapses")
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
