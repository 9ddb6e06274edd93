"""Fixed inputs on which a model and its package are compared: drawn from a seed, and real ones.

The exporter makes a :class:`Probe` for each graph, from the model's configuration
(``models/inputs.py``), and stores it in the manifest, with the outputs that PyTorch gave. On a
device without PyTorch or the data the runtime tests read it, get the same inputs from it as arrays,
and compare. Of large outputs only a sample is stored: :func:`stored_elements`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ffmerge.errors import InputError
from ffmerge.models import kv_cache

Array = npt.NDArray[Any]

# At most this many elements of all outputs are stored per case (a language model at batch 8
# would otherwise add 16 MB of logits to the package, and as much for its cache).
STORED = 1 << 16
# Of logits whole positions are stored, so that there is a first class and a distribution: at
# least this many of a drawn and of a real case.
POSITIONS, REAL_POSITIONS = 2, 16
LARGE = 1 << 16  # values of a row, as a picture of 148 x 148 has: few rows are drawn and computed
BEST = 64  # classes that are kept of every position of a real case, where not all positions are
# kinds of an input that counts tokens: all, those that the mask shows, those that are no padding
ALL, SHOWN, TOLD = "position", "shown position", "told position"
_COARSE = 4  # random points along each side of a drawn picture


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer makes of text: rows of ids that are not ``special``, padded with ``pad``.

    ``first`` and ``last`` are what it puts before and behind a text.
    """

    special: tuple[int, ...] = ()
    pad: int = 0
    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """One model input; ``shape`` mixes numbers and the names of dynamic dimensions.

    ``kind`` says what it is drawn from: "normal" is N(0, 1), "integer" are numbers below
    ``high``, as ``tokens`` if given, "mask" is ones with padding at the end of some rows,
    "position" counts on from the length of the past, "shown position" the tokens that the mask
    shows, "told position" those whose id is not that of ``tokens`` for padding, "flag" is the size
    of that name, "picture" is a smooth picture in 0..1, normalized by the ``colours``: mean and
    deviation by channel, "boxes" are corners in order, left, top, right, bottom, below ``high``. An
    input that is ``needed`` has to be given; for another there is what PyTorch takes for none, and
    of a mask with ``tokens`` that is every id but the padding.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: str = "normal"
    high: int = 0
    tokens: Tokens | None = None
    colours: tuple[tuple[float, float], ...] = ()
    needed: bool = False


@dataclass(frozen=True)
class Probe:
    """The recipe: inputs, the sizes of the dynamic dimensions of each case, and the seed.

    Behind the ``cases`` that are drawn come as many ``real`` ones, whose inputs the package has.
    They come with data, or are ``made``: an example of ours as the checkpoint's processor has it.
    ``fixed`` are the sizes of a graph that takes no others, by dimension: rows one by one.
    """

    inputs: tuple[InputSpec, ...]
    cases: tuple[Mapping[str, int], ...]
    seed: int = 0
    real: int = 0
    made: bool = False
    fixed: Mapping[str, int] = field(default_factory=dict)

    def feeds(self, case: int, stored: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs of one case; those of a real one are completed from ``stored``."""
        if case < len(self.cases):
            return self.draw(case)
        return self.complete(stored)

    def draw(self, case: int, batch: int | None = None) -> dict[str, Array]:
        """Return the inputs of one case; the same values on every machine.

        With ``batch``, every dimension that ends in ``batch_size`` is that.
        """
        generator = np.random.Generator(np.random.PCG64([self.seed, case]))
        sizes = dict(self.cases[case])
        for name in sizes:
            if batch and name.endswith("batch_size"):
                sizes[name] = batch
        has_past = self._has_past(sizes)
        return {spec.name: _draw(spec, sizes, has_past, generator) for spec in self.inputs}

    @property
    def cache(self) -> str:
        """The type of the keys and values that are taken, float32 if none are."""
        kept = {spec.dtype for spec in self.inputs if kv_cache.is_past(spec.name)}
        return next(iter(kept), "float32")

    def with_cache(self, dtype: str) -> "Probe":
        """Return the recipe with keys and values of another type."""
        inputs = []
        for spec in self.inputs:
            if kv_cache.is_past(spec.name):
                spec = replace(spec, dtype=dtype)
            inputs.append(spec)
        return replace(self, inputs=tuple(inputs))

    def _has_past(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether an input is a cache that is not empty in a case of these sizes."""
        for spec in self.inputs:
            for dimension in spec.shape:
                if str(dimension).startswith("past_") and sizes[str(dimension)]:
                    return True
        return False

    def complete(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Return the inputs for a batch of data; what it lacks is no padding and an empty past.

        Positions go on from the past, as they do in PyTorch where they are not given; other numbers
        are 0, where PyTorch takes that for none. Rows are padded to the sizes that are ``fixed``.

        Raises:
            InputError: the batch lacks what nothing stands in for, or has other sizes than fixed.
        """
        sizes = self.sizes_of(batch)
        inputs = {}
        for spec in self.inputs:
            if spec.name in batch:
                array = batch[spec.name]
            elif spec.needed:
                raise InputError(f"{spec.name} is not given, and the model reads it.")
            else:
                array = _stand_in(spec, batch, sizes)
            inputs[spec.name] = np.asarray(array, spec.dtype)
        if self.fixed:
            self._check_agree(inputs, sizes)
            return {spec.name: self._padded(spec, inputs[spec.name]) for spec in self.inputs}
        return inputs

    def runs(self, feeds: Mapping[str, Array]) -> list[dict[str, Array]]:
        """Return complete inputs as a graph takes them: all rows at once, or one by one."""
        if not self.fixed:
            return [dict(feeds)]
        rows = len(next(iter(feeds.values())))
        return [{name: x[i : i + 1] for name, x in feeds.items()} for i in range(rows)]

    def _check_agree(self, inputs: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
        """Raise InputError where two inputs differ in a size, which padding would hide."""
        for spec in self.inputs:
            shape = inputs[spec.name].shape
            sides = zip(spec.shape, shape, strict=False)
            agreed = tuple(sizes.get(str(side), size) for side, size in sides)
            if shape[: len(agreed)] != agreed:
                raise InputError(
                    f"{spec.name} is {_times(shape)}, and by the other inputs {_times(agreed)}."
                )

    def _padded(self, spec: InputSpec, array: Array) -> Array:
        """Return an input of the fixed sizes: what is missing of each row is padding behind it."""
        given, wanted = array.shape[1:], self._row(spec)
        if given == wanted:
            return array
        told = f"{spec.name} is {_times(given)} a row, and the package takes {_times(wanted)}"
        if len(given) != len(wanted):
            raise InputError(f"{told}.")
        for side, size, full in zip(spec.shape[1:], given, wanted, strict=True):
            if size == full or (size < full and self._is_masked(side)):
                continue
            if spec.kind == "picture":
                raise InputError(f"{told}: resize pictures to that, or export it for others.")
            if size > full:
                raise InputError(f"{told}: cut longer rows, or export it for others.")
            raise InputError(f"{told}: it reads no mask that could tell padding.")
        pad = 0
        if spec.kind == "integer" and spec.tokens:
            pad = spec.tokens.pad
        behind = np.subtract(wanted, given)
        return np.pad(array, [(0, 0), *((0, more) for more in behind)], constant_values=pad)

    def _is_masked(self, side: int | str) -> bool:
        """Say whether a mask tells what along a side is padding."""
        return any(spec.kind == "mask" and side in spec.shape for spec in self.inputs)

    def _row(self, spec: InputSpec) -> tuple[int, ...]:
        """Return the fixed sizes of a row of an input."""
        return tuple(int(self.fixed.get(str(side), side)) for side in spec.shape[1:])

    def sizes_of(self, batch: Mapping[str, Array]) -> dict[str, int]:
        """Return the sizes of the dynamic dimensions that the arrays of a batch have."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.name in batch:
                for dimension, size in zip(spec.shape, np.shape(batch[spec.name]), strict=False):
                    if isinstance(dimension, str):
                        sizes.setdefault(dimension, size)
        past = sizes.setdefault("past_sequence_length", 0)
        sizes.setdefault("total_sequence_length", past + sizes.get("sequence_length", 0))
        return sizes


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) or "one number"


def _stand_in(spec: InputSpec, batch: Mapping[str, Array], sizes: Mapping[str, int]) -> Array:
    """Return what stands for an input that is not given; a size that is not known is 0."""
    if spec.kind == "mask" and spec.tokens and "input_ids" in batch:
        return np.asarray(batch["input_ids"] != spec.tokens.pad)
    shape = tuple(sizes.get(d, 0) if isinstance(d, str) else d for d in spec.shape)
    if spec.kind == "mask":
        return np.ones(shape)
    if spec.kind in (ALL, SHOWN, TOLD):
        return _counted(spec, batch, sizes["past_sequence_length"], shape)
    return np.zeros(shape)


def _counted(spec: InputSpec, batch: Mapping[str, Array], past: int, shape: Sequence[int]) -> Array:
    """Return the positions of tokens behind a past, counted as the kind of the input says."""
    if spec.kind == SHOWN and "attention_mask" in batch:
        count = np.cumsum(batch["attention_mask"], 1) - 1
        return np.maximum(count[:, past:], 0)
    if spec.kind == TOLD and spec.tokens and "input_ids" in batch:
        text = np.asarray(batch["input_ids"] != spec.tokens.pad)
        return (np.cumsum(text, 1) + past) * text + spec.tokens.pad
    return np.broadcast_to(np.arange(past, past + shape[1]), shape)


def _draw(
    spec: InputSpec, sizes: Mapping[str, int], has_past: bool, generator: np.random.Generator
) -> Array:
    """Return values of an input of the ``sizes``, as its kind says."""
    shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
    if spec.kind == "flag":
        return np.full(shape, sizes[spec.name], spec.dtype)
    if spec.kind in (ALL, SHOWN, TOLD):  # padding is drawn behind a text
        count = np.arange(shape[1]) + sizes.get("past_sequence_length", 0)
        return np.broadcast_to(count, shape).astype(spec.dtype)
    if spec.kind == "mask":
        real = np.arange(shape[1]) < _lengths(shape)[:, None]
        behind = real.reshape(*real.shape, *[1] * (len(shape) - 2))
        return np.broadcast_to(behind, shape).astype(spec.dtype)
    if spec.kind == "boxes":
        corners = generator.integers(0, spec.high, shape)
        half = shape[-1] // 2
        ordered = np.sort(corners.reshape(*shape[:-1], 2, half), -2)
        return ordered.reshape(shape).astype(spec.dtype)
    if spec.kind == "integer" and spec.tokens:
        return _text(shape, spec.high, spec.tokens, has_past, generator).astype(spec.dtype)
    if spec.kind == "integer":
        return generator.integers(0, spec.high, shape).astype(spec.dtype)
    if spec.kind == "picture":
        mean, deviation = np.array(spec.colours).T[:, :, None, None]
        drawn = _smooth((math.prod(shape[:-3]), *shape[-3:]), generator)
        return ((drawn - mean) / deviation).reshape(shape).astype(spec.dtype)
    return generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)


def _lengths(shape: tuple[int, ...]) -> Array:
    """Return how much of each row is no padding: i % 3 parts less than all, and never nothing.

    A part is one position, of long rows a sixteenth.
    """
    part = max(shape[1] // 16, 1)
    return shape[1] - np.minimum(np.arange(shape[0]) % 3 * part, shape[1] - 1)


def _text(
    shape: tuple[int, ...],
    high: int,
    tokens: Tokens,
    has_past: bool,
    generator: np.random.Generator,
) -> Array:
    """Return rows of ids: what begins a text unless there is a past, the ends, the padding."""
    plain = np.setdiff1d(np.arange(high), tokens.special)
    ids = plain[generator.integers(0, len(plain), shape)]
    for row, length in zip(ids, _lengths(shape), strict=True):
        first = tokens.first[:length]
        if has_past:
            first = ()
        last = tokens.last[: length - len(first)]
        row[: len(first)] = first
        row[length - len(last) : length] = last
        row[length:] = tokens.pad
    return ids


def picture(shape: tuple[int, ...], seed: int) -> Array:
    """Return smooth pictures in 0..1 of (rows, channels, height, width)."""
    return _smooth(shape, np.random.Generator(np.random.PCG64(seed)))


def _smooth(shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    """Return pictures in 0..1 whose colours run from point to point of a coarse random grid.

    Only sums and products of single elements: the same bits on every machine.
    """
    picture = generator.random((*shape[:2], _COARSE, _COARSE))
    for axis in (2, 3):
        at = np.linspace(0, _COARSE - 1, shape[axis])
        low = np.minimum(at.astype(np.intp), _COARSE - 2)
        part = at - low
        if axis == 2:
            part = part[:, None]
        picture = np.take(picture, low, axis) * (1 - part) + np.take(picture, low + 1, axis) * part
    return picture


def is_logits(name: str) -> bool:
    """Say whether an output of this name has scores of classes along its last dimension."""
    return name.startswith("logits") or name.endswith("_logits")


def stored_elements(output: Array, of: int = 1, name: str = "", real: bool = False) -> Array:
    """Return the flat sample of one ``of`` several outputs that the package keeps.

    All elements when there are at most ``STORED // of``; else see :func:`kept`.
    """
    step, width = kept(output.shape, of, name, real)
    return output.reshape(-1, width)[::step].reshape(-1)


def kept(shape: Sequence[int], of: int = 1, name: str = "", real: bool = False) -> tuple[int, int]:
    """Return ``(step, width)``: every step-th run of ``width`` elements of an output is stored.

    A run is one element, or of logits all classes of a position. The step is odd, so that it
    visits every residue of the usual even row lengths.
    """
    width = 1
    if is_logits(name) and len(shape) > 1 and shape[-1]:
        width = shape[-1]
    runs = max(STORED // of // width, 1)
    if width > 1 and real:
        runs = max(STORED // width, REAL_POSITIONS)
    elif width > 1:
        runs = max(runs, POSITIONS)
    step = max(-(-math.prod(shape) // width // runs), 1)
    if step % 2 == 0:
        step += 1
    return step, width


def keeps_best(shape: Sequence[int], of: int, name: str, real: bool) -> bool:
    """Say whether the best classes of every position are kept of an output beside its sample.

    They are of real logits of which :func:`kept` leaves positions out.
    """
    step, width = kept(shape, of, name, real)
    return real and step > 1 and width > BEST


def best_classes(logits: Array) -> Array:
    """Return the ``BEST`` highest classes of each position, (positions, ``BEST``), in no order."""
    rows = logits.reshape(-1, logits.shape[-1])
    found = np.argpartition(rows, -BEST, axis=-1)[:, -BEST:]
    return found.astype(np.int32)


def best_scores(logits: Array, classes: Array) -> Array:
    """Return the scores of ``classes`` at each position, and behind them that of all others as one.

    The score of several classes as one is the logarithm of their summed exponentials: a softmax
    over what is returned, (positions, classes + 1), has the probabilities of the softmax over all.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    found = np.empty((len(rows), classes.shape[1] + 1))
    for i, row in enumerate(rows):
        found[i, :-1] = row[classes[i]]
        others = np.delete(row.astype(np.float64), classes[i])
        found[i, -1] = np.logaddexp.reduce(others)
    return found
