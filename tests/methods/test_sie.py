"""SIE: official numbers, its parts by other means, what the map learns."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.gathering import assert_two_processes_are_one, without_batch_norm
from support.golden_methods import METHODS, check, fill_as, inputs, settings
from torch import nn

from clever.data.codes import COLUMNS, GROUPS
from clever.methods.sie import SIE, covariance, predict, variance_hinge
from clever.methods.term import mlp
from clever.utils import InputError

CASES = ["sie.rows0", "sie.rows1", "sie.rows2", "sie.path0", "sie.path1"]
GROUPS_OF = {"sie.rows1": ["crop", "blur"], "sie.path1": ["crop", "color"]}  # as wide as the codes


def arguments(**changes):
    return argparse.Namespace(**{"net": "sie", "hp1": 0.8, "batch_size_per_gpu": 8, "sie_width": 5} | changes)


def small(dim=6, groups=("crop", "rotation"), **changes):
    torch.manual_seed(0)
    return SIE(dim, arguments(**changes), groups)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# --- official numbers --------------------------------------------------------------------------------------------------


def official_terms(case, features1, features2, codes12):
    """The official objective, by our functions: also the invariant part, which stands in the first columns."""
    spec = settings(case)
    e = spec["equivariant_width"]
    projectors = [nn.Identity(), nn.Identity()]
    for i, part in enumerate(("inv", "equi")):
        if widths := spec.get(f"projector_{part}"):
            width = features1.shape[1] - e if part == "inv" else e
            projectors[i] = mlp(width, *widths, bias=True, last_bias=False)
            fill_as(projectors[i], case, f"projector_{part}")
    rows = [torch.cat([projectors[0](f[:, :-e]), projectors[1](f[:, -e:])], dim=1) for f in (features1, features2)]
    width = spec.get("projector_equi", [e])[-1]
    (invariant1, x), (invariant2, y) = ((r[:, :-width], r[:, -width:]) for r in rows)
    hypernetwork = nn.Sequential(nn.Linear(codes12.shape[1], width**2, bias=False))
    fill_as(hypernetwork, case, "predictor.hypernet.net")
    predicted = predict(codes12, x, hypernetwork[0].weight)
    terms = {
        "inv": F.mse_loss(invariant1, invariant2),
        "equi": F.mse_loss(predicted, y),
        "std": sum(map(variance_hinge, rows)),
        "predstd": variance_hinge(predicted),
        "cov": sum(map(covariance, rows)),
    }
    terms["total"] = sum(weight * terms[name] for name, weight in spec["weights"].items() if weight)
    return predicted, terms


@pytest.mark.parametrize("case, direction", [*((case, "") for case in CASES), *((case, ".21") for case in GROUPS_OF)])
def test_parts_and_gradients_are_the_official_ones(case, direction):
    features1, features2, codes12, *codes21 = inputs(case)
    first = (features2, features1, codes21[0]) if direction else (features1, features2, codes12)
    predicted, terms = official_terms(case, *first)
    check(f"{case}.predicted{direction}", predicted)
    for name, value in terms.items():
        name = f"{case}.{name}{direction}"
        if name in METHODS["numbers"]:
            check(name, value)
            gradients = torch.autograd.grad(value, [features1, features2], retain_graph=True, materialize_grads=True)
            for i, gradient in enumerate(gradients, 1):
                if f"{name}.grad_features{i}" in METHODS["numbers"]:
                    check(f"{name}.grad_features{i}", gradient)


@pytest.mark.parametrize("case", GROUPS_OF)
def test_term_is_the_mean_of_the_official_one_in_both_directions(case):
    features1, features2, codes12, codes21 = inputs(case)
    dim, (*hidden, width) = features1.shape[1], settings(case).get("projector_equi", [16])
    term = SIE(dim, arguments(sie_width=width), GROUPS_OF[case], hidden[0] if hidden else None).double()
    fill_as(nn.Sequential(term.hypernetwork), case, "predictor.hypernet.net")
    if hidden:
        fill_as(term.projector, case, "projector_equi")
    else:
        term.projector = nn.Identity()
    values = term.compare(torch.stack([features1, features2]), codes12, codes21)
    both = [official_terms(case, features1, features2, codes12)[1], official_terms(case, features2, features1, codes21)[1]]
    mean = (both[0]["total"] + both[1]["total"]) / 2 / 4.5  # of numbers that are checked above
    torch.testing.assert_close(values["term"], mean)
    for name in ("equi", "std", "predstd", "cov"):
        torch.testing.assert_close(values[name], (both[0][name] + both[1][name]) / 2)
    for ours, official in zip(*(torch.autograd.grad(v, [features1, features2]) for v in (values["term"], mean)), strict=True):
        torch.testing.assert_close(ours, official)


def test_parts_by_hand():
    x, codes, *maps = (double(values) for values in inputs("hand5"))
    predicted = predict(codes, x, torch.stack([m.flatten() for m in maps], dim=1))
    check("hand5.value", predicted)
    check("hand6.value", F.mse_loss(predicted, double(inputs("hand6")[1])))
    check("hand7.value", variance_hinge(double(inputs("hand7")[0])))
    check("hand8.value", covariance(double(inputs("hand8")[0])))


# --- properties --------------------------------------------------------------------------------------------------------


def test_prediction_is_the_product_with_the_map_of_the_code():
    codes, x, weight = torch.randn(4, 3).double(), torch.randn(4, 5).double(), torch.randn(25, 3).double()
    maps = (codes @ weight.T).view(4, 5, 5)
    torch.testing.assert_close(predict(codes, x, weight), torch.bmm(maps, x[:, :, None])[:, :, 0])


def test_regularisers_against_numpy():
    x = np.random.default_rng(0).normal(0, 0.7, (9, 4))
    cov = np.cov(x.T)
    assert covariance(double(x)).item() == pytest.approx((cov[~np.eye(4, dtype=bool)] ** 2).sum() / 4)
    hinge = np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean() / 2
    assert variance_hinge(double(x)).item() == pytest.approx(hinge)


def test_code_has_half_angles_and_a_constant():
    angles1, angles2 = torch.deg2rad(torch.tensor([[10.0, -89.0, 30.0], [50.0, 89.0, 30.0]]))
    codes = torch.zeros(3, 2, len(COLUMNS))
    codes[..., GROUPS["rotation"]] = torch.stack([torch.stack([a.sin(), a.cos()], 1) for a in (angles1, angles2)], 1)
    half = torch.deg2rad(torch.tensor([20.0, 89.0, 0.0]))
    expected = torch.stack([torch.zeros(3), half.sin(), half.cos(), torch.ones(3)], dim=1)
    torch.testing.assert_close(small(groups=["blur", "rotation"]).describe(*codes.unbind(1)), expected)


def test_equal_views_are_predicted_by_the_constant_alone():
    """Without it, a code of zeros would predict zeros and give the map no gradient."""
    term, z = small(groups=["crop"]), torch.randn(1, 8, 6).expand(2, 8, 6)
    term(z, torch.zeros(8, 2, len(COLUMNS)))["predstd"].backward()
    *told, constant = term.hypernetwork.weight.grad.norm(dim=0).tolist()
    assert told == [0] * 4 and constant > 0


def test_term_learns_what_rotations_do_to_features():
    """Features that turn with the views: the prediction needs the pair's own code, and the embeddings stay spread."""
    torch.manual_seed(0)
    term = SIE(2, arguments(sie_width=4), ["rotation"], hidden=32)
    optimizer = torch.optim.Adam(term.parameters(), 1e-2)
    for _ in range(100):
        angles, codes = 3 * torch.rand(64, 2) - 1.5, torch.zeros(64, 2, len(COLUMNS))
        codes[..., GROUPS["rotation"]] = torch.stack([angles.sin(), angles.cos()], dim=-1)
        turned = 6.3 * torch.rand(64, 1) + angles
        z = torch.stack([turned.sin(), turned.cos()], dim=-1).transpose(0, 1)  # 2, B, 2
        values = term(z, codes)
        optimizer.zero_grad()
        values["term"].backward()
        optimizer.step()
    assert values["equi"] < 0.7 and values["spread"] > 0.7  # a prediction of the mean has 1 where the spread is 1
    assert term(z, codes[torch.randperm(64)])["equi"] > 2 * values["equi"]


