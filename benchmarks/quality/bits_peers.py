"""Four bits by ffmerge beside other tools, of one trained file in one run: bytes, loss, time.

    pip install nncf
    python benchmarks/quality/bits_peers.py PACKAGE CALIBRATION HELD_OUT [--tool NAME ...]

The arguments and the measure are those of ``bits.py``. All store blocks of 32, and get the same
inputs where they read any. The quantizers of ONNX Runtime are ``MatMulNBitsQuantizer`` with each of
its algorithms; those that leave lookups alone are followed by its default one for these, so that
tables count in all files. A tool that fails has its error as its row.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bits import prepared, share
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

BLOCK, ROWS = 32, 8  # of a scale, and of a batch
FEW = 8  # batches for a tool that runs the whole graph anew for each product
TABLES = ("Gather",)

Feeds = dict[str, np.ndarray]
Tool = Callable[[Path, Path, list[Feeds]], None]  # graph, the file to write, batches


def with_nbits(graph: Path, target: Path, algorithms: list[Any], symmetric: bool) -> None:
    """Write what the algorithms of MatMulNBitsQuantizer make of a graph, one after the other."""
    model = onnx.load(graph)
    for algorithm in algorithms:
        quantizer = nbits.MatMulNBitsQuantizer(
            model, block_size=BLOCK, is_symmetric=symmetric, accuracy_level=4, algo_config=algorithm
        )
        quantizer.process()
        model = quantizer.model.model
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}_data")


def default(symmetric: bool, *ops: str) -> Any:
    """Return the default algorithm, rounding to the nearest, for some operators."""
    return nbits.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=symmetric, accuracy_level=4, op_types_to_quantize=ops
    )


def rounding(symmetric: bool) -> Tool:
    """Return rounding to the nearest."""

    def tool(graph: Path, target: Path, batches: list[Feeds]) -> None:
        with_nbits(graph, target, [default(symmetric, "MatMul", *TABLES)], symmetric)

    return tool


def k_quant(graph: Path, target: Path, batches: list[Feeds]) -> None:
    """Search scales and zero points as llama.cpp does."""
    algorithm = nbits.KQuantWeightOnlyQuantConfig()
    with_nbits(graph, target, [algorithm, default(False, *TABLES)], False)


def hqq(graph: Path, target: Path, batches: list[Feeds]) -> None:
    """Fit zero points by half-quadratic splitting."""
    algorithm = nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK, op_types_to_quantize=("MatMul",))
    with_nbits(graph, target, [algorithm, default(False, *TABLES)], False)


def gptq(symmetric: bool) -> Tool:
    """Return rounding by data."""

    def tool(graph: Path, target: Path, batches: list[Feeds]) -> None:
        algorithm = nbits.GPTQWeightOnlyQuantConfig(calibration_data_reader=batches[:FEW])
        with_nbits(graph, target, [algorithm, default(symmetric, *TABLES)], symmetric)

    return tool


def nncf(**settings: Any) -> Tool:
    """Return NNCF's compression of weights: products in four bits, tables in eight.

    What it writes is valid from opset 21 on, so the graph is brought to that before. With tables in
    four bits (``all_layers``) ONNX Runtime refuses the scales of one of them.
    """

    def tool(graph: Path, target: Path, batches: list[Feeds]) -> None:
        import nncf

        newer = target.parent / "opset21.onnx"
        if not newer.exists():
            share(graph, newer, ["--opset", "21"])
        given = dict(settings)
        if given:
            given["dataset"] = nncf.Dataset(batches)
        model = nncf.compress_weights(
            onnx.load(newer), mode=nncf.CompressWeightsMode.INT4_SYM, group_size=BLOCK, ratio=1.0,
            **given,
        )  # fmt: skip
        onnx.save(model, target, save_as_external_data=True, location=f"{target.name}_data")

    return tool


def ours(*flags: str) -> Tool:
    """Return ``ffmerge share`` with these flags."""

    def tool(graph: Path, target: Path, batches: list[Feeds]) -> None:
        share(graph, target, ["--dtype", *flags])

    return tool


def tools(rows: Path) -> dict[str, Tool]:
    """Return what is compared, by the name of its row."""
    return {
        "ONNX Runtime, rounding": rounding(True),
        "ONNX Runtime, rounding with zero points": rounding(False),
        "ONNX Runtime, k-quant": k_quant,
        "ONNX Runtime, HQQ": hqq,
        "ONNX Runtime, GPTQ": gptq(True),
        "ONNX Runtime, GPTQ with zero points": gptq(False),
        "NNCF": nncf(),
        "NNCF, AWQ and scale estimation": nncf(awq=True, scale_estimation=True),
        "ffmerge": ours("int4"),
        "ffmerge, by data": ours("int4", "--data", str(rows)),
        "ffmerge, by data, blocks of 128": ours("int4", "--data", str(rows), "--block", "128"),
    }


def main() -> None:
    """Print a row for each tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("package", "calibration", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tool", nargs="*", choices=tools(Path()), default=list(tools(Path())))
    given = parser.parse_args()
    graph = given.package / "model.onnx"
    print("| tool | bytes | perplexity or cosine | time |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = folder / "rows.npz"
        measure = prepared(graph, given.package, (given.calibration, given.held_out), rows)
        whole = dict(np.load(rows))
        batches = []
        for start in range(0, len(next(iter(whole.values()))), ROWS):
            batches.append({name: array[start : start + ROWS] for name, array in whole.items()})
        for number, name in enumerate(given.tool):
            target, start = folder / f"{number}.onnx", time.perf_counter()
            try:
                tools(rows)[name](graph, target, batches)
                taken = time.perf_counter() - start
                size = sum(path.stat().st_size for path in folder.glob(f"{number}.onnx*"))
                print(f"| {name} | {size:,} | {measure(target):.4f} | {taken:.0f} s |", flush=True)
            except Exception as error:  # a tool's failure is its result
                reason = str(error).strip().splitlines()[0][:100]
                print(f"| {name} | {type(error).__name__}: {reason} |", flush=True)


if __name__ == "__main__":
    main()
