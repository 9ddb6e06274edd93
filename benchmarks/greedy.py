"""Greedy ids of a decoder's package in 4 or 8 bits, against PyTorch with the weights it has.

    python benchmarks/greedy.py CHECKPOINT PACKAGE TEXT [--prompts 5]

PyTorch gets the codes of every product and of the table, multiplied out. ``as it is`` are the ids
of the package, whose products round what they multiply to 8 bits; ``inputs in float`` those of the
same graph with an ``accuracy_level`` that does not. Of each prompt of 32 tokens 64 ids are made;
what is counted is how many are PyTorch's before the first that is not, with the margin by which
PyTorch preferred its own there.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from genai import Package
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, IDS = 32, 64
FLOAT = 1  # accuracy_level


def multiplied_out(node: ir.Node) -> np.ndarray:
    """Return the matrix [rows, columns] of a product in blocks."""
    rows, columns, block, bits = (
        node.attributes[name].as_int() for name in ("N", "K", "block_size", "bits")
    )

    def codes(array: np.ndarray) -> np.ndarray:
        parts = [(array >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return np.stack(parts, -1).reshape(rows, -1).astype(np.float32)

    stored = [value.const_value.numpy() for value in node.inputs[1:] if value is not None]
    blocks = codes(stored[0]).reshape(rows, -1, block)
    zeros: Any = 2 ** (bits - 1)
    if len(stored) > 2:
        zeros = codes(stored[2])[:, : blocks.shape[1], None]
    scaled = (blocks - zeros) * stored[1].reshape(rows, -1, 1)
    return scaled.reshape(rows, -1)[:, :columns]


def give(model: Any, name: str, matrix: np.ndarray) -> None:
    """Put rows of a matrix called ``layer.q+k+v.weight`` into the parameters of that name."""
    path, _, last = name.rpartition(".")
    layer, _, members = path.rpartition(".")
    start = 0
    for member in members.split("+"):
        parameter = model.get_parameter(f"{layer}.{member}.{last}")
        stop = start + len(parameter)
        with torch.no_grad():
            parameter.copy_(torch.tensor(matrix[start:stop]))
        start = stop


def written(path: Path, prompt: list[int]) -> list[int]:
    """Return the ids that a graph writes behind a prompt."""
    graph = Package(path, 1)
    graph.start(PROMPT + IDS)
    found = [graph.step(prompt)]
    while len(found) < IDS:
        found.append(graph.step(found[-1:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("package", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=5)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32).eval()
    graph, count = ir.load(given.package / "model.onnx"), 0
    for node in graph.graph:
        if node.op_type == "MatMulNBits":
            give(model, str(node.inputs[1].name), multiplied_out(node))
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT)
            count += 1
    print(f"{count} matrices multiplied out")
    paths = {"as it is": given.package / "model.onnx"}
    paths["inputs in float"] = given.package / "in_float.onnx"  # beside the data file
    ir.save(graph, paths["inputs in float"])
    tokenizer = AutoTokenizer.from_pretrained(given.checkpoint)
    text = tokenizer(given.text.read_text())["input_ids"]
    settings = {"do_sample": False, "max_new_tokens": IDS, "min_new_tokens": IDS}
    for number in range(given.prompts):
        start = number * (len(text) - PROMPT) // given.prompts
        prompt, cells = text[start : start + PROMPT], []
        with torch.no_grad():
            made = model.generate(
                torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **settings
            )
        wanted = made.sequences[0, PROMPT:].tolist()
        for label, path in paths.items():
            equal = [a == b for a, b in zip(written(path, prompt), wanted, strict=True)]
            same = [*equal, False].index(False)
            cells.append(f"{label} {same}")
            if same < IDS:
                first, second = made.logits[same][0].topk(2).values.tolist()
                cells[-1] += f" (preferred by {first - second:.2f})"
        print(f"prompt {number + 1}: {', '.join(cells)}, of {IDS}", flush=True)
    paths["inputs in float"].unlink()


if __name__ == "__main__":
    main()
