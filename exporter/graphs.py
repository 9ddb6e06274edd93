"""The graphs of a package: for each a PyTorch module, its inputs and its outputs by name.

``exporter/plan.py`` asks :func:`graphs` what to export of a model: one graph for most tasks, a
step with a cache for a decoder, and of an encoder and decoder an encoder, a first step, a later
one, and both steps in one. A graph's module takes a dictionary ``{input name: tensor}`` and gives a
tuple of tensors, which is what ``torch.export`` traces and what the package is compared with.

Files, inputs and outputs have optimum's names. Shapes of keys, values and hidden states are read
from one run of the model, so nothing here knows an architecture.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from ffmerge.errors import InputError, first_line
from ffmerge.exporter.positions import positions
from ffmerge.exporter.traceable import traceable
from ffmerge.models import kv_cache, tasks
from ffmerge.models.derive import input_specs, probe
from ffmerge.models.float64 import exactly
from ffmerge.models.inputs import example_inputs, refused, to_tensors
from ffmerge.models.kv_cache import DECODER, ENCODER, FLAG, KEPT
from ffmerge.models.probe import Array, InputSpec, Probe

STATES = "encoder_hidden_states"  # what a decoder reads of its encoder
_LENGTH = "encoder_sequence_length"
# Batch, length and past of the steps that are compared: one token more, a prompt, several tokens
# more. The first is timed; the last is traced, so no size of it is 1 or like another.
_STEPS = ((1, 1, 6), (3, 7, 0), (2, 4, 3))
CLOSE = 1e-3  # of the largest logit: how far a token may be apart with and without a cache

Inputs = Mapping[str, Tensor]
Outputs = tuple[Tensor, ...]


class GraphModule(nn.Module):
    """A transformers model, called as a graph is: all inputs by name, outputs in their order."""

    def __init__(self, model: Any, call: Callable[[Any, Inputs], Outputs]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Inputs) -> Outputs:
        """Return the outputs of the graph."""
        return self.call(self.model, inputs)


@dataclass(frozen=True)
class Answer:
    """What PyTorch gave for the inputs ``feeds``, by name; ``exact`` in float64."""

    feeds: Mapping[str, Array]
    exact: bool
    outputs: Mapping[str, Array]

    def is_to(self, feeds: Mapping[str, Array], exact: bool) -> bool:
        """Say whether it was for the same inputs, to the last bit."""
        if exact != self.exact or feeds.keys() != self.feeds.keys():
            return False
        for name, array in feeds.items():
            known = self.feeds[name]
            if array.dtype != known.dtype or not np.array_equal(array, known):
                return False
        return True


@dataclass(frozen=True)
class Graph:
    """One graph of a package.

    ``module`` maps a dictionary of the probe's inputs to the ``outputs``, in order. With
    ``parts``, the graph is made of two others: the first step and the later ones. What the later
    ones do not put out of its outputs has no elements then, and the shape that is in ``empty``.
    Of a graph of one size, outputs ``by_token`` have the tokens of a row as second dimension.
    ``answers`` are what PyTorch gave while the graph was planned, so that it need not again.
    """

    name: str
    module: Any
    probe: Probe
    outputs: tuple[str, ...]
    parts: tuple[str, ...] = ()
    empty: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    by_token: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()

    def knowing(
        self, feeds: Mapping[str, Array], given: Mapping[str, Any], exact: bool = False
    ) -> "Graph":
        """Return the graph with what PyTorch gave for inputs; all its outputs are among that."""
        outputs = {name: torch.as_tensor(given[name]).cpu().numpy() for name in self.outputs}
        return replace(self, answers=(*self.answers, Answer(feeds, exact, outputs)))

    def answer(self, feeds: Mapping[str, Array], exact: bool = False) -> Mapping[str, Array]:
        """Return what :meth:`run` does; where that is known, nothing is computed."""
        for answer in self.answers:
            if answer.is_to(feeds, exact):
                return answer.outputs
        return self.run(feeds, exact)

    def run(self, feeds: Mapping[str, Array], exact: bool = False) -> dict[str, Array]:
        """Return the outputs that PyTorch gives for the inputs ``feeds``; ``exact`` in float64."""
        module = self.module.eval()
        precision = exactly(module) if exact else nullcontext()
        with torch.no_grad(), precision:
            outputs = module(to_tensors(feeds, module))
        arrays = [tensor.cpu().numpy() for tensor in outputs]
        return dict(zip(self.outputs, arrays, strict=True))


def graphs(
    model: Any, task: str, specs: tuple[InputSpec, ...] | None = None, keeps: bool = False
) -> tuple[Graph, ...]:
    """Return the graphs that serve ``model`` for ``task``, with or without a cache.

    ``specs`` are the inputs of the model, by default those that its configuration tells. Where it
    ``keeps``, the graph of a decoder with a cache is told for how many tokens logits are wanted.

    Raises:
        InputError: the task has a cache, and the model keeps none of keys and values.
    """
    kind = tasks.base(task)
    specs = specs or input_specs(model)
    if kind == "text-generation":
        return (_decoder_only(model, task, specs, keeps),)
    if kind in tasks.GENERATE and model.config.is_encoder_decoder:
        return _encoder_decoder(model, task, specs)
    recipe = probe(model, specs)
    if kind.startswith("zero-shot"):
        recipe = _two_batches(recipe)
    drawn = recipe.draw(0)
    given = outputs_given(model, drawn)
    graph = _whole(model, recipe, tasks.outputs(task, list(given)))
    return (graph.knowing(drawn, given),)


def outputs_given(model: Any, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return the tensors that a model gives for its inputs, by name, in their order.

    Raises:
        InputError: it does not take these inputs.
    """
    try:
        with torch.no_grad():
            out = model(**to_tensors(feeds, model), **_settings(model), return_dict=True)
    except Exception as error:  # a model's code may raise anything
        raise InputError(refused(model, feeds, error)) from error
    return _named(out)


