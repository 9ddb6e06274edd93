"""``share`` on whatever ONNX allows: old versions, functions, scopes, sequences, other domains."""

import time

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphs import build, normal, run
from onnx import helper, numpy_helper

from ffmerge.config import ShareConfig
from ffmerge.errors import InputError
from ffmerge.passes.graph.run import share_file, share_model

INT8, INT4, FP16 = (ShareConfig(dtype=dtype) for dtype in ("int8", "int4", "fp16"))


def saved(path, text, opset=17, ir_version=8, domains=(), **weights):
    """Save a graph written as text that onnx.checker accepts."""
    imports = ", ".join(f'"{name}": {version}' for name, version in (("", opset), *domains))
    graph, *functions = text.split("|")
    model = onnx.parser.parse_model(
        f"<ir_version: {ir_version}, opset_import: [{imports}]> g {graph}" + "".join(functions)
    )
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        if ir_version < 4:
            tensor = model.graph.initializer[-1]
            info = helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            model.graph.input.append(info)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def shared(source, config=ShareConfig()):
    target = source.with_name(f"{config.dtype}.{config.opset}.onnx")
    result = share_file(source, target, config)
    onnx.checker.check_model(str(target))
    return result, str(target)


PRODUCT = "(float[n,64] x) => (float[n,64] y) { y = MatMul(x, W) }"


@pytest.mark.parametrize(
    "functions",
    [
        '<domain: "my", opset_import: ["": 17]> F (a) => (o) '
        "{ two = Constant<value = float {2}>() o = Mul(a, two) }",
        '<domain: "my", opset_import: ["": 17, "my": 1]> F (a) => (o) { o = my.G(a) }'
        '<domain: "my", opset_import: ["": 17]> G (a) => (o) '
        "{ two = Constant<value = float {2}>() o = Mul(a, two) }",
    ],
    ids=["one", "one that calls another"],
)
def test_functions_that_are_never_called_go(tmp_path, functions):
    source = saved(
        tmp_path / "in.onnx", f"{PRODUCT}|{functions}", W=normal(64, 64), domains=[("my", 1)]
    )
    _, target = shared(source)
    assert not onnx.load(target).functions
    x = normal(3, 64, seed=1)
    assert np.array_equal(run(target, x=x)[0], run(str(source), x=x)[0])


def test_a_function_that_calls_itself_is_refused(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "my": 1]> g '
        "(float[2] x) => (float[2] y) { y = my.F(x) }"
        '<domain: "my", opset_import: ["": 17, "my": 1]> F (a) => (o) '
        "{ two = Constant<value = float {2}>() b = Mul(a, two) o = my.F(b) }"
    )
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(InputError, match="a function of the model cannot be inlined"):
        share_file(tmp_path / "in.onnx", tmp_path / "out.onnx")


@pytest.mark.parametrize("config", [ShareConfig(), INT8, INT4, FP16, ShareConfig(opset=17)])
def test_weights_of_ir_3_are_constants(tmp_path, config):
    """There each had to be an input, and what becomes one of a Constant would have to be, too."""
    weight = ", ".join(map(str, normal(64).tolist()))
    text = f"""(float[n,64] x) => (float[n,64] y) {{
        c = Constant<value = float[64] {{{weight}}}>() p = MatMul(x, W) q = MatMul(p, V)
        y = Add(q, c) }}"""
    w = normal(64, 64)
    source = saved(tmp_path / "in.onnx", text, 13, 3, W=w, V=w)
    result, target = shared(source, config)
    model = onnx.load(target)
    assert [value.name for value in model.graph.input] == ["x"] and model.ir_version >= 4
    assert result.bytes_after < 0.51 * result.bytes_before  # W and V are one
    x = normal(3, 64, seed=1)
    expected, got = run(str(source), x=x)[0], run(target, x=x)[0]
    bound = {None: 0, "int8": 0.05, "int4": 0.4, "fp16": 4e-3}[config.dtype]
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("domain", ["com.microsoft", "ai.onnx.ml", "nobody.knows"])
def test_opset_of_a_file_that_imports_other_domains(tmp_path, domain):
    source = saved(tmp_path / "in.onnx", PRODUCT, 11, W=normal(64, 64), domains=[(domain, 1)])
    _, target = shared(source, ShareConfig(dtype="int8", opset=17))
    imported = {each.domain: each.version for each in onnx.load(target).opset_import}
    assert (imported[""], imported[domain]) == (17, 1)


