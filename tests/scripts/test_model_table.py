"""The model table: the numbers of the paper, and Markdown."""

import subprocess
import sys

import pytest
from support.processes import ROOT

from scripts import model_table


@pytest.mark.parametrize(
    "arch, dim, params, gflops, with_scan",
    [  # the paper's table
        ("vit_tiny", "192", "5.5", "1.26", "-"),
        ("vit_small", "384", "21.7", "4.61", "-"),
        ("resnet18", "512", "11.2", "1.83", "-"),
        ("resnet50", "2048", "23.5", "4.14", "-"),
        # 4.91 with the 0.77 M multiply-adds of a classifier of 1000 classes
        ("vssm2-vmambav2_tiny_224", "768", "29.5", "4.84", "4.90"),
    ],
)
def test_numbers_of_the_paper(arch, dim, params, gflops, with_scan):
    assert model_table.table_row(arch, 224) == (arch, dim, params, gflops, with_scan)


def test_runs_as_a_module_and_prints_markdown():
    arguments = ["vit_micro", "resnet8", "--img_size", "32"]
    command = [sys.executable, "-m", "scripts.model_table", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert rows[0][0] == "backbone" and set(rows[1][0]) == {"-"}
    assert [row[:3] for row in rows[2:]] == [["vit_micro", "128", "1.3"], ["resnet8", "128", "0.3"]]
