"""Closed forms against float64 solutions written out, and merges whose result is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import bert, gpt2, vit
from tiny_wider import GATED, SEQ2SEQ, seeded, t5

from ffmerge.config import MergeConfig
from ffmerge.models.find import find
from ffmerge.models.sublayer import FeedForward, stacks
from ffmerge.passes.weights import calibrated, least_squares
from ffmerge.passes.weights.activations import collect, watch
from ffmerge.passes.weights.calibrated import low_rank, scale_of
from ffmerge.passes.weights.least_squares import Regression, ridge_solve
from ffmerge.passes.weights.merge import merge_

Arrays = dict[str, np.ndarray]
Parameters = dict[str, torch.Tensor]

# linear maps, Conv1D, gate and up apart, fused, and with biases; encoder and decoder
MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: vit(32, 64, 4),
    "gpt2": lambda: gpt2(32, 64, 4),
    "bert": lambda: bert(32, 64, 4),
    "llama": GATED["llama"],
    "phi3": GATED["phi3"],
    "t5": lambda: t5(3, 3, feed_forward_proj="gated-gelu"),
    "marian": lambda: SEQ2SEQ["marian"](3, 3),
}


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def _covariance(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.cov(x.numpy().T, bias=True))


def _least_squares(
    x: np.ndarray, y: np.ndarray, strength: float, start: np.ndarray | float = 0
) -> np.ndarray:
    """Return the W, (inputs, outputs), with the least |x W - y|^2 + strength |W - start|^2."""
    root = np.sqrt(strength) * np.eye(x.shape[1])
    target = root @ (np.zeros((x.shape[1], y.shape[1])) + start)
    return np.linalg.lstsq(np.vstack([x, root]), np.vstack([y, target]))[0]


def _data(model: Any, rows: int = 24, seed: int = 1) -> Arrays:
    generator = np.random.default_rng(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": generator.standard_normal((rows, 3, 16, 16)).astype(np.float32)}
    ids = {"input_ids": generator.integers(3, 61, (rows, 9))}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = generator.integers(3, 61, (rows, 7))
    return ids


def _outputs(model: Any, data: Arrays) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: torch.from_numpy(x) for key, x in data.items()}).logits.double()


def _own(model: Any, member: FeedForward) -> Parameters:
    """Return all parameters of a sublayer by number of the map and part."""
    return {
        f"{number} {part}": parameter.detach().double()
        for number, path in enumerate(member.maps)
        for part, parameter in model.get_submodule(path).named_parameters()
    }


def _merged(make: Callable[[], Any], method: str = "calibrated") -> Any:
    """Return a model whose layers from 1 on are merged on ``_data``."""
    model = make()
    config = MergeConfig(window=(1, 2), method=method, rank=3, batch_size=10)
    merge_(model, _data(model), config, {k: x[:2] for k, x in _data(model).items()})
    return model


# The closed forms, each alone


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


# Merges whose result is known


def _make_copies(model: Any, shuffle: bool) -> None:
    """Make layer 2 of every stack a copy of layer 1, its neurons in another order."""
    for members in stacks(find(model)).values():
        order = torch.arange(members[1].d_ff)
        if shuffle:
            order = torch.randperm(members[1].d_ff, generator=torch.Generator().manual_seed(3))
        for a, b in zip(members[1].weights, members[2].weights, strict=True):
            value = model.get_parameter(a.name).detach().clone()
            model.get_parameter(b.name).data = a.reordered(value, order)


@pytest.mark.parametrize("shuffle", [False, True], ids=["equal", "permuted"])
@pytest.mark.parametrize("method", ["calibrated", "residual", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_merge_without_loss(name: str, method: str, shuffle: bool) -> None:
    model = MODELS[name]()
    _make_copies(model, shuffle)
    data = _data(model)
    before = _outputs(model, data)
    size = sum(p.numel() for p in model.parameters())
    config = MergeConfig(window=(1, 2), method=method, rank=3)
    merge_(model, None if method == "weights" else data, config)
    assert (_outputs(model, data) - before).abs().max() < 1e-5  # measured 2.1e-6
    assert sum(p.numel() for p in model.parameters()) < size


def _relu_bert(layers: int = 3) -> Any:
    return seeded(
        "BertForSequenceClassification", "BertConfig", hidden_size=16, intermediate_size=24,
        num_hidden_layers=layers, num_attention_heads=2, vocab_size=61, hidden_act="relu",
    )  # fmt: skip


def _seen(model: Any, data: Arrays) -> list[dict[str, np.ndarray]]:
    """Return of each sublayer what its maps take and give, (tokens, width) in float64."""
    seen: list[dict[str, np.ndarray]] = [{} for _ in find(model)]
    handles = []

    def keep(found: dict[str, np.ndarray], key: str, args: Any, out: torch.Tensor) -> None:
        found[f"{key} in"], found[f"{key} out"] = (
            x.detach().flatten(0, 1).double().numpy() for x in (args[0], out)
        )

    for found, member in zip(seen, find(model), strict=True):
        for key, path in enumerate(member.maps):
            hook = model.get_submodule(path).register_forward_hook
            handles.append(hook(lambda m, a, out, f=found, k=key: keep(f, str(k), a, out)))
    _outputs(model, data)
    for handle in handles:
        handle.remove()
    return seen


def _nearest(rest: np.ndarray, covariance: np.ndarray, rank: int) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(rest @ root, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank] @ np.linalg.inv(root)


@pytest.mark.parametrize(("gated", "rank"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_a_fit_is_that_of_an_implementation_of_its_own(gated: bool, rank: int) -> None:
    """Alignment, mean, scale, bias, residual and least squares of layers 1 and 2 in numpy."""
    make = (lambda: GATED["llama"](3)) if gated else _relu_bert
    model = make()
    data = _data(model, 40)
    maps = 1 + gated
    seen = _seen(model, data)[1:]
    own = [{k: x.numpy() for k, x in _own(model, m).items()} for m in find(model)[1:]]
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
        got = {k: x.numpy() for k, x in _own(model, find(model)[1 + layer]).items()}
        for key, values in want.items():
            number, part = key.split()
            if part == "low":
                if rank:
                    product = got[f"{number} up"] @ got[f"{number} down"]
                    assert np.abs(product - values).max() < 1e-5, (layer, key)  # measured 1.9e-6
            else:
                assert np.abs(got[key] - values).max() < 5e-6, (layer, key)  # measured 8.0e-7


# What must not depend on chance


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_four_times_the_data_does_not_hurt(name: str) -> None:
    original = MODELS[name]()
    held_out = _data(original, 64, seed=99)
    wanted = _outputs(original, held_out)

    def error(rows: int, seed: int) -> float:
        model = MODELS[name]()
        config = MergeConfig(window=(1, 2), method="calibrated", tokens=100_000)
        merge_(model, _data(model, rows, seed), config, {k: x[:1] for k, x in held_out.items()})
        return float((_outputs(model, held_out) - wanted).norm() / wanted.norm())

    few, many = ([error(rows, seed) for seed in range(3)] for rows in (16, 64))
    assert np.mean(many) < np.mean(few)  # measured 0.82 and 0.84 of it


def _dead(model: Any) -> None:
    """Let a third of the neurons of layers 1 and 2 put out nothing, whatever they read."""
    for member in find(model)[1:3]:
        for weight in member.weights[:2]:
            model.get_parameter(weight.name).data[: member.d_ff // 3] = 0


def _same(model: Any, rows: int = 6) -> Arrays:
    return {"input_ids": np.full((rows, 9), 7), "decoder_input_ids": np.full((rows, 5), 7)}


SINGULAR: dict[str, tuple[Callable[[], Any], Callable[[Any], None], Callable[[Any], Arrays]]] = {
    "dead neurons": (_relu_bert, _dead, _data),
    "inputs that never change": (lambda: t5(3, 3), lambda m: None, _same),
    "fewer tokens than neurons": (_relu_bert, lambda m: None, lambda m: _data(m, 1)),
    "one row again and again": (
        _relu_bert, lambda m: None, lambda m: {k: x.repeat(30, 0) for k, x in _data(m, 1).items()}
    ),
    "all at once": (
        _relu_bert, _dead, lambda m: {"input_ids": np.full((4, 1), 7)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["calibrated", "residual"])
@pytest.mark.parametrize("what", SINGULAR)
def test_singular_statistics_give_a_finite_model(
    what: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is right on what it has seen, where that is too little to be wrong on."""
    monkeypatch.setattr(calibrated, "RIDGE", 1e-6)
    make, spoil, draw = SINGULAR[what]
    model = make()
    spoil(model)
    data = draw(model)
    before, other = _outputs(model, data), _data(model)
    plain = _outputs(model, other)
    config = MergeConfig(window=(1, 2), method=method, rank=3)
    merge_(model, data, config, {k: x[:1] for k, x in data.items()})
    assert all(torch.isfinite(p).all() for p in model.parameters())
    after = _outputs(model, other)
    assert (after - plain).norm() < 2 * plain.norm()  # measured 0.004 to 1.1 of it
    if what != "dead neurons":
        error = (_outputs(model, data) - before).norm() / before.norm()
        assert error < 1e-5  # measured 3.8e-7


