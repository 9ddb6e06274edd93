"""What onnxruntime-genai needs to run a package for the CPU: its configuration, and a graph for it.

``exporter/write.py`` calls :func:`write_genai` for a decoder of ``export --for cpu``. The graph,
``model_genai.onnx``, reads the data file of ``model.onnx`` and differs from it: the attention is
``GroupQueryAttention``, which appends to keys and values where they lie, in buffers that
onnxruntime-genai makes once, and rotates what it reads (``turned.py``); norms make the sums before
them (``summed.py``); the head is multiplied by for the last token only. That operator takes no
mask: :func:`_window` looks at what each mask of the graph lets through, and where that is not what
the operator computes, the configuration names ``model.onnx``, whose cache grows by copies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass

from ffmerge.errors import first_line
from ffmerge.exporter.flat import join_heads
from ffmerge.exporter.last_logits import LOGITS
from ffmerge.exporter.summed import sum_inside
from ffmerge.exporter.turned import opened, session_of, turn_inside
from ffmerge.files import write_json
from ffmerge.models import kv_cache
from ffmerge.models.kv_cache import KEPT, PAST
from ffmerge.models.manifest import GraphRecord, Skip
from ffmerge.models.probe import Array
from ffmerge.passes.graph.blocks import MICROSOFT
from ffmerge.passes.graph.rewrite import store
from ffmerge.passes.graph.tensors import is_op

CONFIG, GRAPH = "genai_config.json", "model_genai.onnx"
TYPE = "llama"  # its name of a decoder that reads ids, mask, positions and the past of each layer
LONG = 1 << 15  # tokens before the one whose mask is looked at, at most
SHORT, NEW = 3, 5  # tokens before, and read at once, where the rest of the mask is
HIDDEN = -1e20  # what is added to a score that does not count is below that
# of the largest logit: how far the two graphs may be apart, and in less bits, where what a product
# reads is rounded
CLOSE, CLOSE_ROUNDED = 1e-3, 0.1
ROUNDED = ("fp16", "q4f16", "int8-dynamic", "int8-static")
FLOAT = 1  # the accuracy level of MatMulNBits that does not round what is multiplied
LENGTH = 9  # tokens of the prompt that they are compared on
_INPUTS = ("input_ids", "attention_mask", "position_ids")
_POSITIONS = ("max_position_embeddings", "n_positions")


class _Plain(Exception):
    """The operator does not compute an attention; the message says why."""


def write_genai(folder: Path, record: GraphRecord, model: Any, dtype: str) -> Skip | None:
    """Write configuration and graph beside the graph of ``record``; ``model`` is PyTorch's.

    Returns why the graph is not written, or its attention does not rotate, if so.
    """
    graph, skip, length = GRAPH, None, _length(model.config)
    reason = _write_graph(folder, record, dtype, length, turn=True)
    if reason is not None:
        skip = Skip("genai", f"queries and keys are rotated before the attention: {reason}")
        reason = _write_graph(folder, record, dtype, length, turn=False)
    if reason is not None:
        graph, skip = record.path, Skip("genai", f"its cache grows by copies: {reason}")
    write_json(folder / CONFIG, _config(record, model, graph, length))
    return skip


def _write_graph(
    folder: Path, record: GraphRecord, dtype: str, length: int, turn: bool
) -> str | None:
    """Write the graph, in which attention rotates if it is to ``turn``; return why it cannot."""
    model = ir.load(folder / record.path)
    try:
        _share_buffers(model, length)
        if turn:
            turn_inside(model, length)
        sum_inside(model.graph)
        DeduplicateInitializersPass()(model)
        ir.save(model, folder / GRAPH)
        _check_same(folder / record.path, folder / GRAPH, record, dtype)
    except Exception as reason:  # ONNX Runtime's errors have no common class of their own
        (folder / GRAPH).unlink(missing_ok=True)
        return first_line(reason)
    return None


def _length(config: Any) -> int:
    """Return how many tokens a model takes, as far as its configuration tells."""
    for name in _POSITIONS:
        if getattr(config.get_text_config(), name, None):
            return int(getattr(config.get_text_config(), name))
    return LONG


def _config(record: GraphRecord, model: Any, graph: str, length: int) -> dict[str, Any]:
    config, generation = model.config.get_text_config(), model.generation_config
    past = [spec for spec in record.probe.inputs if kv_cache.is_past(spec.name)]
    read = [spec.name for spec in record.probe.inputs if spec.name in _INPUTS]
    ends = generation.eos_token_id or config.eos_token_id
    last = ends[0] if isinstance(ends, Sequence) else ends
    _, heads, _, size = past[0].shape
    ids = {
        "bos_token_id": _first(generation.bos_token_id, config.bos_token_id, 0),
        "eos_token_id": _first(ends, 0),
        "pad_token_id": _first(generation.pad_token_id, config.pad_token_id, last, 0),
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": size,
        "hidden_size": config.hidden_size,
        "inputs": {name: name for name in read}
        | {f"past_{part}_names": f"{PAST}%d.{part}" for part in ("key", "value")},
        "outputs": {"logits": LOGITS}
        | {f"present_{part}_names": f"{kv_cache.PRESENT}%d.{part}" for part in ("key", "value")},
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(past) // 2,
        "num_key_value_heads": heads,
    }
    model_part = {**ids, "context_length": length, "decoder": decoder, "type": TYPE}
    search = {
        "do_sample": bool(generation.do_sample),
        "max_length": length,
        "past_present_share_buffer": graph == GRAPH,
        "repetition_penalty": _first(generation.repetition_penalty, 1.0),
        "temperature": _first(generation.temperature, 1.0),
        "top_k": _first(generation.top_k, 50),
        "top_p": _first(generation.top_p, 1.0),
    }
    return {"model": {**model_part, "vocab_size": config.vocab_size}, "search": search}


def _first(*values: Any) -> Any:
    """Return the first value that is given."""
    return next(value for value in values if value is not None)


def _share_buffers(model: ir.Model, length: int) -> None:
    """Let attention append to the past where it lies, and the last token alone have logits.

    Raises:
        _Plain: an attention is none that the operator computes.
    """
    graph = model.graph
    join_heads(model)
    nodes = [node for node in graph if is_op(node, "Attention")]
    windows: dict[ir.Value, int] = {}
    for node in nodes:
        mask = _mask_of(node)
        if mask not in windows:
            windows[mask] = _window(model, mask, length)
    lengths = _lengths(graph)
    for node in nodes:
        attributes = [node.attributes[name] for name in ("kv_num_heads", "scale")
                      if name in node.attributes]  # fmt: skip
        attributes.append(ir.AttrInt64("num_heads", node.attributes["q_num_heads"].as_int()))
        attributes.append(ir.AttrInt64("local_window_size", windows[_mask_of(node)]))
        inputs = [*node.inputs[:3], *node.inputs[4:6], *lengths]
        new = ir.Node(
            MICROSOFT, "GroupQueryAttention", inputs, attributes, num_outputs=3, name=node.name
        )
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [new], node.outputs, new.outputs
        )
    model.opset_imports[MICROSOFT] = 1
    RemoveUnusedNodesPass()(model)
    for value in graph.inputs:
        if not kv_cache.is_past(str(value.name)):
            continue
        readers = {node.op_type for node, _ in value.uses()}
        if readers == {"Cast"}:
            raise _Plain("keys and values come in float32, and are read in float16")
        if readers != {"GroupQueryAttention"}:
            raise _Plain("the past is read elsewhere, too")
    _one_row(graph)


def _mask_of(node: ir.Node) -> ir.Value:
    """Return the mask of an attention with a past whose heads are joined.

    Raises:
        _Plain: it is another.
    """
    if len(node.inputs) < 6 or "q_num_heads" not in node.attributes or None in node.inputs[:6]:
        raise _Plain("an attention has no mask, no past, or heads apart")
    if {"softcap", "is_causal"} & set(node.attributes):
        raise _Plain("an attention has settings that are not looked at")
    mask = node.inputs[3]
    assert mask is not None
    return mask


def _window(model: ir.Model, mask: ir.Value, length: int) -> int:
    """Return how many tokens before it the mask lets a token read, -1: all.

    It is computed for one token behind a long past, and for several behind shorter ones.

    Raises:
        _Plain: which they are does not go by their distance, or they do not count alike.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    session = session_of(model, mask, inputs)
    past = max(min(length, LONG) - NEW, 1)
    row = _visible(session, model, past, 1)[0]
    count = int(row.sum())
    if count > past:
        count = past + NEW
    for before in (SHORT, min(count + SHORT, past)):
        found = _visible(session, model, before, NEW)
        here = np.arange(before, before + NEW)[:, None] - np.arange(before + NEW)
        if not np.array_equal(found, (here >= 0) & (here < count)):
            raise _Plain("a mask is no window of the tokens before")
    return -1 if count > past else count


