"""``export --for cpu``: many tokens of an encoder by the flash kernel, where no mask hides any."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from architectures import CASES, index_of, model_of
from graphs import ops
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    ViTConfig,
    ViTModel,
)

from ffmerge.config import ExportConfig
from ffmerge.exporter.flash import LONG
from ffmerge.exporter.package import export
from ffmerge.models.manifest import Manifest
from ffmerge.passes.graph.audit import audit
from ffmerge.runtime_tests.parity import check_parity

LAYERS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}  # fmt: skip
TEXT = {**SIZES, "vocab_size": 97, "max_position_embeddings": 400}
# of the largest state, which is 3: measured 1.5e-7 to 4e-7
CLOSE = 3e-6


def bert(**given: Any) -> Any:
    torch.manual_seed(0)
    return BertModel(BertConfig(**{**TEXT, **given})).eval()


def exported(model: Any, folder: Path, **given: Any) -> Any:
    return export(model, folder / "package", ExportConfig(profile="cpu", **given))


def graph_of(package: Any) -> ir.Model:
    return ir.load(package.path / package.manifest.graphs[0].path)


def rows(length: int, padded: int) -> dict[str, np.ndarray]:
    """Return two rows of ids, the second with so much padding behind it."""
    ids = np.random.default_rng(length).integers(3, 97, (2, length))
    mask = np.ones_like(ids)
    if padded:
        mask[1, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model = bert()
    return model, exported(model, tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("length", [LONG - 1, LONG, 400])
@pytest.mark.parametrize("padded", [0, 1, 200])
def test_states_are_pytorchs(small: tuple[Any, Any], length: int, padded: int) -> None:
    model, package = small
    feeds = rows(length, padded)
    with torch.no_grad():
        given = {name: torch.tensor(array) for name, array in feeds.items()}
        expected = model(**given).last_hidden_state.numpy()
    session = onnxruntime.InferenceSession(package.path / "model.onnx")
    types = np.zeros_like(feeds["input_ids"])
    (found,) = session.run(["last_hidden_state"], {**feeds, "token_type_ids": types})
    counts = feeds["attention_mask"] == 1
    assert np.abs(found - expected)[counts].max() < CLOSE * np.abs(expected).max()


def test_the_kernel_is_chosen_for_many_tokens_of_which_none_is_hidden(
    small: tuple[Any, Any], tmp_path: Path
) -> None:
    """By what ONNX Runtime says that it ran."""
    _, package = small
    found = ops(graph_of(package))
    assert found["If"] == found["MultiHeadAttention"] == found["Attention"] == LAYERS
    for length, padded, kind in (
        (LONG, 0, "MultiHeadAttention"), (LONG, 1, "Attention"), (LONG - 1, 0, "Attention"),
    ):  # fmt: skip
        assert ran(package.path / "model.onnx", rows(length, padded), tmp_path) == {kind: LAYERS}


def ran(path: Path, feeds: dict[str, np.ndarray], folder: Path) -> dict[str, int]:
    """Return how many attentions of each kind ONNX Runtime ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "ran")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {**feeds, "token_type_ids": np.zeros_like(feeds["input_ids"])})
    counts: dict[str, int] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        kind = event.get("args", {}).get("op_name", "")
        if "Attention" in kind and event["name"].endswith("_kernel_time"):
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def test_so_many_tokens_are_compared(small: tuple[Any, Any]) -> None:
    """Broken inside of the branch for many tokens, a package is refused."""
    _, package = small
    manifest = Manifest.read(package.path)
    (graph,) = manifest.graphs
    assert [case["sequence_length"] for case in graph.probe.cases][-1] == LONG
    assert all(output.ok for output in check_parity(package.path, manifest))
    assert audit(package.path).ok
    model = ir.load(package.path / "model.onnx")
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "MultiHeadAttention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.1)
    whole = (package.path / "model.onnx").read_bytes()
    try:
        ir.save(model, package.path / "model.onnx")
        assert not all(output.ok for output in check_parity(package.path, manifest))
    finally:
        (package.path / "model.onnx").write_bytes(whole)


def test_a_model_of_fewer_positions_has_no_branch(tmp_path: Path) -> None:
    package = exported(bert(max_position_embeddings=LONG - 1), tmp_path)
    assert ops(graph_of(package))["Attention"] == LAYERS
    assert "If" not in ops(graph_of(package))


def test_what_always_adds_to_scores_has_no_branch(tmp_path: Path) -> None:
    """A table by distance, and a window that is shorter than so many tokens."""
    torch.manual_seed(0)
    by_distance = MPNetModel(MPNetConfig(**TEXT)).eval()
    assert "MultiHeadAttention" not in ops(graph_of(exported(by_distance, tmp_path / "mpnet")))
    ids = dict.fromkeys([f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")], 0)
    config = ModernBertConfig(**TEXT, **ids, local_attention=64, global_attn_every_n_layers=2)
    package = exported(ModernBertModel(config).eval(), tmp_path / "modernbert")
    assert ops(graph_of(package))["MultiHeadAttention"] == 1
    assert all(output.ok for output in check_parity(package.path, package.manifest))


def test_pictures_of_many_parts_need_no_branch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=64, patch_size=4)
    package = exported(ViTModel(config).eval(), tmp_path)
    found = ops(graph_of(package))
    assert found["MultiHeadAttention"] == LAYERS and not {"Attention", "If"} & set(found)
    assert all(output.ok for output in check_parity(package.path, package.manifest))


def test_the_encoder_of_a_pair_has_it_and_the_decoder_has_not(tmp_path: Path) -> None:
    name, config, sizes = CASES[index_of("MarianMTModel")][:3]
    model = model_of(name, config, {**sizes, "max_position_embeddings": 300})
    package = exported(model, tmp_path)
    encoder, decoder = (ir.load(package.path / g.path) for g in package.manifest.graphs[:2])
    assert ops(encoder)["MultiHeadAttention"] == LAYERS
    assert "MultiHeadAttention" not in ops(decoder)
    assert all(output.ok for output in check_parity(package.path, package.manifest))
