"""Programs are translated as they are where that is right, and compute what PyTorch computes."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnxscript._internal.converter import Converter
from torch import Tensor, fx, nn
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from ffmerge.exporter import lean
from ffmerge.exporter.lean import lean_exporter

X = torch.arange(12, dtype=torch.float32).reshape(3, 4) - 5


def written(x: Tensor) -> Tensor:
    h = x * 2
    before = h + 1
    h.add_(x)
    return before - h * h


def written_twice(x: Tensor) -> Tensor:
    h = x * 2
    h.mul_(3).sub_(x)
    return h


def seen_through_a_view(x: Tensor) -> Tensor:
    h = x * 2
    row = h[0]
    h.add_(1)
    return row + h


def through_a_view(x: Tensor) -> Tensor:
    h = x * 2
    h[1].add_(10)
    return h


def promoted(x: Tensor) -> Tensor:
    h = x.to(torch.int64)
    h.mul_(torch.tensor(2, dtype=torch.int32))
    return h + (x > 0)


def masks(x: Tensor) -> Tensor:
    either = (x > 1) | (x < -3)
    return torch.max(x, -x) * ((either & (x != 2)) ^ (x == 0)).to(torch.float32)


def mixed(x: Tensor) -> Tensor:
    whole = x.to(torch.int64)
    half = whole * 0.5 + torch.arange(x.shape[0])[:, None]
    return half + (whole > 0) * 2 + torch.pow(whole, 2) / 3 + torch.where(x > 0, x, whole)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.float().exp() * torch.tensor(2.0)
    return x * scale


def outputs_by_name(x: Tensor) -> Tensor:
    return (x + 1).to(torch.float32)


def written_and_given(x: Tensor) -> Tensor:
    h = x * 2
    h.add_(x)
    return h


def copied(x: Tensor) -> Tensor:
    h = x.to(torch.float32, copy=True)
    h.add_(1)
    return h * x


def seen_by_one_that_gives_it(x: Tensor) -> Tensor:
    h = x * 2
    same = h.type_as(x)
    h.mul_(3)
    return same + x


def written_elsewhere(x: Tensor) -> Tensor:
    h, out = x * 2, torch.empty_like(x)
    torch.add(h, x, out=out)
    return h + out


def product(x: Tensor) -> Tensor:
    scores = x @ torch.ones(4, 4)
    scores += x
    return scores.softmax(-1)


def decomposed(x: Tensor) -> Tensor:
    return torch.nn.functional.hardswish(torch.special.entr(x.abs()))


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "whole"),
    [
        (written, False),
        (written_twice, False),
        (seen_through_a_view, True),
        (through_a_view, True),
        (promoted, True),
        (masks, False),
        (mixed, False),
        (without_gradients, False),
        (outputs_by_name, False),
        (written_and_given, None),
        (copied, None),
        (seen_by_one_that_gives_it, True),
        (written_elsewhere, True),
        (product, False),
        (decomposed, True),
    ],
)
def test_what_is_translated_computes_the_same(
    function: Callable[[Tensor], Tensor], whole: bool | None, tmp_path: Path
) -> None:
    decompose = mock.Mock(
        side_effect=_fx_passes.decompose_with_registry, __name__="decompose_with_registry"
    )
    with mock.patch.object(_fx_passes, "decompose_with_registry", decompose):
        with lean_exporter():
            torch.onnx.export(
                _Module(function).eval(), (X,), tmp_path / "model.onnx", dynamo=True,
                optimize=False, dynamic_shapes=({0: "rows"},), verbose=False,
            )  # fmt: skip
    assert whole is None or decompose.called == whole
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for x in (X, X[:2] * 3):
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, function(x.clone()).numpy(), rtol=1e-6)  # measured 1.7e-7


def test_what_was_traced_is_not_run_again_for_its_types() -> None:
    """PyTorch runs every node anew to promote types, though most keep theirs."""
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])
    run = mock.Mock(side_effect=fx.Interpreter.run_node)
    with mock.patch.object(fx.Interpreter, "run_node", lambda *given: run(*given)):
        with lean_exporter():
            torch.onnx.export(
                layers.eval(), (X,), None, dynamo=True, optimize=False, verbose=False,
                dynamic_shapes=({0: "rows"},),
            )  # fmt: skip
    assert not [call for call in run.call_args_list if call.args[1].op == "call_function"]


def test_no_translation_is_parsed_and_no_line_of_code_looked_up() -> None:
    """The table is PyTorch's own, and a node is not told where a model's code made it."""
    lean._translations.cache_clear()
    whole = ONNXRegistry.from_torchlib()
    parsed = mock.Mock()
    with mock.patch.object(Converter, "translate_function_signature", parsed), lean_exporter():
        table = ONNXRegistry.from_torchlib(opset_version=whole.opset_version)
        program = torch.export.export(nn.Linear(4, 4), (X,))
    assert not parsed.called
    assert table.functions.keys() == whole.functions.keys()
    for name, known in whole.functions.items():
        found = table.functions[name]
        assert [each.onnx_function for each in found] == [each.onnx_function for each in known]
        assert [each.signature for each in found] == [each.signature for each in known]
    assert not any(node.stack_trace for node in program.graph.nodes)


def test_an_exporter_of_another_build_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_fx_passes, "decompose_with_registry")
    with lean_exporter():
        assert not hasattr(_fx_passes, "decompose_with_registry")