def _visible(session: Any, model: ir.Model, past: int, new: int) -> Array:
    """Return (new, past + new): which tokens each of the ``new`` ones reads, in one row.

    Raises:
        _Plain: they do not count alike.
    """
    feeds = {}
    for value in session.get_inputs():
        feeds[value.name] = _fed(value.name, value.shape, past, new)
    (found,) = session.run(None, feeds)
    if found.dtype != bool:
        hidden = max(HIDDEN, float(np.finfo(found.dtype).min) / 2)  # of float16 there is no less
        if ((found != 0) & (found > hidden)).any():
            raise _Plain("scores are moved by where a token is")
        found = found == 0
    return np.asarray(np.broadcast_to(found, (1, 1, new, past + new))[0, 0])


def _fed(name: str, shape: Sequence[Any], past: int, new: int) -> Array:
    if kv_cache.is_past(name):
        return np.zeros((1, shape[1], past, shape[3]), np.float32)
    if name == "attention_mask":
        return np.ones((1, past + new), np.int64)
    if name == "position_ids":
        return np.arange(past, past + new)[None]
    return np.zeros((1, new), np.int64)


def _lengths(graph: ir.Graph) -> list[ir.Value]:
    """Return two inputs of the operator: tokens of each row less one, and of the longest row."""
    (mask,) = (value for value in graph.inputs if value.name == "attention_mask")
    one = store(graph, "genai.one", ir.tensor(np.array([1])))
    count = ir.node("ReduceSum", [mask, one], {"keepdims": 1})
    less = ir.node("Sub", [count.outputs[0], one])
    rows = ir.node("Cast", [less.outputs[0]], {"to": ir.DataType.INT32})
    width = ir.node("Shape", [mask], {"start": 1, "end": 2})
    single = ir.node("Squeeze", [width.outputs[0]])
    whole = ir.node("Cast", [single.outputs[0]], {"to": ir.DataType.INT32})
    nodes = [count, less, rows, width, single, whole]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"genai.length.{number}"
    graph.insert_before(graph[0], nodes)
    return [rows.outputs[0], whole.outputs[0]]


