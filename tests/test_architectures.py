"""Forty architectures through the whole line, with no list of names; makes the table of docs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ffmerge.exporter.package import export
from ffmerge.models import checkpoint, ties
from ffmerge.models.feedforward import find, prove, stacks
from ffmerge.models.inputs import example_inputs
from ffmerge.passes.graph.audit import audit
from ffmerge.passes.weights.merge import MergeConfig, merge_
from ffmerge.runtime_tests.parity import check_parity

S = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
V = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
I = {"image_size": 16, "patch_size": 4}  # noqa: E741
B = {**S, "vocab_size": 60}
G = {**S, **V, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, **V}
ED = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2, **V,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60,
    "decoder_start_token_id": 0,
}  # fmt: skip
TOWERS = {
    "text_config": {**S, **V, "max_position_embeddings": 20},
    "vision_config": {**S, **I},
}
ONE, TWO, TOWER = {"layers": 2}, {"encoder": 2, "decoder": 2}, {"vision_model": 2, "text_model": 2}

# class, configuration, settings, layers by stack, gated
CASES: list[tuple[str, str, dict[str, Any], dict[str, int], bool]] = [
    ("ViTForImageClassification", "ViTConfig", {**S, **I}, ONE, False),
    ("DeiTForImageClassification", "DeiTConfig", {**S, **I}, ONE, False),
    ("BeitForImageClassification", "BeitConfig", {**S, **I}, ONE, False),
    ("Dinov2ForImageClassification", "Dinov2Config", {**S, **I, "mlp_ratio": 2}, ONE, False),
    (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
         "num_heads": [2, 4], "window_size": 4}, {"0": 2, "1": 2}, False,
    ),
    ("CLIPModel", "CLIPConfig", TOWERS, TOWER, False),
    ("SiglipModel", "SiglipConfig", TOWERS, TOWER, False),
    ("BertForMaskedLM", "BertConfig", B, ONE, False),
    ("RobertaForMaskedLM", "RobertaConfig", {**S, **V}, ONE, False),
    (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 60}, ONE, False,
    ),
    ("ElectraForMaskedLM", "ElectraConfig", {**B, "embedding_size": 16}, ONE, False),
    ("DebertaV2ForMaskedLM", "DebertaV2Config", B, ONE, False),
    (
        "ModernBertForMaskedLM", "ModernBertConfig",
        {**S, **V, "cls_token_id": 3, "sep_token_id": 4}, ONE, True,
    ),
    ("AlbertForMaskedLM", "AlbertConfig", {**B, "embedding_size": 16}, {"layers": 1}, False),
    ("GPT2LMHeadModel", "GPT2Config", GPT, ONE, False),
    (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
         "num_heads": 4, "intermediate_size": 48, **V}, {"layers": 2}, False,
    ),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**S, **V}, ONE, False),
    ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, ONE, False),
    (
        "OPTForCausalLM", "OPTConfig",
        {**S, **V, "ffn_dim": 48, "word_embed_proj_dim": 32}, ONE, False,
    ),
    (
        "BloomForCausalLM", "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, **V}, ONE, False,
    ),
    ("FalconForCausalLM", "FalconConfig", {**S, **V, "ffn_hidden_size": 48}, ONE, False),
    ("LlamaForCausalLM", "LlamaConfig", G, ONE, True),
    ("MistralForCausalLM", "MistralConfig", G, ONE, True),
    ("Qwen2ForCausalLM", "Qwen2Config", G, ONE, True),
    ("Qwen3ForCausalLM", "Qwen3Config", {**G, "head_dim": 8}, ONE, True),
    ("GemmaForCausalLM", "GemmaConfig", {**G, "head_dim": 8}, ONE, True),
    ("PhiForCausalLM", "PhiConfig", {**S, **V}, ONE, False),
    ("Phi3ForCausalLM", "Phi3Config", G, ONE, True),
    ("OlmoForCausalLM", "OlmoConfig", G, ONE, True),
    ("Olmo2ForCausalLM", "Olmo2Config", G, ONE, True),
    ("StableLmForCausalLM", "StableLmConfig", G, ONE, True),
    ("GlmForCausalLM", "GlmConfig", {**G, "head_dim": 8}, ONE, True),
    ("T5ForConditionalGeneration", "T5Config", T5, TWO, False),
    (
        "T5ForConditionalGeneration", "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"}, TWO, True,
    ),
    ("BartForConditionalGeneration", "BartConfig", ED, TWO, False),
    ("MarianMTModel", "MarianConfig", {**ED, "decoder_vocab_size": 60}, TWO, False),
    ("M2M100ForConditionalGeneration", "M2M100Config", ED, TWO, False),
    ("PegasusForConditionalGeneration", "PegasusConfig", ED, TWO, False),
    (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**ED, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20},
        TWO, False,
    ),
    (
        "Wav2Vec2ForCTC", "Wav2Vec2Config",
        {**S, "vocab_size": 20, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2],
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}, ONE, False,
    ),
    ("MixtralForCausalLM", "MixtralConfig", {**G, "num_local_experts": 2}, {}, False),
]  # fmt: skip


# What is left out of a column, and why; measured, and written into the table.
EXCEPTIONS = {
    "AlbertForMaskedLM": "one sublayer for all layers already",
    "MixtralForCausalLM": "its feed-forward layers are mixtures of experts",
}
TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
BOUNDS = (1e-6, 1e-5, 1e-4)


def _model(name: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


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


@pytest.mark.parametrize(
    ("name", "config", "settings", "layers", "gated"), CASES, ids=[f"{c[0]}-{c[4]}" for c in CASES]
)
def test_from_finding_to_parity(
    name, config, settings, layers, gated, tmp_path, pytestconfig
) -> None:
    """Found, proved, merged, saved, reloaded and exported, each held against PyTorch."""
    model = _model(name, config, settings)
    found = stacks(find(model))
    assert {stack: len(members) for stack, members in found.items()} == layers
    for members in found.values():
        assert {m.gated for m in members} == {gated}
    proved = sum(sum(prove(model, members)) for members in found.values())
    mergeable = [stack for stack, members in found.items() if len(members) > 1]
    assert bool(mergeable) == (name not in EXCEPTIONS)
    if mergeable:
        before = sum(p.numel() for p in model.parameters())
        chosen = MergeConfig(window=(0, 1), stacks=tuple(mergeable), method="average")
        merge = merge_(model, None, chosen)
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
    package = export(model, tmp_path / "package")
    assert all(check.ok for check in audit(package.path).ties)
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
