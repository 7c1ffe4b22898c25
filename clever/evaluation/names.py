"""Names of the files that the probes write, for the evaluation scripts and for the launch scripts.

The launch scripts run it as a command, which prints one name:
    python clever/evaluation/names.py linear --part main_part --hp1 0.8 --lr 0.001 --epochs 100 --trial_name T
It imports only the standard library: the command is fast and works on machines without torch. Names contain lr, epochs
and hp1 as the user typed them (0.50 stays 0.50): pass strings or arguments.TypedFloat.
"""

import argparse
import os
import sys

# Flag --else_part, in the original's words -> part of the representation: all of it, its IR or its EF.
PARTS = {"ALL": "ALL", "main_part": "IR", "else_part": "EF"}
NUMBER = r"[-+.\deE]+"  # matches any lr, hp1, ... in a name


def part_flag(part: str) -> str:
    """The value of --else_part that means `part`; result files contain it. Anything but IR and EF is returned unchanged."""
    return next((flag for flag, meaning in PARTS.items() if meaning == part), part)


def part_suffix(part: str, hp1: object) -> str:
    """What distinguishes the parts in file names: nothing for ALL, _hp<hp1> for IR, _hp<hp1>_else for EF."""
    return {"ALL": "", "IR": f"_hp{hp1}", "EF": f"_hp{hp1}_else"}[part]


def linear_probe_name(part: str, hp1: object, lr: object, epochs: object, trial_name: str) -> str:
    """linear[_hp<hp1>[_else]]_<lr>_<epochs>_<trial>: the linear probe of eval_linear.py."""
    return f"linear{part_suffix(part, hp1)}_{lr}_{epochs}_{trial_name}"


def downstream_name(
    mode: str, data: str, part: str, hp1: object, trial_name: str, lr: object, backbone_lr: object, epochs: object,
    batch_size: object,
) -> str:  # fmt: skip
    """ds_<mode>_<data>_linear[_hp<hp1>[_else]][_<trial>]_sgd_lr<lr>_lrbk<lr>_ep<epochs>_bs<batch>_li_aug1: eval_linear_ds.py's.

    `batch_size` counts the images per process.
    """
    recipe = f"sgd_lr{lr}_lrbk{backbone_lr}_ep{epochs}_bs{batch_size}_li_aug1"
    pieces = ["ds", mode, data, f"linear{part_suffix(part, hp1)}", trial_name, recipe]
    return "_".join(filter(None, pieces))


def classifier_name(checkpoint: str | os.PathLike) -> str:
    """What a classifier's results are named after: the file of its checkpoint, without checkpoint_ and .pth.tar."""
    return os.path.basename(checkpoint).removeprefix("checkpoint_").removesuffix(".pth.tar")


NAMES = {
    "linear": (linear_probe_name, ("hp1", "lr", "epochs", "trial_name")),
    "downstream": (downstream_name, ("mode", "data", "hp1", "trial_name", "lr", "backbone_lr", "epochs", "batch_size")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, (function, fields) in NAMES.items():
        subparser = commands.add_parser(command, help=function.__doc__.splitlines()[0])
        for field in ("part", *fields):
            subparser.add_argument(f"--{field}", required=True)
    args = vars(parser.parse_args())
    function, _ = NAMES[args.pop("command")]
    if args["part"] not in PARTS:  # one line, which the launch scripts show
        print(f"unknown part {args['part']!r}: must be one of {', '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)
    print(function(**args | {"part": PARTS[args["part"]]}))


if __name__ == "__main__":
    main()