@pytest.mark.parametrize("name", ["bert", "gpt2", "marian"])
@pytest.mark.parametrize("method", ["calibrated", "residual"])
def test_padding_counts_for_nothing(name: str, method: str) -> None:
    """Whatever stands under the padding: bit for bit the same model."""
    merged = []
    for padding in (5, 44):
        model = MODELS[name]()
        data = _data(model)
        mask = np.ones_like(data["input_ids"])
        for row in range(len(mask)):
            mask[row, 9 - row % 4 :] = 0
        data["input_ids"] = np.where(mask, data["input_ids"], padding)
        data["attention_mask"] = mask
        if model.config.is_encoder_decoder:
            mask = mask[:, :7]
            data["decoder_input_ids"] = np.where(mask, data["decoder_input_ids"], padding)
            data["decoder_attention_mask"] = mask
        config = MergeConfig(window=(1, 2), method=method, rank=2)
        merge_(model, data, config, {k: x[:1] for k, x in data.items()})
        merged.append(dict(model.named_parameters()))
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_a_bf16_model_stays_one_and_close_to_the_float32_merge() -> None:
    outputs = []
    for dtype in (torch.bfloat16, torch.float32):
        model = bert(32, 64, 4).bfloat16().to(dtype)
        config = MergeConfig(window=(1, 2), method="residual", rank=3)
        merge_(model, _data(model), config, {k: x[:1] for k, x in _data(model).items()})
        assert {p.dtype for p in model.parameters()} == {dtype}
        outputs.append(_outputs(model.float(), _data(model)))
    error = (outputs[0] - outputs[1]).norm()
    assert error < 2e-3 * outputs[1].norm()  # measured 3.6e-4


