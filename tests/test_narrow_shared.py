"""Narrowing of sublayers that share, against one regression of all of them written out in NumPy."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_narrow import STREAMS, _data, _kept, _outputs, _through, _w_out
from tiny import bert, gpt2
from tiny_wider import GATED, t5

import ffmerge
from ffmerge.config import CompareConfig, ExportConfig, MergeConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models import checkpoint, ties
from ffmerge.models.card import merge_text, results
from ffmerge.models.find import find
from ffmerge.models.record import MergeRecord
from ffmerge.passes.weights import compare as comparing
from ffmerge.passes.weights import narrow, units, widths
from ffmerge.passes.weights.merge import merge_
from ffmerge.runtime_tests.rows import loss_rows
from ffmerge.tables import merge_table

MODELS: dict[str, Any] = {
    "bert": lambda: bert(32, 48, layers=4),
    "gpt2": lambda: gpt2(32, 48, layers=4),
    "llama": lambda: GATED["llama"](4),
    "phi3": lambda: GATED["phi3"](4),
}
# Biases and scales of its own, one bias for all, none.
CASES = [
    ("bert", "calibrated"), ("bert", "permute"), ("gpt2", "permute"), ("llama", "permute"),
    ("llama", "calibrated"), ("phi3", "calibrated"),
]  # fmt: skip


def _merged(name: str, method: str, first: int = 1, last: int = 3) -> tuple[Any, Any]:
    """Return a model of which layers share, and data."""
    torch.manual_seed(0)
    model = MODELS[name]()
    data = _data(model, rows=12)
    config = MergeConfig(method=method, window=(first, last), criterion="fidelity")
    merge_(model, data, config, data)
    return model, data


def _twice(name: str, method: str, width: int) -> tuple[Any, Any, Any, Any]:
    """Return a merged model, the same one narrowed, their sublayers and the data."""
    model, data = _merged(name, method)
    narrowed, _ = _merged(name, method)
    members = find(narrowed)
    found = narrow.fit(narrowed, members, dict.fromkeys(members, width), [data])
    ties.tie_(narrowed, [members], [found])
    return model, narrowed, members, data


class _Sums:
    """A ridge regression over several sets of rows, each centred for itself or all together."""

    def __init__(self, own_means: bool, centred: bool) -> None:
        self.own_means, self.centred = own_means, centred
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def solved(self, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return W and the bias of the first set of rows."""
        sets = self.rows
        if not self.own_means:
            parts = zip(*self.rows, strict=True)
            sets = [tuple(np.concatenate(each) for each in parts)]  # type: ignore[misc]
        gram, cross, means = np.zeros((len(old),) * 2), np.zeros_like(old), []
        for hidden, target, weights in sets:
            mean = np.average(hidden, 0, weights), np.average(target, 0, weights)
            means.append(mean)
            if self.centred:
                hidden, target = hidden - mean[0], target - mean[1]
            gram += hidden.T @ (weights[:, None] * hidden)
            cross += hidden.T @ (weights[:, None] * target)
        ridge = np.diag(narrow.RIDGE * gram.diagonal())
        weight = np.linalg.solve(gram + ridge, cross + ridge @ old)
        return weight, means[0][1] - means[0][0] @ weight


@pytest.mark.parametrize(("name", "method"), CASES)
def test_one_w_out_is_the_ridge_regression_of_all_members(name: str, method: str) -> None:
    """The first on what the narrowed model has there, later ones on what the merged model has."""
    model, narrowed, members, data = _twice(name, method, width=30)
    stream = {m: m.output.replace(*STREAMS[name]) for m in members}
    paths = [*stream.values(), *(member.output for member in members)]
    seen, was = _through(narrowed, data, paths), _through(model, data, paths)
    group = members[1:]
    kept = _kept(model, narrowed, group[0])
    old, old_bias = _w_out(model, group[0])
    shared_bias = method == "permute" and old_bias is not None
    sums = _Sums(own_means=not shared_bias, centred=old_bias is not None)
    wanted = {}
    for member in group:
        hidden, target = was[member.output][0][:, kept], was[member.output][1]
        weights = np.ones(len(hidden))
        if name == "bert":
            total = was[stream[member]][0] + was[member.output][1]
            weights = 1 / total.var(1, ddof=1)
        missing = was[stream[member]][0] - seen[stream[member]][0]
        wanted[member] = target + missing, weights
        if member == group[0]:
            hidden, target = seen[member.output][0], target + missing
        sums.rows.append((hidden, target, weights))
    expected, bias = sums.solved(old[kept])
    for member in group:
        new, new_bias = _w_out(narrowed, member)
        assert np.abs(new - expected).max() < 1e-3 * np.abs(expected).max()  # measured 2e-5
        assert _kept(model, narrowed, member) == kept
        if old_bias is None or new_bias is None:
            continue
        if not shared_bias:  # solved for at the turn of each
            target, weights = wanted[member]
            rest = target - seen[member.output][0] @ new
            bias = np.average(rest, 0, weights)
        assert np.abs(new_bias - bias).max() < 1e-5  # measured 3e-7


