"""A package as the Hugging Face class it came from: its forward pass runs on ONNX Runtime.

:func:`load_package` makes the class on the meta device, without weights, and replaces its
``forward``, and that of its encoder if it has one, by a run of a graph; ``generate``, configuration
and pipelines stay those of transformers. A step of a decoder turns the cache that transformers
hands it into inputs of the graph, by the names of ``models/kv_cache.py``, and its outputs into the
next cache.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.utils import ModelOutput

from ffmerge.errors import InputError, first_line
from ffmerge.models import call, checkpoint, finite, kv_cache
from ffmerge.models.inputs import StopForward
from ffmerge.models.kv_cache import DECODER, ENCODER, FLAG, KEPT, PRESENT
from ffmerge.models.manifest import GraphRecord, Manifest
from ffmerge.runtime_tests.fixed import run_rows, without_padding
from ffmerge.runtime_tests.runtimes.base import Session
from ffmerge.runtime_tests.runtimes.registry import find_runtime

STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"  # what a decoder reads
Run = Callable[[Mapping[str, Any]], dict[str, Tensor]]  # of a graph: its outputs by name
Call = Callable[[Mapping[str, Any]], Any]  # of a module: its arguments that are not None


def load_package(
    folder: str | Path,
    provider: str = "cpu",
    threads: int = 0,
    kind: str = "onnx",
    dtype: str | None = None,
    profile: str | None = None,
) -> Any:
    """Return the package in ``folder`` as its Hugging Face class, running on ONNX Runtime.

    ``forward`` takes and gives CPU tensors and, without a cache, ``generate`` uses none.
    ``kind`` is "onnx", or that of a variant: "ort" or "prepacked". Of a package in several
    precisions ``dtype`` is the one that is loaded, of one for several profiles ``profile``, by
    default the first. The files are checked first; no PyTorch weights are read or allocated.

    Raises:
        InputError: the package is not whole, has no such kind, precision or profile, or its class
            is not known.
        RuntimeCheckError: the provider was not used, or the model does not load.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    manifest = manifest.in_dtype(dtype).in_profile(profile)
    model = checkpoint.without_weights(folder)
    setattr(model, finite.PACKAGE, str(folder))
    runtime = find_runtime(provider)
    graphs = manifest.served(kind)
    run = [
        _runner(runtime.open(folder / path, threads=threads), graph)
        for path, graph in graphs.items()
    ]
    if model.can_generate():
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        last = list(graphs.values())[-1]
        model.generation_config.use_cache = kv_cache.keeps_cache(last.outputs)
    read = {spec.name for graph in graphs.values() for spec in graph.probe.inputs}
    if len(run) == 1:
        whole = partial(_step, run[0])
        return _replace_forward(model, _checked(model, whole, manifest.task, read, folder))
    encode, decode = run
    sizes = {spec.name: spec.shape[1:2] for spec in list(graphs.values())[-1].probe.inputs}
    sound = sizes.get(MASK, sizes[STATES]) != sizes[STATES]
    both = partial(_encode_and_decode, model, type(model).forward, decode, sound)
    _replace_forward(model.get_encoder(), lambda given: _without_cache(encode(given)))
    read |= {"decoder_input_ids", "encoder_outputs"}
    return _replace_forward(model, _checked(model, both, manifest.task, read, folder))


def _checked(model: Any, run: Call, task: str, read: Collection[str], folder: Path) -> Call:
    """Return the call that refuses what no graph reads, and gives the loss and the form asked for.

    ``read`` are the inputs of the graphs.
    """
    if any(kv_cache.is_past(name) for name in read):
        read = {*read, "past_key_values"}

    def called(given: Mapping[str, Any]) -> Any:
        call.check(model, given, read, folder.name)
        outputs = run(given)
        if any(name in given for name in call.LABELS):
            loss = call.loss(model, task, given, outputs)
            outputs = ModelOutput(loss=loss, **outputs)
        if given.get("logits_to_keep"):
            outputs["logits"] = outputs["logits"][:, -given["logits_to_keep"] :]
        if given.get("return_dict") is False:
            return outputs.to_tuple()
        return outputs

    return called


def _runner(session: Session, graph: GraphRecord) -> Run:
    """Return what runs a graph; what it is not given is an empty past, or no padding."""
    names = {spec.name for spec in graph.probe.inputs}

    def run(given: Mapping[str, Any]) -> dict[str, Tensor]:
        feeds = {}
        for name, x in given.items():
            if name in names and isinstance(x, Tensor):
                feeds[name] = x.detach().cpu().numpy()
        kept = given.get("logits_to_keep")
        if isinstance(kept, int) and KEPT in (*names, *graph.optional):
            feeds[KEPT] = np.array(kept)
        completed = {**feeds, **graph.probe.complete(feeds)}
        outputs = without_padding(graph, run_rows(graph, session, completed), feeds)
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    return run


