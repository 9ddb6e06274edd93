"""Random graphs with planted copies: same results, nothing stored twice, same bytes again."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ffmerge.passes.graph.audit import audit
from ffmerge.passes.graph.run import share_model

D, SEEDS = 8, 3
# Gemm against MatMul: up to 12 products of width 8, each within 1 by Tanh; seen 0.0
GEMM = 1e-6
FORMS = ("plain", "transposed", "transpose node", "cast", "reshape", "identity", "bias", "gather")
PLACES = ("initializer", "constant", "branch", "deep branch", "function")
STORED = {
    "transposed": np.transpose,
    "transpose node": np.transpose,
    "bias": lambda array: array[0],
    "cast": lambda array: array.astype(np.float16),
    "reshape": lambda array: array.reshape(2, 4, D),
}
STEP = st.tuples(st.integers(0, SEEDS - 1), st.sampled_from(FORMS), st.sampled_from(PLACES))


def weight(seed):
    return np.random.default_rng(seed).standard_normal((D, D)).astype(np.float16).astype("f")


def planted(steps):
    """Return a model in which each step reads a weight in its form, stored in its place."""
    initializers, nodes, functions, current = [], [], [], "x"
    for index, (seed, form, place) in enumerate(steps):
        inner, value = [], f"w{index}"
        array = STORED.get(form, np.asarray)(weight(seed))
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), value)
        if place == "initializer":
            initializers.append(tensor)
        else:
            inner.append(helper.make_node("Constant", [], [value], value=tensor))
        if form == "reshape":
            shape = numpy_helper.from_array(np.array([D, -1]), f"s{index}")
            inner.append(helper.make_node("Constant", [], [f"s{index}"], value=shape))
        view = {
            "transpose node": helper.make_node("Transpose", [value], [f"v{index}"], perm=[1, 0]),
            "cast": helper.make_node("Cast", [value], [f"v{index}"], to=TensorProto.FLOAT),
            "reshape": helper.make_node("Reshape", [value, f"s{index}"], [f"v{index}"]),
            "identity": helper.make_node("Identity", [value], [f"v{index}"]),
        }.get(form)
        if view:
            inner.append(view)
        read = f"v{index}" if view else value
        source = "h" if place == "function" else current
        if form == "bias":
            inner.append(helper.make_node("Add", [source, read], [f"m{index}"]))
        elif form == "gather":
            inner.append(helper.make_node("Gather", [read, "ids"], [f"g{index}"]))
            inner.append(helper.make_node("Add", [source, f"g{index}"], [f"m{index}"]))
        else:
            inner.append(helper.make_node("MatMul", [source, read], [f"m{index}"]))
        inner.append(helper.make_node("Tanh", [f"m{index}"], [f"o{index}"]))
        nodes += wrapped(inner, index, place, current, functions)
        current = f"o{index}"
    outputs = [helper.make_tensor_value_info(current, TensorProto.FLOAT, None)]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, D]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [2]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return model


def wrapped(inner, index, place, current, functions):
    """Return the nodes of a step as they are, in both branches of an If, or as a function."""
    if place in ("branch", "deep branch"):
        for level in range(2 if place == "deep branch" else 1):
            branches = {}
            for branch in ("then", "else"):
                prefix = f"{branch}{level}_"
                nodes = [renamed(node, prefix) for node in inner]
                last = nodes[-1].output[0]
                out = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
                branches[f"{branch}_branch"] = helper.make_graph(nodes, prefix, [], [out])
            inner = [helper.make_node("If", ["c"], [f"o{index}"], **branches)]
        return inner
    if place == "function":
        opsets = [helper.make_opsetid("", 20)]
        functions.append(
            helper.make_function("f", f"F{index}", ["h", "ids"], [f"o{index}"], inner, opsets)
        )
        return [helper.make_node(f"F{index}", [current, "ids"], [f"o{index}"], domain="f")]
    return inner


def renamed(node, prefix):
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    own = {"w", "s", "v", "m", "g", "o"}
    copy.output[:] = [prefix + name for name in node.output]
    copy.input[:] = [
        name if name in ("x", "ids", "c") or name[0] not in own or name in renamed.outer
        else prefix + name
        for name in node.input
    ]  # fmt: skip
    return copy


renamed.outer = set()


def built(steps):
    """Names of earlier steps and of main initializers are read from inside branches as they are."""
    renamed.outer = {f"o{i}" for i in range(len(steps))}
    renamed.outer |= {f"w{i}" for i, step in enumerate(steps) if step[2] == "initializer"}
    return ir.from_proto(planted(steps))


def feeds():
    rng = np.random.default_rng(9)
    x = rng.standard_normal((3, 2, D)).astype("f")
    return [{"x": x, "ids": np.array([1, 5]), "c": np.array(c)} for c in (True, False)]


@settings(
    max_examples=120, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(st.lists(STEP, min_size=2, max_size=12))
def test_sharing_keeps_results_and_leaves_one_of_each(tmp_path_factory, steps):
    before = [run(built(steps), **feed)[0] for feed in feeds()]
    result = share_model(built(steps))
    gemm = any(node.op_type == "Gemm" for node in result.model.graph)
    for one, feed in zip(before, feeds(), strict=True):
        after = run(result.model, **feed)[0]
        if gemm:
            np.testing.assert_allclose(after, one, rtol=0, atol=GEMM)
        else:
            assert after.tobytes() == one.tobytes()
    once = ir.to_proto(result.model).SerializeToString()
    path = tmp_path_factory.mktemp("p") / "m.onnx"
    path.write_bytes(once)
    found = audit(path)
    told = {skip.name for skip in result.skipped}
    assert all(told & set(duplicate.names) for duplicate in found.duplicates), found.duplicates
    assert not found.duplicates or all(d.kind == "transposed" for d in found.duplicates)
    assert (
        ir.to_proto(share_model(ir.from_proto(onnx.load(path))).model).SerializeToString() == once
    )


HASHED = [
    [(seed, form, place) for form in FORMS for seed in (0, 1)][start : start + 8]
    for place in PLACES
    for start in (0, 8)
]


def digests():
    return [
        hashlib.sha256(ir.to_proto(share_model(built(s)).model).SerializeToString()).hexdigest()
        for s in HASHED
    ]


@pytest.mark.parametrize("seed", ["1", "77"])
def test_the_bytes_do_not_depend_on_the_hash_seed(seed):
    code = "import test_properties; print(test_properties.digests())"
    paths = [os.path.dirname(__file__), *(p for p in sys.path if p)]
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert child.stdout.strip() == str(digests())