def test_spread_shows_a_collapse():
    term, codes = small(), torch.zeros(8, 2, len(COLUMNS))
    term.projector = nn.Identity()
    assert term(torch.ones(2, 8, 5), codes)["spread"] == 0
    columns = torch.tensor([-1.0, 1.0]).repeat(4)[:, None].expand(8, 5)
    assert term(torch.stack([columns, 3 * columns]), codes)["spread"].item() == pytest.approx(2 * (8 / 7) ** 0.5)


def test_statistics_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        values = small()(torch.randn(2, 8, 6), torch.rand(8, 2, len(COLUMNS)))
    assert {value.dtype for value in values.values()} == {torch.float32}


def test_what_has_no_covariance_is_refused():
    with pytest.raises(InputError, match="^--hp1 0.8: "):
        small(dim=1)
    with pytest.raises(InputError, match="^--batch_size_per_gpu 1: "):
        small(batch_size_per_gpu=1)
    with pytest.raises(InputError, match="^--sie_width 1: "):
        SIE.check_args(arguments(sie_width=1))


def without_norms():
    term = without_batch_norm(small().double())
    return term, torch.randn(2, 8, 6).double(), torch.rand(8, 2, len(COLUMNS)).double(), None


def test_two_processes_are_one(tmp_path):
    assert_two_processes_are_one(without_norms, tmp_path)
