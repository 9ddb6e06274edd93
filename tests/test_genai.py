"""``genai_config.json`` and ``model_genai.onnx``: a package for the CPU on onnxruntime-genai."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import build, ops
from test_fused import DECODERS, LAYERS, SIZES, WINDOW, drawn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
)

from ffmerge.config import ExportConfig
from ffmerge.exporter import genai
from ffmerge.exporter.genai import CONFIG, GRAPH, _Plain, _window
from ffmerge.exporter.package import export
from ffmerge.passes.graph import resident
from ffmerge.passes.graph.audit import audit
from ffmerge.tables import package_table

FAST = ("Qwen3", "Mistral")  # they write unlike ids
PROMPT, NEW = [5, 6, 7, 8, 9, 10, 11, 12, 13], 12
TURNED = ("Qwen3", "Mistral", "Gemma 3")  # the others have narrower heads than its kernel rotates
WINDOWS = {"Gemma 3": {WINDOW, -1}, "Mistral": {WINDOW}}


def packed(name: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = drawn(DECODERS[name]())
    return model, export(model, folder / "package", ExportConfig(profile="cpu", **settings))


def wanted(model: Any) -> list[int]:
    """Return the ids that PyTorch puts first behind the prompt; none ends it."""
    ids = torch.tensor([PROMPT])
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=NEW, min_new_tokens=NEW,
    )  # fmt: skip
    return [int(each) for each in found[0, len(PROMPT) :]]


def greedy(path: Path, room: int) -> list[int]:
    """Return what a graph writes into one buffer for each key and value, as the library runs it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    buffers = {}
    for given in session.get_inputs():
        if given.name.startswith("past_key_values."):
            empty = np.full((1, given.shape[1], room, given.shape[3]), 7, np.float32)
            buffers[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
    length, ids, found = 0, PROMPT, []
    while len(found) < NEW:
        binding = session.io_binding()
        places = np.arange(length, length + len(ids))[None]
        length += len(ids)
        binding.bind_cpu_input("input_ids", np.array([ids]))
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        if any(given.name == "position_ids" for given in session.get_inputs()):
            binding.bind_cpu_input("position_ids", places)
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        assert logits.shape[:2] == (1, 1)  # of the last token only
        row = logits[0, -1]
        row[[1, 2]] = -np.inf  # as no id ends it
        ids = [int(row.argmax())]
        found += ids
    return found


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS]
)
def test_what_is_written_into_one_buffer_is_what_pytorch_writes(name: str, tmp_path: Path) -> None:
    """A prompt that is longer than the window, and a buffer with rubbish behind the tokens."""
    model, package = packed(name, tmp_path)
    graph = ir.load(package.path / GRAPH)
    attention = [node for node in graph.graph if node.op_type == "GroupQueryAttention"]
    assert len(attention) == LAYERS and "Attention" not in ops(graph)
    windows = {node.attributes["local_window_size"].as_int() for node in attention}
    assert windows == WINDOWS.get(name, {-1})
    rotated = {node.attributes.get_int("do_rotary", 0) for node in attention}
    assert rotated == {int(name in TURNED)}
    told = [skip.reason for skip in package.manifest.skipped if skip.name == "genai"]
    assert bool(told) == (name not in (*TURNED, "GPT-2"))  # which rotates nothing
    expected = wanted(model)
    assert greedy(package.path / GRAPH, 64) == expected
    held = {file.path for file in package.manifest.files}
    assert {GRAPH, CONFIG} <= held and not package.manifest.variants
    assert audit(package.path).ok
    told = json.loads((package.path / CONFIG).read_text())
    decoder = told["model"]["decoder"]
    sizes = {given.name: given.shape for given in graph.graph.inputs}
    _, heads, _, size = sizes["past_key_values.0.key"]
    assert (decoder["num_key_value_heads"], decoder["head_size"]) == (heads, size)
    assert {*decoder["inputs"].values()} & {*sizes} == {
        given for given in sizes if not given.startswith("past_")
    }
    assert decoder["filename"] == GRAPH and told["search"]["past_present_share_buffer"]


