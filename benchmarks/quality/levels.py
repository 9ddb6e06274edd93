"""What rounding activations costs: blocks of few bits at ``accuracy_level`` 4 and 0, on text.

``python benchmarks/quality/levels.py PACKAGE HELD_OUT [DTYPE ...]`` with a package of ``ffmerge
export`` in fp32, of a folder of ``benchmarks/trained.py``, and a text. Level 4 rounds activations
to 8 bit in blocks, level 0 multiplies floats; ``--apart down_proj`` also tries level 0 for products
by weights of such names alone. A model that gives logits is measured by its perplexity and by the
mean KL divergence from fp32, another by the mean cosine of sentence embeddings. Prints a row for
each dtype and level, with the processor time of measuring.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import bits

from ffmerge.config import ShareConfig
from ffmerge.passes.graph.run import share_file

TOKENS = 1024
Found = list[np.ndarray]


def at_level(graph: Path, level: str) -> Path:
    """Write a graph again beside its weights, its products in blocks at a level.

    A level that is no number is a part of names: products by such weights are at 0, others at 4.
    """
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [each for each in node.attribute if each.name != "accuracy_level"]
            number = 0
            if level == "4" or (level != "0" and level not in node.input[1]):
                number = 4
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", number)])
    path = graph.with_name(f"level{level}.onnx")
    onnx.save(model, path)
    return path


def log_probabilities(path: Path, batch: bits.Feeds) -> Found:
    """Return the log probabilities of each window but for its last token's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = []
    for ids in batch["input_ids"]:
        row = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
        logits = opened.run(["logits"], bits.whole(row, opened))[0][0, :-1]
        logits = logits - logits.max(-1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return found


def of_logits(found: Found, expected: Found, batch: bits.Feeds) -> str:
    """Return perplexity and mean KL divergence from ``expected``."""
    lost, apart = [], []
    for ids, ours, theirs in zip(batch["input_ids"], found, expected, strict=True):
        lost.append(-ours[np.arange(len(ours)), ids[1:]].astype(np.float64))
        apart.append((np.exp(theirs) * (theirs - ours)).sum(-1))
    perplexity = np.exp(np.concatenate(lost).mean())
    return f"{perplexity:.3f} | {np.concatenate(apart).mean():.5f}"


def main() -> None:
    """Print a row for each dtype and level."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("dtypes", nargs="*", default=("int8", "int4"))
    parser.add_argument("--apart", nargs="*", default=(), help="parts of names, at level 0 alone")
    given = parser.parse_args()
    graph = given.package / "model.onnx"
    tokenizer = AutoTokenizer.from_pretrained(given.package)
    has_logits = "logits" in [each.name for each in bits.session(graph).get_outputs()]
    if has_logits:
        batch = bits.windows(given.held_out, tokenizer, TOKENS)
        read = log_probabilities
    else:
        batch = bits.sentences(given.held_out, tokenizer, bits.SENTENCES[1])
        read = bits.embeddings
    expected = read(graph, batch)
    if has_logits:
        print("| dtype | level | perplexity | KL divergence | processor time |")
        print("|---|---|---|---|---|")
        print(f"| fp32 | | {of_logits(expected, expected, batch)} | |")
    else:
        print("| dtype | level | cosine | processor time |\n|---|---|---|---|")
    for dtype in given.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "model.onnx"
            block = 64 if dtype == "int8" else None  # else rows, which have no level
            share_file(graph, made, ShareConfig(dtype=dtype, block=block))
            for level in ("4", "0", *given.apart):
                path = at_level(made, level)
                start = time.process_time()
                found = read(path, batch)
                seconds = time.process_time() - start
                if has_logits:
                    lost = of_logits(found, expected, batch)
                else:
                    lost = f"{(found * expected).sum(1).mean():.5f}"
                print(f"| {dtype} | {level} | {lost} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
