"""The graphs of a package: for each a PyTorch module, its inputs and its outputs by name.

Files, inputs and outputs have optimum's names. Shapes of keys, values and hidden states are read
from one run of the model, so nothing here knows an architecture.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ffmerge.errors import InputError
from ffmerge.models import kv_cache, tasks
from ffmerge.models.inputs import example_inputs, input_specs, probe
from ffmerge.models.kv_cache import DECODER, ENCODER, FLAG
from ffmerge.models.probe import InputSpec, Probe

# Batch, length and past of the steps that are compared: one token more, a prompt, several tokens
# more. The first is timed; the last is traced, so no size of it is 1 or like another.
_STEPS = ((1, 1, 6), (3, 7, 0), (2, 4, 3))

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """One graph of a package.

    ``module`` maps a dictionary of the probe's inputs to the ``outputs``, in order. With
    ``parts``, the graph is made of two others: the first step and the later ones.
    """

    name: str
    module: Any
    probe: Probe
    outputs: tuple[str, ...]
    parts: tuple[str, ...] = ()


def graphs(model: Any, task: str) -> tuple[Graph, ...]:
    """Return the graphs that serve ``model`` for ``task``, with or without a cache.

    Raises:
        InputError: the task has a cache, and the model keeps none of keys and values.
    """
    kind = tasks.base(task)
    if kind == "text-generation":
        return (_decoder_only(model, task),)
    if kind in tasks.GENERATE and model.config.is_encoder_decoder:
        return _encoder_decoder(model, task)
    outputs = tasks.OUTPUTS[kind]
    recipe = _two_batches(probe(model)) if kind.startswith("zero-shot") else probe(model)
    return (Graph("model", _Forward(model, outputs), recipe, outputs),)


class _Forward(nn.Module):
    """One forward pass of the whole model."""

    def __init__(self, model: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs
        accepted = inspect.signature(model.forward).parameters
        self.settings = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        out = self.model(**inputs, **self.settings, return_dict=True)
        return tuple(out[name] for name in self.outputs)


class _Step(nn.Module):
    """A step of a decoder-only model: prefill where the past is empty, else decoding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        own = {name: x for name, x in inputs.items() if not kv_cache.is_past(name)}
        cache = DynamicCache(kv_cache.pairs(inputs))
        out = self.model(**own, past_key_values=cache, use_cache=True, return_dict=True)
        return (out.logits, *_cached(out.past_key_values).values())


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return (self.model.get_encoder()(**inputs).last_hidden_state,)


