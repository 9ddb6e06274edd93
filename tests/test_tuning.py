"""Narrowed sublayers that are trained alone: nearer to the original, and told as what they are."""

from typing import Any

import numpy as np
import pytest
import torch
from test_narrow import MODELS, _data, _outputs
from tiny import gpt2

from ffmerge.config import MergeConfig
from ffmerge.errors import FfmergeWarning, InputError
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.passes.weights import narrow
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.methods import in_place
from ffmerge.passes.weights.tuning import as_function

STEPS = 40


@pytest.mark.parametrize("name", MODELS)
def test_each_sublayer_is_nearer_to_what_it_should_put_out(name: str) -> None:
    model = MODELS[name]()
    data, members = _data(model, rows=64), find(model)
    batches = [{key: array[at : at + 16] for key, array in data.items()} for at in range(0, 64, 16)]
    plan = dict.fromkeys(members, 24)
    expected, error = _outputs(model, data), []
    for steps in (0, STEPS):
        weights = narrow.fit(model, members, plan, batches, steps=steps)
        with in_place(model, {tuple(members): weights}):
            error.append(float((_outputs(model, data) - expected).square().mean()))
    assert error[1] < 0.9 * error[0]  # 0.56 (bert) to 0.81 (gpt2)


@pytest.mark.parametrize("name", MODELS)
def test_a_sublayer_is_the_function_that_the_model_computes(name: str) -> None:
    model = MODELS[name]()
    for member in find(model):
        seen: dict[str, torch.Tensor] = {}
        hooks = []
        for path in (member.inputs[0], member.output):
            module = model.get_submodule(path)
            hooks.append(module.register_forward_hook(_keep(seen, path)))
        _outputs(model, _data(model))
        for hook in hooks:
            hook.remove()
        own = {}
        for key, weight in zip(member.keys, member.weights, strict=True):
            own[key] = model.get_parameter(weight.name).detach()
        read, hidden = seen[member.inputs[0]], seen[member.output]
        function = as_function(member, own, read, hidden)
        assert function is not None
        with torch.no_grad():
            out = model.get_submodule(member.output)(hidden)
        assert torch.allclose(function(own, read), out, rtol=1e-4, atol=1e-5)  # measured 0
        assert as_function(member, own, read, hidden.sin()) is None


class Sine(torch.nn.Module):
    """No activation of transformers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


def _keep(seen: dict[str, torch.Tensor], path: str) -> Any:
    def hook(_: Any, args: tuple[torch.Tensor, ...], out: Any) -> None:
        seen[path] = args[0].detach()

    return hook


def test_a_function_that_is_not_known_leaves_the_closed_form(monkeypatch: Any) -> None:
    model = MODELS["bert"]()
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = Sine()
    members, batches = find(model), [_data(model)]
    plan = dict.fromkeys(members, 24)
    closed = narrow.fit(model, members, plan, batches)
    with pytest.warns(FfmergeWarning, match="layer 0 of .* is not trained"):
        tuned = narrow.fit(model, members, plan, batches, steps=3)
    for one, other in zip(closed.own, tuned.own, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_budget_is_met_and_the_trained_one_is_taken_if_it_is_better() -> None:
    rows = from_arrays({"input_ids": np.random.default_rng(0).integers(3, 61, (48, 12))})
    merge = merge_(
        gpt2(32, 128, layers=2), rows,
        MergeConfig(method="narrow", budget="-15%", tune=STEPS, criterion="fidelity"),
    )  # fmt: skip
    *closed, tuned = merge.candidates
    assert tuned.bytes in {each.bytes for each in closed}
    assert tuned.value > max(each.value for each in closed)
    assert merge.record.metric["merged"] == tuned.value


@pytest.mark.parametrize(
    "asked",
    [{"tune": -1, "budget": "-10%"}, {"tune": 5, "k": 2}, {"tune": 5, "method": "calibrated"}],
)
def test_what_is_not_trained_alone(asked: dict[str, Any]) -> None:
    settings = {"method": "narrow", **asked}
    if "k" not in settings:
        settings["budget"] = "-10%"
    with pytest.raises(InputError, match="tune is a number of steps"):
        MergeConfig(**settings)
