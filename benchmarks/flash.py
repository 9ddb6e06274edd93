"""How long one attention of an encoder takes on ONNX Runtime's CPU, in the forms it may have.

    python benchmarks/flash.py [--heads 12] [--size 32] [--turns 9]

``masked`` is the standard's ``Attention`` with a mask that hides nothing, ``chosen`` what
``export --for cpu`` writes: an If, which takes ``MultiHeadAttention`` without a mask here. Medians
of the processor time of one thread, in turns.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime as ort

SIZES = [(16, 1), (128, 1), (128, 8), (256, 1), (256, 8), (512, 1), (512, 8)]
LEAST = 0.05  # seconds of a turn
PLAIN = "Attention <q_num_heads = {heads}, kv_num_heads = {heads}> (q, k, v, mask)"
FLASH = "com.microsoft.MultiHeadAttention <num_heads = {heads}> (q, k, v)"
FORMS = {
    "masked": f"y = {PLAIN}",
    "chosen": f"y = If (whole) <then_branch = flash () => (one) {{{{ one = {FLASH} }}}}, "
              f"else_branch = plain () => (other) {{{{ other = {PLAIN} }}}}>",
}  # fmt: skip


def session(form: str, heads: int, width: int) -> ort.InferenceSession:
    """Return a session of an attention in a form."""
    given = ", ".join(f"float[b,s,{width}] {name}" for name in "qkv")
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]> attention '
        f"({given}, float[b,1,s,s] mask, bool whole) => (float[b,s,{width}] y) "
        f"{{ {FORMS[form].format(heads=heads)} }}"
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    width = given.heads * given.size
    sessions = {form: session(form, given.heads, width) for form in FORMS}
    print("| tokens x rows | masked | chosen |\n|---|---|---|")
    for length, batch in SIZES:
        draw = np.random.default_rng(0).standard_normal
        feeds = {name: draw((batch, length, width), np.float32) for name in "qkv"}
        feeds |= {"mask": np.zeros((batch, 1, length, length), np.float32), "whole": np.array(True)}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(given.turns):
            for form, opened in sessions.items():
                start, runs = time.process_time(), 0
                while time.process_time() - start < LEAST:
                    opened.run(None, feeds)
                    runs += 1
                times[form].append((time.process_time() - start) / runs * 1e3)
        cells = [f"{statistics.median(times[form]):.2f} ms" for form in FORMS]
        print(f"| {length} x {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