def test_opset_with_nodes_of_other_domains(tmp_path):
    text = """(float[n,64] x) => (float[n,64] y) {
        p = MatMul(x, W) q = com.microsoft.Gelu(p) r = MatMul(q, V) y = com.microsoft.Gelu(r) }"""
    weights = {"W": normal(64, 64), "V": normal(64, 64, seed=1)}
    source = saved(tmp_path / "in.onnx", text, 11, domains=[("com.microsoft", 1)], **weights)
    x = normal(3, 64, seed=1)
    expected = run(str(source), x=x)[0]
    for config in (ShareConfig(opset=17), ShareConfig(dtype="int8", opset=21)):
        got = run(shared(source, config)[1], x=x)[0]
        assert np.abs(got - expected).max() <= 0.05 * np.abs(expected).max()


OUTER = {
    "initializer": "(bool c, float[2,8] x) => (float[2,8] y) { IF }",
    "input": "(bool c, float[2,8] x, float[8,8] N) => (float[2,8] y) { IF }",
    "result": "(bool c, float[2,8] x) => (float[2,8] y) { N = Neg(M) IF }",
    "two scopes out": """(bool c, float[2,8] x) => (float[2,8] y) {
        y = If(c) <then_branch = o () => (float[2,8] v) { IFv },
                  else_branch = u () => (float[2,8] w) { w = Neg(x) }> }""",
}
IF = """ = If(c) <then_branch = t () => (float[2,8] a) { a = MatMul(x, N) },
                  else_branch = e () => (float[2,8] b) { b = Neg(x) }>"""


@pytest.mark.parametrize("outer", OUTER)
def test_a_tensor_of_a_branch_under_an_outer_name_is_refused(tmp_path, outer):
    """ONNX Runtime reads the outer one; by the rule of scopes it is the inner."""
    text = OUTER[outer].replace("IFv", f"v{IF}").replace("IF", f"y{IF}")
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    around = numpy_helper.from_array(normal(8, 8), "M" if outer == "result" else "N")
    if outer != "input":
        model.graph.initializer.append(around)
    inner = numpy_helper.from_array(normal(8, 8, seed=1), "N")
    _innermost(model.graph).initializer.append(inner)
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(InputError, match="'N' is defined in a subgraph and around it"):
        share_file(tmp_path / "in.onnx", tmp_path / "out.onnx")


def _innermost(graph):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "then_branch":
                return _innermost(attribute.g)
    return graph


def test_branches_beside_each_other_may_use_one_name(tmp_path):
    text = """(bool c, float[2,8] x) => (float[2,8] y) {
        y = If(c) <then_branch = t () => (float[2,8] a) {a = MatMul(x, N)},
                   else_branch = e () => (float[2,8] a) {a = MatMul(x, N)}> }"""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for seed, attribute in enumerate(model.graph.node[0].attribute):
        attribute.g.initializer.append(numpy_helper.from_array(normal(8, 8, seed=seed), "N"))
    onnx.save(model, tmp_path / "in.onnx")
    share_file(tmp_path / "in.onnx", tmp_path / "out.onnx")
    for c in (True, False):
        feeds = {"c": np.array(c), "x": normal(2, 8)}
        one, other = (run(str(tmp_path / name), **feeds)[0] for name in ("in.onnx", "out.onnx"))
        assert np.array_equal(one, other)


