"""Sixty architectures through the whole line, with no list of names; makes the table of docs."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from architectures import CASES, call_of, exported, merge_all, model_of
from torch.utils._pytree import tree_leaves

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.exporter.package import export
from ffmerge.models import checkpoint, ties
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs
from ffmerge.models.prove import prove
from ffmerge.models.sublayer import stacks
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.weights import precision
from ffmerge.runtime_tests.parity import check_parity

# What is left out of a column, and why; measured, and written into the table.
EXCEPTIONS = {
    "AlbertForMaskedLM": "one sublayer for all layers already",
    "MixtralForCausalLM": "its feed-forward layers are mixtures of experts",
}
# Their graphs are those of Llama, GPT-2, Marian or BERT: tested by `make slow`, for time.
ALIKE = {
    "MistralForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "OlmoForCausalLM",
    "Olmo2ForCausalLM", "StableLmForCausalLM",
    "GPTJForCausalLM", "GPTNeoForCausalLM", "BartForConditionalGeneration", "GlmForCausalLM",
    "M2M100ForConditionalGeneration", "PegasusForConditionalGeneration", "RobertaForMaskedLM",
    "T5ForConditionalGeneration-True",
}  # fmt: skip
# Dear to trace, or like another: tested by `make slow` as well.
DEAR = {
    "DPRQuestionEncoder", "CLIPTextModelWithProjection",
    "XLMForSequenceClassification", "ErnieForMaskedLM", "SiglipTextModel", "SiglipVisionModel",
    "CLIPVisionModelWithProjection", "BartForSequenceClassification", "BartForQuestionAnswering",
    "T5ForSequenceClassification", "T5ForQuestionAnswering", "T5EncoderModel",
    "Speech2TextForConditionalGeneration", "Wav2Vec2BertForCTC", "HubertForCTC", "WavLMForCTC",
    "TimesformerForVideoClassification", "InformerForPrediction",
    "T5ForConditionalGeneration", "SwinForImageClassification", "Qwen3ForCausalLM",
    "FalconForCausalLM", "PhiForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM",
    "ElectraForMaskedLM", "DeiTForImageClassification", "DistilBertForMaskedLM",
    "WhisperForConditionalGeneration",
}  # fmt: skip
PARAMETERS = []
for case in CASES:
    case_id = f"{case[0]}-{case[4]}"
    marks = [pytest.mark.slow] if {case[0], case_id} & (ALIKE | DEAR) else []
    PARAMETERS.append(pytest.param(*case, id=case_id, marks=marks))
TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
BOUNDS = (1e-6, 1e-5, 1e-4)


def _row(name: str, found: dict[str, Any], proved: int, merged: int, worst: float) -> list[str]:
    stacks_text = ", ".join(f"{stack}: {len(members)}" for stack, members in found.items())
    total = sum(len(members) for members in found.values())
    gated = any(m.gated for members in found.values() for m in members)
    label = name + " (gated)" * (name.startswith("T5") and gated)
    bound = next(b for b in BOUNDS if 2 * worst < b)  # room for other processors
    return [
        label, stacks_text or "none", "yes" if gated else "no", str(total), str(proved),
        str(merged) if merged else EXCEPTIONS[name], "yes", f"{bound:.0e}",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "settings", "layers", "gated"), PARAMETERS)
def test_from_finding_to_parity(
    name, config, settings, layers, gated, tmp_path, pytestconfig
) -> None:
    """Found, proved, merged, saved, reloaded and exported, each held against PyTorch."""
    model = model_of(name, config, settings)
    found = stacks(find(model))
    assert {stack: len(members) for stack, members in found.items()} == layers
    for members in found.values():
        assert {m.gated for m in members} == {gated}
    proved = sum(sum(prove(model, members)) for members in found.values())
    mergeable = [stack for stack, members in found.items() if len(members) > 1]
    assert bool(mergeable) == (name not in EXCEPTIONS)
    if mergeable:
        before = sum(p.numel() for p in model.parameters())
        merge = merge_all(model)
        members = [found[stack][0] for stack in mergeable]
        removed = sum(model.get_parameter(w.name).numel() for m in members for w in m.weights)
        assert before - sum(p.numel() for p in model.parameters()) == removed
        assert merge.record.parameters_after == before - removed
        inputs = example_inputs(model)
        checkpoint.save(model, tmp_path / "merged")
        again = checkpoint.load(tmp_path / "merged")
        assert len(ties.ties(again)) == len(ties.ties(model))
        with torch.no_grad():
            expected, got = (m(**inputs, return_dict=True) for m in (model, again))
        for one, other in zip(_tensors(got), _tensors(expected), strict=True):
            assert torch.equal(one, other)
    served, package = exported(CASES.index((name, config, settings, layers, gated)))
    checks = audit(package.path).ties
    tied = {tie.name for tie in ties.ties(served) if served.get_parameter(tie.name).any()}
    assert tied <= {check.group for check in checks}  # zeros aside, which no graph stores
    assert all(check.ok for check in checks)
    outputs = check_parity(package.path, package.manifest)
    assert [o for o in outputs if not o.ok] == []
    worst = max(o.max_abs for o in outputs)
    _answers_a_call(served, package)
    row = _row(name, found, proved, len(mergeable), worst)
    if pytestconfig.getoption("--write-table"):
        _write(row)
    (stated,) = (line for line in _rows() if line[0] == row[0])
    assert stated[:-1] == row[:-1]
    assert worst < float(stated[-1])  # the table's bound


@pytest.mark.slow
@pytest.mark.parametrize(("name", "config", "settings"), [case[:3] for case in CASES])
def test_each_is_right_in_plain_operators(
    name: str, config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What other runtimes load; the graphs above are those for ONNX Runtime's CPU."""
    model = model_of(name, config, settings)
    merge_all(model)
    package = export(model, tmp_path / "package", ExportConfig(profile="portable"))
    assert [o for o in check_parity(package.path, package.manifest) if not o.ok] == []
    assert audit(package.path).ok


