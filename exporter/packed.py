"""Products of one value as one, for decoders of ``export --for cpu``.

``exporter/convert.py`` calls :func:`pack` when the graphs are in their precision. For one token one
product is faster than three; for many the parts are copied out of it, which costs more. Queries,
keys and values of an attention that are products of the same value become one, of their weights
behind one another, and in blocks a gate and what it lets through; a Split gives the parts by the
names that they had. What a product gives is unchanged: each row
of a weight in blocks has scales of its own, and zero points if one of the weights has. A weight
that is tied, or that anything else reads, stays apart: packed, it would be stored twice.
"""

import itertools
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ffmerge.models.codes import middle
from ffmerge.models.codes import pack as packed_codes
from ffmerge.passes.graph.blocks import MICROSOFT
from ffmerge.passes.graph.contract import read_ties
from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import Array, is_op, shape_of, values_of
from ffmerge.passes.graph.transposed import numbers

# what may stand between a product and the attention that reads it, each with one input that counts
_BETWEEN = ("RotaryEmbedding", "RMSNormalization", "Reshape", "Transpose")
SCALED = 2  # of what a product in blocks reads codes and scales; zero points may be missing


class Product(NamedTuple):
    """A product by a weight (last in ``MatMul``, before its scales in blocks), and its bias."""

    node: ir.Node
    width: int  # of what it gives
    added: ir.Node | None = None  # adds a vector of that width

    @property
    def weights(self) -> list[ir.Value]:
        """What it reads beside the value that is multiplied."""
        return [value for value in self.node.inputs[1:] if value is not None]

    @property
    def bias(self) -> ir.Value | None:
        """What is added."""
        if self.added is None:
            return None
        return next(filter(_is_stored, self.added.inputs))

    @property
    def held(self) -> list[ir.Value]:
        """All tensors that it reads."""
        return [*self.weights, *([self.bias] if self.bias is not None else [])]

    @property
    def names(self) -> set[str]:
        """What these are called."""
        return {str(value.name) for value in self.held}

    @property
    def given(self) -> ir.Value:
        """What the product, with its bias, gives."""
        return (self.added or self.node).outputs[0]


Group = Sequence[Product]


def pack(models: Sequence[ir.Model], gates: bool = False) -> None:
    """Let products of one value be one in the graphs of a package, where all graphs can, in place.

    A weight that one graph would read packed and another apart stays apart. ``gates`` in blocks
    are packed if that is asked for.
    """
    found = [_groups(model, gates) for model in models]
    apart = _read_apart(models, found)
    for model, groups in zip(models, found, strict=True):
        for group in groups:
            if not apart & set(_names(group)):
                _join(group, model.graph)


def _read_apart(models: Sequence[ir.Model], found: Sequence[Sequence[Group]]) -> set[str]:
    """Return the weights that a graph reads in no group, or two graphs in different ones."""
    apart, forms = set[str](), set[frozenset[str]]()
    for model, groups in zip(models, found, strict=True):
        names = {frozenset(_names(group)) for group in groups}
        apart |= set(model.graph.initializers).difference(*names)
        forms |= names
    for form in forms:
        if any(form & other for other in forms - {form}):
            apart |= form
    return apart


def _names(group: Group) -> list[str]:
    return [str(product.weights[0].name) for product in group]


def _groups(model: ir.Model, gates: bool) -> list[Group]:
    """Return the products that can be one, each group in the order of the graph."""
    tied = {member for tie in read_ties(model) for member in (tie.name, *tie.members)}
    found = list(_read_by_attentions(model, tied))
    if gates:
        grouped = {product.node for group in found for product in group}
        for run in _runs_in_blocks(model, tied):
            if grouped.isdisjoint(product.node for product in run):
                found.append(run)
    return [group for group in found if len(group) > 1]