@pytest.mark.parametrize("config", [ShareConfig(), INT8, INT4, FP16])
@pytest.mark.parametrize(
    "nodes",
    [
        "s = SplitToSequence<axis = 0>(p) y = SequenceAt(s, i)",
        "s = SequenceConstruct(p, p) y = ConcatFromSequence<axis = 0>(s)",
        "s = SequenceEmpty<dtype = 1>() t = SequenceInsert(s, p) y = SequenceAt(t, i)",
        "o = Optional(p) y = OptionalGetElement(o)",
        "s = SequenceConstruct(p) o = Optional(s) t = OptionalGetElement(o) y = SequenceAt(t, i)",
    ],
)
def test_sequences_and_optional_values_keep_their_types(tmp_path, nodes, config):
    text = f"(float[n,64] x) => (float[m,64] y) {{ p = MatMul(x, W) {nodes} }}"
    source = saved(tmp_path / "in.onnx", text, W=normal(64, 64), i=np.array(0))
    _, target = shared(source, config)
    x = normal(3, 64, seed=1)
    expected, got = run(str(source), x=x)[0], run(target, x=x)[0]
    bound = {None: 0, "int8": 0.05, "int4": 0.4, "fp16": 4e-3}[config.dtype]
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("config", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("(float[5,1,64] x) => (float[5,1,1,64] y) { y = LSTM<hidden_size = 64>(x, W, V) }",
         {"W": (1, 256, 64), "V": (1, 256, 64)}),
        ("(float[5,1,64] x) => (float[5,1,1,64] y) { y = GRU<hidden_size = 64>(x, W, V) }",
         {"W": (1, 192, 64), "V": (1, 192, 64)}),
        ("(float[1,16,8,8] x) => (float[1,16,m,k] y) { y = ConvTranspose(x, W) }",
         {"W": (16, 16, 3, 3)}),
        ('(float[2,64] x) => (float[2,64] y) { y = Einsum<equation = "ij,jk->ik">(x, W) }',
         {"W": (64, 64)}),
        ("(float[2,64] x) => (float[2,64] y) { y = com.microsoft.FusedMatMul(x, W) }",
         {"W": (64, 64)}),
        ("(float[2,64] x) => (float[2,64] y) { y = my.F(x, W) }"
         '|<domain: "my", opset_import: ["": 17]> F (a, w) => (o) { o = MatMul(a, w) }',
         {"W": (64, 64)}),
        ("(float[2,4096] x) => (float[2,4096] y) { y = Mul(x, W) }", {"W": (4096,)}),
    ],
    ids=["LSTM", "GRU", "ConvTranspose", "Einsum", "fused", "function", "vector"],
)  # fmt: skip
def test_every_weight_that_stays_float_is_named(tmp_path, text, weights, config):
    given = {name: normal(*shape) for name, shape in weights.items()}  # W and V are equal
    domains = [("com.microsoft", 1), ("my", 1)]
    source = saved(tmp_path / "in.onnx", text, domains=domains, **given)
    result, _ = shared(source, config)
    assert {skip.name for skip in result.skipped} >= set(weights)
    assert all(skip.reason.startswith("FLOAT: ") for skip in result.skipped)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("config", "bound", "part"), [(INT8, 0.06, 0.65), (INT4, 0.4, 0.4)])
