"""Names of the probes' files: in Python, on the command line, and without torch."""

import subprocess
import sys

import pytest
from support.processes import ROOT

from clever.arguments import TypedFloat
from clever.evaluation.names import downstream_name, linear_probe_name

LINEAR = {
    "ALL": "linear_1e-3_100_T", "main_part": "linear_hp0.80_1e-3_100_T", "else_part": "linear_hp0.80_else_1e-3_100_T",
}  # fmt: skip
SCRIPT = ROOT / "clever" / "evaluation" / "names.py"


def print_name(*words):
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)


def test_linear_probe_names_keep_numbers_as_typed():
    hp1, lr = TypedFloat("0.80"), TypedFloat("1e-3")
    assert [linear_probe_name(part, hp1, lr, 100, "T") for part in ("ALL", "IR", "EF")] == list(LINEAR.values())


@pytest.mark.parametrize("part", LINEAR)
def test_command_line_prints_the_same_name(part):
    result = print_name("linear", f"--part={part}", "--hp1=0.80", "--lr=1e-3", "--epochs=100", "--trial_name=T")
    assert (result.returncode, result.stdout) == (0, LINEAR[part] + "\n"), result.stderr


def test_downstream_names():
    recipe = "sgd_lr1e-3_lrbk0.0010_ep100_bs128_li_aug1"
    numbers = ("1e-3", "0.0010", 100, 128)
    assert downstream_name("ds_ft", "CUB200", "ALL", "0.8", "T", *numbers) == f"ds_ds_ft_CUB200_linear_T_{recipe}"
    assert downstream_name("semi_1", "IN100", "IR", "0.8", "", *numbers) == f"ds_semi_1_IN100_linear_hp0.8_{recipe}"
    words = "--mode=linear --data=d --part=else_part --hp1=.5 --trial_name= --lr=1 --backbone_lr=0 --epochs=2 --batch_size=4"
    expected = downstream_name("linear", "d", "EF", ".5", "", 1, 0, 2, 4)
    assert print_name("downstream", *words.split()).stdout == expected + "\n"


def test_an_unknown_part_is_one_line():
    result = print_name("linear", "--part=DIR", "--hp1=1", "--lr=1", "--epochs=1", "--trial_name=")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "unknown part 'DIR': must be one of ALL, main_part, else_part\n"


def test_needs_only_the_standard_library():
    """The launch scripts print names on machines without torch, and within milliseconds."""
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0
