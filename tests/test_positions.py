"""What a decoder counts and keeps of its tokens, where a caller gives neither positions nor all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import exported, index_of
from test_fused import APART, LAYERS, SIZES, WINDOW, check_writes_the_same, drawn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma3TextModel,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.errors import ExportError, InputError
from ffmerge.exporter.fused import check_fused
from ffmerge.exporter.graphs import graphs
from ffmerge.exporter.package import export
from ffmerge.exporter.positions import positions
from ffmerge.models.derive import input_specs
from ffmerge.models.kv_cache import is_past
from ffmerge.models.probe import ALL, SHOWN, TOLD

TEXT = "text-generation-with-past"


def opt() -> Any:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32))


def roberta() -> Any:
    """Its padding is 1, as in all that were trained, and positions begin behind it."""
    sizes = {**SIZES, "pad_token_id": 1, "bos_token_id": 0}
    return RobertaForCausalLM(RobertaConfig(**sizes, is_decoder=True))


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_inner": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, **sizes, bos_token_id=1, eos_token_id=2))


MODELS = {
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), ALL),
    "GPT-2": (gpt2, ALL),
    "OPT": (opt, SHOWN),
    "RoBERTa": (roberta, TOLD),
}


@pytest.mark.parametrize("name", MODELS)
def test_how_a_model_counts_is_found(name: str) -> None:
    make, kind = MODELS[name]
    model = drawn(make())
    spec = positions(model, input_specs(model))
    assert spec is not None and spec.kind == kind


def test_a_count_that_is_not_known_is_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph counts then, as the model does."""
    model = drawn(gpt2())
    inputs, whole = input_specs(model), model.forward

    def other(*args: Any, position_ids: Any = None, **given: Any) -> Any:
        if position_ids is None:
            position_ids = 2 * torch.arange(given["input_ids"].shape[1])[None]
        return whole(*args, position_ids=position_ids, **given)

    monkeypatch.setattr(model, "forward", other)
    assert positions(model, inputs) is None


@pytest.mark.parametrize("name", ["OPT", "RoBERTa"])
def test_rows_are_counted_as_pytorch_counts_them(name: str, tmp_path: Path) -> None:
    """No positions given: padding on the left, and then a token more for each row."""
    model = drawn(MODELS[name][0]())
    package = export(model, tmp_path / "package", ExportConfig(profile="cpu"))
    loaded, pad = ffmerge.load_package(package.path), model.config.pad_token_id
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(3):
        mask[row, : 2 * row] = 0
    ids = torch.where(mask == 1, ids, pad)
    found = []
    for each in (model, loaded):
        with torch.no_grad():
            first = each(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            cache = first.past_key_values
            last = each(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=cache)
        found.append(torch.cat([first.logits, last.logits], 1)[mask == 1])
    assert torch.allclose(found[0], found[1], atol=1e-5)  # measured 1.4e-6
    check_writes_the_same(model, loaded)


def test_layers_that_read_the_keys_of_others_keep_none() -> None:
    """Gemma 3n: of four layers the last two have no keys of their own."""
    sizes = {**APART, "num_hidden_layers": 4, "vocab_size_per_layer_input": 97}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3nTextConfig(
        **sizes, sliding_window=WINDOW, layer_types=kinds, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    model = drawn(Gemma3nForCausalLM(config))
    (graph,) = graphs(model, TEXT)
    assert len([spec for spec in graph.probe.inputs if is_past(spec.name)]) == 2 * 2
    check_fused(graph)


def test_a_decoder_that_keeps_other_states_is_refused() -> None:
    """Of LFM2 each convolution keeps tokens, too; as one pass over all tokens it is a graph."""
    kinds = ["conv", "full_attention"]
    model = drawn(Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=kinds, conv_L_cache=3)))
    with pytest.raises(InputError, match="Lfm2ForCausalLM keeps more than keys and values of the"):
        graphs(model, TEXT)
    assert graphs(model, "text-generation")


def test_a_model_that_does_not_run_is_refused_in_a_sentence() -> None:
    model = gpt2()
    model.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(torch.zeros(31, 48))
    with pytest.raises(InputError, match="GPT2LMHeadModel does not run on the inputs derived"):
        graphs(model, TEXT)


def test_a_decoder_that_reads_more_of_its_encoder_is_refused() -> None:
    sizes = {
        f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
        (("num_hidden_layers", 1), ("num_attention_heads", 4), ("num_key_value_heads", 4))
    }  # fmt: skip
    model = MoonshineForConditionalGeneration(
        MoonshineConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, decoder_start_token_id=1, **sizes
        )
    )
    with pytest.raises(InputError, match="does not write from the states of its encoder alone"):
        graphs(model.eval(), "automatic-speech-recognition-with-past")


def test_windows_may_reach_both_ways(tmp_path: Path) -> None:
    """Embeddings of Gemma 3: its masks are made by functions, which PyTorch cannot trace as is."""
    config = Gemma3TextConfig(
        **APART, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    )  # fmt: skip
    model = drawn(Gemma3TextModel(config))
    package = export(model, tmp_path / "package", ExportConfig(profile="cpu"))
    assert "attention" not in {skip.name for skip in package.manifest.skipped}
    ids, mask = torch.arange(3, 27).reshape(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = mask[1, :2] = 0
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
    found = ffmerge.load_package(package.path)(ids, mask).last_hidden_state
    assert torch.allclose(found[mask == 1], expected[mask == 1], atol=1e-5)  # measured 1e-6


def test_why_a_model_cannot_be_traced_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch's first line ends in a colon, what it announces is told too."""

    def refuse(*args: Any, **more: Any) -> Any:
        raise ValueError("The following was found:\n\n  a == b is not so")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError, match="exported: The following was found: a == b"):
        export(gpt2(), tmp_path / "package")


def test_how_long_sound_is_has_to_be_told(tmp_path: Path) -> None:
    """Of states alone it is not known; with the mask they go on as PyTorch does."""
    model, package = exported(index_of("Speech2TextForConditionalGeneration"))
    loaded, sound = ffmerge.load_package(package.path), torch.randn(1, 20, 8)
    ids, mask = torch.tensor([[2, 4, 5]]), torch.ones(1, 20, dtype=torch.int64)
    with torch.no_grad():
        states = model.get_encoder()(sound, attention_mask=mask)
        expected = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids).logits
    given = loaded(encoder_outputs=states, attention_mask=mask, decoder_input_ids=ids).logits
    assert torch.allclose(given, expected, atol=1e-5)  # measured 4.5e-7
    with pytest.raises(InputError, match="beside encoder_outputs give attention_mask"):
        loaded(encoder_outputs=states, decoder_input_ids=ids)


def test_positions_may_be_viewed_as_one_row(tmp_path: Path) -> None:
    """XGLM does so, which PyTorch takes of rows that lie behind one another only."""
    sizes = {"d_model": 32, "ffn_dim": 48, "num_layers": 1, "attention_heads": 4}
    model = drawn(XGLMForCausalLM(XGLMConfig(vocab_size=97, max_position_embeddings=64, **sizes)))
    package = export(model, tmp_path / "package")
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
    found = ffmerge.load_package(package.path)(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)  # measured 1.2e-6
