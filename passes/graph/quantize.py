"""Weights in fewer bits that stay shared: one tensor and one set of scales for all consumers.

:func:`quantize` is the entry, called by :func:`ffmerge.passes.graph.run.share` on a model that is
shared already. It decides which weights are stored in fewer bits, and says why of all others;
``blocks.py``, ``int8.py`` and ``float16.py`` then rewrite the graph. A quantized weight keeps its
name, so that ties and whatever else knows it stay true.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import onnx_ir as ir

from ffmerge.config import DTYPES, FOUR_BITS, QuantizeConfig
from ffmerge.errors import InputError
from ffmerge.models.codes import BLOCKS, FLOOR, Form, is_vector
from ffmerge.models.manifest import Skip
from ffmerge.models.pages import give_back_array
from ffmerge.passes.graph import bits, blocks, gptq, int8
from ffmerge.passes.graph.attention import GUARDS
from ffmerge.passes.graph.float16 import MASK, to_float16
from ffmerge.passes.graph.infer import infer_types
from ffmerge.passes.graph.matrix import Matrix, matrix_of, to_lookups
from ffmerge.passes.graph.rewrite import read_in_float32
from ffmerge.passes.graph.share import names_of
from ffmerge.passes.graph.tensors import Stored, is_op, shape_of, stored, values_of

BITS = {"int8": 8, **dict.fromkeys(FOUR_BITS, 4)}  # of those stored in blocks
# Of these a weight is quantized, as what it is in float32.
QUANTIZED = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
ROWS, IN_BLOCKS = "rows", "blocks"  # what has a range of its own in the products of int8
CACHES = ("past", "present")  # how names of a cache begin, optimum's and others'
# between a bias and the softmax whose scores it is added to: looked up, capped, scaled, masked
TO_SCORES = ("Add", "Div", "Gather", "Max", "Mul", "Tanh", *GUARDS, *int8.MOVES)
MASK_INPUT = 3  # of Attention, which adds it to its scores
SCORES_OFF = 0.05  # so much a score may be off: e^0.05 of a probability
OPSET = 13  # from which DequantizeLinear has a scale per channel


def quantize(
    model: ir.Model, precision: str, config: QuantizeConfig = QuantizeConfig()
) -> tuple[Skip, ...]:
    """Bring a shared model to a precision other than fp32, in place.

    Return what is stored in more bits, and why.

    Nodes are left out of order and scales possibly equal: the model is to be shared again, as
    :func:`ffmerge.passes.graph.run.share` does.

    Raises:
        InputError: there is no such precision, or it needs a later opset or calibration data.
    """
    _check(model, precision, config)
    infer_types(model)
    if precision == "fp16":
        return tuple(to_float16(model))
    rows = precision == "int8" and int8_products(model, config) == ROWS
    if precision in BITS:
        config = replace(config, block=config.block or BLOCKS[BITS[precision]])
    matrices, skipped = _matrices(model, config, config.block if precision in BITS else None)
    if precision == "int8-dynamic":
        int8.to_dynamic(model, matrices, config)
    elif precision == "int8-static":
        skipped += int8.to_static(model, matrices, config)
    elif rows:
        read = [matrix for matrix in matrices if _is_looked_up(matrix, config)]
        _to_blocks(model, read, BITS[precision], config)
        int8.to_dynamic(model, [each for each in matrices if each not in read], config)
    else:
        _to_blocks(model, matrices, BITS[precision], config)
    if precision == "q4f16":
        skipped = _rest_to_float16(model, skipped)
    return tuple(skipped)


def int8_products(model: ir.Model, config: QuantizeConfig) -> str:
    """Return in which form int8 multiplies in a graph: ``ROWS`` or ``IN_BLOCKS``.

    One row at a time, that is in a graph which keeps a cache, blocks are faster, and nearer; of
    many at once they take twice the time, and spread rows are near enough (a cosine of 0.9993 and
    more for three trained encoders). A block that is asked for is had in either.
    """
    names = [str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)]
    if config.block is not None or any(name.startswith(CACHES) for name in names):
        return IN_BLOCKS
    return ROWS


def _is_looked_up(matrix: Matrix, config: QuantizeConfig) -> bool:
    """Say whether a graph of the package looks rows of a matrix up: it is in blocks in all."""
    return bool(matrix.lookups) or matrix.weight.name in config.looked_up


def _rest_to_float16(model: ir.Model, skipped: Sequence[Skip]) -> list[Skip]:
    """Bring all but the blocks to float16; return what is skipped, called by what it is now.

    In float16 ONNX Runtime's CPU is told no accuracy level: with level 4 the logits of a merged ViT
    had a cosine of 0.73 to those of int4, of 0.9999 without (1.31.1; why, is not known).
    """
    infer_types(model)
    wide = list(to_float16(model))
    for graph in model.graphs():
        for node in graph:
            if node.op_type == "MatMulNBits" and node.outputs[0].dtype == ir.DataType.FLOAT16:
                node.attributes.add(ir.AttrInt64("accuracy_level", 0))
    names, found = {skip.name for skip in wide}, []
    for skip in skipped:
        if skip.name not in names:
            skip = replace(skip, reason=skip.reason.replace("FLOAT:", "FLOAT16:", 1))
            found.append(skip)
    return found + wide


def _to_blocks(
    model: ir.Model, matrices: Sequence[Matrix], width: int, config: QuantizeConfig
) -> None:
    """Store matrices in blocks, of ``width`` bits if not for a budget.

    ``config.forms`` and ``config.rounded`` then have what was done.
    """
    assert config.block is not None
    forms = {} if config.forms is None else config.forms
    rounded = {} if config.rounded is None else config.rounded
    if config.budget is not None:
        chosen, codes = _best_for_budget(model, matrices, config, bits.Files([[model]]))
        forms.update(chosen)
        rounded.update(codes)
    for matrix in matrices:
        name = str(matrix.weight.name)
        if name not in forms:
            forms[name] = bits.form_of(matrix, Form(width, config.block))
    config = replace(config, forms=forms, rounded=rounded)
    if width == 4 and config.calibration:
        left = [matrix for matrix in matrices if matrix.weight.name not in rounded]
        rounded.update(gptq.round_on_data(model, left, config))
    for matrix in matrices:
        blocks.to_blocks(model, matrix, config)


def for_package(
    joined: ir.Model, files: bits.Files, config: QuantizeConfig
) -> tuple[dict[str, Form], gptq.Rounded]:
    """Return forms and codes with which the files of several graphs take ``config.budget`` bytes.

    ``joined`` is all of them as one, and of no use after that.

    Raises:
        InputError: they cannot, or the model is of an older opset.
    """
    _check(joined, "int4", config)
    infer_types(joined)
    config = replace(config, block=BLOCKS[4])
    matrices, _ = _matrices(joined, config, config.block)
    return _best_for_budget(joined, matrices, config, files)


def _best_for_budget(
    model: ir.Model, matrices: Sequence[Matrix], config: QuantizeConfig, files: bits.Files
) -> tuple[dict[str, Form], gptq.Rounded]:
    """Return forms that fit, and codes: of those to try the ones that move the outputs least.

    Both are rounded by the data and run: what rounding each weight alone does is not all.
    """
    whole = [(matrix.weight, matrix.tensor) for matrix in matrices]
    rows, best = bits.few(config.calibration), None
    least = float("inf")
    tried = bits.assign(model, matrices, config, files)
    expected = bits.outputs_of(model, rows)
    for forms in tried:
        codes = gptq.round_on_data(model, matrices, replace(config, forms=forms))
        for matrix in matrices:
            name = str(matrix.weight.name)
            if name not in codes:
                matrix.weight.const_value = ir.Tensor(bits.rounded(matrix, forms[name]))
        off = bits.moved(model, expected, rows)
        for weight, tensor in whole:
            weight.const_value = tensor
        if best is None or off < least:
            best, least = (forms, codes), off
    assert best is not None
    return best


def _check(model: ir.Model, precision: str, config: QuantizeConfig) -> None:
    if precision == "fp32" or precision not in DTYPES:
        raise InputError(f"no dtype {precision!r}: there is {', '.join(DTYPES)}.")
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        raise InputError(f"{precision} needs opset {OPSET}, the model has {opset}: add --opset 17.")
    if precision == "int8-static" and not config.calibration:
        raise InputError("int8-static needs calibration batches: name -> array of every input.")


def _matrices(
    model: ir.Model, config: QuantizeConfig, block: int | None
) -> tuple[list[Matrix], list[Skip]]:
    """Return the matrices to quantize, and a reason for every other weight.

    Where the consumers do not agree on a layout, the weight becomes int8 behind one
    DequantizeLinear for all of them.
    """
    to_lookups(model)
    matrices, skipped = [], []
    casts: dict[ir.Value, ir.Value] = {}
    for item in stored(model):
        weight, dtype = item.value, item.tensor.dtype
        if not dtype.is_floating_point() or not (_is_weight(weight) or item.tensor.size >= FLOOR):
            continue
        if reason := _stays_float(item, model.graph):
            for name in names_of(weight):
                skipped.append(Skip(name, f"{dtype}: {reason}"))
            continue
        if dtype != ir.DataType.FLOAT:
            read_in_float32(weight, casts)
        matrix = _matrix(weight, block)
        if isinstance(matrix, str):
            how = int8.read_dequantized(weight, model)
            skipped.append(Skip(item.name, f"INT8, {how}: {matrix}"))
            continue
        if not matrix.products and item.name in config.multiplied:
            matrix = replace(matrix, turned=True)  # stored as the matrix it is in another graph
        matrices.append(matrix)
    return matrices, skipped


def _matrix(weight: ir.Value, block: int | None) -> Matrix | str:
    """Return a weight as a matrix that can be stored, in blocks if so, or why it cannot."""
    assert weight.const_value is not None
    shape = shape_of(weight.const_value)
    if len(shape) != 2:
        return "it is not a matrix"
    if _is_scored(weight):
        return "a softmax reads its sums"
    matrix = matrix_of(weight)
    if block is None or isinstance(matrix, str) or not matrix.lookups:
        return matrix
    if matrix.products and not matrix.turned:
        return "its rows are looked up, and it is multiplied by without a transpose"
    if shape[1] % block:
        return f"its rows of {shape[1]} are not whole blocks of {block}"
    return matrix


def _is_weight(value: ir.Value) -> bool:
    """Say whether a product, a convolution or a lookup reads a value; of a matrix, a sum or a norm.

    Learned queries that only pass a norm are as position embeddings, which are added.
    """
    matrix = value.const_value is not None and not is_vector(shape_of(value.const_value))
    for node, index in _uses(value):
        if is_op(node, "MatMul", "Gemm", "Conv") and index < 2:
            return True
        if is_op(node, "Gather") and index == 0:
            return True
        if matrix and _adds_or_norms(node, index):
            return True
    return False


def _adds_or_norms(node: ir.Node, index: int) -> bool:
    """Say whether a node adds what it reads at a place, or is the norm of it."""
    return is_op(node, "Add") or (is_op(node, "LayerNormalization") and index == 0)


def _uses(value: ir.Value, through: Sequence[str] = int8.MOVES) -> Iterator[tuple[ir.Node, int]]:
    """Yield what reads a value, as it is or moved: position embeddings are cut and resized.

    ``through`` are operators of which what reads their output is told in their place.
    """
    seen, left = {value}, [value]
    while left:
        for node, index in left.pop().uses():
            if is_op(node, *through):
                left += [moved for moved in node.outputs if moved not in seen]
                seen.update(node.outputs)
            else:
                yield node, index


def _readers(value: ir.Value) -> str:
    """Say which nodes read a weight that is read in none of the ways of :func:`_is_weight`."""
    nodes = value.consumers()
    if not nodes:
        return "no node reads it"
    more = ""
    if len(nodes) > 1:
        more = f" and {len(nodes) - 1} more"
    return f"{nodes[0].op_type} node {nodes[0].name}{more} reads it"


def _stays_float(item: Stored, main: ir.Graph) -> str | None:
    value, tensor = item.value, item.tensor
    if value.is_graph_input() or value.is_graph_output():
        return "it is a graph input or output"
    if not value.is_initializer() or value.graph is not main:
        return "it belongs to a function or a subgraph"
    if tensor.dtype not in QUANTIZED:
        return "only float32, float16 and bfloat16 are quantized"
    if tensor.size < FLOOR:
        return f"{tensor.size} elements, too few to gain by it"
    if is_vector(shape_of(tensor)):
        return f"a vector of {tensor.size} elements"
    if not _is_weight(value):
        return _readers(value)
    values = values_of(tensor)
    least, most = float(values.min()), float(values.max())
    give_back_array(values)  # its codes are made when all have been looked at
    if not -MASK < least <= most < MASK:
        return "it is a mask, or holds values that are not finite"
    if _is_scored(value) and (off := int8.most_off(values)) > SCORES_OFF:
        return f"a softmax reads its sums, which 8 bits would change by up to {off:.2g}"
    return None


def _is_scored(value: ir.Value) -> bool:
    """Say whether what a value is added to goes to a softmax, as that which attention prefers."""
    for node, index in _uses(value, TO_SCORES):
        if is_op(node, "Softmax") or (is_op(node, "Attention") and index == MASK_INPUT):
            return True
    return False
