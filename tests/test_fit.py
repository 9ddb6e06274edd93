"""A fit against one written out in numpy."""

import numpy as np
import pytest
from drawn import data_of, own_of, seen_in
from scipy.optimize import linear_sum_assignment
from tiny_wider import GATED, relu_bert

from ffmerge.config import MergeConfig
from ffmerge.models.find import find
from ffmerge.passes.weights.merge import merge_


def _least_squares(
    x: np.ndarray, y: np.ndarray, strength: float, start: np.ndarray | float = 0
) -> np.ndarray:
    """Return the W, (inputs, outputs), with the least |x W - y|^2 + strength |W - start|^2."""
    root = np.sqrt(strength) * np.eye(x.shape[1])
    target = root @ (np.zeros((x.shape[1], y.shape[1])) + start)
    return np.linalg.lstsq(np.vstack([x, root]), np.vstack([y, target]))[0]


def _nearest(rest: np.ndarray, covariance: np.ndarray, rank: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(rest @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank] @ np.linalg.inv(root)


@pytest.mark.parametrize(("gated", "rank"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_a_fit_is_that_of_an_implementation_of_its_own(gated: bool, rank: int) -> None:
    """Alignment, mean, scale, bias, residual and least squares of layers 1 and 2 in numpy."""
    make = (lambda: GATED["llama"](3)) if gated else relu_bert
    model = make()
    data = data_of(model, 40)
    maps = 1 + gated
    seen = seen_in(model, data)[1:]
    own = [{k: x.numpy() for k, x in own_of(model, m).items()} for m in find(model)[1:]]
    f = len(own[0]["0 weight"])
    # equations (1) and (2); a gated sublayer is aligned by gate, up and their product
    keys = [f"{i} out" for i in range(maps)] + ["2 in"] * gated
    c = sum(np.corrcoef(seen[0][key].T, seen[1][key].T)[:f, f:] for key in keys)
    orders = [np.arange(f), linear_sum_assignment(c, maximize=True)[1]]
    xs = [s["0 in"] for s in seen]
    means = [x.mean(0) for x in xs]
    covariances = [np.cov(x.T, bias=True) for x in xs]
    w_outs = [o[f"{maps} weight"][:, p] for o, p in zip(own, orders, strict=True)]
    strong = [
        s[f"{maps} in"].var(0)[p] * (w**2).sum(0)
        for s, p, w in zip(seen, orders, w_outs, strict=True)
    ]
    share = strong[0] / (strong[0] + strong[1])
    hidden: list[list[np.ndarray]] = [[], []]
    wanted: list[dict[str, np.ndarray]] = [{}, {}]
    for i in range(maps):
        w = [o[f"{i} weight"][p] for o, p in zip(own, orders, strict=True)]
        merged = share[:, None] * w[0] + (1 - share)[:, None] * w[1]
        for layer in range(2):
            b = own[layer].get(f"{i} bias", np.zeros(f))[orders[layer]]
            ours, theirs = (x @ (xs[layer] - means[layer]).T for x in (w[layer], merged))
            scale = (ours * theirs).sum(1) / (theirs**2).sum(1)
            rest = w[layer] - scale[:, None] * merged
            low = _nearest(rest, covariances[layer], rank)
            bias = b + (rest - low) @ means[layer]
            hidden[layer].append(xs[layer] @ (scale[:, None] * merged + low).T + bias)
            wanted[layer] |= {f"{i} weight": merged, f"{i} scale": scale, f"{i} bias": bias}
            wanted[layer][f"{i} low"] = low
    if gated:
        hidden = [[gate / (1 + np.exp(-gate)) * up] for gate, up in hidden]
    else:
        hidden = [[np.maximum(h, 0)] for (h,) in hidden]
    start = share * w_outs[0] + (1 - share) * w_outs[1]
    lows = [_nearest(w - start, np.eye(f), rank) for w in w_outs]
    errors = [
        s[f"{maps} out"] - h @ (start + low).T
        for s, (h,), low in zip(seen, hidden, lows, strict=True)
    ]
    h_all = np.vstack([h - h.mean(0) for (h,) in hidden])
    e_all = np.vstack([e - e.mean(0) for e in errors])
    step = _least_squares(h_all, e_all, 1e-2 * (h_all**2).sum() / f, 0.0).T
    for layer in range(2):
        wanted[layer][f"{maps} weight"] = start + step
        wanted[layer][f"{maps} bias"] = errors[layer].mean(0) - step @ hidden[layer][0].mean(0)
        wanted[layer][f"{maps} low"] = lows[layer]
    method = "residual" if rank else "calibrated"
    config = MergeConfig(window=(1, 2), method=method, rank=rank or None, batch_size=7)
    merge_(model, data, config, {k: x[:1] for k, x in data.items()})
    for layer, want in enumerate(wanted):
        got = {k: x.numpy() for k, x in own_of(model, find(model)[1 + layer]).items()}
        for key, values in want.items():
            number, part = key.split()
            if part == "low":
                if rank:
                    product = got[f"{number} up"] @ got[f"{number} down"]
                    assert np.abs(product - values).max() < 1e-5, (layer, key)  # measured 1.9e-6
            else:
                assert np.abs(got[key] - values).max() < 5e-6, (layer, key)  # measured 8.0e-7