# Alignment


def _shuffled(model: Any, layer: int, seed: int) -> None:
    member = find(model)[layer]
    order = torch.randperm(member.d_ff, generator=torch.Generator().manual_seed(seed))
    for weight in member.weights:
        parameter = model.get_parameter(weight.name)
        parameter.data = weight.reordered(parameter.data, order)


@pytest.mark.parametrize("method", ["weights", "calibrated"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_the_order_in_which_a_member_holds_its_neurons_changes_nothing(
    name: str, layer: int, method: str
) -> None:
    """Also that of the first, which the others are matched to: then the merge is reordered."""
    outputs = []
    for shuffle in (False, True):
        model = MODELS[name]()
        if shuffle:
            _shuffled(model, layer, seed=5)
        data = None if method == "weights" else _data(model)
        merge_(model, data, MergeConfig(window=(0, 2), method=method))
        outputs.append(_outputs(model, _data(model)))
    assert (outputs[0] - outputs[1]).abs().max() < 2e-5  # measured 2.6e-6


def test_the_first_member_keeps_its_neurons_where_they_are() -> None:
    for method in ("permute", "copy-anchor"):
        model = bert(32, 64, 4)
        data, own = _data(model), [_own(model, member)["0 weight"] for member in find(model)]
        seen, want = _seen(model, data), own[0]
        if method == "permute":
            f = len(want)
            for other in (1, 2):
                c = np.corrcoef(seen[0]["0 out"].T, seen[other]["0 out"].T)[:f, f:]
                want = want + own[other][linear_sum_assignment(c, maximize=True)[1]]
            want = want / 3
        config = MergeConfig(window=(0, 2), method=method)
        merge_(model, data, config, {k: x[:1] for k, x in data.items()})
        error = (_own(model, find(model)[1])["0 weight"] - want).abs().max()
        assert error < 5e-8  # measured 5.0e-9


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("residual", ["bias", "down", "scale", "up"]),
        ("calibrated", ["bias", "scale"]),
        ("permute", []),
    ],
)
def test_the_record_says_what_each_layer_has_for_itself(method: str, own: list[str]) -> None:
    model = _merged(lambda: GATED["llama"](3), method)
    assert model.config.ffmerge["own"] == own
    first, second = (find(model)[layer] for layer in (1, 2))
    for path, other in zip(first.maps, second.maps, strict=True):
        mine, theirs = (dict(model.get_submodule(p).named_parameters()) for p in (path, other))
        assert set(mine) == {"weight", *own} - ({"scale"} if path == first.output else set())
        assert {part for part in mine if mine[part] is not theirs[part]} == set(mine) - {"weight"}


