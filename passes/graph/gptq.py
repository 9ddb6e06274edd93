"""Weights of 4 bits rounded by what they are multiplied by: GPTQ (arXiv 2210.17323) in blocks.

:func:`ffmerge.passes.graph.quantize.quantize` calls :func:`round_on_data` where it has batches of
the graph's inputs. What a rounded weight does wrong is measured by its Hessian, ``X^T X`` of what
it is multiplied by (:func:`hessians`). A tied weight has one for all its products: their sum.
Columns are rounded one after the other, and those left over make up for what the ones before do
wrong (:func:`gptq_codes`). Weights go front to back in stages: inputs of a stage are those of the
graph with all weights before it rounded already.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ffmerge.config import QuantizeConfig
from ffmerge.errors import InputError
from ffmerge.models.codes import block_scales, block_values, middle
from ffmerge.passes.graph.calibration import check_batch
from ffmerge.passes.graph.matrix import Matrix
from ffmerge.passes.graph.tensors import Array, shape_of, values_of

Batch = Mapping[str, Array]
Inputs = tuple[ir.Value, ...]  # what the products of a weight multiply it by

DAMPING = 0.01  # of the mean of a Hessian's diagonal
STAGES = 8  # runs over the data: more cost more, and bring less each
MEMORY = 1 << 29  # bytes of the Hessians of a stage, or those of one weight if that is more
ROWS = 8192  # of a weight that are rounded at a time


def round_on_data(
    model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig
) -> dict[str, tuple[Array, Array]]:
    """Return codes and scales of the matrices that are multiplied by, by name.

    In the graph each has its rounded values afterwards, in float32.

    Raises:
        InputError: a batch is not finite, or not what the model takes.
    """
    bits, block = 4, config.block
    assert block is not None
    model.graph.sort()
    found = {}
    for stage in _stages(model, matrices):
        gathered = hessians(model, list(dict.fromkeys(map(inputs_of, stage))), config.calibration)
        for matrix in stage:
            hessian = gathered[inputs_of(matrix)]
            if matrix.lookups:  # its rows are read as they are, too
                hessian = hessian + np.eye(len(hessian)) * hessian.trace() / len(hessian)
            values = values_of(matrix.tensor)
            if not matrix.turned:
                values = values.T
            codes, scales = gptq_codes(values, hessian, bits, block)
            found[str(matrix.weight.name)] = codes, scales
            rounded = block_values(codes, scales, bits, values.shape[1])
            if not matrix.turned:
                rounded = rounded.T
            matrix.weight.const_value = ir.Tensor(np.ascontiguousarray(rounded))
    return found


def inputs_of(matrix: Matrix) -> Inputs:
    """Return what the products of a weight multiply it by, one for each."""
    return tuple(value for node in matrix.products if (value := node.inputs[0]) is not None)


def _stages(model: ir.Model, matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return the matrices that are multiplied by, front to back, some at a time."""
    place = {node: index for index, node in enumerate(model.graph)}
    products = [matrix for matrix in matrices if matrix.products]
    products.sort(key=lambda matrix: min(place.get(node, 0) for node in matrix.products))
    stages: list[list[Matrix]] = []
    seen: set[Inputs] = set()
    held, most = 0, -(-len(products) // STAGES)
    for matrix in products:
        new = inputs_of(matrix) not in seen
        width = shape_of(matrix.tensor)[1 if matrix.turned else 0]
        size = 8 * width**2
        if not stages or (new and (held + size > MEMORY or len(stages[-1]) >= most)):
            stages.append([])
            seen, held, new = set(), 0, True
        stages[-1].append(matrix)
        seen.add(inputs_of(matrix))
        held += size if new else 0
    return stages


def hessians(
    model: ir.Model, wanted: Sequence[Inputs], batches: Sequence[Batch]
) -> dict[Inputs, Array]:
    """Return ``X^T X`` of the inputs of each weight, added up over all of them and all batches.

    Positions that an ``attention_mask`` leaves out are left out.

    Raises:
        InputError: a batch is not finite, or not what the model takes.
    """
    import onnxruntime

    values = list(dict.fromkeys(value for inputs in wanted for value in inputs))
    names = [str(value.name) for value in values if not value.is_graph_input()]
    outputs = list(model.graph.outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        hidden = [v for v in values if not (v.is_graph_input() or v.is_graph_output())]
        model.graph.outputs.extend(hidden)
        ir.save(model, path, external_data="data")
        model.graph.outputs[:] = outputs
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    only = onnxruntime.RunOptions()
    only.only_execute_path_to_fetches = True
    found: dict[Inputs, Array] = {}
    for given in batches:
        check_batch(given)
        batch = _without_padding(model, given)
        seen = dict(batch)
        try:
            if names:
                seen.update(zip(names, session.run(names, dict(batch), only), strict=True))
        except Exception as error:  # ONNX Runtime's errors have no common class of their own
            reason = str(error).splitlines()[0]
            raise InputError(f"the calibration data does not fit the model: {reason}") from error
        for inputs in wanted:
            for value in inputs:
                rows = _rows(seen[str(value.name)], batch)
                found[inputs] = found.get(inputs, 0) + (rows.T @ rows).astype(np.float64)
    return found


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


def _rows(array: Array, batch: Batch) -> Array:
    """Return the positions of what a product reads, one a row."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2 and array.shape[:-1] == mask.shape:
        array = array[mask != 0]
    rows = array.reshape(-1, array.shape[-1]).astype(np.float32)
    return rows[np.isfinite(rows).all(-1)]


def gptq_codes(values: Array, hessian: Array, bits: int, block: int) -> tuple[Array, Array]:
    """Return codes [rows, blocks, block] and scales [rows, blocks] of a matrix [rows, width].

    ``hessian`` [width, width] is that of the inputs. The scale of a block is the one with the
    least error, weighted with the Hessian's diagonal, when the blocks before it are rounded.
    """
    rows, width = values.shape
    blocks = -(-width // block)
    codes = np.empty((rows, blocks, block), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    root, weights = _inverse_root(hessian), hessian.diagonal().astype(np.float32)
    for start in range(0, rows, ROWS):
        some = slice(start, start + ROWS)
        codes[some], scales[some] = _codes_of_rows(values[some], root, weights, bits, block)
    return codes, scales


def _codes_of_rows(
    values: Array, root: Array, weights: Array, bits: int, block: int
) -> tuple[Array, Array]:
    left = np.array(values.T, np.float32, order="C")  # [width, rows], what is still to be rounded
    width, rows = left.shape
    codes = np.full((-(-width // block) * block, rows), middle(bits), np.uint8)
    scales = []
    for start in range(0, width, block):
        end = min(start + block, width)
        now = np.ascontiguousarray(left[start:end].T)
        scale = block_scales(now[:, None], bits, weights[start:end])[:, 0]
        divisor = np.where(scale == 0, 1, scale)
        errors = np.empty((end - start, rows), np.float32)
        for index in range(start, end):
            whole = np.clip(np.rint(left[index] / divisor) + middle(bits), 0, 2**bits - 1)
            codes[index] = whole
            off = (left[index] - (whole - middle(bits)) * scale) / root[index, index]
            left[index + 1 : end] -= np.outer(root[index, index + 1 : end], off)
            errors[index - start] = off
        left[end:] -= root[start:end, end:].T @ errors
        scales.append(scale)
    return codes.T.reshape(rows, -1, block), np.stack(scales, 1)


def _inverse_root(hessian: Array) -> Array:
    """Return the upper triangular U with ``U^T U`` the inverse of the damped Hessian."""
    from scipy.linalg import cholesky, lapack

    damped = hessian.astype(np.float64)
    mean = damped.trace() / len(damped)
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    factor = cholesky(damped, lower=True, check_finite=False)
    inverse, _ = lapack.dpotri(factor, lower=True)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    return cholesky(inverse, check_finite=False).astype(np.float32)
