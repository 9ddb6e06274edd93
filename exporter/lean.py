"""PyTorch's ONNX exporter without the work that changes nothing.

``torch.onnx.export`` decomposes every program into the operators that it translates, which traces
it anew twice and takes nearly half of an export, though programs of transformers are mostly made of
no others. For every graph it makes the table of its translations anew, for which it parses the
source of each of them, and runs each node once more to see what type its inputs are promoted to.
Shapes that it traced it keeps to find them again, which costs more than it saves where sizes have
names. ``torch_onnx.py`` exports inside :func:`lean_exporter`.
"""

import contextlib
import importlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._C import DispatchKey
from torch.export import ExportedProgram

_ATEN = torch.ops.aten
_CAST, _DETACH = "aten::to", "aten::detach_"
_PRODUCTS = (_ATEN.linear.default, _ATEN.matmul.default)  # these always give memory of their own
_CHECKS = ("aten::_assert_scalar", "aten::_assert_tensor_metadata")
# what Python's operators and names of two meanings are called, and the function that is the same
_SAME = {
    _ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor,
    _ATEN.__or__.Tensor: _ATEN.bitwise_or.Tensor,
    _ATEN.__xor__.Tensor: _ATEN.bitwise_xor.Tensor,
    _ATEN.max.other: _ATEN.maximum.default,
    _ATEN.min.other: _ATEN.minimum.default,
}


@contextlib.contextmanager
def lean_exporter() -> Iterator[None]:
    """Let PyTorch's exporter translate a program as it is if it can translate every operator.

    A PyTorch whose exporter is built in another way does all of its work.
    """
    with contextlib.ExitStack() as stack:
        # all of it: a part that a model computes without gradients would be a graph in the graph
        stack.enter_context(torch.no_grad())
        with contextlib.suppress(ImportError, AttributeError):
            passes = importlib.import_module("torch.onnx._internal.exporter._fx_passes")
            whole = passes.decompose_with_registry
            needed = partial(_decomposed_if_needed, whole)
            stack.enter_context(mock.patch.object(passes, whole.__name__, needed))
            kind, made = _translations()
            stack.enter_context(mock.patch.object(kind, "from_torchlib", staticmethod(made)))
            promotion = importlib.import_module("torch.onnx._internal.fx.passes.type_promotion")
            interpreter = promotion._TypePromotionInterpreter
            lean = partial(_promoted, promotion, interpreter.run_node)
            stack.enter_context(
                mock.patch.object(interpreter, "run_node", lambda *given: lean(*given))
            )
        with contextlib.suppress(ImportError, AttributeError):
            # a shape with names is hardly ever met again, and kept at the price of making it anew
            dynamo = importlib.import_module("torch._dynamo.config")
            stack.enter_context(dynamo.patch(fake_tensor_cache_enabled=False))
        with contextlib.suppress(ImportError, AttributeError):
            # where in a model's code each node comes from, by files that are parsed for it
            config = importlib.import_module("torch.fx.config")
            stack.enter_context(mock.patch.object(config, "do_not_emit_stack_traces", True))
        try:
            yield
        finally:
            _forget_traced()


def _forget_traced() -> None:
    """Let go of the program that was traced last, which PyTorch holds until the next one."""
    with contextlib.suppress(ImportError, AttributeError):
        tracing = importlib.import_module("torch.fx.experimental.proxy_tensor")
        tracing._FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT.clear()


def _promoted(promotion: Any, whole: Any, interpreter: Any, node: fx.Node) -> Any:
    """Promote the types of what a node reads and return what it gives, as ``whole`` does.

    That runs each node anew. What a node gives was found when it was traced, and is found again
    where its inputs become others.
    """
    if node.op != "call_function" or node.meta.get("val") is None:
        return whole(interpreter, node)
    with interpreter._set_current_node(node):
        rule = promotion.get_type_promotion_rule(node, interpreter.type_promotion_table)
        if rule is not None:
            interpreter._maybe_promote_node(node, rule)
    return node.meta["val"]


