"""Streaming moments against float64 computed from all data at once."""

import numpy as np
import pytest
import torch
from tiny import bert, gpt2

from ffmerge.models.feedforward import find
from ffmerge.passes.weights.statistics import Moments, collect


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.corrcoef(x.T.astype(np.float64), y.T.astype(np.float64))[: x.shape[1], x.shape[1] :]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_correlation_equals_float64(offset: float) -> None:
    # At an offset of 10,000 the textbook formula E[xy] - E[x]E[y] in float32 is off by over 1.
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((700, 5)) + offset).astype(np.float32)
    y = (0.5 * x[:, ::-1] + generator.standard_normal((700, 5))).astype(np.float32)
    moments = Moments(((0, 3),))
    for start in (0, 1, 300, 650):
        end = {0: 1, 1: 300, 300: 650, 650: 700}[start]
        batch = slice(start, end)
        moments.update({0: torch.from_numpy(x[batch]), 3: torch.from_numpy(y[batch])})
    error = np.abs(moments.correlation(0, 3).numpy() - _correlation(x, y)).max()
    assert error < 1e-6  # measured 1.1e-7
    assert moments.count == 700
    assert (
        np.abs(moments.mean[0].numpy() - x.astype(np.float64).mean(0)).max() < 1e-10
    )  # measured 1.8e-12
    variance = moments.squares[3].numpy() / 700
    assert np.abs(variance / y.astype(np.float64).var(0) - 1).max() < 5e-8  # measured 5.3e-9


def test_a_neuron_that_never_changes_correlates_with_nothing() -> None:
    moments = Moments(((0, 1),))
    x = torch.randn(50, 3)
    x[:, 1] = 4.0
    moments.update({0: x, 1: x})
    correlation = moments.correlation(0, 1)
    assert torch.isfinite(correlation).all()
    assert correlation[1].abs().max() == 0
    assert torch.allclose(correlation[0, 0], torch.tensor(1.0), atol=1e-6)


@pytest.mark.parametrize("make", [bert, gpt2])
def test_padding_counts_for_nothing(make) -> None:
    model = make()
    pairs = {"layers": [find(model)[:2]]}
    ids = np.random.default_rng(0).integers(1, 97, (4, 6))
    mask = np.ones_like(ids)
    plain = collect(model, pairs, [{"input_ids": ids, "attention_mask": mask}], 1000)["layers"]
    padded = {
        "input_ids": np.concatenate([ids, np.full((4, 3), 5)], 1),
        "attention_mask": np.concatenate([mask, np.zeros((4, 3), int)], 1),
    }
    masked = collect(model, pairs, [padded], 1000)["layers"]
    assert plain.count == masked.count == 24
    difference = (plain.correlation(0, 1) - masked.correlation(0, 1)).abs().max()
    assert difference < 1e-6  # measured 0


def test_features_are_those_before_the_activation() -> None:
    model = bert()
    ids = np.random.default_rng(0).integers(1, 97, (3, 5))
    seen = []
    hook = model.bert.encoder.layer[2].intermediate.dense.register_forward_hook(
        lambda module, args, out: seen.append(out.detach())
    )
    pairs = {"layers": [find(model)[2:4]]}
    moments = collect(model, pairs, [{"input_ids": ids}], 10)["layers"]
    hook.remove()
    assert torch.allclose(moments.mean[2].float(), seen[-1].flatten(0, 1).mean(0), atol=1e-6)
    assert set(moments.mean) == {2, 3}  # of the windows only