def _settings(model: Any) -> dict[str, bool]:
    """Return what a single pass is called with beside its inputs."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        return {"use_cache": False}
    return {}


def _named(out: Any) -> dict[str, Tensor]:
    """Return the tensors of an output by name, those in a tuple by number as well.

    Hidden states, attentions and the loss are no outputs: they are given to who asks for them.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in out.items():
        if isinstance(value, Tensor) and name != "loss":
            tensors[name] = value
        elif isinstance(value, tuple) and not name.endswith(("hidden_states", "attentions")):
            parts = {f"{name}.{i}": part for i, part in enumerate(value)}
            tensors |= {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    return tensors


def _whole(model: Any, recipe: Probe, outputs: tuple[str, ...]) -> Graph:
    """Return the graph of one forward pass of the whole model."""
    settings = _settings(model)

    def call(model: Any, inputs: Inputs) -> Outputs:
        with traceable():
            named = _named(model(**inputs, **settings, return_dict=True))
        return tuple(named[name] for name in outputs)

    return Graph("model", GraphModule(model, call), recipe, outputs)


def _decoder_only(model: Any, task: str, inputs: tuple[InputSpec, ...], keeps: bool) -> Graph:
    """Return the graph of a step: a prefill where the past is empty, else decoding."""
    specs = list(inputs)
    model.eval()  # as its graphs are run
    if "position_ids" in inspect.signature(model.forward).parameters:
        found = positions(model, specs)
        specs += [found] if found is not None else []
    if not task.endswith(tasks.PAST):
        return _whole(model, probe(model, tuple(specs)), ("logits",))
    for i, spec in enumerate(specs):
        if spec.kind == "mask":
            specs[i] = replace(spec, shape=("batch_size", "total_sequence_length"))
    past = _past(_example_outputs(model), {"": "past_sequence_length"})
    _check_goes_on(model, inputs)
    cases = []
    for batch, length, before in _STEPS:
        sizes = {"batch_size": batch, "sequence_length": length, "past_sequence_length": before}
        if keeps:  # those of a prompt's last token
            sizes[KEPT] = int(before == 0)
        cases.append({**sizes, "total_sequence_length": before + length})
    if keeps:
        specs.append(InputSpec(KEPT, "int64", (), "flag"))
    recipe = Probe((*specs, *past), tuple(cases))
    return Graph("model", GraphModule(model, _step), recipe, ("logits", *_presents(past)))


def _step(model: Any, inputs: Inputs) -> Outputs:
    given = {name: x for name, x in inputs.items() if not kv_cache.is_past(name)}
    kept = given.pop(KEPT, None)
    cache = DynamicCache(kv_cache.pairs(inputs))
    out = model(**given, past_key_values=cache, use_cache=True, return_dict=True)
    logits = out.logits
    if kept is not None and not torch.compiler.is_exporting():  # last_logits.py does it in a graph
        logits = logits[:, -int(kept) :]
    return (logits, *_cached(out.past_key_values).values())


def _encoder_decoder(model: Any, task: str, inputs: tuple[InputSpec, ...]) -> tuple[Graph, ...]:
    """Return the encoder and the decoder; with a cache its first step, the later ones, and both."""
    length = _LENGTH
    specs = {}
    for spec in inputs:
        specs[spec.name] = replace(spec, shape=_renamed(spec.shape, {"sequence_length": length}))
    ids = replace(specs.pop("decoder_input_ids"), name="input_ids")
    masks = []
    for spec in specs.values():
        if spec.kind == "mask":
            masks.append(replace(spec, name=f"encoder_{spec.name}"))
    cases: list[Mapping[str, int]] = []
    for batch, steps, before in _STEPS:
        sizes = {"batch_size": batch, length: steps + 1, "decoder_sequence_length": steps}
        cases.append({**sizes, "past_decoder_sequence_length": before + 2})
    cases = _with_sound(model, tuple(specs.values()), cases)
    out = _example_outputs(model)
    width = int(out["encoder_last_hidden_state"].shape[-1])
    states = InputSpec(STATES, "float32", ("batch_size", length, width))

    encoder = Graph(
        "encoder_model", GraphModule(model, _encode), Probe(tuple(specs.values()), tuple(cases)),
        ("last_hidden_state",),
    )  # fmt: skip
    recipe = Probe((*masks, ids, states), tuple(cases))
    if not task.endswith(tasks.PAST):
        module = GraphModule(model, partial(_decode, outputs=("logits",)))
        whole = Graph("decoder_model", module, recipe, ("logits",))
        _check_decodes(whole)
        return encoder, whole
    past = _past(out, {DECODER: "past_decoder_sequence_length", ENCODER: length})
    outputs = ("logits", *_presents(past))
    later = tuple(name for name in outputs if kv_cache.side_of(name) != ENCODER)
    first = Graph(
        "decoder_model", GraphModule(model, partial(_decode, outputs=outputs)), recipe, outputs
    )
    _check_decodes(first)
    with_past = Graph(
        "decoder_with_past_model", GraphModule(model, partial(_decode, outputs=later)),
        Probe((*masks, ids, *past), tuple(cases)), later,
    )  # fmt: skip
    return encoder, first, with_past, _both_steps(model, first, with_past)


def _check_decodes(decoder: Graph) -> None:
    """Raise InputError unless the states of its encoder are all that a decoder reads of it."""
    try:
        decoder.run(decoder.probe.draw(0))
    except Exception as error:  # a model's code may raise anything
        raise InputError(
            f"{type(decoder.module.model).__name__} does not write from the states of its encoder "
            f"alone, which is what a package hands on: {first_line(error)}."
        ) from error


def _with_sound(
    model: Any, inputs: tuple[InputSpec, ...], cases: Sequence[Mapping[str, int]]
) -> list[Mapping[str, int]]:
    """Return the cases with sound of some length, and the length that its encoder makes of it."""
    lengths = {"samples", "frames"} & {size for spec in inputs for size in spec.shape}
    if not lengths:
        return list(cases)
    found: list[Mapping[str, int]] = []
    for case in cases:
        sizes = {**case}
        for name in lengths:
            sizes[str(name)] = probe(model, inputs).cases[0][str(name)] + case[_LENGTH]
        drawn = Probe(inputs, (sizes,)).draw(0, batch=1)
        with torch.no_grad():
            (states,) = _encode(model, to_tensors(drawn, model))
        found.append({**sizes, _LENGTH: int(states.shape[1])})
    return found


def _encode(model: Any, inputs: Inputs) -> Outputs:
    return (model.get_encoder()(**inputs).last_hidden_state,)


def _decode(model: Any, inputs: Inputs, outputs: Sequence[str]) -> Outputs:
    """Run a step of an encoder-decoder: the first, or with a past in its inputs a later one."""
    crossed = kv_cache.pairs(inputs, ENCODER)
    cache, states = None, inputs.get(STATES)
    if states is None:  # nothing is read of them but their shape
        own = kv_cache.pairs(inputs, DECODER)
        cache = EncoderDecoderCache(DynamicCache(own), DynamicCache(crossed))
        batch, _, length, _ = crossed[0][0].shape
        states = crossed[0][0].new_zeros(batch, length, 1)
    keeps = kv_cache.keeps_cache(outputs)
    out = model(
        attention_mask=inputs.get("encoder_attention_mask"),
        decoder_input_ids=inputs["input_ids"],
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        past_key_values=cache, use_cache=keeps, return_dict=True,
    )  # fmt: skip
    named = {"logits": out.logits}
    if keeps:
        for name, tensor in _cached(out.past_key_values).items():
            named[kv_cache.present_of(name)] = tensor
    return tuple(named[name] for name in outputs)


def _both_steps(model: Any, first: Graph, later: Graph) -> Graph:
    """Return the graph that does what ``later`` does where the flag is set, else ``first``."""
    empty = {}
    for spec in later.probe.inputs:
        if kv_cache.is_past(spec.name):
            _, heads, _, size = spec.shape
            empty[kv_cache.present_of(spec.name)] = (0, int(heads), 1, int(size))

    def call(model: Any, inputs: Inputs) -> Outputs:
        if not inputs[FLAG].item():
            return first.module({k: x for k, x in inputs.items() if not kv_cache.is_past(k)})
        rest = {name: x for name, x in inputs.items() if name != STATES}
        named = dict(zip(later.outputs, later.module(rest), strict=True))
        for name in first.outputs:
            named.setdefault(name, torch.zeros(empty.get(name, 0)))
        return tuple(named[name] for name in first.outputs)

    past = [spec for spec in later.probe.inputs if kv_cache.is_past(spec.name)]
    cases = []
    for case in first.probe.cases:
        cases += [{**case, FLAG: 1}, {**case, FLAG: 0}]
    recipe = Probe(
        (*first.probe.inputs, *past, InputSpec(FLAG, "bool", (1,), "flag")), tuple(cases)
    )
    return Graph(
        "decoder_model_merged", GraphModule(model, call), recipe, first.outputs,
        (first.name, later.name), empty,
    )  # fmt: skip


def _two_batches(recipe: Probe) -> Probe:
    """Return the probe of a model that compares any number of images with any number of texts."""
    inputs = []
    for spec in recipe.inputs:
        batch = "text_batch_size"
        if spec.name == "pixel_values":
            batch = "image_batch_size"
        inputs.append(replace(spec, shape=_renamed(spec.shape, {"batch_size": batch})))
    cases = []
    for case in recipe.cases:
        images = case["batch_size"]
        sizes = {"image_batch_size": images, "text_batch_size": images + 1}
        cases.append({**sizes, "sequence_length": case["sequence_length"]})
    return Probe(tuple(inputs), tuple(cases))


def _renamed(shape: Sequence[int | str], names: Mapping[str, str]) -> tuple[int | str, ...]:
    return tuple(names.get(str(size), size) for size in shape)


def _example_outputs(model: Any) -> Any:
    """Run the model once, for the shapes of what it keeps."""
    inputs = example_inputs(model)
    try:
        with torch.no_grad():
            out = model(**inputs, use_cache=True, return_dict=True)
    except Exception as error:  # a model's code may raise anything
        raise InputError(refused(model, inputs, error)) from error
    if not _cached(out.get("past_key_values")):
        raise InputError(
            f"{type(model).__name__} keeps no cache of keys and values: choose a task without "
            f"{tasks.PAST}."
        )
    return out


def _check_goes_on(model: Any, inputs: Sequence[InputSpec]) -> None:
    """Raise InputError unless keys and values are all that a decoder needs of the tokens before.

    The last of a few tokens is computed behind a cache of nothing else, and with all at once.
    """
    specs = {spec.name: spec for spec in inputs}
    drawn = {name: x for name, x in example_inputs(model).items() if name in specs}
    first, last = dict(drawn), dict(drawn)
    for name, tensor in drawn.items():
        if "sequence_length" in specs[name].shape[1:2]:
            first[name], last[name] = tensor[:, :-1], tensor[:, -1:]
    try:
        with torch.no_grad():
            whole = model(**drawn, use_cache=False).logits[:, -1]
            cache = DynamicCache()  # of all tokens, where the model's own has those of its window
            model(**first, past_key_values=cache, use_cache=True)
            cache = DynamicCache(_of_layers(cache))
            behind = model(**last, past_key_values=cache, use_cache=True).logits[:, -1]
        goes_on = bool((behind - whole).abs().max() <= CLOSE * whole.abs().max())
    except Exception:  # a model's code may raise anything where a state is not there
        goes_on = False
    if not goes_on:
        raise InputError(
            f"{type(model).__name__} keeps more than keys and values of the tokens before: choose "
            f"a task without {tasks.PAST}."
        )


def _cached(cache: Any) -> dict[str, Tensor]:
    """Return the keys and values in a cache by the names of the inputs they are."""
    own = getattr(cache, "self_attention_cache", None)
    if own is None:
        return kv_cache.named({"": _of_layers(cache)})
    crossed = cache.cross_attention_cache
    return kv_cache.named({DECODER: _of_layers(own), ENCODER: _of_layers(crossed)})


def _of_layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of the layers up to the last that has its own; others read those."""
    found = []
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "keys", None) is not None:
            found.append((layer.keys, layer.values))
    return found


def _past(out: Any, lengths: Mapping[str, int | str]) -> tuple[InputSpec, ...]:
    """Return the inputs for what a run left in its cache; ``lengths`` by side."""
    specs = []
    for name, tensor in _cached(out["past_key_values"]).items():
        length = lengths[kv_cache.side_of(name)]
        shape = ("batch_size", int(tensor.shape[1]), length, int(tensor.shape[3]))
        specs.append(InputSpec(name, "float32", shape))
    return tuple(specs)


def _presents(past: Sequence[InputSpec]) -> tuple[str, ...]:
    return tuple(kv_cache.present_of(spec.name) for spec in past)
