"""What PyTorch's exporter wrote, with constants folded and what does nothing left out.

``torch_onnx.py`` calls :func:`simplify` for a graph whose ties are written into it. The steps are
those of ``onnxscript.optimizer.optimize_ir`` but for one rule, that makes a split of slices: it
lists all nodes anew for each of them, and changes no package that the tests know byte by byte.
"""

from functools import cache
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

_ROUNDS = 2  # what one leaves, the next may fold
_RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.normalize_pad_format_conv_integer_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_pad_into_conv_integer_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_qlinear_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


class _AtItsOperator:
    """A rule that is tried at nodes of the operator that it ends in only; others it never fits."""

    def __init__(self, rule: Any) -> None:
        self._rule = rule
        self._fits = cache(rule._target_pattern.output_nodes[0].op.matches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **given: Any) -> Any:
        """Return what the rule puts in the place of a node, or None."""
        if not self._fits(node.op_type):
            return None
        return self._rule.try_rewrite(model, graph, node, **given)


def simplify(model: ir.Model) -> None:
    """Fold constants and apply the rewrite rules of onnxscript, in place."""
    passes.InlinePass()(model)
    tried: Any = [_AtItsOperator(rule) for rule in _RULES]
    for _ in range(_ROUNDS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True).modified
        rewritten = rewriter.RewritePass(tried)(model).modified
        passes.RemoveUnusedNodesPass()(model)
        passes.RemoveUnusedFunctionsPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
        if not folded and not rewritten:
            break
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)
    rewriter.RewritePass(_RULES)(trivial(20))  # rules hold the last graph that they saw


def trivial(opset: int) -> ir.Model:
    """Return a graph that every rule tries: one of them looks at slices only."""
    inputs = [ir.Value(name=name) for name in ("x", "start", "end")]
    node = ir.Node("", "Slice", inputs)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": opset})
    return ir.Model(graph, ir_version=10)
