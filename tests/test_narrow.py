"""Narrowing against ridge regression written out in NumPy, and its exact cases."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import bert, gpt2, vit
from tiny_wider import GATED, seeded, t5

import ffmerge
from ffmerge.config import CompareConfig, ExportConfig, MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, ties
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.models.record import merge_record
from ffmerge.passes.weights import cost, narrow, widths
from ffmerge.passes.weights.compare import compare
from ffmerge.passes.weights.elimination import eliminate
from ffmerge.passes.weights.merge import merge_

MODELS: dict[str, Any] = {
    "vit": lambda: vit(32, 48, layers=2),
    "gpt2": lambda: gpt2(32, 48, layers=2),
    "bert": lambda: bert(32, 48, layers=2),
    "llama": lambda: GATED["llama"](2),
    "phi3": lambda: GATED["phi3"](2),
    "t5": lambda: t5(2, 2),
    "t5-gated": lambda: t5(2, 2, feed_forward_proj="gated-gelu"),
}
# Of a sublayer's map f -> d the end of its path, and that of what is given what it is added to.
STREAMS = {
    "vit": ("mlp.fc2", "layernorm_after"),
    "gpt2": ("mlp.c_proj", "ln_2"),
    "bert": ("output.dense", "intermediate"),
    "llama": ("mlp.down_proj", "post_attention_layernorm"),
    "phi3": ("mlp.down_proj", "post_attention_layernorm"),
    "t5": ("DenseReluDense.wo", "layer_norm"),
    "t5-gated": ("DenseReluDense.wo", "layer_norm"),
}


def _data(model: Any, rows: int = 24, seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": generator.standard_normal((rows, 3, 16, 16)).astype("f")}
    data = {"input_ids": generator.integers(3, 61, (rows, 9))}
    if model.config.is_encoder_decoder:
        data["decoder_input_ids"] = generator.integers(3, 61, (rows, 7))
    return data


def _outputs(model: Any, data: dict[str, np.ndarray]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in data.items()})[0]


def _through(
    model: Any, data: dict[str, np.ndarray], paths: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return what each module is given and puts out, (positions, width) in float64."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def keep(path: str, args: Any, out: torch.Tensor) -> None:
        flat = [x.detach().double().flatten(0, -2).numpy() for x in (args[0], out)]
        found[path] = flat[0], flat[1]

    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _, args, out, path=path: keep(path, args, out)
        )
        for path in paths
    ]
    _outputs(model, data)
    for handle in handles:
        handle.remove()
    return found


def _narrow(model: Any, data: dict[str, np.ndarray], width: int) -> Any:
    """Narrow every sublayer of a model to a width, in place; return its sublayers before that."""
    members = find(model)
    found = narrow.fit(model, members, dict.fromkeys(members, width), [data])
    ties.tie_(model, [members], [found])
    return members


def _w_out(model: Any, member: Any) -> tuple[np.ndarray, np.ndarray | None]:
    module = model.get_submodule(member.output)
    weight = module.weight.detach().double().numpy()
    is_turned = isinstance(module, transformers.pytorch_utils.Conv1D)
    bias = None if module.bias is None else module.bias.detach().double().numpy()
    return weight if is_turned else weight.T, bias


@pytest.mark.parametrize("name", MODELS)
def test_w_out_is_the_ridge_regression_of_numpy(name: str) -> None:
    """On what the narrowed model has there, for the stream of the original, layer for layer."""
    model, original = MODELS[name](), MODELS[name]()
    data = _data(model)
    members = _narrow(model, data, width=30)
    stream = {m: m.output.replace(*STREAMS[name]) for m in members}
    paths = [*stream.values(), *(member.output for member in members)]
    seen, wanted = _through(model, data, paths), _through(original, data, paths)
    for member in members:
        hidden, target = seen[member.output][0], wanted[member.output][1]
        target = target + wanted[stream[member]][0] - seen[stream[member]][0]
        assert hidden.shape[1] == 30
        old, old_bias = _w_out(original, member)
        new, bias = _w_out(model, member)
        kept = _kept(original, model, member)
        weights = np.ones(len(hidden))
        if name == "bert":  # a norm comes after the sum, and divides by its standard deviation
            total = wanted[stream[member]][0] + wanted[member.output][1]
            weights = 1 / total.var(1, ddof=1)
        mean, mean_target = (np.average(each, 0, weights) for each in (hidden, target))
        if old_bias is not None:
            hidden, target = hidden - mean, target - mean_target
        hidden, target = (each * np.sqrt(weights)[:, None] for each in (hidden, target))
        gram = hidden.T @ hidden
        ridge = np.diag(narrow.RIDGE * gram.diagonal())
        expected = np.linalg.solve(gram + ridge, hidden.T @ target + ridge @ old[kept])
        assert np.abs(new - expected).max() < 1e-3 * np.abs(expected).max()
        if bias is not None:
            assert np.abs(bias - (mean_target - mean @ new)).max() < 1e-5


def _kept(original: Any, model: Any, member: Any) -> list[int]:
    """Return which neurons are left, by their rows of the first map d -> f."""
    weight = member.weights[0]
    old, new = (m.get_parameter(weight.name).detach() for m in (original, model))
    if weight.neurons:
        old, new = old.T, new.T
    old, new = old[: len(old) // weight.blocks], new[: len(new) // weight.blocks]
    return [int((old == row).all(1).nonzero().item()) for row in new]


@pytest.mark.parametrize("name", MODELS)
def test_full_width_changes_nothing(name: str) -> None:
    model = MODELS[name]()
    data = _data(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _narrow(model, data, width=48)
    for key, value in model.state_dict().items():
        assert (value - before[key]).abs().max() < 2e-6  # measured 2e-7


@pytest.mark.parametrize("name", MODELS)
def test_neurons_that_do_nothing_are_those_that_go(name: str) -> None:
    """And the model computes what it did."""
    model = MODELS[name]()
    data, dead = _data(model), [1, 5, 17, 40, 41, 47]
    members = find(model)
    with torch.no_grad():
        for member in members:
            weight = model.get_submodule(member.output).weight
            neurons_first = member.weights[member.keys.index((len(member.inputs), "weight"))]
            weight.index_fill_(neurons_first.neurons, torch.tensor(dead), 0.0)
    original = MODELS[name]()
    original.load_state_dict(model.state_dict())
    before = _outputs(model, data)
    _narrow(model, data, width=42)
    for member in members:
        assert _kept(original, model, member) == [i for i in range(48) if i not in dead]
    assert (_outputs(model, data) - before).abs().max() < 1e-4 * before.abs().max()


def test_what_goes_costs_least_and_as_much_as_is_told() -> None:
    """Every error against least squares without those neurons; the first against all others."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((90, 12)) @ generator.standard_normal((12, 12))
    hidden[:, 7] = hidden[:, 3]  # twins: either may go, not both
    target = hidden @ generator.standard_normal((12, 5)) + generator.standard_normal((90, 5))
    damped = hidden.T @ hidden + 0.1 * np.eye(12)

    def error(kept: list[int]) -> float:
        weight = np.linalg.solve(damped[np.ix_(kept, kept)], hidden[:, kept].T @ target)
        return float(((target - hidden[:, kept] @ weight) ** 2).sum() + 0.1 * (weight**2).sum())

    every = list(range(12))
    found = eliminate(damped, np.linalg.solve(damped, hidden.T @ target), 1)
    assert len(found.order) == 11 and len(found.errors) == 12
    for gone in range(12):
        kept = found.kept(12 - gone, 12).tolist()
        assert found.errors[gone] == pytest.approx(error(kept) - error(every), rel=1e-6, abs=1e-6)
    alone = [error([i for i in every if i != one]) for one in every]
    assert found.order[0] == int(np.argmin(alone)) and found.order[0] in (3, 7)
    assert not {3, 7} <= set(found.order[:5].tolist())


