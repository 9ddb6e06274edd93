"""The ONNX project's own evaluator: slow, in numpy, written from the specification."""

from pathlib import Path
from typing import Any

from ffmerge.runtime_tests.runtimes.base import Runtime, Session, failing

ENGINE = "onnx.reference"


def _start(model: Path | bytes, level: str, threads: int) -> Session:
    from onnx import load, load_from_string
    from onnx.reference import ReferenceEvaluator

    def read() -> Any:
        if isinstance(model, bytes):
            return ReferenceEvaluator(load_from_string(model))
        return ReferenceEvaluator(load(model))

    return Session(ENGINE, ENGINE, "cpu", failing(ENGINE, "load", read).run)


RUNTIMES = (Runtime("reference", ENGINE, _start, arithmetic="native"),)
