"""Bits for each weight, for a size: what most changes the outputs when it is rounded keeps most.

:func:`ffmerge.passes.graph.quantize.quantize` calls :func:`assign` where it has a budget. Each
weight is rounded alone, in 4 bits, and a few rows of the data run through the rest of the graph
(:func:`sensitivities`); how much more or less it loses in other bits and blocks is told by the
squared error of some of its rows. What outputs lose is a part of their square; of logits, how far
what they say diverges, which is what a perplexity hears (:func:`moved`). Then :func:`choose` spends
the bytes where they bring most, once from the fewest bits on and once from the best single form. A
tied weight is one weight, so all that read it agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from ffmerge.config import QuantizeConfig
from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models.codes import Form, block_codes
from ffmerge.models.kv_cache import is_present
from ffmerge.passes.graph.matrix import Matrix
from ffmerge.passes.graph.tensors import Array, is_op, shape_of, stored, values_of
from ffmerge.passes.graph.walk import Batch, Kept, Walk
from ffmerge.passes.graph.write import EMBEDDED_TENSOR, LARGE, PAGE

FORMS = (
    Form(2, 32), Form(2, 64),
    Form(4, 32), Form(4, 64), Form(4, 128), Form(8, 64), Form(8, 128),
    Form(4, 32, zeros=True), Form(4, 64, zeros=True), Form(4, 128, zeros=True),
)  # fmt: skip
TRIED = Form(4, 32)  # in which a weight is rounded alone
TOKENS, ROWS = 256, 8  # of the data that run each time, at most
# Without a budget 4 bits have zero points in blocks of so many elements or more (in blocks of 32 a
# file would be 2.5 % larger, of 128 it is 0.7 %), where they leave at most that part of the error.
LARGE_BLOCK, WORTH = 64, 0.92
SAMPLE = 256  # rows of a weight by which its forms are compared
PLACES = 8  # of the data, from which rows are taken to choose between ways
PARTS = 12  # of a graph, at whose beginning the data wait
# Bytes in the graph, at most: of a matrix beside its name (twice), and of its zero points; of its
# rows' nodes where they are unpacked by standard operators; and a name of the data file.
BESIDE, UNPACKED, DATA = 150, 2500, "data" * 10
Options = Mapping[Form, tuple[int, float]]  # of a matrix: bytes and loss in each form


@dataclass(frozen=True)
class Files:
    """What a package is written as: of which graphs each file is made.

    The weights of all are in one data file if they are ``shared``, else in the files.
    """

    graphs: Sequence[Sequence[ir.Model]]
    shared: bool = True

    def copies(self, name: str) -> int:
        """Return how often a weight is stored."""
        if self.shared:
            return 1
        found = 0
        for models in self.graphs:
            found += any(name in model.graph.initializers for model in models)
        return found


def assign(
    model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig, files: Files
) -> list[dict[str, Form]]:
    """Return forms of all matrices, by name, with which the files take ``config.budget`` bytes.

    ``model`` is what runs, and has all their weights. The forms are those of :func:`choose`, one or
    two.

    Raises:
        InputError: that is less than the weights take in the fewest bits.
    """
    assert config.budget is not None
    forms = {matrix: _forms(matrix) for matrix in matrices}
    room, least = config.budget - _beside(files, matrices, config.plain_lookups), 0
    sizes: dict[Matrix, dict[Form, int]] = {}
    for matrix in matrices:
        times = files.copies(str(matrix.weight.name))
        sizes[matrix] = {form: times * _bytes(matrix, form) for form in forms[matrix]}
        least += min(sizes[matrix].values())
    if room < least:
        needed = config.budget - room + least
        raise InputError(
            f"the budget of {size_text(config.budget)} is too small: in the fewest bits the model "
            f"takes {size_text(needed)} ({needed:,} bytes)."
        )
    lost = sensitivities(model, matrices, config.calibration)
    options: list[Options] = []
    for matrix in matrices:
        errors = _errors(matrix, forms[matrix])
        scale = lost[matrix] / max(errors[TRIED], 1e-30)
        own = {form: (size, scale * errors[form]) for form, size in sizes[matrix].items()}
        options.append(own)
    names = [str(matrix.weight.name) for matrix in matrices]
    return [dict(zip(names, chosen, strict=True)) for chosen in choose(options, room)]


def moved(model: ir.Model, expected: Sequence[Batch], batches: Sequence[Batch]) -> float:
    """Return how far the outputs for batches are from what is expected of them."""
    total = 0.0
    for one, other, batch in zip(expected, _outputs(model, batches), batches, strict=True):
        total += _moved(one, other, batch.get("attention_mask"))
    return total


def outputs_of(model: ir.Model, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return what a graph puts out for batches, its caches left out; it waits on disk."""
    return Kept(_outputs(model, batches))


