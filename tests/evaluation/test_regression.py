"""evaluation/regression.py: ridge regression against scikit-learn's, the choice of its strength, the MLP, scores by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from clever.evaluation.regression import (
    STRENGTHS,
    LinearRegressor,
    MLPRegressor,
    Ridge,
    accuracy,
    auc,
    mean_angle_error,
    pooled_r2,
    r2_per_target,
    sie_r2,
    standardization,
)


def linear_data(rows, noise, seed=0):
    """Correlated features of different scales, float32 [rows, 6], and two linear functions of them with noise."""
    rng = np.random.default_rng(seed)
    mixing, weights = np.random.default_rng(9).normal(size=(6, 6)), np.random.default_rng(8).normal(size=(6, 2))
    z = rng.normal(size=(rows, 6)) @ mixing
    y = z @ weights + noise * rng.normal(size=(rows, 2)) + [5, -3]
    return torch.tensor(z * 10.0 ** np.arange(-2, 4) + 7, dtype=torch.float32), torch.tensor(y)


# --- ridge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 4, 5], [4, 1]])
@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e3])
def test_ridge_equals_scikit_learns(strength, columns, monkeypatch):
    """On standardised features, with alpha = rows * strength; the rows are taken in several chunks."""
    monkeypatch.setattr("clever.evaluation.regression.ROWS", 16)
    x, y = linear_data(50, noise=1)
    test_x, _ = linear_data(9, noise=1, seed=1)
    found = Ridge(x, y).predict(test_x, torch.tensor(columns), torch.full((1, 2), strength))
    scaler = StandardScaler().fit(x[:, columns].double())
    reference = SklearnRidge(alpha=50 * strength).fit(scaler.transform(x[:, columns].double()), y)
    expected = reference.predict(scaler.transform(test_x[:, columns].double()))
    np.testing.assert_allclose(found[0], expected, rtol=1e-8)


@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_constant_columns_are_ignored(value):
    x, y = linear_data(50, noise=1)
    padded = torch.cat([x, torch.full((50, 1), value)], dim=1)
    strengths = torch.full((1, 2), 1e-6)
    found = Ridge(padded, y).predict(padded, torch.arange(7), strengths)
    assert torch.allclose(found, Ridge(x, y).predict(x, torch.arange(6), strengths), atol=1e-9)
    assert standardization(padded)[1][-1] == 0
    only_constant = Ridge(padded, y).predict(padded, torch.tensor([6]), strengths)
    assert torch.allclose(only_constant[0], y.mean(0).expand(50, 2))


def test_strength_is_that_of_least_error_by_an_explicit_search():
    x, y = linear_data(60, noise=4)
    y = y[:, 1:]
    held_out = torch.arange(60) < 12
    regressor = LinearRegressor(x, y[:, None], held_out)
    scaler = StandardScaler().fit(x[~held_out].double())
    fitted, tested = (scaler.transform(x[rows].double()) for rows in (~held_out, held_out))
    scores = [
        r2_score(y[held_out], SklearnRidge(alpha=48 * strength).fit(fitted, y[~held_out]).predict(tested))
        for strength in STRENGTHS.tolist()
    ]
    best = int(np.argmax(scores))
    assert 0 < best < len(STRENGTHS) - 1
    assert regressor.choose_strengths(torch.arange(6)).item() == STRENGTHS[best]


# --- MLP ---------------------------------------------------------------------------------------------------------------


def test_mlp_learns_what_no_linear_regressor_can():
    """The product of two features; the same numbers every time; only the wanted groups are trained."""
    x = torch.rand(600, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x[:, 0] * x[:, 1])[:, None].double()
    regressor = MLPRegressor(x[:500], y[:500, None], torch.zeros(500, dtype=torch.bool), epochs=15, seed=3)
    state = torch.get_rng_state()
    found = regressor.predict(x[500:], torch.tensor([1, 0]), groups=1)
    assert found.shape == (100, 1, 1) and torch.equal(torch.get_rng_state(), state)
    assert pooled_r2(found[:, 0], y[500:]) > 0.9
    assert pooled_r2(regressor.predict(x[500:], torch.tensor([0, 2]), groups=1)[:, 0], y[500:]) < 0.3
    linear = LinearRegressor(x[:500], y[:500, None], torch.arange(500) < 100)
    assert abs(pooled_r2(linear.predict(x[500:], torch.tensor([1, 0]), 1)[:, 0], y[500:])) < 0.1


# --- scores ------------------------------------------------------------------------------------------------------------


def test_r2_by_hand():
    """Targets 0, 2, 4 (squares about the mean: 8) and 10, 10, 13 (6); squared errors 4 and 3."""
    truth = torch.tensor([[0.0, 10], [2, 10], [4, 13]])
    predicted = torch.tensor([[0.0, 11], [2, 11], [2, 14]])
    assert r2_per_target(predicted, truth).tolist() == pytest.approx([0.5, 0.5])
    assert pooled_r2(predicted, truth) == pytest.approx(1 - 7 / 14)
    # One mean of all, 6.5: squares 42.25 + 20.25 + 6.25 + 2 * 12.25 + 42.25 = 135.5.
    assert sie_r2(predicted, truth) == pytest.approx(1 - 7 / 135.5)
    means = truth.mean(0).expand(3, 2)
    assert pooled_r2(means, truth) == pytest.approx(0) and r2_per_target(means, truth).tolist() == pytest.approx([0, 0])
    assert sie_r2(means, truth) == pytest.approx(1 - 14 / 135.5)


def test_angle_error_takes_the_short_way_round():
    angles = torch.tensor([[170.0, -170], [10, 40], [-90, 90]]).deg2rad()
    predicted, truth = (torch.stack([3 * a.sin(), 3 * a.cos()], dim=1) for a in angles.unbind(1))
    assert mean_angle_error(predicted, truth) == pytest.approx((20 + 30 + 180) / 3, abs=1e-3)


def test_accuracy_and_auc():
    labels = torch.tensor([-1.0, -1, 1, 1])
    scores = torch.tensor([-0.5, 0.7, 0.7, 0.9])  # of the four pairs, three in order and one tied
    assert accuracy(scores, labels) == 0.75 and auc(scores, labels) == 3.5 / 4
    assert auc(-scores, labels) == 0.5 / 4 and auc(torch.zeros(4), labels) == 0.5
    generator = torch.Generator().manual_seed(0)
    labels, scores = torch.rand(50, generator=generator).round() * 2 - 1, torch.randn(50, generator=generator).round(decimals=1)
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
