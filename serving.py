"""A package as the Hugging Face class it came from: its forward pass runs on ONNX Runtime.

:func:`load_package` makes the class on the meta device, without weights, and replaces its
``forward``, and that of its encoder if it has one, by a run of a graph; ``generate``, configuration
and pipelines stay those of transformers. A step of a decoder turns the cache that transformers
hands it into inputs of the graph, by the names of ``models/kv_cache.py``, and its outputs into the
next cache.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.utils import ModelOutput

from ffmerge.models import checkpoint, kv_cache
from ffmerge.models.kv_cache import DECODER, ENCODER, FLAG, PRESENT
from ffmerge.models.manifest import GraphRecord, Manifest
from ffmerge.runtime_tests.runtimes.base import Session
from ffmerge.runtime_tests.runtimes.registry import find_runtime

Run = Callable[[Mapping[str, Any]], dict[str, Tensor]]  # of a graph: its outputs by name


def load_package(
    folder: str | Path, provider: str = "cpu", threads: int = 0, kind: str = "onnx"
) -> Any:
    """Return the package in ``folder`` as its Hugging Face class, running on ONNX Runtime.

    ``forward`` takes and gives CPU tensors and, without a cache, ``generate`` uses none.
    ``kind`` is "onnx", or that of a variant: "ort" or "prepacked". The files are checked first;
    no PyTorch weights are read or allocated.

    Raises:
        InputError: the package is not whole, or its class is not known.
        RuntimeCheckError: the provider was not used, or the model does not load.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    manifest.check_files(folder)
    model = checkpoint.without_weights(folder)
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
    if len(run) == 1:
        return _replace_forward(model, partial(_step, run[0]))
    encode, decode = run
    _replace_forward(model.get_encoder(), lambda given: _without_cache(encode(given)))
    return _replace_forward(model, partial(_encode_and_decode, model, decode))


def _runner(session: Session, graph: GraphRecord) -> Run:
    """Return what runs a graph; what it is not given is an empty past, or no padding."""

    def run(given: Mapping[str, Any]) -> dict[str, Tensor]:
        feeds = {}
        for name, x in given.items():
            if isinstance(x, Tensor):
                feeds[name] = x.detach().cpu().numpy()
        outputs = session.run(graph.outputs, graph.probe.complete(feeds))
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    return run


def _replace_forward(module: Any, run: Callable[[Mapping[str, Any]], ModelOutput]) -> Any:
    """Give a module of the meta device a ``forward`` that runs elsewhere; return the module.

    It takes what the class's own does and hands on by name what is not None. ``generate`` looks at
    its signature and at the device, so both are there.
    """
    original = type(module)
    signature = inspect.signature(original.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
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
    if present:
        outputs["past_key_values"] = DynamicCache(present)
    return _without_cache(outputs)


def _encode_and_decode(model: Any, decode: Run, given: Mapping[str, Any]) -> ModelOutput:
    """Run a step of an encoder-decoder; the encoder first if its outputs are not given."""
    states = given.get("encoder_outputs")
    if states is None:
        accepted = inspect.signature(model.get_encoder().forward).parameters
        states = model.get_encoder()(**{k: x for k, x in given.items() if k in accepted})
    cache = given.get("past_key_values")
    own = _layers_of(getattr(cache, "self_attention_cache", None))
    crossed = _layers_of(getattr(cache, "cross_attention_cache", None))
    whole = torch.ones(states[0].shape[:2], dtype=torch.int64)
    outputs: dict[str, Any] = decode(
        {
            "input_ids": given["decoder_input_ids"],
            "encoder_hidden_states": states[0],
            "encoder_attention_mask": given.get("attention_mask", whole),
            FLAG: torch.tensor([bool(own)]),
            **kv_cache.named({DECODER: own, ENCODER: crossed}),
        }
    )
    present = kv_cache.pairs(outputs, DECODER, PRESENT)
    if present:  # what a later step gives of the encoder's is empty
        kept = crossed or kv_cache.pairs(outputs, ENCODER, PRESENT)
        outputs["past_key_values"] = EncoderDecoderCache(DynamicCache(present), DynamicCache(kept))
    return _without_cache({**outputs, "encoder_last_hidden_state": states[0]})


def _without_cache(tensors: Mapping[str, Any]) -> ModelOutput:
    """Return the outputs of a graph that are one of the class, too."""
    out = ModelOutput()
    for name, tensor in tensors.items():
        if not kv_cache.is_present(name):
            out[name] = tensor
    return out


def _layers_of(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of every layer of a cache that holds any."""
    if cache is None or not cache.get_seq_length():
        return []
    return [(layer.keys, layer.values) for layer in cache.layers]
