"""What cannot be merged is said before work, and a merge that fails leaves nothing behind."""

from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, index_of, model_of
from drawn import labelled
from tiny import vit
from tiny_wider import seeded, t5

from ffmerge.config import MergeConfig
from ffmerge.errors import InputError
from ffmerge.models import ties
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs
from ffmerge.passes.weights import methods
from ffmerge.passes.weights.least_squares import Regression
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.search import Trials


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MergeConfig(window=(3, 6)), "out of range"),
        (MergeConfig(k=7), "k = 7"),
        (MergeConfig(k=1), "k = 1"),
        (MergeConfig(k=2, method="magic"), "no method"),
        (MergeConfig(k=2, stacks=("decoder",)), "no stack"),
        (MergeConfig(window={"layers": (1, 2)}, stacks=("layers", "decoder")), "for each of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: MergeConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_(vit(), labelled(vit()), config)


def test_data_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(InputError, match="does not take this data"):
        merge_(vit(), {"pixel_values": np.zeros((4, 3, 8, 8), np.float32)}, MergeConfig(k=2))


def _hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("method", ["permute", "calibrated"])
@pytest.mark.parametrize("fails", ["rows", "statistics", "fit", "measuring"])
def test_a_merge_that_fails_leaves_the_model_as_it_was(
    fails: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook, no tie, no other class: the next forward pass gives what it gave."""
    model, data = vit(), labelled(vit())
    before = model(torch.from_numpy(data["pixel_values"])).logits
    classes = [type(module) for module in model.modules()]
    given: Any = data

    def fail(*_: Any, **__: Any) -> Any:
        raise InputError("stopped")

    def progress(step: str, done: int, total: int) -> None:
        if fails == "statistics" and step.startswith("statistics"):
            fail()

    if fails == "rows":
        given = {"pixel_values": np.zeros((4, 3, 8, 8), np.float32)}
    elif fails == "fit":
        monkeypatch.setattr(Regression, "update", fail)
        monkeypatch.setattr(methods, "mean_of", fail)
    elif fails == "measuring":
        monkeypatch.setattr(Trials, "rank", fail)
    with pytest.raises(InputError) as caught:  # its traceback holds all frames
        merge_(model, given, MergeConfig(k=2, method=method), data, progress=progress)
    assert _hooks(model) == 0
    assert [type(module) for module in model.modules()] == classes
    assert not ties.ties(model)
    assert torch.equal(model(torch.from_numpy(data["pixel_values"])).logits, before)
    assert caught.value.args


def test_a_merged_model_is_not_merged_again() -> None:
    model = vit()
    merge_(model, labelled(model), MergeConfig(k=2))
    with pytest.raises(InputError, match="merged already"):
        merge_(model, labelled(model), MergeConfig(k=2))


class _InPlace(torch.nn.Module):
    """Elementwise to the eye: the second factor of the product in place is not followed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).mul_(torch.arange(x.shape[-1], device=x.device))


def test_what_the_proof_rejects_is_left_out_of_every_window() -> None:
    model = vit()
    model.vit.layers[2].mlp.activation_fn = _InPlace()
    assert len(find(model)) == 6
    result = merge_(model, labelled(model), MergeConfig(k=3, method="average"))
    tried = [c.groups[0].layers for c in result.candidates]
    assert tried == [(0, 1, 3), (1, 3, 4), (3, 4, 5)]
    for sublayer in model.vit.layers:
        sublayer.mlp.activation_fn = _InPlace()
    with pytest.raises(InputError, match="merged already"):
        merge_(model, labelled(model), MergeConfig(k=2))


_PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 60,
    "num_attention_heads": 4,
}  # fmt: skip
_STAGES = {
    "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "image_size": 32,
    "num_attention_heads": [1, 1, 2, 2],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "config", "settings", "message"),
    [
        ("MixtralForCausalLM", "MixtralConfig",
         {**_PLAIN, "num_local_experts": 2, "num_key_value_heads": 4}, "mixture-of-experts"),
        ("AlbertForMaskedLM", "AlbertConfig", {**_PLAIN, "embedding_size": 8},
         "shared already.* 3 times"),
        ("MambaForCausalLM", "MambaConfig",
         {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4},
         "no feed-forward sublayer"),
        ("SegformerForImageClassification", "SegformerConfig", _STAGES, "depthwise_convolution"),
    ],
)  # fmt: skip
def test_what_holds_nothing_to_merge_says_why(model, config, settings, message: str) -> None:
    made = seeded(model, config, **settings)
    before = {name: id(p) for name, p in made.named_parameters()}
    with pytest.raises(InputError, match=message) as caught:
        merge_(made, None, MergeConfig(k=2, method="average"))
    assert len(str(caught.value).splitlines()) == 1
    assert {name: id(p) for name, p in made.named_parameters()} == before


def test_data_with_nothing_to_write_is_told_so() -> None:
    """What the model says of it names arguments that nobody gave."""
    ids = np.random.default_rng(0).integers(3, 60, (4, 6))
    with pytest.raises(InputError, match=r"has none for it to write \(--target-column\)"):
        merge_(t5(), {"input_ids": ids}, MergeConfig(k=2))


def test_layers_of_unlike_length_are_told_apart() -> None:
    """A convolution between Informer's layers halves what the later ones run over."""
    model = model_of(*CASES[index_of("InformerForPrediction")][:3])
    drawn = example_inputs(model)
    data = {name: array.repeat(4, *[1] * (array.ndim - 1)) for name, array in drawn.items()}
    config = MergeConfig(k=2, stacks=("encoder",))
    with pytest.raises(InputError, match=r"layer 0 of 'encoder' runs over 8 .* layer 1 over 4"):
        merge_(model, data, config)