def few(batches: Sequence[Batch]) -> list[Batch]:
    """Return a few rows from places all over the data."""
    places = np.linspace(0, len(batches) - 1, min(PLACES, len(batches))).astype(int)
    return [_few_rows(batches[place]) for place in places]


def _outputs(model: ir.Model, batches: Sequence[Batch]) -> Iterator[Batch]:
    outputs = [value for value in model.graph.outputs if not is_present(str(value.name))]
    return Walk(model, batches).run(outputs)


def choose(options: Sequence[Options], room: int) -> list[list[Form]]:
    """Return forms of the matrices so that little is lost in ``room`` bytes, one or two ways.

    The first begins with the smallest of each; the second with one form for all, or as many bits,
    the best that fits, if one does: no matrix is stored worse than in that.
    """
    found = [_filled(options, [min(each, key=each.__getitem__) for each in options], room)]
    if best := _best_alike(options, room):
        raised = _filled(options, best, room)
        if raised not in found:
            found.append(raised)
    return found


def _filled(options: Sequence[Options], chosen: Sequence[Form], room: int) -> list[Form]:
    """Return forms no smaller than these: while one fits, what saves most for its bytes."""
    forms = list(chosen)
    used = sum(each[form][0] for each, form in zip(options, forms, strict=True))
    while step := _best_step(options, forms, room - used):
        number, form = step
        used += options[number][form][0] - options[number][forms[number]][0]
        forms[number] = form
    return forms


def _best_alike(options: Sequence[Options], room: int) -> list[Form] | None:
    """Return the forms in which all matrices fit and lose least, of one form or of so many bits.

    None if nothing fits.
    """
    best, least = None, float("inf")
    for forms in _alike(options):
        size, loss = _total(options, forms)
        if size <= room and loss < least:
            best, least = forms, loss
    return best


def _alike(options: Sequence[Options]) -> Iterator[list[Form]]:
    """Yield one form for all, and for each number of bits the form that takes least of each."""
    for form in FORMS:
        if all(form in each for each in options):
            yield [form] * len(options)
    for bits in dict.fromkeys(form.bits for form in FORMS):
        forms = []
        for each in options:
            some = [form for form in each if form.bits == bits]
            if some:
                forms.append(min(some, key=each.__getitem__))
        if len(forms) == len(options):
            yield forms


def _best_step(
    options: Sequence[Options], chosen: Sequence[Form], room: int
) -> tuple[int, Form] | None:
    """Return which matrix gains most for its bytes in which larger form, None if none fits."""
    best, step = 0.0, None
    for number, each in enumerate(options):
        size, loss = each[chosen[number]]
        for form, (larger, less) in each.items():
            more = larger - size
            if 0 < more <= room and loss - less > best * more:
                best, step = (loss - less) / more, (number, form)
    return step


def _total(options: Sequence[Options], chosen: Sequence[Form]) -> tuple[int, float]:
    found = [each[form] for each, form in zip(options, chosen, strict=True)]
    return sum(size for size, _ in found), sum(loss for _, loss in found)


