"""Names of the probes' files: in Python, on the command line, and without torch. No other test asserts them."""

import subprocess
import sys

import pytest
from support.processes import ROOT

from clever.arguments import TypedFloat
from clever.evaluation.names import PARTS, downstream_name, linear_probe_name

HP1, LR = TypedFloat("0.80"), TypedFloat("1e-3")
RECIPE = "sgd_lr1e-3_lrbk0.0010_ep100_bs128_li_aug1"
LINEAR = {
    "ALL": "linear_1e-3_100_T", "main_part": "linear_hp0.80_1e-3_100_T", "else_part": "linear_hp0.80_else_1e-3_100_T",
}  # fmt: skip
DOWNSTREAM = {
    "ALL": f"ds_ds_ft_CUB200_linear_T_{RECIPE}",
    "main_part": f"ds_ds_ft_CUB200_linear_hp0.80_T_{RECIPE}",
    "else_part": f"ds_ds_ft_CUB200_linear_hp0.80_else_T_{RECIPE}",
}
SCRIPT = ROOT / "clever" / "evaluation" / "names.py"


def print_name(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flag, part", PARTS.items())
def test_names_keep_numbers_as_typed(flag, part):
    assert linear_probe_name(part, HP1, LR, 100, "T") == LINEAR[flag]
    numbers = (LR, TypedFloat("0.0010"), 100, 128)
    assert downstream_name("ds_ft", "CUB200", part, HP1, "T", *numbers) == DOWNSTREAM[flag]
    assert downstream_name("ds_ft", "CUB200", part, HP1, "", *numbers) == DOWNSTREAM[flag].replace("_T_", "_")


def test_the_command_prints_the_same_names():
    result = print_name("linear", "--part=main_part", "--hp1=0.80", "--lr=1e-3", "--epochs=100", "--trial_name=T")
    assert (result.returncode, result.stdout) == (0, LINEAR["main_part"] + "\n"), result.stderr
    words = "--mode=ds_ft --data=CUB200 --part=else_part --hp1=0.80 --trial_name=T --lr=1e-3 --backbone_lr=0.0010 --epochs=100"
    assert print_name("downstream", *words.split(), "--batch_size=128").stdout == DOWNSTREAM["else_part"] + "\n"


def test_needs_only_the_standard_library():
    """The launch scripts print names on machines without torch, and within milliseconds."""
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0
