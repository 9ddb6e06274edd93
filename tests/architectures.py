"""Sixty architectures as tiny configurations, and their packages, made once in a process."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ffmerge.config import MergeConfig
from ffmerge.exporter.package import Package, export
from ffmerge.models.find import find
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights.merge import merge_

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
HEAD = {**ED, "eos_token_id": 1, "num_labels": 3, "max_position_embeddings": 40}
SOUND = {
    **S, "vocab_size": 20, "conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer",
}  # fmt: skip
CLIP = {**S, **I, "num_frames": 4, "num_labels": 3}
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
    (
        "LayoutLMForTokenClassification", "LayoutLMConfig",
        {**B, "max_2d_position_embeddings": 40}, ONE, False,
    ),
    (
        "XLMForSequenceClassification", "XLMConfig",
        {"vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 2}, ONE, False,
    ),
    (
        "ErnieForMaskedLM", "ErnieConfig",
        {**B, "use_task_id": True, "task_type_vocab_size": 3}, ONE, False,
    ),
    ("DPRQuestionEncoder", "DPRConfig", {**B, "projection_dim": 16}, ONE, False),
    (
        "CLIPTextModelWithProjection", "CLIPTextConfig",
        {**TOWERS["text_config"], "projection_dim": 16}, ONE, False,
    ),
    (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig",
        {**TOWERS["vision_config"], "projection_dim": 16}, ONE, False,
    ),
    (
        "SiglipTextModel", "SiglipTextConfig",
        {**TOWERS["text_config"], "projection_size": 16}, ONE, False,
    ),
    ("SiglipVisionModel", "SiglipVisionConfig", TOWERS["vision_config"], ONE, False),
    ("BartForSequenceClassification", "BartConfig", HEAD, TWO, False),
    ("BartForQuestionAnswering", "BartConfig", HEAD, TWO, False),
    ("T5ForSequenceClassification", "T5Config", {**T5, "num_labels": 3}, TWO, False),
    ("T5ForQuestionAnswering", "T5Config", T5, TWO, False),
    ("T5EncoderModel", "T5Config", T5, ONE, False),
    (
        "Speech2TextForConditionalGeneration", "Speech2TextConfig",
        {**ED, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 80,
         "max_target_positions": 20}, TWO, False,
    ),
    (
        "Wav2Vec2BertForCTC", "Wav2Vec2BertConfig",
        {**S, "vocab_size": 20, "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3},
        {"ffn1": 2, "ffn2": 2}, False,
    ),
    (
        "ASTForAudioClassification", "ASTConfig",
        {**S, "max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8,
         "time_stride": 8}, ONE, False,
    ),
    ("HubertForCTC", "HubertConfig", {**SOUND, "do_stable_layer_norm": True}, ONE, False),
    ("WavLMForCTC", "WavLMConfig", SOUND, ONE, False),
    ("VideoMAEForVideoClassification", "VideoMAEConfig", CLIP, ONE, False),
    ("TimesformerForVideoClassification", "TimesformerConfig", CLIP, ONE, False),
    (
        "PatchTSTForPrediction", "PatchTSTConfig",
        {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2,
         "d_model": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "prediction_length": 4}, ONE, False,
    ),
    (
        "InformerForPrediction", "InformerConfig",
        {"context_length": 8, "prediction_length": 4, "lags_sequence": [1, 2],
         "num_time_features": 2, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "attention_type": "full"}, TWO, False,
    ),
    ("MixtralForCausalLM", "MixtralConfig", {**G, "num_local_experts": 2}, {}, False),
]  # fmt: skip


# Those that tests let generate; T5's first entry is the plain one.
GENERATE = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "MarianMTModel", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
)  # fmt: skip

# Packages that several tests look at live until the process ends.
_FOLDER = tempfile.TemporaryDirectory(prefix="ffmerge-tests-")


def index_of(name: str) -> int:
    """Return the place of a class in ``CASES``, the first of two."""
    return next(i for i, case in enumerate(CASES) if case[0] == name)


@functools.cache
def exported(index: int) -> tuple[Any, Package]:
    """Return a case's model, two layers of every stack merged, and its package; made once."""
    model = model_of(*CASES[index][:3])
    merge_all(model)
    return model, export(model, Path(_FOLDER.name) / str(index))


def merge_all(model: Any) -> Any:
    """Merge the first two layers of every stack that has them; return what was done, or None."""
    found = stacks(find(model))
    several = tuple(stack for stack, members in found.items() if len(members) > 1)
    config = MergeConfig(window=(0, 1), stacks=several, method="average")
    return merge_(model, None, config) if several else None


def call_of(graph: Any, case: int = 1) -> dict[str, torch.Tensor]:
    """Return what a person gives a model: what a processor returns, no cache and no positions."""
    call = {}
    for name, array in graph.probe.draw(case).items():
        if name != "position_ids" and not name.startswith("past_key_values"):
            call[name] = torch.as_tensor(array)
    return call


def model_of(name: str, config: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