def test_files_of_16_bits_are_quantized(dtype, config, bound, part):
    """Lookups, products that share an input and a weight, a weight that is also read otherwise."""
    kind = {"float16": "float16", "bfloat16": "bfloat16"}[dtype]
    text = f"""(int64[b,s] ids) => ({kind}[b,s,96] y) {{
        x = Gather(E, ids) a = MatMul(x, W) r = Relu(a) p = MatMul(r, V) q = MatMul(r, U)
        d = Add(p, q) h = MatMul(d, W) t = Transpose<perm = [1, 0]>(E) y = MatMul(h, t) }}"""
    shapes = {"E": (96, 64), "W": (64, 64), "V": (64, 64), "U": (64, 64)}
    weights = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        weights[name] = (normal(*shape, seed=seed) / 8).astype(dtype)
    model = build(text, 20, **weights)
    result = share_model(model, dtype=config.dtype)
    assert not result.skipped and result.bytes_after < part * result.bytes_before
    ids = np.arange(10).reshape(2, 5)
    x = weights["E"].astype("f")[ids]
    a = np.maximum(x @ weights["W"].astype("f"), 0)
    d = a @ weights["V"].astype("f") + a @ weights["U"].astype("f")
    expected = d @ weights["W"].astype("f") @ weights["E"].astype("f").T
    if dtype == "bfloat16":  # which ONNX Runtime's CPU provider does not add
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        return
    (got,) = run(model, ids=ids)
    assert got.dtype == np.float16
    assert np.abs(got - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("config", [ShareConfig(), INT8, INT4, FP16, ShareConfig(opset=21)])
def test_axes_documentation_and_metadata_stay(tmp_path, config):
    text = "(float[b,tokens,64] x) => (float[b,tokens,64] y) { p = MatMul(x, W) y = Relu(p) }"
    saved(tmp_path / "in.onnx", text, ir_version=10, W=normal(64, 64))
    model = onnx.load(tmp_path / "in.onnx")
    model.doc_string, model.domain, model.model_version = "of the model", "com.acme", 7
    helper.set_model_props(model, {"labels": "a,b"})
    graph = model.graph
    graph.doc_string = "of the graph"
    graph.metadata_props.add(key="author", value="me")
    for value in (*graph.input, *graph.output):
        value.doc_string = f"of {value.name}"
        value.metadata_props.add(key="unit", value="m")
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    onnx.save(model, tmp_path / "in.onnx")
    _, target = shared(tmp_path / "in.onnx", config)
    after = onnx.load(target)
    for key in ("doc_string", "domain", "model_version", "metadata_props"):
        assert getattr(after, key) == getattr(model, key)
    for key in ("name", "doc_string", "metadata_props", "input", "output"):
        assert getattr(after.graph, key) == getattr(graph, key)


@pytest.mark.parametrize("dtype", ["int8", "int4", "fp16"])
def test_an_old_opset_is_refused_with_what_helps(tmp_path, dtype):
    source = saved(tmp_path / "in.onnx", PRODUCT, 11, W=normal(64, 64))
    with pytest.raises(InputError, match="the model has 11: add --opset 17"):
        share_file(source, tmp_path / "out.onnx", ShareConfig(dtype=dtype))
    shared(source, ShareConfig(dtype=dtype, opset=17))


DEPTH = 30  # about as deep as protobuf parses


@pytest.mark.parametrize("config", [ShareConfig(), INT8, INT4, FP16, ShareConfig(opset=21)])
def test_deep_nesting(tmp_path, config):
    """Branches in each other, each with a product, three weights for all."""
    weights = {f"W{i}": normal(32, 32, seed=i % 3) for i in range(DEPTH)}
    source = saved(
        tmp_path / "in.onnx",
        f"(float[2,32] x, bool c) => (float[2,32] y0) {{ {_nested(0)} }}",
        **weights,
    )
    start = time.process_time()
    _, target = shared(source, config)
    assert time.process_time() - start < 10
    for c in (True, False):
        feeds = {"x": normal(2, 32), "c": np.array(c)}
        expected, got = run(str(source), **feeds)[0], run(target, **feeds)[0]
        bound = {None: 1e-6, "int8": 0.06, "int4": 0.4, "fp16": 4e-3}[config.dtype]
        assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


def _nested(level):
    """Return the nodes that compute y{level} by a product, and by all that lies deeper."""
    product, deeper = f"p{level} = MatMul(x, W{level})", level + 1
    if deeper == DEPTH:
        return f"{product} y{level} = Neg(p{level})"
    return f"""{product} d{level} = If(c)
        <then_branch = t{level} () => (float[2,32] y{deeper}) {{ {_nested(deeper)} }},
         else_branch = e{level} () => (float[2,32] n{level}) {{ n{level} = Neg(p{level}) }}>
        y{level} = Sub(d{level}, p{level})"""


def _seconds(model, dtype=None):
    start = time.process_time()
    share_model(model, dtype=dtype)
    return time.process_time() - start


def _alike(count):
    """Return a chain of products with matrices that differ in one element, which no sample sees."""
    weights = {}
    for i in range(count):
        weights[f"W{i}"] = np.zeros((32, 32), np.float32)
        weights[f"W{i}"][5, 7] = i + 1
    return _chain("{y} = MatMul({x}, W{i})", count, **weights)


def _chain(node, count, **weights):
    nodes = []
    for i in range(count):
        nodes.append(node.format(x=f"v{i}", y=f"v{i + 1}", i=i))
    text = f"(float[4,32] v0, bool c) => (float[4,32] v{count}) {{ {' '.join(nodes)} }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> g {text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return ir.from_proto(model)


CHAINS = {
    "constants": "c{i} = Constant<value = float {{{i}.5}}>() {y} = Add({x}, c{i})",
    "branches": """{y} = If(c) <then_branch = t () => (float[4,32] a) {{ a = Neg({x}) }},
                                else_branch = e () => (float[4,32] b) {{ b = Sin({x}) }}>""",
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("alike", None), ("constants", None), ("branches", None), ("branches", "fp16")],
)
def test_time_grows_with_size_and_not_with_its_square(kind, dtype):
    """4 times the nodes take 3.5 to 5.3 times as long; of tensors alike it was 18 times.

    The least of two: in a process that holds much, garbage collection alone takes half a second.
    """
    times = []
    for count in (150, 600):
        models = [
            _alike(count) if kind == "alike" else _chain(CHAINS[kind], count) for _ in range(2)
        ]
        times.append(min(_seconds(model, dtype) for model in models))
    assert times[1] < 9 * times[0] + 0.5


def test_equal_tensors_among_many_that_only_look_so():
    """More candidates than are compared one by one: each matrix, a copy and its transpose."""
    weights, nodes = {}, []
    for i in range(20):
        matrix = np.zeros((32, 32), np.float32)
        matrix[5, 7] = i + 1
        for name, array in ((f"A{i}", matrix), (f"B{i}", matrix), (f"C{i}", matrix.T)):
            weights[name] = np.ascontiguousarray(array)
            nodes.append(f"y{name} = MatMul(x, {name})")
    outputs = ", ".join(f"float[4,32] y{name}" for name in weights)
    text = f"(float[4,32] x) => ({outputs}) {{ {' '.join(nodes)} }}"
    model = build(text, **weights)
    x = normal(4, 32)
    result = share_model(model)
    assert result.bytes_after == result.bytes_before // 3
    for got, name in zip(run(model, x=x), weights, strict=True):
        assert np.allclose(got, x @ weights[name], rtol=0, atol=1e-5)  # measured 0
