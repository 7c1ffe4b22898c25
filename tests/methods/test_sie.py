"""SIE: official numbers, its parts by other means, what the map learns."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.gathering import assert_two_processes_are_one, without_batch_norm
from support.golden import rel_error
from support.golden_methods import TENSORS, check, fill_as, inputs, settings
from torch import nn

from clever.data.codes import COLUMNS, GROUPS
from clever.methods.sie import SIE, covariance, predict, variance_hinge
from clever.utils import InputError


def arguments(**changes):
    return argparse.Namespace(**{"hp1": 0.8, "sie_width": 5} | changes)


def small(dim=6, groups=("crop", "rotation"), **changes):
    torch.manual_seed(0)
    return SIE(dim, arguments(**changes), groups)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", ["sie.rows0", "sie.rows1", "sie.rows2"])
def test_parts_and_gradients_are_the_official_ones(case):
    """Without projectors. The official regularisers also see the invariant part, the first columns, if there is one."""
    e, weights = (settings(case)[name] for name in ("equivariant_width", "weights"))
    features1, features2, codes12 = inputs(case)[:3]
    hypernetwork = nn.Sequential(nn.Linear(codes12.shape[1], e**2, bias=False))
    fill_as(hypernetwork, case, "predictor.hypernet.net")
    predicted = predict(codes12, features1[:, -e:], hypernetwork[0].weight)
    check(f"{case}.predicted", predicted)
    terms = {
        "inv": F.mse_loss(features1[:, :-e], features2[:, :-e]),
        "equi": F.mse_loss(predicted, features2[:, -e:]),
        "std": variance_hinge(features1) + variance_hinge(features2),
        "predstd": variance_hinge(predicted),
        "cov": covariance(features1) + covariance(features2),
    }
    terms = {name: term for name, term in terms.items() if weights[name]}
    terms["total"] = sum(weights[name] * term for name, term in terms.items())
    for name, term in terms.items():
        check(f"{case}.{name}", term)
        gradients = torch.autograd.grad(term, [features1, features2], retain_graph=True, materialize_grads=True)
        for i, gradient in enumerate(gradients, 1):
            check(f"{case}.{name}.grad_features{i}", gradient)


def test_term_and_gradients_are_the_official_ones_in_the_mean_of_both_directions():
    case = "sie.path1"
    features1, features2, codes12, codes21 = inputs(case)
    hidden, _, width = settings(case)["projector_equi"]
    term = SIE(26, arguments(sie_width=width), ["crop", "color"], hidden).double()
    fill_as(nn.Sequential(term.hypernetwork), case, "predictor.hypernet.net")
    fill_as(term.projector, case, "projector_equi")
    values = term.compare(torch.stack([features1, features2]), codes12, codes21)
    found = {name: values[name] for name in ("equi", "std", "predstd", "cov")} | {"total": 4.5 * values["term"]}
    for name, value in found.items():
        assert rel_error(value, (TENSORS[f"{case}.{name}"] + TENSORS[f"{case}.{name}.21"]) / 2) < 1e-6
    for i, gradient in enumerate(torch.autograd.grad(values["term"], [features1, features2]), 1):
        official = [TENSORS[f"{case}.{name}.grad_features{i}"] for name in ("total", "total.21")]
        assert rel_error(4.5 * gradient, sum(official) / 2) < 1e-6


def test_parts_by_hand():
    x, codes, *maps = (double(values) for values in inputs("hand5"))
    predicted = predict(codes, x, torch.stack([m.flatten() for m in maps], dim=1))
    check("hand5.value", predicted)
    check("hand6.value", F.mse_loss(predicted, double(inputs("hand6")[1])))
    check("hand7.value", variance_hinge(double(inputs("hand7")[0])))
    check("hand8.value", covariance(double(inputs("hand8")[0])))


def test_parts_by_other_means():
    codes, x, weight = torch.randn(9, 3).double(), 0.7 * torch.randn(9, 5).double(), torch.randn(25, 3).double()
    maps = (codes @ weight.T).view(9, 5, 5)
    torch.testing.assert_close(predict(codes, x, weight), torch.bmm(maps, x[:, :, None])[:, :, 0])
    cov = np.cov(x.numpy().T)
    assert covariance(x).item() == pytest.approx((cov[~np.eye(5, dtype=bool)] ** 2).sum() / 5)
    assert variance_hinge(x).item() == pytest.approx(np.maximum(0, 1 - np.sqrt(np.diag(cov) + 1e-4)).mean() / 2)


def test_code_has_the_angle_between_the_views_and_a_constant():
    angles1, angles2 = torch.deg2rad(torch.tensor([[10.0, -89.0, 30.0], [50.0, 89.0, 30.0]]))
    codes = torch.zeros(3, 2, len(COLUMNS))
    codes[..., GROUPS["rotation"]] = torch.stack([torch.stack([a.sin(), a.cos()], 1) for a in (angles1, angles2)], 1)
    angle = torch.deg2rad(torch.tensor([-40.0, -178.0, 0.0]))
    expected = torch.stack([torch.zeros(3), angle.sin(), angle.cos(), torch.ones(3)], dim=1)
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
    with pytest.raises(InputError, match="^--sie_width 1: "):
        SIE.check_args(arguments(sie_width=1))


def without_norms():
    term = without_batch_norm(small().double())
    return term, torch.randn(2, 8, 6).double(), torch.rand(8, 2, len(COLUMNS)).double(), None


def test_two_processes_are_one(tmp_path):
    assert_two_processes_are_one(without_norms, tmp_path)
