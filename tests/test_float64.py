"""What float32 rounds off is measured, and is what a runtime is allowed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packages import linear_package
from tiny import gpt2
from torch import Tensor
from torch.nn.functional import linear

import ffmerge
from ffmerge.exporter import reference
from ffmerge.exporter.fused import check_fused
from ffmerge.exporter.graphs import graphs
from ffmerge.models import float64
from ffmerge.models.float64 import Float64, rounded_off
from ffmerge.models.manifest import Manifest
from ffmerge.runtime_tests.parity import check_parity

LLAMA = transformers.LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(LLAMA).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_float32_model_is_computed_in_float64(make: Callable[[], Any]) -> None:
    model = make()
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        with Float64():
            found = model(ids).logits
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        right = model.double()(ids).logits
        rounded = model.float()(ids).logits
    # Llama's own code computes its norms and rotations in float32, whatever its weights are
    bound = {"gpt2": 1e-14, "llama": 1e-6}[model.config.model_type]  # measured 0, 4e-8
    assert float((found - right).abs().max()) < bound
    assert float((found - rounded).abs().max()) > 1e-8


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 50)])
def test_a_large_weight_is_widened_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, bias: Tensor | None
) -> None:
    """A head of 50 rows in parts of 16, of which the last has 2; as it is all at once."""
    monkeypatch.setattr(float64, "_WIDENED", 16 * 24 + 5)
    torch.manual_seed(0)
    given, weight = torch.randn(2, 3, 24), torch.randn(50, 24)
    with Float64():
        found = linear(given, weight, bias)
    wide = None if bias is None else bias.double()
    right = linear(given.double(), weight.double(), wide)
    assert found.dtype == torch.float64
    assert float((found - right).abs().max()) < 1e-13  # measured 3.6e-15


def test_a_product_may_be_by_a_vector_and_name_its_input() -> None:
    given, weight = torch.randn(3, 4), torch.randn(5, 4)
    with Float64():
        named, vector = linear(input=given, weight=weight), linear(given, weight[0])
    right = given.double() @ weight.double().T
    assert float((named - right).abs().max()) < 1e-14  # measured 0
    assert vector.shape == (3,) and float((vector - right[:, 0]).abs().max()) < 1e-14  # measured 0


def test_what_is_rounded_off_is_counted_beyond_a_part_of_each_element() -> None:
    exact = np.array([1000.0, 1.0, 0.0])
    output = np.array([1000.02, 1.0005, 0.0001], np.float32)
    assert rounded_off(output, exact, rtol=1e-5) == pytest.approx(0.01, rel=2e-3)  # 0.02 - 0.01
    assert rounded_off(output, exact, rtol=1e-4) == pytest.approx(4e-4, rel=1e-3)
    assert rounded_off(output[:0], exact[:0], rtol=1e-5) == 0


def test_the_largest_of_all_cases_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case is off by most here, so neither the last nor the mean is taken."""
    graph = graphs(llama(), "text-generation")[0]
    cases = iter([3e-4, 2e-4, 1e-4, 0.0])
    monkeypatch.setattr(reference, "rounded_off", lambda *_: next(cases))
    _, most = reference._outputs(graph, "model.onnx", {}, True)
    assert len(graph.probe.cases) > 1 and graph.outputs == ("logits",)
    assert most == {"logits": 3e-4}


@pytest.mark.parametrize(("side", "rows", "computed"), [(16, [1, 3, 8], 3), (160, [1, 2, 3], 1)])
def test_of_large_pictures_few_rows_are_computed(
    monkeypatch: pytest.MonkeyPatch, side: int, rows: list[int], computed: int
) -> None:
    """Three batch sizes in any case; in float64 one row of large pictures, of others all."""
    config = transformers.ViTConfig(
        image_size=side, patch_size=side // 2, hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=1,
    )  # fmt: skip
    graph = graphs(transformers.ViTForImageClassification(config).eval(), "image-classification")[0]
    assert [case["batch_size"] for case in graph.probe.cases] == rows
    exact: list[int] = []
    monkeypatch.setattr(reference, "rounded_off", lambda one, *_: exact.append(len(one)) or 0.0)
    kept, _ = reference._outputs(graph, "model.onnx", {}, True)
    assert exact == rows[:computed]
    assert len(kept) == 3  # each case is compared
    fed: list[int] = []
    run = type(graph).run
    monkeypatch.setattr(
        type(graph), "run", lambda self, x, exact=False: fed.append(exact) or run(self, x, exact)
    )
    check_fused(graph)
    assert fed == [True] * 2 * computed


@pytest.mark.parametrize(("off", "ok"), [(5e-4, True), (5e-3, False)])
def test_a_runtime_may_be_off_as_far_as_pytorch_is(tmp_path: Path, off: float, ok: bool) -> None:
    generator = np.random.default_rng(0)
    weight, bias = generator.standard_normal((8, 5)).astype(np.float32), np.zeros(5, np.float32)
    served = weight.copy()
    served[2, 3] += off
    manifest = linear_package(tmp_path / "package", weight, bias, served)
    strict = check_parity(tmp_path / "package", manifest)
    graph = replace(manifest.graphs[0], rounding={"logits": 5e-4})
    (output,) = check_parity(tmp_path / "package", replace(manifest, graphs=(graph,)))
    assert not strict[0].ok
    assert output.ok is ok, output.reason


def test_a_healthy_model_with_outliers_holds(tmp_path: Path) -> None:
    """As trained models have: a neuron that is a thousand times the rest."""
    model = gpt2(32, 64, 3)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[:, 0] *= 3000
        model.transformer.h[2].mlp.c_proj.weight[:, 0] *= -3000
        model.lm_head.weight *= 60
    package = tmp_path / "package"
    ffmerge.export(model, package)
    manifest = Manifest.read(package)
    (logits,) = [o for o in check_parity(package, manifest) if o.name == "logits"]
    assert manifest.graphs[0].rounding["logits"] > 2e-5  # what the plain bound allows
    assert logits.ok, logits.reason


def longrope() -> Any:
    """Phi-3 whose angles are others from 17 tokens on, which it writes into its buffers."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 1.5, 4.0]}
    config = transformers.Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope, bos_token_id=1,
        eos_token_id=2, original_max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.mark.parametrize("length", [12, 24])
def test_what_a_model_writes_into_a_buffer_is_read(length: int) -> None:
    """It stays float32, so that the model is what it was when all is done."""
    model, ids = longrope(), torch.arange(3, 3 + length)[None]
    with torch.no_grad():
        model(torch.arange(3, 40)[None])
        with float64.exactly(model):
            found = model(ids).logits
        right = model(ids).logits
    assert float((found - right).abs().max()) < 1e-6  # measured 9.7e-8; 1.3e-3 by other angles
    held = [*model.buffers(), *vars(model.model.rotary_emb).values()]
    assert {x.dtype for x in held if isinstance(x, Tensor)} == {torch.float32}


def test_a_tensor_that_is_changed_in_place_is_changed() -> None:
    given = torch.arange(4.0)
    with Float64():
        given += 1
        given[0] = 7
        given.mul_(2)
        wide = given * 1
    assert given.tolist() == [14, 4, 6, 8] and given.dtype == torch.float32
    assert wide.tolist() == given.tolist() and wide.dtype == torch.float64