@pytest.mark.parametrize(("name", "method"), CASES)
def test_what_was_one_parameter_is_one_and_what_was_its_own_keeps_its_neurons(
    name: str, method: str
) -> None:
    model, narrowed, members, _ = _twice(name, method, width=30)
    assert ties.ties(narrowed) == ties.ties(model)
    kept = torch.tensor(_kept(model, narrowed, members[1]))
    for member in members[1:]:
        for weight in member.weights:
            if not weight.name.startswith(f"{member.output}."):
                was = weight.reordered(model.get_parameter(weight.name), kept)
                assert torch.equal(narrowed.get_parameter(weight.name), was)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_full_width_changes_nothing(name: str, method: str) -> None:
    model, narrowed, _, _ = _twice(name, method, width=48)
    before = model.state_dict()
    for key, value in narrowed.state_dict().items():
        assert (value - before[key]).abs().max() < 1e-6  # measured 1e-8


@pytest.mark.parametrize("method", ["permute", "calibrated"])
def test_what_a_width_costs_is_what_all_members_miss(method: str) -> None:
    """Against least squares of the members' rows without those neurons; the price counts once."""
    model, data = _merged("llama", method)
    members = find(model)
    first, group = narrow.forecast(model, members, [data])
    assert first == (members[0],) and group == tuple(members[1:])
    per_neuron = 3 * 32
    if method == "calibrated":
        per_neuron += 3 * 4  # gate and up have each a bias and a scale of their own
    assert widths.per_neuron(model, group) == per_neuron
    costs = narrow.forecast(model, members, [data])[group]
    was = _through(model, data, [member.output for member in group])
    old, bias = _w_out(model, group[0])
    rows = [was[member.output] for member in group]
    every = np.arange(48)

    def least(kept: Any) -> float:
        """Return the least error of these neurons, damped as all are."""
        sums = _Sums(own_means=True, centred=bias is not None)
        sums.rows = [(hidden, hidden @ old, np.ones(len(hidden))) for hidden, _ in rows]
        gram = np.zeros((48, 48))
        for hidden, _, _ in sums.rows:
            mean = hidden.mean(0) if sums.centred else 0
            gram += (hidden - mean).T @ (hidden - mean)
        damped = gram + np.diag(narrow.RIDGE * gram.diagonal())
        inside = damped[np.ix_(kept, kept)]
        right = damped[kept] @ old
        gain = (right * np.linalg.solve(inside, right)).sum()
        return float((old * (damped @ old)).sum() - gain)

    alone = [least(np.delete(every, one)) for one in every]
    positions = len(rows[0][0])
    assert costs[1] == pytest.approx(min(alone) / positions, rel=1e-3)  # measured 1.5e-5