# What the fit reads


def test_signals_are_what_the_maps_take_and_give() -> None:
    model = GATED["phi3"]()
    data = _data(model, 6)
    members = {"layers": find(model)[1:3]}
    batches = [{k: x[i : i + 2] for k, x in data.items()} for i in (0, 2, 4)]
    got = list(watch(model, members, batches, tokens=30))
    assert len(got) == 2  # 18 positions each: the second batch brings it to 30
    seen = _seen(model, {k: x[:4] for k, x in data.items()})
    for layer in (1, 2):
        signals = [batch["layers"][layer] for batch in got]
        gate, up = np.split(seen[layer]["0 out"], 2, 1)
        wanted = {
            "inputs": seen[layer]["0 in"], "hidden": seen[layer]["1 in"],
            "outputs": seen[layer]["1 out"],
            "features": np.stack([gate, up, seen[layer]["1 in"]]),
        }  # fmt: skip
        for name, want in wanted.items():
            joined = torch.cat([getattr(s, name) for s in signals], -2).numpy()
            # products of other numbers of rows: measured 0 with AVX2, 4.8e-7 with AVX-512
            assert np.abs(joined - want).max() < 2e-6, name


def test_features_are_taken_before_the_nonlinearity() -> None:
    model = _relu_bert()
    data = _data(model)
    moments = collect(model, {"layers": [find(model)[1:3]]}, [data], 1000)["layers"]
    x, y = (seen["0 out"] for seen in _seen(model, data)[1:3])
    f = x.shape[1]
    want = np.corrcoef(x.T, y.T)[:f, f:]
    got = moments["features"].correlation(1, 2).numpy()
    assert np.abs(got - want).max() < 2e-6  # measured 3.4e-7
    inputs = _seen(model, data)[2]["0 in"]
    mean = moments["inputs"].mean[2][0].numpy()
    assert np.abs(mean - inputs.mean(0)).max() < 1e-12  # measured 0
