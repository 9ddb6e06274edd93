"""Rules are tried where they can fit, and a graph is simplified as by all of them everywhere."""

import onnx_ir as ir
from graphs import build, normal, ops, run
from onnxscript import rewriter

from ffmerge.exporter.simplify import _RULES, _AtItsOperator, simplify

GRAPH = """(float[2,6] x) => (float[3,4] y, float[2,6] z) {
    one = Constant<value_float=1.0>()  zero = Constant<value_float=0.0>()
    a = Mul(one, x)  b = Add(a, zero)  c = Transpose<perm=[1,0]>(b)  d = Transpose<perm=[1,0]>(c)
    e = Cast<to=1>(d)  s = Constant<value_ints=[3,4]>()  t = Constant<value_ints=[6,2]>()
    f = Reshape(e, t)  y = Reshape(f, s)  g = Relu(e)  h = Relu(g)  z = Sub(h, zero)}"""


def test_what_does_nothing_is_left_out() -> None:
    model, x = build(GRAPH), normal(2, 6)
    before = run(model, x=x)
    simplify(model)
    assert ops(model) == {"Reshape": 1, "Relu": 1}
    for one, other in zip(before, run(model, x=x), strict=True):
        assert (one == other).all()


def test_a_rule_is_tried_at_each_node_that_it_fits() -> None:
    """All rules at all nodes, one round: the same nodes as of rules at their own operators."""
    found = []
    for rules in (list(_RULES), [_AtItsOperator(rule) for rule in _RULES]):
        model = build(GRAPH)
        rewriter.RewritePass(rules)(model)
        found.append(
            [(node.op_type, [str(v and v.name) for v in node.inputs]) for node in model.graph]
        )
    assert found[0] == found[1]
    assert len(found[0]) < len(list(build(GRAPH).graph))


def test_a_rule_is_not_tried_elsewhere() -> None:
    tried = []

    class Rule:
        _target_pattern = _RULES[-1]._target_pattern  # ends in Gemm

        def try_rewrite(self, model: ir.Model, graph: ir.Graph, node: ir.Node) -> None:
            tried.append(node.op_type)

    rule, model = _AtItsOperator(Rule()), build(GRAPH)
    gemm = ir.Node("", "Gemm", [model.graph.inputs[0]] * 2)
    for node in (*model.graph, gemm):
        rule.try_rewrite(model, model.graph, node)
    assert tried == ["Gemm"]
