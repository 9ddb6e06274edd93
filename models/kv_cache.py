"""Names of a decoder's cache of keys and values, as optimum has them.

A decoder's graph takes what it kept as ``past_key_values.LAYER.key`` and ``.value`` and gives what
to keep as ``present.LAYER.key`` and ``.value``, each of shape (batch, heads, length, size). The
decoder of a pair keeps two caches, its own and that of the encoder's output, which its first step
makes once: there a name has a side, ``present.LAYER.decoder.key``. A merged decoder is both steps
in one graph, and takes the flag: true where there is a past. A decoder alone may take for how many
tokens logits are wanted, by the name that transformers.js has for that.

The exporter names the graphs' inputs and outputs so; serving and the runtime tests hand a step's
outputs to the next one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

PAST, PRESENT = "past_key_values.", "present."
DECODER, ENCODER = "decoder.", "encoder."  # the sides of a pair; a decoder alone has none
FLAG = "use_cache_branch"
KEPT = "num_logits_to_keep"  # how many of the last tokens have logits; 0: all

T = TypeVar("T")


def is_past(name: str) -> bool:
    """Say whether an input of this name is a part of the cache."""
    return name.startswith(PAST)


def is_present(name: str) -> bool:
    """Say whether an output of this name is a part of the cache."""
    return name.startswith(PRESENT)


def side_of(name: str) -> str:
    """Return the side that a part of the cache is of."""
    parts = name.split(".")
    return f"{parts[2]}." if len(parts) > 3 else ""


def past_of(present: str) -> str:
    """Return the input by which the next step reads the output ``present``."""
    return PAST + present.removeprefix(PRESENT)


def present_of(past: str) -> str:
    """Return the output that the input ``past`` grows into."""
    return PRESENT + past.removeprefix(PAST)


def keeps_cache(outputs: Iterable[str]) -> bool:
    """Say whether a graph with these outputs keeps a cache."""
    return any(is_present(name) for name in outputs)


def named(caches: Mapping[str, Sequence[tuple[T, T]]]) -> dict[str, T]:
    """Return keys and values by the names of the inputs they are, layer by layer.

    ``caches`` has the pairs of all layers by side; that of a decoder alone is "".
    """
    tensors: dict[str, T] = {}
    for layer in range(max(map(len, caches.values()))):
        for side, pairs in caches.items():
            if pairs:
                key, value = pairs[layer]
                tensors |= {f"{PAST}{layer}.{side}key": key, f"{PAST}{layer}.{side}value": value}
    return tensors


def pairs(tensors: Mapping[str, T], side: str = "", prefix: str = PAST) -> list[tuple[T, T]]:
    """Return keys and values of the layers, in order, that are among inputs or outputs."""
    found: list[tuple[T, T]] = []
    while (key := f"{prefix}{len(found)}.{side}key") in tensors:
        found.append((tensors[key], tensors[f"{prefix}{len(found)}.{side}value"]))
    return found
