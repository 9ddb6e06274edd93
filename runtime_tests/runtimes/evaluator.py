"""The ONNX project's own evaluator: slow, in numpy, written from the specification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffmerge.models.probe import Array
from ffmerge.runtime_tests.runtimes.base import Runtime, failing

ENGINE = "onnx.reference"


@dataclass(frozen=True)
class EvaluatorSession:
    """A model in the evaluator."""

    evaluator: Any
    used: str = ENGINE
    device: str = "cpu"

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the named outputs."""
        outputs = failing(ENGINE, "run", lambda: self.evaluator.run(list(names), dict(feeds)))
        return dict(zip(names, outputs, strict=True))


def _start(model: Path | bytes, level: str, threads: int) -> EvaluatorSession:
    from onnx import load, load_from_string
    from onnx.reference import ReferenceEvaluator

    def read() -> Any:
        read = load_from_string(model) if isinstance(model, bytes) else load(model)
        return ReferenceEvaluator(read)

    return EvaluatorSession(failing(ENGINE, "load", read))


RUNTIMES = (Runtime("reference", ENGINE, _start, arithmetic="native"),)