def _one_row(graph: ir.Graph) -> None:
    """Let the logits be those of the last token, where the graph can be told."""
    for value in list(graph.inputs):
        if value.name == KEPT:
            graph.inputs.remove(value)
            value.const_value = ir.tensor(np.array(1), name=KEPT)
            logits = next(each for each in graph.outputs if each.name == LOGITS)
            assert logits.shape is not None
            logits.shape = ir.Shape([logits.shape[0], 1, *logits.shape[2:]])


def _exact(path: Path) -> Any:
    """Return a session of a graph whose products of 4 and 8 bits round nothing but weights."""
    model, target = ir.load(path), path.with_name(f"exact_{path.name}")
    for node in model.graph:
        if (node.domain, node.op_type) == (MICROSOFT, "MatMulNBits"):
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FLOAT)
    try:
        ir.save(model, target)  # beside the data file
        return opened(target)
    finally:
        target.unlink(missing_ok=True)


def _check_same(one: Path, other: Path, record: GraphRecord, dtype: str) -> None:
    """Raise _Plain unless two graphs put out the same behind a prompt, and for a token more."""
    close = CLOSE_ROUNDED if dtype in ROUNDED else CLOSE
    for first, second in zip(_logits(one, record), _logits(other, record), strict=True):
        if np.abs(first - second).max() > close * np.abs(first).max():
            raise _Plain("with the operator the logits are others")


def _logits(path: Path, record: GraphRecord) -> list[Array]:
    """Return the last logits behind a prompt, and behind a token more; one graph is open then."""
    session, drawn, logits = _exact(path), record.probe.draw(0, batch=1), []
    names = [output.name for output in session.get_outputs()]
    cache = {name: array[:, :, :0] for name, array in drawn.items() if kv_cache.is_past(name)}
    for before, new in ((0, LENGTH), (LENGTH, 1)):
        feeds = {
            "input_ids": drawn["input_ids"].reshape(-1)[:1].repeat(new)[None] + np.arange(new) % 2,
            "attention_mask": np.ones((1, before + new), np.int64),
            "position_ids": np.arange(before, before + new)[None],
        }
        read = {name: feeds[name] for name in feeds if name in drawn}
        found = dict(zip(names, session.run(None, {**read, **cache}), strict=True))
        logits.append(found.pop(LOGITS)[:, -1])
        cache = {kv_cache.past_of(name): array for name, array in found.items()}
    return logits
