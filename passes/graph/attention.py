"""What attention does with what a weight gives: values are mixed, by scores, before they count.

``gptq.py`` asks: an error in the value of a token that all others look at stands in all of them. In
trained models that is often the first token, one of hundreds: SmolLM2 lost 3 in perplexity by its
value projections alone, of 5 by all weights. The scores are those of a softmax; an attention that
is one operator is asked to put them out meanwhile (:func:`scores_put_out`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from ffmerge.passes.graph.tensors import Array, is_op

# between a product and what attention mixes: the heads apart, earlier tokens before, copies
VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Concat", "Identity", "Cast")
# between the softmax and the product: no row without a token, dropout
GUARDS = ("Identity", "Cast", "Where", "Dropout")


SCORES = 3  # which output of Attention they are, and the mode in which they are behind the softmax


@contextmanager
def scores_put_out(model: ir.Model) -> Iterator[None]:
    """Let every attention of the main graph put out its scores as well, for the time being."""
    asked = {}
    for node in model.graph:
        if is_op(node, "Attention") and len(node.outputs) <= SCORES:
            asked[node] = len(node.outputs)
            node.resize_outputs(SCORES + 1)
            for left_out in node.outputs[asked[node] : SCORES]:
                left_out.name = ""
            scores, mixed = node.outputs[SCORES], node.outputs[0]
            scores.name, scores.type = f"{mixed.name}.scores", mixed.type
            node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", SCORES)
    try:
        yield
    finally:
        for node, count in asked.items():
            node.resize_outputs(count)
            del node.attributes["qk_matmul_output_mode"]


def scores_of(product: ir.Node) -> ir.Value | None:
    """Return the scores by which attention mixes what a product gives, None if it does not."""
    values = [product.outputs[0]]
    while values:
        for node, index in values.pop().uses():
            left = node.inputs[0]
            if is_op(node, *VIEWS) or _adds_bias(node):
                values.append(node.outputs[0])
            elif is_op(node, "MatMul") and index == 1 and left is not None and _is_softmax(left):
                return left
            elif is_op(node, "Attention") and index == 2 and len(node.outputs) > SCORES:
                return node.outputs[SCORES]
    return None


def _adds_bias(node: ir.Node) -> bool:
    return is_op(node, "Add") and any(v is not None and v.is_initializer() for v in node.inputs)


def _is_softmax(value: ir.Value) -> bool:
    """Say whether a softmax gives a value."""
    node = value.producer()
    while node is not None and is_op(node, *GUARDS):
        source = node.inputs[-1 if node.op_type == "Where" else 0]
        node = source.producer() if source is not None else None
    return node is not None and is_op(node, "Softmax")


def mixed_gram(x: Array, scores: Array, mask: Array | None) -> Array | None:
    """Return ``Z^T Z`` of Z, the inputs [batch, tokens, width] mixed by the scores of each head.

    ``scores`` are [batch, heads, tokens, tokens]; None if they are of other sizes. Tokens that the
    mask [batch, tokens] leaves out mix nothing.
    """
    if scores.ndim != 4 or x.ndim != 3 or scores.shape[::3] != x.shape[:2]:
        return None
    total = np.zeros((x.shape[-1], x.shape[-1]), np.float32)
    for number, (row, heads) in enumerate(zip(x, scores, strict=True)):
        if mask is not None and mask.shape == (len(x), heads.shape[1]):
            heads = heads[:, mask[number] != 0]
        seen = heads.reshape(-1, len(row)).astype(np.float32)
        total += row.T @ ((seen.T @ seen) @ row)
    return total
