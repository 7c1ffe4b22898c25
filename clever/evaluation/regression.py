"""Regression on frozen features: ridge regression in closed form, an MLP, and their scores.

Both regressors have the same form: `Regressor(x, y, held_out)`, then `.predict(x, columns, groups)`. They are fitted to G
groups of T targets. Each group is a problem of its own, for example the true targets and shuffled ones.

Shapes: M training rows, N test rows, D columns of the features, d of them in use, G groups of T targets, S strengths.
"""

import torch
from torch import Tensor, nn

ROWS = 8192  # converted to float64 at a time
# Strengths of the ridge per training row, from none to all but ignoring the features.
STRENGTHS = torch.logspace(-6, 4, 21, dtype=torch.float64)


def standardization(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and factor, float64 [D], with which the columns of x [M, D] get mean 0 and standard deviation 1.

    The factor of a constant column is 0; variation within the rounding errors of float32 counts as none.
    """
    mean = x.mean(0, dtype=torch.float64)  # D
    variance = sum((rows.double() - mean).square().sum(0) for rows in x.split(ROWS)) / len(x)  # D
    std = variance.sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs(), 1 / std, 0)


# --- ridge regression ----------------------------------------------------------------------------------------------------


class Ridge:
    """Ridge regressions of y [M, K] on any of the standardised columns of x [M, D], in float64.

    The coefficients W minimise |y - mean(y) - z W|^2 + M * strength * |W|^2, where z are the standardised features. So they are
    those of scikit-learn's Ridge with alpha = M * strength.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.mean, self.scale = standardization(x)
        self.rows, self.y_mean = len(x), y.mean(0, dtype=torch.float64)  # K
        self.gram = self.mean.new_zeros(x.shape[1], x.shape[1])
        self.cross = self.mean.new_zeros(x.shape[1], y.shape[1])
        for rows, targets in zip(x.split(ROWS), y.split(ROWS), strict=True):
            z = (rows.double() - self.mean) * self.scale
            self.gram += z.T @ z  # D, D
            self.cross += z.T @ (targets.double() - self.y_mean)  # D, K

    def predict(self, x: Tensor, columns: Tensor, strengths: Tensor) -> Tensor:
        """Predictions [S, N, K] for x [N, D] from `columns` [d] alone, with a strength [S, K] for each target.

        All strengths share one eigen-decomposition.
        """
        values, vectors = torch.linalg.eigh(self.gram[columns][:, columns])  # d; d, d
        rotated = vectors.T @ self.cross[columns]  # d, K
        penalty = self.rows * strengths[:, None]  # S, 1, K
        coefficients = vectors @ (rotated / (values.clamp_min(0)[:, None] + penalty))  # S, d, K
        z = (x[:, columns].double() - self.mean[columns]) * self.scale[columns]  # N, d
        return z @ coefficients + self.y_mean


class LinearRegressor:
    """Ridge regression. The strength is chosen on the held-out rows, for each group; then all rows are fitted.

    Args:
        x, y: features [M, D] and targets [M, G, T].
        held_out: which rows choose the strength, bool [M]. All views of an image belong on the same side.
    """

    def __init__(self, x: Tensor, y: Tensor, held_out: Tensor) -> None:
        self.shape = y.shape[1:]
        flat = y.flatten(1)  # M, G*T
        self.trial, self.final = Ridge(x[~held_out], flat[~held_out]), Ridge(x, flat)
        self.held_out_x, self.held_out_y = x[held_out], flat[held_out].double()
        self.variance = flat.double().var(0, unbiased=False)  # G*T

    def choose_strengths(self, columns: Tensor) -> Tensor:
        """The strength [G] of least squared error on the held-out rows, relative to the variance of each target."""
        strengths = STRENGTHS.to(self.variance.device)
        predictions = self.trial.predict(self.held_out_x, columns, strengths[:, None].expand(-1, len(self.variance)))
        errors = (predictions - self.held_out_y).square().mean(1) / self.variance  # S, G*T
        return strengths[errors.unflatten(1, self.shape).mean(-1).argmin(0)]

    def predict(self, x: Tensor, columns: Tensor, groups: int) -> Tensor:
        """Predictions [N, groups, T] of the first `groups` groups for x [N, D], from `columns` [d] alone."""
        strengths = self.choose_strengths(columns).repeat_interleave(self.shape[1])  # G*T
        (predictions,) = self.final.predict(x, columns, strengths[None])
        return predictions.unflatten(1, self.shape)[:, :groups]


# --- MLP -----------------------------------------------------------------------------------------------------------------


class MLPRegressor:
    """The MLP d-1024-1024-T with ReLU of SIE's evaluation (arXiv 2302.10283): Adam at 1e-3, batches of 256, MSE.

    Args:
        x, y: features [M, D] and targets [M, G, T].
        held_out: not used, since nothing is chosen.
        epochs: passes over the rows.
        seed: of the weights and of the order of the rows.
        standardize: standardise the features, so that their scale does not matter; SIE does not.
    """

    def __init__(self, x: Tensor, y: Tensor, held_out: Tensor, epochs: int, seed: int, standardize: bool = True) -> None:
        self.x, self.y, self.epochs, self.seed = x, y.float(), epochs, seed
        self.mean, self.scale = standardization(x) if standardize else (x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]))

    def predict(self, x: Tensor, columns: Tensor, groups: int) -> Tensor:
        """Predictions [N, groups, T] of the first `groups` groups for x [N, D]; trains a network for each."""
        inputs, test = self._input(self.x, columns), self._input(x, columns)
        return torch.stack([self._fit(inputs, self.y[:, group])(test).double() for group in range(groups)], dim=1).detach()

    def _input(self, x: Tensor, columns: Tensor) -> Tensor:
        return ((x[:, columns] - self.mean[columns]) * self.scale[columns]).float()

    def _fit(self, x: Tensor, y: Tensor) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # on the CPU, where it gives every device the same weights
            torch.manual_seed(self.seed)
            layers = nn.Linear(x.shape[1], 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, y.shape[1])
            network = nn.Sequential(*layers).to(x.device)
        generator = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(256):
                optimizer.zero_grad()
                nn.functional.mse_loss(network(x[rows]), y[rows]).backward()
                optimizer.step()
        return network


