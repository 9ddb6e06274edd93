"""A package as the Hugging Face class it came from: its forward pass runs on ONNX Runtime.

The class is made on the meta device, without weights, and keeps everything but ``forward``:
``generate``, configuration and pipelines are those of transformers.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
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
    served = [
        _Served(runtime.open(folder / path, threads=threads), graph)
        for path, graph in manifest.served(kind).items()
    ]
    cached = any(kv_cache.keeps_cache(each.graph.outputs) for each in served)
    if model.can_generate():
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        model.generation_config.use_cache = cached
    if len(served) == 1:
        return _swap(model, lambda given: _step(served[0], given))
    encoder, decoder = served
    _swap(model.get_encoder(), lambda given: _outputs(encoder.run(given)))
    return _swap(model, lambda given: _encode_and_decode(model, decoder, given))


@dataclass(frozen=True)
class _Served:
    session: Session
    graph: GraphRecord

    def run(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return all outputs; an input that is not given is that of an empty past or no padding."""
        feeds = {
            name: x.detach().cpu().numpy() for name, x in given.items() if isinstance(x, Tensor)
        }
        outputs = self.session.run(self.graph.outputs, self.graph.probe.complete(feeds))
        return {name: torch.from_numpy(array) for name, array in outputs.items()}


def _swap(module: Any, run: Any) -> Any:
    """Give a module of the meta device a ``forward`` that runs elsewhere; return the module."""
    original = type(module)
    signature = inspect.signature(original.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        given = {**bound, **bound.pop("kwargs", {})}
        return run({name: x for name, x in given.items() if x is not None})

    forward.__signature__ = signature  # type: ignore[attr-defined]  # generate looks at it
    here = property(lambda self: torch.device("cpu"))
    names = {"forward": forward, "device": here, "__module__": original.__module__}
    module.__class__ = type(original.__name__, (original,), names)
    return module


def _step(served: _Served, given: Mapping[str, Any]) -> ModelOutput:
    """Run the whole model, or a step of a decoder that continues the cache it is given."""
    cache = given.get("past_key_values")
    outputs = served.run({**given, **kv_cache.named({"": _layers_of(cache)})})
    present = kv_cache.pairs(outputs, prefix=PRESENT)
    if present:
        outputs["past_key_values"] = DynamicCache(present)
    return _outputs(outputs)


def _encode_and_decode(model: Any, decoder: _Served, given: Mapping[str, Any]) -> ModelOutput:
    """Run a step of an encoder-decoder; the encoder first if its outputs are not given."""
    states = given.get("encoder_outputs")
    if states is None:
        accepted = inspect.signature(model.get_encoder().forward).parameters
        states = model.get_encoder()(**{k: x for k, x in given.items() if k in accepted})
    cache = given.get("past_key_values")
    own = _layers_of(getattr(cache, "self_attention_cache", None))
    crossed = _layers_of(getattr(cache, "cross_attention_cache", None))
    whole = torch.ones(states[0].shape[:2], dtype=torch.int64)
    outputs = decoder.run(
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
    return _outputs({**outputs, "encoder_last_hidden_state": states[0]})


def _outputs(tensors: Mapping[str, Any]) -> ModelOutput:
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