@pytest.mark.parametrize(("name", "config", "settings"), [case[:3] for case in CASES])
def test_each_is_measured_with_fewer_bits_and_is_whole_again(
    name, config, settings, monkeypatch
) -> None:
    """What a search measures, however its modules are called: by sizes, too, as in Marian."""
    monkeypatch.setattr(precision, "FLOOR", 1)
    model = model_of(name, config, settings)
    inputs = example_inputs(model)
    plain = _outputs(model, inputs)
    for dtype in ("int8", "int4"):
        with precision.rounded(model, dtype):
            rounded = _outputs(model, inputs)
        assert any(not torch.equal(one, other) for one, other in zip(rounded, plain, strict=True))
        for one, other in zip(_outputs(model, inputs), plain, strict=True):
            assert torch.equal(one, other)


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)  # Informer draws what its answers are read from
    with torch.no_grad():
        return _tensors(model(**inputs, return_dict=True))


def _answers_a_call(model: Any, package: Any) -> None:
    """Hold the package against PyTorch, given what a processor returns and nothing else."""
    first = package.manifest.graphs[0]
    call, served = call_of(first), ffmerge.load_package(package.path)
    if model.config.is_encoder_decoder and len(package.manifest.graphs) > 1:
        call["decoder_input_ids"] = torch.tensor([[3, 4, 5, 6]] * len(next(iter(call.values()))))
    with torch.no_grad():
        expected = model(**call)
        states = model.get_encoder()(**call_of(first)) if "decoder_input_ids" in call else expected
    got = served(**call)
    mask = call.get("attention_mask")
    for name, tensor in got.items():
        if name != "past_key_values":
            _same(tensor, expected[name], mask)
    session = ort.InferenceSession(package.path / first.path)
    named = {name: tensor.numpy() for name, tensor in call_of(first).items()}
    feeds = first.probe.complete(named)
    for name, array in zip(first.outputs, session.run(list(first.outputs), feeds), strict=True):
        whole, _, number = name.rpartition(".")
        if name.startswith("present."):
            continue
        right = states[whole][int(number)] if number.isdigit() else states[name]
        _same(torch.from_numpy(array), right, mask)


def _tensors(out: Any) -> list[torch.Tensor]:
    """Return the tensors of an output, those in tuples as well, without a cache."""
    leaves = tree_leaves(out.to_tuple())
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _same(found: Any, expected: Any, mask: torch.Tensor | None) -> None:
    """Hold tensors together, those of padding aside, where positions are those of the mask."""
    if isinstance(found, tuple):
        for one, other in zip(found, expected, strict=True):
            _same(one, other, mask)
        return
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    if mask is not None and difference.ndim == 3 and difference.shape[:2] == mask.shape:
        difference = difference[mask == 1]
    assert difference.max() < 5e-5  # measured 1e-5, of Pegasus' large logits


def _rows() -> list[list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _write(row: list[str]) -> None:
    order = [f"{c[0]} (gated)" if c[0].startswith("T5") and c[4] else c[0] for c in CASES]
    rows = {known[0]: known for known in _rows()} | {row[0]: row}
    kept = [rows[name] for name in order if name in rows]
    head = [line for line in TABLE.read_text().splitlines() if not line.startswith("|")]
    columns = "class | stacks: layers | gated | found | proved | stacks merged | exported | parity"
    table = [f"| {columns} |", "|---|---|---|---|---|---|---|---|"]
    table += [f"| {' | '.join(cells)} |" for cells in kept]
    TABLE.write_text("\n".join([*head, *table]) + "\n")
