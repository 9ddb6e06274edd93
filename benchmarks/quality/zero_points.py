"""What zero points would bring to four bits by data: bytes, and how far outputs move, in blocks.

``python benchmarks/quality/zero_points.py PACKAGE CALIBRATION HELD_OUT [BLOCK ...]`` with the
arguments and the measure of ``bits.py``. Products are rounded by data twice, as
``passes/graph/gptq.py`` does it and with a zero point from 0 to 15 for each block beside its scale,
the range cut off where the weighted error is least; both are then multiplied in float32, and tables
are left as they are. Prints the bytes of the products, the cosine or perplexity, and the error
weighted by the Hessian, as a part of the one without.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from bits import prepared
from scipy.linalg import solve_triangular

from ffmerge.config import QuantizeConfig
from ffmerge.models.codes import CLIPS, Form, block_values
from ffmerge.passes.graph import gptq, quantize
from ffmerge.passes.graph.calibration import read_calibration
from ffmerge.passes.graph.infer import infer_types
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.run import share_model

Array = np.ndarray
MOST = 15  # the last code of 4 bits


def with_zeros(rows: Array, root: Array, weights: Array, block: int) -> Array:
    """Return the values of rows [n, width] that are rounded one column after the other."""
    left, found = rows.T.copy(), []
    for start in range(0, len(left), block):
        end = min(start + block, len(left))
        scale, zero = scales(left[start:end].T, weights[start:end])
        errors = np.empty((end - start, len(rows)), np.float32)
        for index in range(start, end):
            value = (np.clip(np.rint(left[index] / scale) + zero, 0, MOST) - zero) * scale
            off = (left[index] - value) / root[index, index]
            left[index + 1 : end] -= np.outer(root[index, index + 1 : end], off)
            errors[index - start] = off
            found.append(value)
        left[end:] -= root[start:end, end:].T @ errors
    return np.stack(found, 1)


def scales(block: Array, weights: Array) -> tuple[Array, Array]:
    """Return scale and zero point of each row of a block: of those tried what loses least."""
    low, high = block.min(1, initial=0), block.max(1, initial=0)
    least = np.full(len(block), np.inf, np.float32)
    best, zeros = np.ones_like(least), np.zeros_like(least)
    for clip in CLIPS.astype(np.float32):
        scale = np.where(high > low, (high - low) * clip / MOST, 1)
        zero = np.clip(np.rint(-low * clip / scale), 0, MOST)
        codes = np.clip(np.rint(block / scale[:, None]) + zero[:, None], 0, MOST)
        off = (codes - zero[:, None]) * scale[:, None] - block
        error = (off * off * weights).sum(1)
        better = error < least
        least = np.where(better, error, least)
        best, zeros = np.where(better, scale, best), np.where(better, zero, zeros)
    return best, zeros


def rounding(
    zeros: bool, lost: list[float]
) -> Callable[[Array, Array, int, int], tuple[Array, Array]]:
    """Return what rounds instead of ``gptq_codes``: one value a block, and scales of 1.

    So what ``gptq.py`` makes of it are the values themselves. Its weighted error goes to ``lost``.
    """
    plain = gptq.gptq_codes

    def rounded(values: Array, hessian: Array, bits: int, block: int) -> tuple[Array, Array]:
        root = gptq._inverse_root(hessian)
        if zeros:
            made = with_zeros(values, root, hessian.diagonal().astype(np.float32), block)
        else:
            made = block_values(*plain(values, hessian, bits, block), bits, values.shape[1])
        off = solve_triangular(root, (made - values).T, trans="T", check_finite=False)
        lost.append(float(np.square(off, dtype=np.float64).sum()))
        return made[:, :, None] + 8, np.ones(made.shape, np.float32)

    return rounded


def main() -> None:
    """Print a row for each block and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("package", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("blocks", type=int, nargs="*", default=(32, 128))
    given = parser.parse_args()
    graph, plain = given.package / "model.onnx", gptq.gptq_codes
    print("| blocks | zero points | bytes of products | cosine or perplexity | weighted error |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        rows, target = Path(made) / "rows.npz", Path(made) / "model.onnx"
        measure = prepared(graph, given.package, (given.calibration, given.held_out), rows)
        for block in given.blocks:
            errors: list[float] = []
            for zeros in (False, True):
                model = share_model(read_model(graph), resident=False).model
                infer_types(model)
                config = QuantizeConfig(block=block, calibration=read_calibration(model, rows))
                matrices, _ = quantize._matrices(model, config, block)
                read = [matrix for matrix in matrices if matrix.products and not matrix.lookups]
                forms = {str(matrix.weight.name): Form(4, block) for matrix in read}
                config = QuantizeConfig(block=block, calibration=config.calibration, forms=forms)
                lost: list[float] = []
                gptq.gptq_codes = rounding(zeros, lost)
                gptq.round_on_data(model, read, config)
                gptq.gptq_codes = plain
                ir.save(model, target, external_data="data")
                blocks = sum(matrix.tensor.size for matrix in read) / block
                size = blocks * (block / 2 + 4 + zeros / 2)
                errors.append(sum(lost))
                cells = f"{size:,.0f} | {measure(target):.4f} | {errors[-1] / errors[0]:.3f}"
                print(f"| {block} | {'yes' if zeros else 'no'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
