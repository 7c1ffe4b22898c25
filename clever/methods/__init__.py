"""The objectives of pretraining. METHODS says what each --net is: a new one is a file in this folder and a row of the table."""

import argparse
from dataclasses import dataclass

from clever.arguments import check_choices, check_not_negative
from clever.data.augmentations import Views
from clever.data.codes import GROUPS, is_constant
from clever.methods.augself import AugSelf
from clever.methods.care import CARE
from clever.methods.clever import CLeVERLoss
from clever.methods.dino import DINOLoss
from clever.methods.equimod import EquiMod, EquiModPair
from clever.methods.essl import ESSL
from clever.methods.sie import SIE
from clever.methods.term import Term
from clever.utils import InputError

FLAGS = ("equiv_lambd", "equiv_params", "equiv_part")  # of all methods with a term; None: the method's default


@dataclass(frozen=True)
class Method:
    """An objective on the representation or on its parts, and perhaps a term that is added to it."""

    base: type[DINOLoss]
    term: type[Term] | None = None

    @property
    def about(self) -> str:
        """One line for --help."""
        return (self.term or self.base).about

    def is_split(self, equiv_part: str | None) -> bool:
        """Whether the representation is cut into IR and EF: by the base objective, or because the term is on the EF alone."""
        return self.base.split or equiv_part == "EF"


METHODS: dict[str, Method] = {
    "dino": Method(DINOLoss),
    "CLeVER": Method(CLeVERLoss),
    "augself": Method(DINOLoss, AugSelf),
    "essl": Method(DINOLoss, ESSL),
    "equimod": Method(DINOLoss, EquiMod),
    "equimod_pair": Method(DINOLoss, EquiModPair),
    "sie": Method(DINOLoss, SIE),
    "care": Method(DINOLoss, CARE),
}


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all methods, a group for each that has some."""
    add = parser.add_argument_group("methods with an equivariant term").add_argument
    add("--equiv_lambd", type=float, help="weight of the term; default: the method's")
    add("--equiv_params", nargs="+", metavar="PARAMETER", help="what the term is told about the views: "
        f"{', '.join(GROUPS)}; default: crop, color, and rotation if --aug has it")  # fmt: skip
    add("--equiv_part", choices=("ALL", "EF"), help="ALL: the term sees the whole representation; EF: the EF alone, and "
        "DINO's head the IR alone; default: ALL, for sie EF")  # fmt: skip
    for name, method in METHODS.items():
        (method.term or method.base).add_arguments(parser.add_argument_group(f"--net {name}"))


def resolve_method(args: argparse.Namespace, global_views: Views) -> dict[str, object]:
    """Check the flags of the method, and return those of the term with their defaults filled in.

    Raises InputError for invalid values, and for flags that --net does not have.
    """
    base, term = METHODS[args.net].base, METHODS[args.net].term
    base.check_args(args)
    if not 0 < args.hp1 <= 1:
        raise InputError(f"--hp1 {args.hp1}: must lie in (0, 1]")
    given = [name for name in FLAGS if getattr(args, name) is not None]
    if term is None:
        if given:
            others = ", ".join(name for name, method in METHODS.items() if method.term)
            raise InputError(f"--{given[0]}: --net {args.net} has no equivariant term; it is for {others}")
        return {}
    term.check_args(args)
    if term.compares and args.batch_size_per_gpu < 2:
        raise InputError(f"--batch_size_per_gpu {args.batch_size_per_gpu}: must be 2 or greater for --net {args.net}")
    if args.equiv_params and not term.is_told:
        raise InputError(f"--equiv_params: --net {args.net} is not told what was drawn")
    told = ["crop", "color"] if is_constant("rotation", global_views) else ["crop", "color", "rotation"]
    values = {"equiv_lambd": term.lambd, "equiv_params": told if term.is_told else None, "equiv_part": term.part}
    values |= {name: getattr(args, name) for name in given}
    check_not_negative(argparse.Namespace(**values), "equiv_lambd")
    check_choices("equiv_part", [values["equiv_part"]], term.parts)
    check_choices("equiv_params", values["equiv_params"] or [], GROUPS)
    for name in values["equiv_params"] or []:
        if is_constant(name, global_views):
            raise InputError(f"--equiv_params {name}: the global views of --aug {args.aug} never change it")
    return values