PYTHON = os.environ.get("FFMERGE_GENAI", sys.executable)  # one that has onnxruntime-genai
WRITE = """
import json, sys
import numpy as np
import onnxruntime_genai
package, prompt, whole = json.loads(sys.argv[1])
parameters = onnxruntime_genai.GeneratorParams(model := onnxruntime_genai.Model(package))
parameters.set_search_options(max_length=whole, min_length=whole, do_sample=False)
generator = onnxruntime_genai.Generator(model, parameters)
generator.append_tokens(np.array([prompt], np.int32))
while not generator.is_done():
    generator.generate_next_token()
print([int(each) for each in generator.get_sequence(0)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_the_library_writes_what_pytorch_writes(name: str, tmp_path: Path) -> None:
    """In a process of its own: it loads another ONNX Runtime."""
    if subprocess.run([PYTHON, "-c", "import onnxruntime_genai"], capture_output=True).returncode:
        missing = "onnxruntime-genai is not installed, in FFMERGE_GENAI or here"
        (pytest.fail if "FFMERGE_GENAI" in os.environ else pytest.skip)(missing)
    model, package = packed(name, tmp_path)
    given = json.dumps([str(package.path), PROMPT, len(PROMPT) + NEW])
    found = subprocess.run([PYTHON, "-c", WRITE, given], capture_output=True, check=True)
    told = json.loads((package.path / CONFIG).read_text())["model"]
    model.generation_config.eos_token_id = told["eos_token_id"]
    assert json.loads(found.stdout) == [*PROMPT, *wanted(model)]


def test_in_less_bits_it_reads_the_same_data_file(tmp_path: Path) -> None:
    _, package = packed("Llama", tmp_path, dtype="int8")
    assert audit(package.path).ok
    (reason,) = [skip.reason for skip in package.manifest.skipped if skip.name == "genai"]
    assert reason.startswith("queries and keys are rotated before the attention: ")  # heads of 8
    one, other = (ir.load(package.path / name) for name in ("model.onnx", GRAPH))
    held = [
        {v.const_value.location for v in each.graph.initializers.values()
         if isinstance(v.const_value, ir.ExternalTensor)}
        for each in (one, other)
    ]  # fmt: skip
    assert held[0] == held[1] == {"model.onnx_data"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dtype": "fp16"}, "its cache grows by copies: keys and values come in float32"),
        ({"dtype": "fp32,q8"}, "it runs packages of one precision"),
    ],
)
def test_where_it_is_slower_or_not_there_is_told(
    given: dict[str, str], reason: str, tmp_path: Path
) -> None:
    _, package = packed("Llama", tmp_path, **given)
    assert not list(package.path.rglob(GRAPH))
    (told,) = [skip.reason for skip in package.manifest.skipped if skip.name == "genai"]
    assert told.startswith(reason)
    names, values = ([*map(str, column.cells)] for column in package_table(package).columns)
    assert values[names.index("onnxruntime-genai")] == told


def test_a_tied_head_is_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored by columns and may be given, so that nothing is packed, for the library too."""
    monkeypatch.setattr(resident, "LARGE", 0)
    model, package = packed("GPT-2", tmp_path)
    for name in ("model.onnx", GRAPH):
        table = ir.load(package.path / name).graph.initializers["transformer.wte.weight"]
        uses = {(node.op_type, index) for node, index in table.uses()}
        assert uses == {("Gather", 0), ("MatMul", 1)} and table.is_graph_input()
        assert np.array_equal(table.const_value.numpy().T, model.lm_head.weight.detach().numpy())
    assert greedy(package.path / GRAPH, 64) == wanted(model)
    assert audit(package.path).ok


def test_heads_that_lie_apart_are_turned_for_the_operator(tmp_path: Path) -> None:
    """Phi rotates a part of each head: no operator does, and heads lie apart behind it."""
    model = drawn(PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.5)))
    package = export(model, tmp_path / "package", ExportConfig(profile="cpu"))
    found = ops(ir.load(package.path / GRAPH))
    assert found["GroupQueryAttention"] == LAYERS and "Attention" not in found
    assert not package.manifest.skipped
    assert greedy(package.path / GRAPH, 64) == wanted(model)


