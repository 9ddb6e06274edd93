"""Least squares, scales and low ranks against solutions of numpy and scipy in float64."""

import numpy as np
import pytest
import torch

from ffmerge.passes.weights import least_squares
from ffmerge.passes.weights.calibrated import low_rank, scale_of
from ffmerge.passes.weights.least_squares import Regression, ridge_solve


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def _covariance(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.cov(x.numpy().T, bias=True))


def test_scales_are_slopes() -> None:
    x, own, merged = _normal(60, 4), _normal(5, 4, seed=1), _normal(5, 4, seed=2)
    merged[3] = 0  # its output never changes
    theirs, ours = (x - x.mean(0)) @ merged.T, (x - x.mean(0)) @ own.T
    for row in range(5):
        slope = np.linalg.lstsq(theirs[:, row, None].numpy(), ours[:, row].numpy())[0][0]
        got = float(scale_of(own, merged, _covariance(x))[row])
        assert abs(got - (slope if row != 3 else 1.0)) < 1e-14  # measured 1.2e-16


def test_low_rank_is_the_best_of_its_rank_on_the_inputs() -> None:
    """Whitened by the symmetric root, where the code takes Cholesky's."""
    x, rest = _normal(50, 6) @ _normal(6, 6, seed=1), _normal(5, 6, seed=2)
    covariance = _covariance(x)
    values, vectors = np.linalg.eigh(covariance.numpy())
    root = vectors * np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(rest.numpy() @ root)
    for rank in (1, 3, 5):
        up, down = low_rank(rest, covariance, rank)
        assert up.shape == (5, rank) and down.shape == (rank, 6)
        want = u[:, :rank] * s[:rank] @ v[:rank] @ np.linalg.inv(root)
        assert np.abs((up @ down).numpy() - want).max() < 1e-5  # measured 1.3e-6: the code damps
    assert (up @ down - rest).abs().max() < 5e-14  # it has no more ranks; measured 2.5e-15


def test_a_gram_of_nothing_but_rounding_gives_a_finite_solution() -> None:
    """Some of its eigenvalues are negative: no ridge relative to its diagonal can be too small."""
    noise = _normal(40, 64).float() * 1e-6
    gram = (noise.T @ noise) - 1e-16 * torch.eye(64)
    assert torch.linalg.eigvalsh(gram.double())[0] < -5e-17
    solution = ridge_solve(gram, noise.T @ noise[:, :3], 1e-9)
    assert torch.isfinite(solution).all()


@pytest.mark.parametrize("n", [5, 6])  # odd and even are packed in two ways
@pytest.mark.parametrize("columns", [3, 150])  # in one part and in several
def test_ridge_solve_solves(n: int, columns: int) -> None:
    gram, right = _covariance(_normal(30, n)), _normal(n, columns, seed=1)
    for ridge in (1e-8, 0.5):
        got = ridge_solve(gram, right, ridge).numpy()
        strength = ridge * np.trace(gram.numpy()) / n
        want = np.linalg.inv(gram.numpy() + strength * np.eye(n)) @ right.numpy()
        assert np.abs(got - want).max() < 1e-14  # measured 2.7e-15
        above = torch.triu(torch.full_like(gram, torch.nan), 1)  # is not read
        assert np.array_equal(ridge_solve(gram + above, right, ridge).numpy(), got)
    assert (ridge_solve(torch.zeros(n, n).double(), right, 1e-2) - right).abs().max() == 0


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("stripe", [2, 512])
def test_regression_in_batches_is_least_squares_with_a_bias_of_each_layer(
    offset: float, stripe: int, monkeypatch
) -> None:
    """At a mean of 10,000 spreads, products that are not centred would be off by 10^8."""
    monkeypatch.setattr(least_squares, "_STRIPE", stripe)
    generator = np.random.default_rng(0)
    hidden = {i: (generator.standard_normal((700, 5)) + offset * i).astype("f") for i in (1, 4)}
    slope = generator.standard_normal((5, 3))
    target = {
        i: (h @ slope + offset + i + generator.standard_normal((700, 3))).astype("f")
        for i, h in hidden.items()
    }
    zeros = torch.zeros
    batched, whole = (Regression(zeros(5, 5), zeros(5, 3)) for _ in range(2))
    for layer in hidden:
        for start, end in ((0, 1), (1, 300), (300, 300), (300, 650), (650, 700)):
            pair = (torch.from_numpy(x[layer][start:end]) for x in (hidden, target))
            batched.update(layer, *pair)
        whole.update(layer, *(torch.from_numpy(x[layer]) for x in (hidden, target)))
    x = np.zeros((1400, 7))
    for place, h in enumerate(hidden.values()):
        x[700 * place : 700 * (place + 1), :5] = h
        x[700 * place : 700 * (place + 1), 5 + place] = 1
    y = np.vstack(list(target.values())).astype(np.float64)
    want = np.linalg.lstsq(x, y)[0]
    for found in (batched, whole):
        got = found.solve(1e-12)
        assert np.abs(got.numpy() - want[:5]).max() < 2e-5  # in float32, measured 2.0e-6
        for place, (layer, h) in enumerate(hidden.items()):
            fitted = h.astype(np.float64) @ got.numpy() + found.bias(layer, got).numpy()
            wanted = h.astype(np.float64) @ want[:5] + want[5 + place]
            assert np.abs(fitted - wanted).max() < 1e-4  # measured 9.8e-6
