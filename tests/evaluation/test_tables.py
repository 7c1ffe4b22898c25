"""The tables and the plot of equivariance results, on records written by hand."""

import pytest

from clever.evaluation import tables


def make_record(draws):
    """One transformation, ALL and `draws` random subspaces, with a standard deviation of .25 (of one draw, 0)."""
    std = 0.25 if draws > 1 else 0.0
    common = {"transform": "rotation", "head": "linear", "input": "pair", "r2": 0.5, "mae_degrees": 20.0}
    common |= {"accuracy": None, "auc": None, "r2_per_target": {"sin": 0.5}, "cosine_gap": 0.125, "gram_gap": 0.01}
    spreads = {f"{name}_std": std for name in ("r2", "mae_degrees", "cosine_gap", "gram_gap")}
    entries = [
        common | {"part": "ALL", "control": None},
        common | {"part": "EF", "control": "random_subspace", "draws": draws} | spreads,
    ]
    return {"net": "CLeVER", "arch": "resnet8", "results": entries, "gaps": entries}


def cells_of(markdown, title):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {title} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(("draws", "r2", "error"), [(3, "0.500 ± 0.250", "20.0 ± 0.2"), (1, "0.500", "20.0")])
def test_only_several_random_subspaces_have_a_standard_deviation(draws, r2, error):
    markdown = tables.to_markdown(make_record(draws))
    assert cells_of(markdown, "rotation: R2") == ["0.500", r2]
    assert cells_of(markdown, "rotation: error (degrees)") == ["20.0", error]