def _read_by_attentions(model: ir.Model, tied: Set[str]) -> Iterator[Group]:
    """Yield of what each attention reads the products that are alike and have no tied weight."""
    order = {node: number for number, node in enumerate(model.graph)}
    for node in model.graph:
        alike: dict[Any, dict[ir.Node, Product]] = {}
        for value in node.inputs[:3] if is_op(node, "Attention") else ():
            product = _product_of(value)
            if product is not None and not tied & product.names:  # keys may be the values, too
                alike.setdefault(_kind(product), {})[product.node] = product
        for once in alike.values():
            yield sorted(once.values(), key=lambda product: order[product.node])


def _runs_in_blocks(model: ir.Model, tied: Set[str]) -> Iterator[Group]:
    """Yield products in blocks that follow one another, are alike and have no tied weight.

    A gate of a feed-forward sublayer and what it lets through are. In float32 two products by
    half a matrix take no longer than one by all of it.
    """
    products = []
    for node in model.graph:
        product = _product_of(node.outputs[0]) if node.op_type == "MatMulNBits" else None
        if product is not None and not tied & product.names:
            products.append(product)
    for _, run in itertools.groupby(products, _kind):
        yield list(run)


def _product_of(value: ir.Value | None) -> Product | None:
    """Return the product that gives what an attention reads, if it has a weight of its own."""
    node, added = _maker(value), None
    while node is not None and is_op(node, *_BETWEEN):
        node = _maker(node.inputs[0])
    if node is not None and is_op(node, "Add"):
        added, node = node, _before_sum(node)
    if node is None or not _multiplies(node) or node.outputs[0].is_graph_output():
        return None
    product = Product(node, _width(node), added)
    if not all(_is_stored(weight) and len(weight.uses()) == 1 for weight in product.weights):
        return None
    if not _adds_alone(product):
        return product._replace(added=None)
    return product


def _maker(value: ir.Value | None) -> ir.Node | None:
    """Return the node that gives a value, if one does."""
    return value.producer() if value is not None else None


def _before_sum(add: ir.Node) -> ir.Node | None:
    """Return the node to whose result a tensor is added."""
    others = [each for each in add.inputs if not _is_stored(each)]
    return _maker(others[0]) if len(others) == 1 else None


def _adds_alone(product: Product) -> bool:
    """Say whether what is added is a vector of the product's own, and nothing else reads it."""
    bias = product.bias
    if bias is None or bias.const_value is None or len(bias.uses()) != 1:
        return False
    alone = len(product.node.outputs[0].uses()) == 1 and not product.given.is_graph_output()
    return alone and shape_of(bias.const_value) == (product.width,)


def _multiplies(node: ir.Node) -> bool:
    if node.domain == MICROSOFT:
        return node.op_type == "MatMulNBits"
    if not is_op(node, "MatMul") or node.inputs[1] is None:
        return False
    tensor = node.inputs[1].const_value
    return tensor is not None and len(tensor.shape) == 2