def test_many_neurons_go_as_if_one_by_one() -> None:
    """More than are looked at in one go: the errors are those of least squares all the same."""
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((400, 150)) @ generator.standard_normal((150, 150))
    target = hidden @ generator.standard_normal((150, 4))
    damped = hidden.T @ hidden + np.eye(150)
    found = eliminate(damped, np.linalg.solve(damped, hidden.T @ target), 20)
    kept = found.kept(20, 150)
    weight = np.linalg.solve(damped[np.ix_(kept, kept)], hidden[:, kept].T @ target)
    right = (target**2).sum() - (hidden[:, kept].T @ target * weight).sum()
    weight = np.linalg.solve(damped, hidden.T @ target)
    right -= (target**2).sum() - (hidden.T @ target * weight).sum()
    assert found.errors[-1] == pytest.approx(right, rel=1e-6)


def test_many_batches_of_padded_rows_are_as_one(tmp_path: Path) -> None:
    """Padding counts nowhere, and how rows are batched changes nothing but rounding."""
    model = bert(32, 48, layers=2)
    data = _data(model)
    members = find(model)
    wide = dict.fromkeys(members, 40)
    data["attention_mask"] = np.ones_like(data["input_ids"])
    data["attention_mask"][::3, 6:] = 0
    once = narrow.fit(model, members, wide, [data])
    data["input_ids"][::3, 6:] = 7  # padding
    parts = [{name: array[i : i + 5] for name, array in data.items()} for i in range(0, 24, 5)]
    again = narrow.fit(model, members, wide, parts)
    for one, other in zip(once.own, again.own, strict=True):
        for key, tensor in one.items():
            assert (tensor - other[key]).abs().max() < 1e-4