def sensitivities(
    model: ir.Model, matrices: Sequence[Matrix], batches: Sequence[Batch]
) -> dict[Matrix, float]:
    """Return how far the outputs move, as a part of their square, when one matrix is rounded.

    Caches are no outputs here: what they hold is read again.

    Raises:
        InputError: a batch is not what the graph takes.
    """
    model.graph.sort()
    batch = _few_rows(batches[0])
    outputs = [value for value in model.graph.outputs if not is_present(str(value.name))]
    walk, lost = Walk(model, [batch]), {}
    for first, some in _parts(model, matrices):
        walk.go(first)
        moved = _from(model.graph, first, outputs)  # those before it stay, and may be out of reach
        run = walk.trial(moved, [matrix.weight for matrix in some])
        names = [str(value.name) for value in moved]
        expected = dict(zip(names, run({}), strict=True))
        for matrix in some:
            arrays = run({str(matrix.weight.name): rounded(matrix, TRIED)})
            found = dict(zip(names, arrays, strict=True))
            lost[matrix] = _moved(expected, found, batch.get("attention_mask"))
    return lost


def _from(graph: ir.Graph, first: ir.Node, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Return which of the values a node computes or one behind it."""
    nodes = list(graph)
    behind = set(nodes[nodes.index(first) :])
    return [value for value in values if value.producer() in behind]


def rounded(matrix: Matrix, form: Form) -> Array:
    """Return a matrix rounded to the nearest codes of a form, as it is stored."""
    rows = _as_rows(matrix)
    values = block_codes(rows, form).values(rows.shape[1])
    return np.ascontiguousarray(values if _rows_are_stored(matrix) else values.T)


def _parts(model: ir.Model, matrices: Sequence[Matrix]) -> list[tuple[ir.Node, list[Matrix]]]:
    """Return the matrices by where they are read first, some at a time, with the first node."""
    place = {node: index for index, node in enumerate(model.graph)}
    firsts = {}
    for matrix in matrices:
        nodes = [node for node in (*matrix.products, *matrix.lookups) if node in place]
        firsts[matrix] = min(nodes, key=place.__getitem__, default=model.graph[0])
    order = sorted(matrices, key=lambda matrix: place[firsts[matrix]])
    most = -(-len(order) // PARTS)
    parts = []
    for start in range(0, len(order), most):
        parts.append((firsts[order[start]], order[start : start + most]))
    return parts


def _few_rows(batch: Batch) -> Batch:
    """Return a few rows of a batch: all of it, where an input has no rows."""
    sizes = {array.shape[:1] for array in batch.values()}
    if len(sizes) != 1 or sizes == {()}:
        return batch
    tokens = max((array.shape[1] for array in batch.values() if array.ndim == 2), default=1)
    rows = max(1, min(ROWS, TOKENS // max(tokens, 1)))
    return {name: array[:rows] for name, array in batch.items()}


def _moved(expected: Batch, found: Batch, mask: Array | None) -> float:
    """Return how far outputs are from what is expected, summed over them.

    Logits of each position are held against each other as distributions: the mean divergence. Of
    all else it is the squared distance as a part of its square.
    """
    total = 0.0
    for name, one in expected.items():
        other = found[name]
        if mask is not None and one.ndim > 2 and one.shape[:2] == mask.shape:
            one, other = one[mask != 0], other[mask != 0]
        if name == "logits" and expected[name].ndim == 3 and one.shape[-1] > 1:
            total += _divergence(one.reshape(-1, one.shape[-1]), other.reshape(-1, one.shape[-1]))
        else:
            off = np.square(one.astype(np.float64) - other).sum()
            total += float(off / max(np.square(one.astype(np.float64)).sum(), 1e-30))
    return total


def _divergence(expected: Array, found: Array) -> float:
    """Return the mean over rows of logits of the Kullback-Leibler divergence."""
    total = 0.0
    for one, other in zip(expected, found, strict=True):
        logs, others = _logs(one), _logs(other)
        total += float((np.exp(logs) * (logs - others)).sum())
    return total / max(len(expected), 1)


def _logs(logits: Array) -> Array:
    """Return the logarithms of what the classes of logits are given."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())


def form_of(matrix: Matrix, form: Form) -> Form:
    """Return a form, with zero points where they are worth their bytes."""
    if form.bits != 4 or form.block < LARGE_BLOCK:
        return form
    zeros = replace(form, zeros=True)
    errors = _errors(matrix, [form, zeros])
    if errors[zeros] < WORTH * errors[form]:
        return zeros
    return form


def _forms(matrix: Matrix) -> list[Form]:
    """Return the forms that the readers of a matrix take."""
    if not matrix.lookups:
        return list(FORMS)
    width = _width(matrix)
    return [form for form in FORMS if form.bits > 2 and width % form.block == 0]


def _errors(matrix: Matrix, forms: Sequence[Form]) -> dict[Form, float]:
    """Return the squared error of each form, on some rows."""
    rows = _as_rows(matrix)
    some = np.ascontiguousarray(rows[:: max(1, len(rows) // SAMPLE)])
    found = {}
    for form in dict.fromkeys([*forms, TRIED]):
        off = block_codes(some, form).values(some.shape[1]) - some
        found[form] = float(np.square(off).sum())
    return found


def _rows_are_stored(matrix: Matrix) -> bool:
    return matrix.turned or not matrix.products


def _as_rows(matrix: Matrix) -> Array:
    """Return a matrix with a row for each output feature, or for each row that is looked up."""
    values = values_of(matrix.tensor)
    return values if _rows_are_stored(matrix) else values.T


def _width(matrix: Matrix) -> int:
    return shape_of(matrix.tensor)[1 if _rows_are_stored(matrix) else 0]


def _bytes(matrix: Matrix, form: Form) -> int:
    """Return the bytes of what is stored in blocks, and where it is large of the pages it begins.

    Zero points count with what they take in the graph, where rows are then always unpacked.
    """
    width = _width(matrix)
    size = form.bytes_of(prod(shape_of(matrix.tensor)) // max(width, 1), width)
    if size > LARGE:
        size += (3 if form.zeros else 2) * PAGE
    if form.zeros:
        size += BESIDE + 2 * len(str(matrix.weight.name)) + UNPACKED * len(matrix.lookups)
    return size


def _beside(files: Files, matrices: Sequence[Matrix], plain: bool) -> int:
    """Return the bytes of all but the matrices: other tensors, and the graphs.

    ``plain`` is that of lookups (:class:`ffmerge.config.QuantizeConfig`).
    """
    chosen = {str(matrix.weight.name) for matrix in matrices}
    total = 0
    others: dict[Any, int] = {}
    for number, models in enumerate(files.graphs):
        for model in models:
            total += _graph_bytes(model)
            for item in stored(model):
                if item.name in chosen:
                    total += BESIDE + 2 * len(item.name) + UNPACKED * _unpacked(item.value, plain)
                elif item.tensor.nbytes < EMBEDDED_TENSOR:
                    total += item.tensor.nbytes
                else:  # where equal bytes are once
                    file = 0 if files.shared else number
                    others[file, sha256(item.tensor.tobytes()).digest()] = item.tensor.nbytes
    return total + sum(others.values())


def _unpacked(weight: ir.Value, plain: bool) -> int:
    """Return how many lookups of a weight unpack its rows by standard operators."""
    lookups = [node for node in weight.consumers() if is_op(node, "Gather")]
    if len(lookups) == len(weight.consumers()) and not plain:
        return 0
    return len(lookups)


def _graph_bytes(model: ir.Model) -> int:
    """Return the bytes of the graph without its tensors."""
    tensors = {item.value: item.tensor for item in stored(model) if item.value.is_initializer()}
    try:
        for value, tensor in tensors.items():
            value.const_value = ir.ExternalTensor(
                DATA, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(shape_of(tensor)),
                name=str(value.name),
            )  # fmt: skip
        return int(ir.to_proto(model).ByteSize())
    finally:
        for value, tensor in tensors.items():
            value.const_value = tensor