def _replace_forward(module: Any, run: Call) -> Any:
    """Give a module of the meta device a ``forward`` that runs elsewhere; return the module.

    It takes what the class's own does and hands on by name what is not None. ``generate`` looks at
    its signature and at the device, so both are there.
    """
    original = type(module)
    signature = inspect.signature(original.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {**bound.pop("kwargs", {}), **bound}
        del given["self"]
        return run({name: x for name, x in given.items() if x is not None})

    forward.__signature__ = signature  # type: ignore[attr-defined]
    here = property(lambda self: torch.device("cpu"))
    names = {"forward": forward, "device": here, "__module__": original.__module__}
    module.__class__ = type(original.__name__, (original,), names)
    return module


def _step(run: Run, given: Mapping[str, Any]) -> ModelOutput:
    """Run the whole model, or a step of a decoder that continues the cache it is given."""
    past = kv_cache.named({"": _layers_of(given.get("past_key_values"))})
    outputs: dict[str, Any] = run({**given, **past})
    present = kv_cache.pairs(outputs, prefix=PRESENT)
    if present and _wants_cache(given):
        outputs["past_key_values"] = _cache(present)
    return _without_cache(outputs)


def _wants_cache(given: Mapping[str, Any]) -> bool:
    """Say whether a caller is given the cache: one who says not goes on with all ids, and none."""
    return given.get("use_cache") is not False


def _encode_and_decode(
    model: Any, forward: Callable[..., Any], decode: Run, sound: bool, given: Mapping[str, Any]
) -> ModelOutput:
    """Run a step of an encoder-decoder; the encoder first if its outputs are not given.

    ``forward`` is the one of the class. The mask of ``sound`` has a length of its own.

    Raises:
        InputError: that length is not known.
    """
    states = given.get("encoder_outputs")
    if sound and states is not None and not {"input_features", "attention_mask"} & set(given):
        raise InputError("beside encoder_outputs give attention_mask: how long the sound is.")
    if states is None:
        accepted = inspect.signature(model.get_encoder().forward).parameters
        states = model.get_encoder()(**{k: x for k, x in given.items() if k in accepted})
    ids = given.get("decoder_input_ids")
    if ids is None:
        ids = _decoder_ids(model, forward, {**given, "encoder_outputs": states})
    cache = given.get("past_key_values")
    own = _layers_of(getattr(cache, "self_attention_cache", None))
    crossed = _layers_of(getattr(cache, "cross_attention_cache", None))
    features = given.get("input_features", states[0])  # a mask of sound is of its own length
    whole = torch.ones(features.shape[:2], dtype=torch.int64)
    outputs: dict[str, Any] = decode(
        {
            "input_ids": ids,
            STATES: states[0],
            MASK: given.get("attention_mask", whole),
            FLAG: torch.tensor([bool(own)]),
            **kv_cache.named({DECODER: own, ENCODER: crossed}),
        }
    )
    present = kv_cache.pairs(outputs, DECODER, PRESENT)
    if present and _wants_cache(given):  # what a later step gives of the encoder's is empty
        kept = crossed or kv_cache.pairs(outputs, ENCODER, PRESENT)
        outputs["past_key_values"] = EncoderDecoderCache(_cache(present), _cache(kept))
    return _without_cache({**outputs, "encoder_last_hidden_state": states[0]})


def _decoder_ids(model: Any, forward: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
    """Return the ids that the class itself makes for its decoder, of labels or of the input.

    Its own code is run up to the decoder, which has no weights here.
    """
    caught: list[Tensor] = []

    def catch(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids is None:
            raise InputError("decoder_input_ids is not given, and the model reads it.")
        caught.append(ids)
        raise StopForward

    hook = model.get_decoder().register_forward_pre_hook(catch, with_kwargs=True)
    try:
        forward(model, **given)
    except StopForward:
        pass
    except ValueError as error:
        raise InputError(f"decoder_input_ids is not given: {first_line(error)}") from error
    finally:
        hook.remove()
    return caught[0]


def _without_cache(tensors: Mapping[str, Any]) -> ModelOutput:
    """Return the outputs of a graph that are one of the class, too."""
    named: dict[str, Any] = {}
    for name, tensor in tensors.items():
        whole, _, number = name.rpartition(".")
        if kv_cache.is_present(name):
            continue
        if number.isdigit():  # a part of a tuple
            named[whole] = (*named.get(whole, ()), tensor)
        else:
            named[name] = tensor
    return ModelOutput(**named)


def _cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a cache that holds keys and values; filled by its own code it would hold copies."""
    cache = DynamicCache()
    for key, value in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def _layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of every layer of a cache that holds any."""
    if cache is None or not cache.get_seq_length():
        return []
    return [(layer.keys, layer.values) for layer in cache.layers]