def test_only_a_decoder_for_the_cpu_has_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    bert = BertForSequenceClassification(BertConfig(vocab_size=97, num_attention_heads=4, **sizes))
    export(bert.eval(), tmp_path / "bert", ExportConfig(profile="cpu"))
    assert not (tmp_path / "bert" / CONFIG).exists()


def test_a_graph_that_is_off_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another window than the mask's is seen: the cache then grows by copies, and it is said."""
    monkeypatch.setattr(genai, "_window", lambda *_: 2)
    _, package = packed("Llama", tmp_path)
    assert not (package.path / GRAPH).exists()
    (reason,) = [skip.reason for skip in package.manifest.skipped if skip.name == "genai"]
    assert reason == "its cache grows by copies: with the operator the logits are others"
    told = json.loads((package.path / CONFIG).read_text())
    assert told["model"]["decoder"]["filename"] == "model.onnx"
    assert not told["search"]["past_present_share_buffer"]


MASK = """(int64[1,n] attention_mask, int64[1,t] position_ids)
    => (bool[t,n] m) { zero = Constant<value_int=0>() one = Constant<value_int=1>()
    s = Shape<start=1, end=2>(attention_mask) n = Squeeze(s) k = Range(zero, n, one)
    axis = Constant<value_ints=[0]>() q0 = Squeeze(position_ids, axis)
    ax1 = Constant<value_ints=[1]>() q = Unsqueeze(q0, ax1) BODY }"""


def mask(body: str, kind: str = "bool") -> tuple[ir.Model, ir.Value]:
    model = build(MASK.replace("BODY", body).replace("bool[t,n] m", f"{kind}[t,n] m"))
    return model, model.graph.outputs[0]


@pytest.mark.parametrize(
    ("body", "window"),
    [
        ("m = LessOrEqual(k, q)", -1),
        ("d = Sub(q, k) c = LessOrEqual(k, q) w = Constant<value_int=5>() l = Less(d, w) "
         "m = And(c, l)", 5),
        ("d = Sub(q, k) c = LessOrEqual(k, q) w = Constant<value_int=1>() l = Less(d, w) "
         "m = And(c, l)", 1),
    ],
)  # fmt: skip
def test_a_window_is_read_from_the_mask(body: str, window: int) -> None:
    assert _window(*mask(body), length=4096) == window
    assert _window(*mask(body), length=40) == window


@pytest.mark.parametrize(
    "body",
    [
        "m = GreaterOrEqual(k, q)",
        "a = Abs(k) m = GreaterOrEqual(a, a)",  # both ways
        "w = Constant<value_int=4>() a = Div(k, w) b = Div(q, w) m = Equal(a, b)",  # in chunks
        "c = LessOrEqual(k, q) w = Constant<value_int=3>() x = GreaterOrEqual(k, w) m = And(c, x)",
    ],
)
def test_other_masks_are_none_of_a_window(body: str) -> None:
    with pytest.raises(_Plain, match="no window"):
        _window(*mask(body), length=4096)


def test_scores_that_are_moved_are_no_mask() -> None:
    """A bias for each distance, as ALiBi has it."""
    model, value = mask("d = Sub(k, q) b = Cast<to=1>(d) m = Identity(b)", "float")
    with pytest.raises(_Plain, match="moved by where"):
        _window(model, value, length=4096)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_scores_that_are_hidden_by_the_lowest_number_are_a_mask(dtype: Any) -> None:
    """That of float16 is -65504, far from float32's."""
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    text = MASK.replace("BODY", "c = LessOrEqual(k, q) m = Where(c, shown, hidden)")
    text = text.replace("bool[t,n] m", f"{kind}[t,n] m")
    model = build(text, shown=np.zeros((), dtype), hidden=np.array(np.finfo(dtype).min))
    assert _window(model, model.graph.outputs[0], length=4096) == -1
