"""Weights rounded by what they are multiplied by: GPTQ (arXiv 2210.17323) in blocks.

:func:`ffmerge.passes.graph.quantize.quantize` calls :func:`round_on_data` where it has batches of
the graph's inputs. What a rounded weight does wrong is measured by its Hessian, ``X^T X`` of what
it is multiplied by (:func:`hessians`), and mixed by attention (``attention.py``). A tied weight has
one for all its products: their sum.
Columns are rounded one after the other, and those left over make up for what the ones before do
wrong; then each code and scale is chosen again, until little is left to win (:func:`gptq_codes`).
Weights go front to back, some at a time: inputs of these are those of
the graph with all weights before them rounded already (``walk.py``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ffmerge.config import QuantizeConfig
from ffmerge.models.codes import Blocks, Form, block_scales
from ffmerge.passes.graph.attention import mixed_gram, scores_of, scores_put_out
from ffmerge.passes.graph.calibration import check_batch
from ffmerge.passes.graph.matrix import Matrix
from ffmerge.passes.graph.tensors import Array, shape_of, values_of
from ffmerge.passes.graph.walk import Batch, Kept, Walk


class Read(NamedTuple):
    """What a product multiplies a weight by, and the scores by which attention mixes the result."""

    value: ir.Value
    scores: ir.Value | None


Rounded = dict[str, Blocks]  # by the name of a weight
Inputs = tuple[Read, ...]  # of the products of a weight

DAMPING = 0.01  # of the mean of a Hessian's diagonal
PARTS = 16  # of a graph: each is loaded twice, and what is in memory for one is that much less
MEMORY = 1 << 28  # bytes of the Hessians of a part, or those of one weight if that is more
ROWS = 8192  # of a weight that are rounded at a time
SWEEPS = 4  # of descent: sixty leave as much of the error, by a thousandth (tests/test_gptq.py)


@dataclass(frozen=True)
class Part:
    """Matrices that are rounded together, and the first node that multiplies by one."""

    first: ir.Node
    matrices: list[Matrix]


def round_on_data(model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig) -> Rounded:
    """Return the matrices that are multiplied by in blocks, by name.

    In the graph each has its rounded values afterwards, in float32.

    Raises:
        InputError: a batch is not finite, or not what the model takes.
    """
    for batch in config.calibration:
        check_batch(batch)
    with scores_put_out(model):
        return _rounded_in_parts(model, matrices, config)


def _rounded_in_parts(
    model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig
) -> Rounded:
    assert config.forms is not None
    batches = Kept(_without_padding(model, batch) for batch in config.calibration)
    masks = [batch.get("attention_mask") for batch in batches]
    model.graph.sort()
    walk, found = Walk(model, batches), {}
    parts = _parts(model, matrices)
    starts = [part.first for part in parts[1:]]
    for part in parts:
        wanted = list(dict.fromkeys(map(inputs_of, part.matrices)))
        gathered = hessians(walk, wanted, starts, masks)
        for matrix in part.matrices:
            hessian = gathered[inputs_of(matrix)]
            if matrix.lookups:  # its rows are read as they are, too
                hessian = hessian + np.eye(len(hessian)) * hessian.trace() / len(hessian)
            values = values_of(matrix.tensor)
            if not matrix.turned:
                values = values.T
            form = config.forms[str(matrix.weight.name)]
            made = gptq_codes(values, hessian, form)
            found[str(matrix.weight.name)] = made
            matrix.weight.const_value = _values(matrix, made)
        if starts:
            walk.go(starts.pop(0))
    return found


def _values(matrix: Matrix, blocks: Blocks) -> ir.LazyTensor:
    """Return what blocks stand for, as the matrix is stored: computed where it is read."""
    shape, turned = shape_of(matrix.tensor), matrix.turned

    def compute() -> ir.TensorProtocol:
        values = blocks.values(shape[1 if turned else 0])
        return ir.Tensor(values if turned else np.ascontiguousarray(values.T))

    return ir.LazyTensor(
        compute, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=matrix.weight.name
    )


def inputs_of(matrix: Matrix) -> Inputs:
    """Return what the products of a weight multiply it by, one for each."""
    reads = []
    for node in matrix.products:
        if node.inputs[0] is not None:
            reads.append(Read(node.inputs[0], scores_of(node)))
    return tuple(reads)


def _parts(model: ir.Model, matrices: Sequence[Matrix]) -> list[Part]:
    """Return the matrices that are multiplied by, front to back, some at a time.

    One with a product in a subgraph is none of them: its inputs are not to be had.
    """
    place = {node: index for index, node in enumerate(model.graph)}
    firsts = {}
    for number, matrix in enumerate(matrices):
        if matrix.products and all(node in place for node in matrix.products):
            firsts[number] = min(matrix.products, key=place.__getitem__)
    order = sorted(firsts, key=lambda number: place[firsts[number]])
    parts: list[Part] = []
    seen: set[Inputs] = set()
    held, most = 0, -(-len(order) // PARTS)
    for number in order:
        matrix = matrices[number]
        new = inputs_of(matrix) not in seen
        width = shape_of(matrix.tensor)[1 if matrix.turned else 0]
        size = 8 * width**2
        if not parts or (new and (held + size > MEMORY or len(parts[-1].matrices) >= most)):
            parts.append(Part(firsts[number], []))
            seen, held, new = set(), 0, True
        parts[-1].matrices.append(matrix)
        seen.add(inputs_of(matrix))
        held += size if new else 0
    return parts


def hessians(
    walk: Walk,
    wanted: Sequence[Inputs],
    starts: Sequence[ir.Node],
    masks: Sequence[Array | None],
) -> dict[Inputs, Array]:
    """Return ``X^T X`` of the inputs of each weight, added up over all of them and all batches.

    They are computed from the place that ``walk`` has reached, which stays there; what comes behind
    the next of ``starts`` by another walk that goes on. Positions that a mask leaves out are left
    out.

    Raises:
        InputError: a batch is not what the model takes.
    """
    ahead = walk.fork()
    found: dict[Inputs, Array] = {}
    place = {node: index for index, node in enumerate(walk.model.graph)}
    left = list(dict.fromkeys(read for inputs in wanted for read in inputs))
    for start in (*starts, None):
        here = left
        if start is not None:
            here = [read for read in left if _place(read, place) < place[start]]
        left = [read for read in left if read not in here]
        values = dict.fromkeys(value for read in here for value in read if value is not None)
        for batch, mask in zip(ahead.run(list(values)), masks, strict=True):
            for read in here:
                _add(found, wanted, read, _gram(read, batch, mask))
        if start is None or not left:
            break
        ahead.go(start)
    return found


def _place(read: Read, place: Mapping[ir.Node, int]) -> int:
    """Return where in the graph the last of what is read is computed, -1 for its inputs."""
    last = -1
    for value in read:
        if value is not None and (producer := value.producer()) is not None:
            last = max(last, place[producer])
    return last


def _gram(read: Read, batch: Batch, mask: Array | None) -> Array:
    x = batch[str(read.value.name)]
    if read.scores is not None:
        mixed = mixed_gram(x, batch[str(read.scores.name)], mask)
        if mixed is not None and np.isfinite(mixed).all():
            return mixed
    rows = _rows(x, mask)
    return rows.T @ rows


def _add(found: dict[Inputs, Array], wanted: Sequence[Inputs], read: Read, gram: Array) -> None:
    """Add what is multiplied to the Hessian of every weight that is multiplied by it."""
    for inputs in wanted:
        if read in inputs:
            if inputs not in found:
                found[inputs] = np.zeros(gram.shape)
            for _ in range(inputs.count(read)):
                found[inputs] += gram


def _without_padding(model: ir.Model, batch: Batch) -> Batch:
    """Return a batch without the columns that every mask leaves out, where the graph allows it."""
    mask = batch.get("attention_mask")
    for value in model.graph.inputs:
        fixed = value.shape is not None and any(isinstance(size, int) for size in value.shape)
        given = batch.get(str(value.name))
        if mask is None or fixed or given is None or given.shape != mask.shape:
            return batch
    assert mask is not None
    return {name: array[:, mask.any(0)] for name, array in batch.items()}


def _rows(array: Array, mask: Array | None) -> Array:
    """Return the positions of what a product reads, one a row."""
    if mask is not None and mask.ndim == 2 and array.shape[:-1] == mask.shape:
        array = array[mask != 0]
    rows = array.reshape(-1, array.shape[-1]).astype(np.float32)
    return rows[np.isfinite(rows).all(-1)]


def gptq_codes(values: Array, hessian: Array, form: Form) -> Blocks:
    """Return a matrix [rows, width] in blocks.

    ``hessian`` [width, width] is that of the inputs. The scale of a block is the one with the
    least error, weighted with the Hessian's diagonal, when the blocks before it are rounded. All
    codes and scales are then chosen again, some times (:func:`_descend_`).
    """
    rows, width = values.shape
    codes = np.empty((rows, -(-width // form.block), form.block), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    zeros = np.empty(codes.shape[:2], np.uint8)
    damped = _damped(hessian)
    root, weights = _inverse_root(damped), hessian.diagonal().astype(np.float32)
    exact = damped.astype(np.float32)
    for start in range(0, rows, ROWS):
        some = slice(start, start + ROWS)
        made = _codes_of_rows(values[some], root, weights, form)
        for _ in range(SWEEPS):
            _descend_(made, values[some], exact, form.bits)
        codes[some], scales[some], zeros[some] = made
    return Blocks(codes, scales, zeros)


def _codes_of_rows(values: Array, root: Array, weights: Array, form: Form) -> Blocks:
    left = np.array(values.T, np.float32, order="C")  # [width, rows], what is still to be rounded
    width, rows = left.shape
    most, block = 2**form.bits - 1, form.block
    codes = np.empty((-(-width // block) * block, rows), np.uint8)
    scales, zeros = [], []
    for start in range(0, width, block):
        end = min(start + block, width)
        now = np.ascontiguousarray(left[start:end].T)
        found = block_scales(now[:, None], form, weights[start:end])
        scale, zero = (each[:, 0] for each in found)
        divisor = np.where(scale == 0, 1, scale)
        errors = np.empty((end - start, rows), np.float32)
        for index in range(start, end):
            whole = np.clip(np.rint(left[index] / divisor) + zero, 0, most)
            codes[index] = whole
            off = (left[index] - (whole - zero) * scale) / root[index, index]
            left[index + 1 : end] -= np.outer(root[index, index + 1 : end], off)
            errors[index - start] = off
        codes[end : start + block] = zero
        left[end:] -= root[start:end, end:].T @ errors
        scales.append(scale)
        zeros.append(zero)
    return Blocks(codes.T.reshape(rows, -1, block), np.stack(scales, 1), np.stack(zeros, 1))


def _descend_(made: Blocks, values: Array, hessian: Array, bits: int) -> None:
    """Choose every code, and every scale, again: the best one while all others stay as they are.

    So the error grows by none: coordinate descent (QuantEase, arXiv 2309.01885), a block of columns
    at a time. GPTQ chose the first ones before it was known what those behind them round to.
    """
    off = np.array((values - made.values(values.shape[1])).T, np.float32, order="C")
    block = made.codes.shape[2]
    for number, start in enumerate(range(0, len(off), block)):
        some = slice(start, min(start + block, len(off)))
        near, pull = hessian[some, some], hessian[some] @ off
        codes = made.codes[:, number].T[: len(pull)].astype(np.float32)
        scale, zero = made.scales[:, number], made.zeros[:, number].astype(np.float32)
        divisor = np.where(scale == 0, 1, scale)
        for index, code in enumerate(codes):
            wanted = code + pull[index] / (near[index, index] * divisor)
            whole = np.clip(np.rint(wanted), 0, 2**bits - 1)
            pull -= np.outer(near[:, index], (whole - code) * scale)
            codes[index] = whole
        steps = codes - zero
        curve = (steps * (near @ steps)).sum(0)
        made.scales[:, number] += (steps * pull).sum(0) / np.where(curve == 0, 1, curve)
        made.codes[:, number, : len(pull)] = codes.T
        off[some] = values[:, some].T - steps * made.scales[:, number]


def _damped(hessian: Array) -> Array:
    mean = hessian.trace() / len(hessian)
    return hessian + np.eye(len(hessian)) * (DAMPING * mean if mean > 0 else 1.0)


def _inverse_root(damped: Array) -> Array:
    """Return the upper triangular U with ``U^T U`` the inverse of the damped Hessian."""
    from scipy.linalg import cholesky, lapack

    # of the rows and columns in reverse L L^T is the Hessian: then L^-1, reversed, is upper, is U
    turned = np.array(damped[::-1, ::-1], np.float64, order="F")
    factor = cholesky(turned, lower=True, overwrite_a=True, check_finite=False)
    inverse, _ = lapack.dtrtri(factor, lower=True, overwrite_c=True)
    return np.ascontiguousarray(inverse[::-1, ::-1], np.float32)