def _width(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes["N"].as_int()
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    return shape_of(weight.const_value)[1]


def _is_stored(value: ir.Value | None) -> bool:
    """Say whether a value is a tensor of the graph that no caller gives."""
    if value is None or value.const_value is None or value.is_graph_input():
        return False
    return value.is_initializer() and not value.is_graph_output()


def _kind(product: Product) -> Any:
    """Return what products have in common that can be one."""
    settings = []
    for name, attribute in product.node.attributes.items():
        if name != "N":
            settings.append((name, attribute.value))
    types = tuple(value.dtype for value in product.weights[:SCALED])
    return product.node.inputs[0], product.node.op_identifier(), tuple(sorted(settings)), types


def _join(group: Group, main: ir.Graph) -> None:
    """Put one product, what it adds and a Split in the place of several products."""
    name = _joined_name(_names(group))
    widths, old = [product.width for product in group], [product.given for product in group]
    nodes = [_product(group, name, main)]
    if any(product.added for product in group):
        bias = store(main, f"{name}/bias", _bias(group))
        nodes.append(ir.Node("", "Add", [nodes[0].outputs[0], bias]))
    for node in nodes:
        node.outputs[0].name = f"{name}/{node.op_type}"
        node.outputs[0].type = old[0].type
    nodes.append(
        ir.Node("", "Split", [nodes[-1].outputs[0], numbers(main, widths)],
                [ir.AttrInt64("axis", -1)], num_outputs=len(group))
    )  # fmt: skip
    gone, held = [], []
    for node in nodes:
        node.name = f"{name}/{node.op_type}"
    for product in group:
        gone += [node for node in (product.added, product.node) if node is not None]
        held += product.held
    first = group[0].node
    ir.convenience.replace_nodes_and_values(main, first, gone, nodes, old, nodes[-1].outputs)
    for value in held:
        if not value.uses():
            main.initializers.pop(str(value.name), None)


def _product(group: Group, name: str, main: ir.Graph) -> ir.Node:
    """Return one product by the weights of all, behind one another."""
    first, weights = group[0].node, []
    most = max(len(product.weights) for product in group)
    for number in range(most):
        tensors = [_tensor(product, number) for product in group]
        suffix = "" if number == 0 else f"/{number}"
        tensor = _behind_one_another(tensors, first.op_type == "MatMul")
        weights.append(store(main, f"{name}{suffix}", tensor))
    attributes = dict(first.attributes)
    if "N" in attributes:
        attributes["N"] = ir.AttrInt64("N", sum(product.width for product in group))
    inputs = [first.inputs[0], *weights]
    return ir.Node(first.domain, first.op_type, inputs, attributes.values())


def _tensor(product: Product, number: int) -> ir.TensorProtocol:
    """Return what a product reads in a place; without zero points those that are meant."""
    tensors = [value.const_value for value in product.weights]
    assert tensors[0] is not None
    if number < len(tensors):
        tensor = tensors[number]
        assert tensor is not None
        return tensor
    bits = product.node.attributes["bits"].as_int()
    rows, blocks = shape_of(tensors[0])[:2]
    return ir.Tensor(packed_codes(np.full((rows, blocks), middle(bits), np.uint8), bits))


def _behind_one_another(tensors: Sequence[ir.TensorProtocol], by_column: bool) -> ir.TensorProtocol:
    """Return tensors as one that is made when it is read: rows, or columns, of all."""
    shapes = [shape_of(tensor) for tensor in tensors]
    axis = 1 if by_column else 0
    shape = list(shapes[0])
    shape[axis] = sum(each[axis] for each in shapes)

    def compute() -> ir.TensorProtocol:
        arrays: list[Array] = [values_of(tensor) for tensor in tensors]
        if by_column:  # weights of PyTorch are stored turned
            return ir.Tensor(np.concatenate([array.T for array in arrays]).T)
        return ir.Tensor(np.concatenate(arrays))

    return ir.LazyTensor(compute, dtype=tensors[0].dtype, shape=ir.Shape(shape))


def _bias(group: Group) -> ir.TensorProtocol:
    """Return the vectors that are added behind one another, zeros where nothing is."""
    known = [product.bias.const_value for product in group if product.bias is not None]
    assert known[0] is not None
    dtype, parts = known[0].dtype, []
    for product in group:
        if product.bias is None or product.bias.const_value is None:
            parts.append(np.zeros(product.width, dtype.numpy()))
        else:
            parts.append(values_of(product.bias.const_value))
    return ir.Tensor(np.concatenate(parts), dtype=dtype)


def _joined_name(names: Sequence[str]) -> str:
    """Return ``layer.q+k+v.weight`` of ``layer.q.weight`` and so on."""
    parts = [name.split(".") for name in names]
    if len({len(each) for each in parts}) > 1:
        return "+".join(names)
    joined = []
    for words in zip(*parts, strict=True):
        joined.append("+".join(dict.fromkeys(words)))
    return ".".join(joined)