@pytest.mark.parametrize(
    ("name", "method", "dtypes"),
    [
        ("bert", "calibrated", ("fp32",)),
        ("llama", "permute", ("fp32",)),
        pytest.param("llama", "calibrated", ("fp32", "int4"), marks=pytest.mark.slow),
        pytest.param("gpt2", "permute", ("int4",), marks=pytest.mark.slow),
    ],
)
def test_it_is_stored_once_loaded_as_it_was_and_exported(
    name: str, method: str, dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    model, data = _merged(name, method)
    before = ties.ties(model)
    size = sum(p.numel() for p in model.parameters())
    record = merge_(model, data, MergeConfig(method="narrow", budget="-10%"), data).record
    assert record.method == f"{method}, narrow"
    assert record.parameters_after == sum(p.numel() for p in model.parameters()) <= 0.9 * size
    assert record.groups[0].layers == (1, 2, 3) and len(record.narrowed[0].layers) == 4
    assert len(set(record.narrowed[0].widths[1:])) == 1
    checkpoint.save(model, tmp_path / "out")
    again = checkpoint.load(tmp_path / "out")
    assert ties.ties(again) == before
    assert torch.equal(_outputs(again, data), _outputs(model, data))
    checkpoint.save(again, tmp_path / "again")
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert stored < 4 * record.parameters_after + 20_000  # names and positions
    for dtype in dtypes:
        folder = tmp_path / dtype
        package = ffmerge.export(again, folder, ExportConfig(dtype=dtype), data=data)
        assert len(package.manifest.ties) >= len(before) - 1  # of a head and its table, too
        assert ffmerge.audit(folder).ok
        result = ffmerge.validate(folder)
        assert result.ok
        assert [row.stage for row in result.metrics][:2] == ["merged", "narrowed"]
        (lost,) = [row for row in loss_rows(result) if row.name == "Method loss"]
        assert "merged against narrowed" in lost.note
        assert "the original:" not in (folder / "report.html").read_text()


def test_an_encoder_and_its_decoder_share_apart_and_the_code_beside_them_loads_it(
    tmp_path: Path,
) -> None:
    model = t5(3, 3)
    data = _data(model)
    config = MergeConfig(method="permute", window=(1, 2), stacks=("encoder", "decoder"))
    merge_(model, data, config, data)
    stacks = ("encoder", "decoder")
    config = MergeConfig(method="narrow", budget="-5%", stacks=stacks, criterion="fidelity")
    record = merge_(model, data, config, data).record
    assert [(group.stack, group.layers) for group in record.groups] == [
        ("encoder", (1, 2)),
        ("decoder", (1, 2)),
    ]
    checkpoint.save(model, tmp_path / "out")
    kind = ffmerge.models.checkpoint.transformers.dynamic_module_utils
    other = kind.get_class_from_dynamic_module(
        "modeling_ffmerge.T5ForConditionalGeneration", str(tmp_path / "out")
    ).from_pretrained(tmp_path / "out")
    for loaded in (other.eval(), checkpoint.load(tmp_path / "out")):
        assert torch.equal(_outputs(loaded, data), _outputs(model, data))
        assert ties.ties(loaded) == ties.ties(model)


def test_expanded_it_is_a_plain_checkpoint_of_the_full_width(tmp_path: Path) -> None:
    """Scales multiplied out, neurons that are gone are 0."""
    model, data = _merged("bert", "calibrated")
    merge_(model, data, MergeConfig(method="narrow", budget="-10%"), data)
    checkpoint.save(model, tmp_path / "whole", expanded=True)
    whole = type(model).from_pretrained(tmp_path / "whole").eval()
    assert {member.d_ff for member in find(whole)} == {48} and len(ties.ties(whole)) <= 1
    assert (_outputs(whole, data) - _outputs(model, data)).abs().max() < 1e-5  # measured 5e-8


def test_it_says_what_shares_and_what_is_narrow() -> None:
    model, data = _merged("bert", "permute")
    merge = merge_(model, data, MergeConfig(method="narrow", budget="-10%"), data)
    title = str(merge_table(merge, Path("out")).renderables[0].title)
    assert "permute, narrow, layers 1-3 share; layers " in title and " of 48 neurons" in title
    text = merge_text(MergeRecord.from_json(model.config.ffmerge))
    assert "share one set of weights. Feed-forward sublayers are narrowed" in text
    before = merge.record.parameters_before
    assert f"% of {before:,} parameters of the merged model removed." in text
    assert "fidelity to the merged model on 12 " in text
    assert "1.0000 of the merged model before, " in text
    assert results(model, "feature-extraction") == {}  # fidelity to no original
    table = merge_table(merge, Path("out")).renderables[0]
    assert [str(column.header) for column in table.columns] == ["", "merged", "narrowed"]
    assert "layers 1+2+3 shared, layers narrowed" in repr(merge.record)


def test_what_shares_is_not_trained_and_that_is_said() -> None:
    model, data = _merged("llama", "permute", first=2)
    with pytest.warns(FfmergeWarning, match="other layers share its weights"):
        merge_(model, data, MergeConfig(method="narrow", budget="-5%", tune=2), data)


def test_what_it_refuses() -> None:
    model, data = _merged("bert", "residual")
    with pytest.raises(InputError, match="part of its own that is not narrowed"):
        merge_(model, data, MergeConfig(method="narrow", budget="-5%"), data)
    model, data = _merged("llama", "permute")
    with pytest.raises(InputError, match="merged already"):
        merge_(model, data, MergeConfig(method="permute", k=2), data)
    merge_(model, data, MergeConfig(method="narrow", budget="-5%"), data)
    with pytest.raises(InputError, match="merged already"):
        merge_(model, data, MergeConfig(method="narrow", budget="-5%"), data)


def test_weights_that_no_merge_has_tied_are_refused() -> None:
    """All of two layers, and one of a merged group that something else reads, too."""
    by_hand = GATED["llama"](4)
    first, second, *_ = find(by_hand)
    for one, other in zip(first.maps, second.maps, strict=True):
        by_hand.get_submodule(other).weight = by_hand.get_submodule(one).weight
    read_twice, _ = _merged("llama", "permute")
    weight = read_twice.get_submodule(find(read_twice)[1].maps[0]).weight
    read_twice.beside = torch.nn.Linear(*weight.shape[::-1], bias=False)
    read_twice.beside.weight = weight
    for model in (by_hand, read_twice):
        with pytest.raises(InputError, match="is shared with another layer already"):
            units.units_of(model, find(model))


def test_two_groups_with_a_weight_in_common_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cut for itself, they would no longer have it in common."""
    model = GATED["llama"](4)
    members = find(model)
    for one, other in ((0, 1), (2, 3)):
        for path, same in zip(members[one].maps, members[other].maps, strict=True):
            model.get_submodule(same).weight = model.get_submodule(path).weight
    groups = [SimpleNamespace(stack=members[0].stack, layers=pair) for pair in ((0, 1), (2, 3))]
    monkeypatch.setattr(units, "merge_record", lambda _: SimpleNamespace(groups=groups))
    assert {len(unit) for unit in units.units_of(model, members).values()} == {2}
    weight = model.get_submodule(members[0].output).weight
    for member in members:
        model.get_submodule(member.output).weight = weight
    with pytest.raises(InputError, match="is shared with another layer already"):
        units.units_of(model, members)


def test_what_can_go_counts_shared_neurons_once() -> None:
    model, _ = _merged("llama", "permute")
    member = find(model)[0]
    can_go = member.d_ff - widths.step_of(member)
    # two units: layer 0, and the other three; gate, up and down have d parameters for a neuron
    assert widths.most(model, find(model)) == 2 * can_go * 3 * member.d_model


def test_rivals_of_what_is_merged_are_refused_before_any_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = _merged("llama", "permute")
    monkeypatch.setattr(comparing, "choose", lambda *_: pytest.fail("one was tried"))
    with pytest.raises(InputError, match="merged already"):
        comparing.compare(model, data, None, CompareConfig(k=2, method="narrow"))


def test_the_commands_merge_and_then_narrow(tmp_path: Path, command: Any) -> None:
    """And what is refused is refused before anything is read."""
    model = GATED["llama"](4)
    model.save_pretrained(tmp_path / "model")
    ids = _data(model)["input_ids"]
    np.savez(tmp_path / "data.npz", input_ids=ids, labels=ids)
    data = ["--data", tmp_path / "data.npz"]
    shared, narrowed = tmp_path / "shared", tmp_path / "narrowed"
    assert command("merge", tmp_path / "model", shared, "--window", "1-2", *data)[0] == 0
    asked = ["--method", "narrow", "--budget", "-10%", *data]
    assert command("merge", shared, narrowed, *asked)[0] == 0
    assert len(ties.ties(checkpoint.load(narrowed))) == 3
    _, text, _ = command("inspect", shared)
    assert "method calibrated" in text and "or merge --method narrow, or export" in text
    there = [member.d_ff for member in find(checkpoint.load(narrowed))]
    _, text, _ = command("inspect", narrowed)
    assert min(there) < max(there) and f"{min(there)} to {max(there)}" in text
    assert "method calibrated, narrow" in text and "--data DATA, or export" in text
    told = json.loads(command("inspect", narrowed, "--json")[1])
    assert [each["d_ff"] for each in told["stacks"][0]["sublayers"]] == there
    for arguments in (
        ("merge", narrowed, tmp_path / "again", *asked),
        ("merge", shared, tmp_path / "again", "--k", 2, *data),
        ("compare", shared, "--method", "narrow", "--k", 2, *data),
    ):
        code, _, text = command(*arguments)
        assert code == 2 and "merged already" in text


def test_a_unit_counts_by_how_far_all_its_members_move_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = _merged("llama", "permute")
    members = find(model)
    moved = dict(zip(members, (5.0, 1.0, 2.0, 6.0), strict=True))
    monkeypatch.setattr(widths, "sensitivities", lambda *_: moved)
    asked: dict[Any, Any] = {}
    monkeypatch.setattr(widths, "cheapest", lambda _, costs, __: asked.update(costs))
    known: dict[Any, Any] = {}
    widths.chosen(model, members, 1, lambda: [data], lambda *_: None, known)
    plain = narrow.forecast(model, members, [data])
    for unit, weight in zip(plain, (5, 3), strict=True):
        assert np.allclose(asked[unit], weight * plain[unit])
    asked.clear()
    monkeypatch.setattr(narrow, "forecast", lambda *_: pytest.fail("it is known"))
    widths.chosen(model, members, 2, lambda: [data], lambda *_: None, known)
    assert asked.keys() == known.keys() == plain.keys()
