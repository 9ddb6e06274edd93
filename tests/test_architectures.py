"""Forty architectures through the whole line, with no list of names; makes the table of docs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, exported, merge_all, model_of

from ffmerge.models import checkpoint, ties
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs
from ffmerge.models.prove import prove
from ffmerge.models.sublayer import stacks
from ffmerge.passes.graph.audit import audit
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
PARAMETERS = []
for case in CASES:
    case_id = f"{case[0]}-{case[4]}"
    marks = [pytest.mark.slow] if {case[0], case_id} & ALIKE else []
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
        assert torch.equal(
            got[0] if got[0].ndim else got[1], expected[0] if expected[0].ndim else expected[1]
        )
    served, package = exported(CASES.index((name, config, settings, layers, gated)))
    checks = audit(package.path).ties
    tied = {tie.name for tie in ties.ties(served) if served.get_parameter(tie.name).any()}
    assert tied <= {check.group for check in checks}  # zeros aside, which no graph stores
    assert all(check.ok for check in checks)
    outputs = check_parity(package.path, package.manifest)
    assert [o for o in outputs if not o.ok] == []
    worst = max(o.max_abs for o in outputs)
    row = _row(name, found, proved, len(mergeable), worst)
    if pytestconfig.getoption("--write-table"):
        _write(row)
    (stated,) = (line for line in _rows() if line[0] == row[0])
    assert stated[:-1] == row[:-1]
    assert worst < float(stated[-1])  # the table's bound


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
