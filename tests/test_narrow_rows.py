"""Every architecture of docs/architectures.md is narrowed, and loaded as it was, or refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, model_of

from ffmerge.config import MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs, forward, main_output
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.merge import merge_

# One sublayer that runs for all layers; feed-forward layers that are mixtures of experts.
REFUSED = {"AlbertForMaskedLM": "is shared already", "MixtralForCausalLM": "mixture-of-experts"}


def _narrowed(case: tuple[Any, ...]) -> tuple[Any, Any, dict[str, Any]]:
    model = model_of(*case[:3])
    inputs = example_inputs(model)
    data = {name: tensor.numpy() for name, tensor in inputs.items()}
    found = stacks(find(model))
    several = tuple(found) if len(found) > 1 else ()
    config = MergeConfig(method="narrow", budget="-4%", stacks=several, criterion="fidelity")
    return model, merge_(model, data, config, data), data


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4]}")
def test_what_is_narrowed_comes_back_exact(case: tuple[Any, ...], tmp_path: Path) -> None:
    if case[0] in REFUSED:
        with pytest.raises(InputError, match=REFUSED[case[0]]):
            _narrowed(case)
        return
    model, merge, data = _narrowed(case)
    record = merge.record
    assert record.parameters_after <= 0.96 * record.parameters_before
    checkpoint.save(model, tmp_path / "narrow")
    again = checkpoint.load(tmp_path / "narrow")
    with torch.no_grad():
        one, other = (main_output(forward(each, data)) for each in (model, again))
    assert torch.equal(one, other)


def test_fidelity_is_of_what_is_foretold_and_not_of_the_loss() -> None:
    """A model that is told the future gives its loss first."""
    case = next(case for case in CASES if case[0] == "InformerForPrediction")
    model = model_of(*case[:3])
    data = {name: tensor.numpy() for name, tensor in example_inputs(model).items()}
    assert "future_values" in data
    score = score_for(model, "time-series-forecasting", from_arrays(data), 32)
    assert score.measure(model) == pytest.approx(1, abs=1e-6)  # measured 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = np.stack(forward(model, data)["params"], -1)
        for parameter in model.model.decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        after = np.stack(forward(model, data)["params"], -1)
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    right = ((before * after).sum(-1) / lengths).mean()
    assert right < 0.9999  # measured 0.99972
    assert score.measure(model) == pytest.approx(right, abs=1e-6)  # measured 0