# --- scores --------------------------------------------------------------------------------------------------------------


def r2_per_target(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 - squared error / squared deviation from the mean, of each target: predictions and targets [N, T] -> [T]."""
    return 1 - (targets - predictions).square().sum(0) / (targets - targets.mean(0)).square().sum(0)


def pooled_r2(predictions: Tensor, targets: Tensor) -> float:
    """1 - all squared errors / all squared deviations, each target from its own mean. Predicting the means gives 0."""
    return (1 - (targets - predictions).square().sum() / (targets - targets.mean(0)).square().sum()).item()


def sie_r2(predictions: Tensor, targets: Tensor) -> float:
    """R2 as SIE's scripts compute it: deviations from one mean of all targets together.

    If the means of the targets differ, predicting them gives more than 0. So compare it only with numbers of the same kind.
    """
    return (1 - (targets - predictions).square().sum() / (targets - targets.mean()).square().sum()).item()


def mean_angle_error(predictions: Tensor, targets: Tensor) -> float:
    """Mean absolute error, degrees, of angles given by their sine and cosine: predictions and targets [N, 2]."""
    angle, truth = (torch.atan2(pairs[:, 0], pairs[:, 1]) for pairs in (predictions, targets))
    return torch.rad2deg((angle - truth + torch.pi).remainder(2 * torch.pi) - torch.pi).abs().mean().item()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of scores [N] with the sign of their labels, -1 or 1 [N]."""
    return ((scores > 0) == (labels > 0)).double().mean().item()


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a score [N] with label 1 is above one with label -1; a tie counts half."""
    from scipy.stats import rankdata  # takes a second or two, which pretraining need not wait for

    positive = (labels > 0).cpu()
    ranks = torch.from_numpy(rankdata(scores.cpu().numpy()))  # ties share their mean rank
    count = int(positive.sum())
    return (ranks[positive].sum().item() - count * (count + 1) / 2) / (count * (len(labels) - count))