def test_a_fit_that_is_broken_off_leaves_no_thread_and_no_hook() -> None:
    model = MODELS["llama"]()
    members = find(model)
    threads = threading.active_count()

    def stop(step: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        narrow.fit(model, members, dict.fromkeys(members, 40), [_data(model)], stop)
    assert threading.active_count() == threads
    assert not any(module._forward_hooks for module in model.modules())


def test_batches_are_as_large_as_one_sublayer_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as all together do: each pass has a thread."""
    model = gpt2(32, 48, layers=4)
    members = find(model)
    data = from_arrays(_data(model))
    row = 9 * cost._position_bytes(members[:1])
    monkeypatch.setattr(cost, "BATCH", 8 * row)
    assert cost.rows_at_a_time(model, data, 16, {"all": members}) == 2
    seen: list[int] = []
    fit = narrow.fit

    def counting(model: Any, members: Any, wide: Any, batches: Any, *more: Any) -> Any:
        batches = [*batches]
        seen.extend(len(batch["input_ids"]) for batch in batches)
        return fit(model, members, wide, batches, *more)

    monkeypatch.setattr(narrow, "fit", counting)
    merge_(model, data, MergeConfig(method="narrow", budget="-5%", batch_size=16), data)
    assert seen == [8, 8, 8]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "phi3", "t5"])
def test_even_widths_are_a_plain_checkpoint(name: str, tmp_path: Path) -> None:
    """That transformers loads with nothing of ours; ffmerge as well."""
    model = MODELS[name]()
    data = _data(model)
    _even(model, data, tmp_path, monkeypatched=40)
    plain = type(model).from_pretrained(tmp_path / "out", use_safetensors=True).eval()
    again = checkpoint.load(tmp_path / "out")
    record = merge_record(again.config)
    assert record is not None and set(record.narrowed[0].widths) == {40}
    for other in (plain, again):
        assert torch.equal(_outputs(other, data), _outputs(model, data))
    assert not (tmp_path / "out" / "modeling_ffmerge.py").exists()


def _even(model: Any, data: Any, folder: Path, monkeypatched: int) -> None:
    """Merge to one width everywhere and save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            widths, "chosen", lambda _, members, *more: dict.fromkeys(members, monkeypatched)
        )
        merge_(model, data, MergeConfig(method="narrow", budget="-1%"), data)
    checkpoint.save(model, folder / "out")


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama", "phi3", "t5-gated"])
def test_widths_of_their_own_are_loaded_by_ffmerge_and_by_the_code_beside_them(
    name: str, tmp_path: Path
) -> None:
    model = MODELS[name]()
    data = _data(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            widths,
            "chosen",
            lambda _, members, *more: {m: 40 - 4 * (m.layer % 2) for m in members},
        )
        merge_(model, data, MergeConfig(method="narrow", budget="-1%"), data)
    checkpoint.save(model, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    assert type(again) is type(model)
    kind = transformers.dynamic_module_utils.get_class_from_dynamic_module(
        f"modeling_ffmerge.{type(model).__name__}", str(tmp_path / "out")
    )
    other = kind.from_pretrained(tmp_path / "out").eval()
    for loaded in (again, other):
        assert torch.equal(_outputs(loaded, data), _outputs(model, data))
    checkpoint.save(model, tmp_path / "whole", expanded=True)
    for kind in (type(model), checkpoint):
        load = getattr(kind, "from_pretrained", None) or checkpoint.load
        whole = load(tmp_path / "whole").eval()
        assert {member.d_ff for member in find(whole)} == {48}
        assert (_outputs(whole, data) - _outputs(model, data)).abs().max() < 1e-5
    other.save_pretrained(tmp_path / "twice")
    checkpoint.save(again, tmp_path / "thrice")
    for folder in ("twice", "thrice"):
        loaded = checkpoint.load(tmp_path / folder)
        assert torch.equal(_outputs(loaded, data), _outputs(model, data))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        type(model).from_pretrained(tmp_path / "out", use_safetensors=True)
    found = ffmerge.inspect(tmp_path / "out")
    assert found.parameters == sum(p.numel() for p in model.parameters())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "fp32"),
        pytest.param("llama", "int4", marks=SLOW),
        pytest.param("llama", "int8", marks=SLOW),
        ("bert", "int8"),
        pytest.param("gpt2", "int4", marks=SLOW),
        pytest.param("t5-gated", "fp32", marks=SLOW),
    ],
)
def test_it_is_exported_as_a_narrower_model(name: str, dtype: str, tmp_path: Path) -> None:
    """Validated, greedy tokens and all, with nothing stored twice."""
    model = MODELS[name]()
    data = _data(model)
    merge_(model, data, MergeConfig(method="narrow", budget="-5%"), data)
    folder = tmp_path / "package"
    package = ffmerge.export(model, folder, ExportConfig(dtype=dtype), data=data)
    assert package.manifest.merge.narrowed
    assert ffmerge.audit(folder).ok
    assert ffmerge.validate(folder).ok
    if name == "llama":
        ids = torch.from_numpy(data["input_ids"][:1, :4])
        served = ffmerge.load_package(folder)
        tokens = served.generate(ids, max_new_tokens=4, do_sample=False)
        if dtype == "fp32":
            assert torch.equal(tokens, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_budget_is_met_and_the_widths_are_what_kernels_like() -> None:
    model = seeded(
        "LlamaForCausalLM", "LlamaConfig", hidden_size=32, intermediate_size=512,
        num_attention_heads=4, num_hidden_layers=2, vocab_size=61,
    )  # fmt: skip
    data = _data(model)
    merge = merge_(model, data, MergeConfig(method="narrow", budget="-30%"), data)
    record = merge.record
    assert record.parameters_after == sum(p.numel() for p in model.parameters())
    step = 32 * 3 * 32 / record.parameters_before
    assert 0.7 - step < record.parameters_after / record.parameters_before <= 0.7
    assert all(width % 32 == 0 for width in record.narrowed[0].widths)
    assert record.groups == () and record.own == ()
    assert merge.frontier[0].narrowed == () and merge.frontier[-1].narrowed
    best = max(merge.frontier[1:], key=lambda point: -point.value)
    assert record.metric["merged"] == best.value


def test_the_cheapest_widths_are_those_of_all_choices() -> None:
    """Convex costs: the greedy choice is the best, held against every other."""
    model = MODELS["llama"]()
    one, two = find(model)
    gone = np.arange(48) / 48
    costs = {(one,): gone**2, (two,): 3 * gone**2}
    remove = 30 * widths.per_neuron(model, (one,))
    found = widths.cheapest(model, costs, remove)
    best = min(
        (costs[one,][48 - a] + costs[two,][48 - b], a, b)
        for a in range(2, 49, 2)
        for b in range(2, 49, 2)
        if 96 - a - b >= 30
    )
    assert (found[one], found[two]) == best[1:]


def test_compare_puts_it_beside_merging() -> None:
    model = GATED["llama"](3)
    data = _data(model)
    found = compare(model, data, data, CompareConfig(k=2))
    row = next(row for row in found.rows if row.name == "narrow")
    merged = next(row for row in found.rows if row.name == "permute")
    assert row.bytes <= merged.bytes and row.what == ""
    assert len(model.get_parameter(find(model)[0].weights[0].name)) == 48  # as it was


def test_what_it_refuses() -> None:
    """In one sentence, before anything has changed."""
    model = GATED["llama"](2)
    data = _data(model)
    cases = [
        (MergeConfig(method="narrow", window=(0, 1)), "a budget instead of a window"),
        (MergeConfig(method="narrow", budget="-5%", auto_precision=True), "auto_precision"),
        (MergeConfig(method="narrow", budget="-95%"), "out of reach"),
        (MergeConfig(method="narrow", budget="100%"), "within that budget"),
    ]
    for config, text in cases:
        with pytest.raises(InputError, match=text):
            merge_(model, data, config, data)
    with pytest.raises(InputError, match="data"):
        merge_(model, None, MergeConfig(method="narrow", budget="-5%"))
    with pytest.raises(InputError, match="data"):
        merge_(model, None, MergeConfig(method="narrow", k=2))
    albert = seeded(
        "AlbertForMaskedLM", "AlbertConfig", hidden_size=32, intermediate_size=48,
        num_attention_heads=4, vocab_size=61, embedding_size=16, num_hidden_layers=3,
    )  # fmt: skip
    with pytest.raises(InputError, match="run 3 times"):
        merge_(albert, _data(albert), MergeConfig(method="narrow", budget="-5%"))
    shared = GATED["llama"](2)
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match="shared with another layer"):
        merge_(shared, _data(shared), MergeConfig(method="narrow", budget="-5%"))