@cache
def _translations() -> tuple[Any, Any]:
    """Return the class of PyTorch's table of translations, and what makes each table once."""
    module = importlib.import_module("torch.onnx._internal.exporter._registration")
    kind = importlib.import_module("onnxscript._internal.values").TracedOnnxFunction
    made = module.ONNXRegistry.from_torchlib

    def table(**given: Any) -> Any:
        # of what it parses it asks the domain only, which is that of the translation's opset
        with mock.patch.object(kind, "function_ir", property(lambda function: function.opset)):
            return made(**given)

    return module.ONNXRegistry, cache(table)


def _decomposed_if_needed(whole: Any, program: ExportedProgram, registry: Any) -> Any:
    """Return a program of operators that are translated, by ``whole`` if it has others."""
    _simplify(program.graph)
    if _translated(program.graph_module, registry):
        return program
    return whole(program, registry)


def _simplify(graph: fx.Graph) -> None:
    """Bring to operators that are translated what differs from one in name only."""
    for node in list(graph.nodes):
        name = _name_of(node)
        if node.target in _SAME:
            node.target = _SAME[node.target]
        elif name == _CAST:
            _cast(node)
        elif name == _DETACH and not _is_output(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _writes(node):
            _let_return(node)
        elif name in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _cast(node: fx.Node) -> None:
    """Let ``to`` be a cast, or nothing if the type stays: an exported model has one device."""
    source, dtype = node.args[0], node.meta["val"].dtype
    assert isinstance(source, fx.Node)
    stays = source.meta["val"].dtype == dtype and not _asks_for_a_copy(node)
    if stays and not _is_output(node):
        node.replace_all_uses_with(source)
        return
    node.target, node.args, node.kwargs = _ATEN._to_copy.default, (source,), {"dtype": dtype}


def _asks_for_a_copy(node: fx.Node) -> bool:
    """Tell whether a ``to`` gives memory of its own even if the type stays."""
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("copy"))


def _let_return(node: fx.Node) -> None:
    """Let what writes into a tensor return a new one, where no other name shows the change."""
    name, overload = _name_of(node).removeprefix("aten::"), node.target._overloadname
    function = getattr(getattr(_ATEN, name.removesuffix("_"), None), overload, None)
    if not name.endswith("_") or function is None or not isinstance(node.args[0], fx.Node):
        return
    base = node.args[0]
    others = [user for user in base.users if user is not node]
    if _is_view(base) or any(map(_is_view, others)) or _is_output(base):
        return
    read = [each.meta["val"] for each in node.all_input_nodes]
    if len({each.dtype for each in read if isinstance(each, torch.Tensor)}) > 1:
        return  # what is written takes the type of the tensor, what is returned may not
    node.target = function
    base.replace_all_uses_with(node, delete_user_cb=lambda user: user > node)


def _is_output(node: fx.Node) -> bool:
    """Tell whether a program gives what a node gives: its signature calls it by the node's name."""
    return any(user.op == "output" for user in node.users)


def _is_view(node: fx.Node) -> bool:
    """Tell whether a node may give the memory of another, as inputs and weights are.

    What is made of other operators does not say: dropout gives its input where nothing is trained.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    composed = node.target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    if composed and node.target not in _PRODUCTS:
        return True
    return any(each.alias_info is not None for each in node.target._schema.returns)


def _writes(node: fx.Node) -> bool:
    """Tell whether a node writes into a tensor."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _translated(module: fx.GraphModule, registry: Any) -> bool:
    """Tell whether ONNX has every operator, none writes in place, and none holds a graph."""
    for node in module.graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            return False
        if not isinstance(target, torch._ops.OpOverload):
            continue
        if _writes(node) or not (_is_onnx(target) or registry.is_registered(target)):
            return False
    return True


def _is_onnx(target: torch._ops.OpOverload) -> bool:
    """Tell whether an operator is one of ONNX itself, as ``torch.onnx.ops`` gives them."""
    return target.namespace == "onnx"


def _name_of(node: fx.Node) -> str:
    """Return the name of an operator without its overload, nothing for other nodes."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name)
    return ""
