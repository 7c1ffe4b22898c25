"""EquiMod and its variant of pairs: official numbers, limits of the contrastive loss, what the networks learn."""

import argparse
import functools
import math

import pytest
import torch
from support.gathering import assert_two_processes_are_one, without_batch_norm
from support.golden_methods import check, fill_as, inputs, settings
from torch import nn

from clever.data.augmentations import eval_transform
from clever.data.codes import COLUMNS, GROUPS
from clever.methods.equimod import EquiMod, EquiModPair, compare, nt_xent

ARGS = argparse.Namespace(global_crops_size=32)
BOTH = pytest.mark.parametrize("method", [EquiMod, EquiModPair])
ALL = list(GROUPS)  # 17 columns


def small(method, **widths):
    """A term that is told a crop and a rotation, with its arguments for 8 images, in float64."""
    torch.manual_seed(0)
    term = method(6, ARGS, ["crop", "rotation"], **{"hidden": 10, "embedding": 5} | widths).double()
    z, codes = torch.randn(2, 8, 6, dtype=torch.float64), torch.rand(8, 3, len(COLUMNS), dtype=torch.float64)
    return term, z, codes, torch.randn(8, 6, dtype=torch.float64) if method is EquiMod else None


@pytest.mark.parametrize("case", [f"equimod.ntxent{i}" for i in range(6)])
def test_nt_xent_and_gradient_are_the_official_ones(case):
    (rows,) = inputs(case)
    loss = nt_xent(rows, settings(case)["temperature"])
    check(f"{case}.loss", loss)
    check(f"{case}.grad_rows", torch.autograd.grad(loss, rows)[0])


@pytest.mark.parametrize("case", ["hand1", "hand2"])
def test_nt_xent_by_hand(case):
    (rows,) = inputs(case)
    check(f"{case}.value", nt_xent(torch.tensor(rows, dtype=torch.float64), settings(case)["temperature"]))


@pytest.mark.parametrize("case, groups", [("equimod.path0", ALL), ("equimod.path1", ALL), ("equimod.path2", ["crop", "flip"])])
def test_networks_term_and_gradients_are_the_official_ones(case, groups):
    features, codes = inputs(case)
    s = settings(case)
    term = EquiMod(s["feature_width"], ARGS, groups, s["hidden"], s["embedding"]).double()
    fill_as(term.projector, case, "proj_head_eq")
    fill_as(nn.Sequential(*term.code_projector[1:]), case, "proj_head_t")
    fill_as(term.predictor, case, "predictor_eq")
    start, views, predicted = term.embed(features, codes)
    check(f"{case}.y_clean", start[: s["images"]])
    check(f"{case}.y_views", views)
    check(f"{case}.y_predicted", predicted)
    values = compare(start, views, predicted, s["temperature"])
    check(f"{case}.loss", values["term"])
    check(f"{case}.eqgain", values["eqgain"])
    of_features, of_weight = torch.autograd.grad(values["term"], [features, term.code_projector[1].weight])
    check(f"{case}.grad_features", of_features)
    check(f"{case}.grad_code_projector_weight", of_weight)


def test_pair_and_gradients_are_the_official_ones():
    case = "equimod_pair.path0"
    features1, features2, codes12 = inputs(case)
    term = EquiModPair(48, ARGS, ["crop", "color", "flip"]).double()
    fill_as(term.projector, case, "projector_equi")
    fill_as(nn.Sequential(*term.code_projector[1:]), case, "action_proj")
    fill_as(term.predictor, case, "predictor")
    loss = term.predict(term.projector(features1), term.projector(features2), codes12)["term"]
    check(f"{case}.loss", loss)
    for i, gradient in enumerate(torch.autograd.grad(loss, [features1, features2]), 1):
        check(f"{case}.grad_features{i}", gradient)


def test_nt_xent_of_equal_rows_is_chance_and_of_perfect_pairs_near_its_minimum():
    assert nt_xent(torch.ones(4 * 6, 3), 0.2).item() == pytest.approx(math.log(4 * 6 - 1))
    pairs = torch.eye(8).repeat(2, 1)  # every other row is orthogonal
    assert nt_xent(pairs, 0.2).item() == pytest.approx(math.log(1 + 14 * math.exp(-5)))


def test_gain_is_over_predicting_no_change():
    start, goal = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    assert compare(start, goal, 2 * goal, 0.2)["eqgain"].item() == pytest.approx(0.4)
    assert compare(start, goal, start, 0.2)["eqgain"] == 0


@BOTH
def test_order_of_images_and_of_views_does_not_matter(method):
    term, z, codes, clean = small(method)
    value, order = term(z, codes, clean)["term"], torch.randperm(8)
    permuted = term(z[:, order], codes[order], None if clean is None else clean[order])["term"]
    torch.testing.assert_close(permuted, value)
    torch.testing.assert_close(term(z.flip(0), codes[:, [1, 0, 2]], clean)["term"], value)
    assert (term(z.flip(0), codes, clean)["term"] - value).abs() > 1e-4


@BOTH
def test_term_learns_what_codes_do_to_features(method):
    """Views that are shifted by their codes: the prediction becomes better than no change, and needs the view's own code."""
    torch.manual_seed(0)
    term, shift = method(6, ARGS, ["crop"], hidden=32, embedding=16), torch.randn(4, 6)
    optimizer = torch.optim.Adam(term.parameters(), 1e-2)
    for _ in range(60):
        codes, clean = torch.zeros(32, 3, len(COLUMNS)), torch.randn(32, 6)
        codes[:, :2, GROUPS["crop"]] = torch.randn(32, 2, 4)
        z = (clean[:, None] + codes[:, :2, GROUPS["crop"]] @ shift).transpose(0, 1)  # 2, B, d
        values = term(z, codes, clean)
        optimizer.zero_grad()
        values["term"].backward()
        optimizer.step()
    assert values["eqgain"] > 0.1
    assert term(z, codes[torch.randperm(32)], clean)["term"] > values["term"] + 0.5


@BOTH
def test_under_autocast_similarities_are_float32_and_constant_codes_harmless(method):
    term, z, codes, clean = small(method)
    with torch.autocast("cpu", torch.bfloat16):
        values = term.float()(z.float(), torch.ones_like(codes).float(), None if clean is None else clean.float())
    values["term"].backward()
    assert values["term"].dtype == values["eqgain"].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in term.parameters())


def test_the_clean_view_is_that_of_evaluations():
    assert EquiMod.extra_views(ARGS) == eval_transform("ori", 32).distributions and EquiModPair.extra_views(ARGS) == []


def without_norms(method):
    term, *arguments = small(method)
    return without_batch_norm(term), *arguments


@BOTH
def test_two_processes_are_one(method, tmp_path):
    assert_two_processes_are_one(functools.partial(without_norms, method), tmp_path)