class _Decoder(nn.Module):
    """A step of an encoder-decoder: the first, or with a past in its inputs a later one."""

    def __init__(self, model: Any, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        crossed = kv_cache.pairs(inputs, ENCODER)
        cache, states = None, inputs.get("encoder_hidden_states")
        if states is None:  # nothing is read of them but their shape
            cache = EncoderDecoderCache(
                DynamicCache(kv_cache.pairs(inputs, DECODER)), DynamicCache(crossed)
            )
            batch, _, length, _ = crossed[0][0].shape
            states = crossed[0][0].new_zeros(batch, length, 1)
        out = self.model(
            attention_mask=inputs.get("encoder_attention_mask"),
            decoder_input_ids=inputs["input_ids"],
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            past_key_values=cache, use_cache=len(self.outputs) > 1, return_dict=True,
        )  # fmt: skip
        named = {"logits": out.logits}
        if len(self.outputs) > 1:
            for name, tensor in _cached(out.past_key_values).items():
                named[kv_cache.present_of(name)] = tensor
        return tuple(named[name] for name in self.outputs)


class _Either(nn.Module):
    """The first step or a later one, as the flag says; a later one leaves the encoder's out."""

    def __init__(self, first: _Decoder, later: _Decoder, empty: Mapping[str, Any]) -> None:
        super().__init__()
        self.first, self.later, self.empty = first, later, empty

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        if not inputs[FLAG].item():
            return self.first({k: x for k, x in inputs.items() if not kv_cache.is_past(k)})
        rest = {k: x for k, x in inputs.items() if k != "encoder_hidden_states"}
        named = dict(zip(self.later.outputs, self.later(rest), strict=True))
        shapes = self.empty
        return tuple(
            named[name] if name in named else torch.zeros(shapes[name])
            for name in self.first.outputs
        )


def _decoder_only(model: Any, task: str) -> Graph:
    specs = input_specs(model)
    if "position_ids" in inspect.signature(model.forward).parameters:
        shape = ("batch_size", "sequence_length")
        specs = (*specs, InputSpec("position_ids", "int64", shape, "position"))
    if not task.endswith(tasks.PAST):
        recipe = replace(probe(model), inputs=specs)
        return Graph("model", _Forward(model, ("logits",)), recipe, ("logits",))
    total = ("batch_size", "total_sequence_length")
    specs = tuple(replace(s, shape=total) if s.kind == "mask" else s for s in specs)
    past = _past(_run(model), {"": "past_sequence_length"})
    cases = tuple(
        {"batch_size": b, "sequence_length": s, "past_sequence_length": p,
         "total_sequence_length": p + s} for b, s, p in _STEPS
    )  # fmt: skip
    outputs = ("logits", *(kv_cache.present_of(spec.name) for spec in past))
    return Graph("model", _Step(model), Probe((*specs, *past), cases), outputs)


def _encoder_decoder(model: Any, task: str) -> tuple[Graph, ...]:
    length = "encoder_sequence_length"
    specs = {
        s.name: replace(s, shape=_renamed(s.shape, {"sequence_length": length}))
        for s in input_specs(model)
    }
    ids = replace(specs.pop("decoder_input_ids"), name="input_ids")
    masks = [replace(s, name=f"encoder_{s.name}") for s in specs.values() if s.kind == "mask"]
    out = _run(model)
    width = int(out["encoder_last_hidden_state"].shape[-1])
    states = InputSpec("encoder_hidden_states", "float32", ("batch_size", length, width))
    cases = tuple(
        {"batch_size": b, length: s + 1, "decoder_sequence_length": s,
         "past_decoder_sequence_length": p + 2} for b, s, p in _STEPS
    )  # fmt: skip
    encoder = Graph(
        "encoder_model", _Encoder(model), Probe(tuple(specs.values()), cases),
        ("last_hidden_state",),
    )  # fmt: skip
    recipe = Probe((*masks, ids, states), cases)
    if not task.endswith(tasks.PAST):
        outputs: tuple[str, ...] = ("logits",)
        return encoder, Graph("decoder_model", _Decoder(model, outputs), recipe, outputs)
    lengths = {DECODER: "past_decoder_sequence_length", ENCODER: length}
    past = _past(out, lengths)
    outputs = ("logits", *(kv_cache.present_of(spec.name) for spec in past))
    later = tuple(name for name in outputs if kv_cache.side_of(name) != ENCODER)
    first = Graph("decoder_model", _Decoder(model, outputs), recipe, outputs)
    with_past = Graph(
        "decoder_with_past_model", _Decoder(model, later), Probe((*masks, ids, *past), cases), later
    )
    empty = {kv_cache.present_of(s.name): (0, s.shape[1], 1, s.shape[3]) for s in past}
    merged = Graph(
        "decoder_model_merged", _Either(first.module, with_past.module, empty),
        Probe(
            (*masks, ids, states, *past, InputSpec(FLAG, "bool", (1,), "flag")),
            tuple({**case, FLAG: flag} for case in cases for flag in (1, 0)),
        ),
        outputs, parts=(first.name, with_past.name),
    )  # fmt: skip
    return encoder, first, with_past, merged


def _two_batches(recipe: Probe) -> Probe:
    """Return the probe of a model that compares any number of images with any number of texts."""
    inputs = [
        replace(s, shape=_renamed(s.shape, {"batch_size": f"{kind}_batch_size"}))
        for s in recipe.inputs
        for kind in ("image" if s.name == "pixel_values" else "text",)
    ]
    cases = (
        {"image_batch_size": c["batch_size"], "text_batch_size": c["batch_size"] + 1,
         "sequence_length": c["sequence_length"]} for c in recipe.cases
    )  # fmt: skip
    return Probe(tuple(inputs), tuple(cases))


def _renamed(shape: Sequence[int | str], names: Mapping[str, str]) -> tuple[int | str, ...]:
    return tuple(names.get(d, d) if isinstance(d, str) else d for d in shape)


def _run(model: Any) -> Any:
    with torch.no_grad():
        out = model(**example_inputs(model), use_cache=True, return_dict=True)
    if not _cached(out.get("past_key_values")):
        raise InputError(
            f"{type(model).__name__} keeps no cache of keys and values: choose a task without "
            f"{tasks.PAST}."
        )
    return out


def _cached(cache: Any) -> dict[str, Tensor]:
    """Return the keys and values in a cache by the names of the inputs they are."""
    own = getattr(cache, "self_attention_cache", None)
    if own is None:
        return kv_cache.named({"": _of_layers(cache)})
    crossed = cache.cross_attention_cache
    return kv_cache.named({DECODER: _of_layers(own), ENCODER: _of_layers(crossed)})


def _of_layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in getattr(cache, "layers", ())]


def _past(out: Any, lengths: Mapping[str, int | str]) -> tuple[InputSpec, ...]:
    """Return the inputs for what a run left in its cache; ``lengths`` by side."""
    specs = []
    for name, tensor in _cached(out["past_key_values"]).items():
        length = lengths[kv_cache.side_of(name)]
        shape = ("batch_size", int(tensor.shape[1]), length, int(tensor.shape[3]))
        specs.append(InputSpec(name, "float32", shape))
    return tuple(specs)
