"""Mutated inputs of every kind: does a command ever end otherwise than well or in one sentence?

``python benchmarks/fuzz.py [--cases 10000] [--only KIND] [--json FILE]`` changes one file of a
small good input (a graph, a manifest, a configuration, weights, arrays, a table, a picture, a
tokenizer, a recipe), runs a command on it in a child process, and counts how it ended. Wrong are
exit code 3, an exception, more than one sentence, a process that dies, one that takes longer than
20 seconds, and a file that is opened outside the input's folder. Prints a table, and every case
that is wrong; a case is known again by its number.
"""

import argparse
import gc
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

SECONDS = 20
GRACE = 5  # seconds more until a child is killed in which no alarm rings
CHUNK = 50  # cases of one child process
MEMORY = 12 << 30  # bytes of addresses a child may have
SECRET = "secret"  # name of the folder beside the inputs that nothing may open
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 1e308, float("nan"), "", "x", f"../{SECRET}/file",
    "/etc/passwd", "a" * 5000, "[/]", "\x1b[2J", [], {}, [[]], {"a": 1}, ["x", 3],
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A kind of input: the file that is changed, how, and commands with ``{in}`` and ``{out}``."""

    kind: str
    file: str
    mutate: Callable[[bytes, np.random.Generator], bytes]
    commands: tuple[str, ...]


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="a kind of input")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(arguments.first, arguments.first + arguments.cases)
        for number, kind, outcome in run(Path(folder), numbers, arguments.only):
            counts[kind][outcome.partition(":")[0]] += 1
            if outcome.partition(":")[0] not in RIGHT:
                print(f"case {number}, {kind}: {outcome}", flush=True)
    seconds = time.perf_counter() - start
    for kind, counted in counts.items():
        print(f"{kind:12}", ", ".join(f"{what} {count}" for what, count in counted.most_common()))
    print(f"{arguments.cases} cases in {seconds:.0f} s")
    if arguments.json:
        figures = {"cases": arguments.cases, "seconds": round(seconds), "counts": counts}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


RIGHT = ("done", "a check failed", "one sentence")


def run(folder: Path, numbers: Iterable[int], only: str = "") -> list[tuple[int, str, str]]:
    """Return number, kind and outcome of the cases."""
    torch.set_num_threads(1)  # a child that is forked would wait for threads that it has not,
    gc.collect()  # as where it frees a session of ONNX Runtime that nothing here holds any more
    gc.freeze()
    targets = write_inputs(folder / "inputs", only)
    (folder / SECRET).mkdir()
    (folder / SECRET / "file").write_text("nobody is to read this")
    same = [replace(target, mutate=_unchanged) for target in targets]
    for _, kind, outcome in _in_child(folder, same, [*range(len(same))]):
        if outcome not in ("done", "a check failed"):
            raise RuntimeError(f"the unchanged {kind} is no good input: {outcome}")
    found = []
    pending = list(numbers)
    while pending:
        chunk, pending = pending[:CHUNK], pending[CHUNK:]
        found += _in_child(folder, targets, chunk)
    gc.unfreeze()
    return found


def _in_child(
    folder: Path, targets: list[Target], numbers: list[int]
) -> list[tuple[int, str, str]]:
    """Return the outcomes of some cases; where a child dies, each is run in one of its own.

    An alarm in the child ends what takes too long, unless native code never comes back: then the
    child is killed from here.
    """
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, context) as pool:
        children = pool.submit(_cases, folder, targets, numbers)
        try:
            return children.result(timeout=len(numbers) * (SECONDS + GRACE))
        except BrokenProcessPool:
            ended = "died"
        except TimeoutError:
            ended = "took too long"
            for child in multiprocessing.active_children():
                child.kill()
    if len(numbers) == 1:
        target = targets[numbers[0] % len(targets)]
        return [(numbers[0], target.kind, ended)]
    found = []
    for number in numbers:
        found += _in_child(folder, targets, [number])
    return found


def _cases(folder: Path, targets: list[Target], numbers: list[int]) -> list[tuple[int, str, str]]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    opened: list[str] = []
    secret = str(folder / SECRET)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).startswith(secret):
            opened.append(str(args[0]))

    sys.addaudithook(watch)
    found = []
    for number in numbers:
        target = targets[number % len(targets)]
        outcome = _case(folder, target, number)
        if opened:
            outcome = f"opened {opened[0]}"
            opened.clear()
        found.append((number, target.kind, outcome))
    return found


def _case(folder: Path, target: Target, number: int) -> str:
    """Run one command on a changed input; return how it ended."""
    from ffmerge.__main__ import main

    random = np.random.default_rng([1, number])
    with tempfile.TemporaryDirectory(dir=folder, prefix="case-") as room:
        given = Path(room) / "in"
        shutil.copytree(folder / "inputs" / target.kind, given)
        path = given / target.file
        path.write_bytes(target.mutate(path.read_bytes(), random))
        words = target.commands[random.integers(len(target.commands))]
        said, shown = io.StringIO(), io.StringIO()
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            os.chdir(given)  # the paths of a recipe
            with redirect_stderr(said), redirect_stdout(shown):
                main(words.format(**{"in": given, "out": Path(room) / "out"}).split())
        except SystemExit as ended:
            return _told(int(ended.code or 0), said.getvalue(), room)
        except TimeoutError:
            return "took too long"
        except BaseException as error:
            return f"exception: {type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            os.chdir(folder)
    return "no exit"


def _too_long(*_: Any) -> None:
    raise TimeoutError


def _told(code: int, said: str, room: str) -> str:
    """Return how a command ended by its exit code and what it wrote to stderr."""
    lines = [line for line in said.splitlines() if line.startswith("ffmerge: ")]
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if "TimeoutError" in said:
        return "took too long"
    if code == 3 or "Traceback" in said:
        return f"fault: {last.replace(room, '')}"
    if code == 2:
        if not lines and "Usage:" not in said:
            return f"nothing said: {said[-300:]}"
        return "one sentence"
    return "a check failed" if code == 1 else "done"


# ---- inputs


def write_inputs(folder: Path, only: str = "") -> list[Target]:
    """Write a small good input of every kind that is asked for; return what is changed in each."""
    writers = (
        _graph, _manifest, _config, _weights, _arrays, _table, _lines, _picture, _tokenizer,
        _recipe,
    )  # fmt: skip
    targets = []
    for write in writers:
        name = write.__name__.removeprefix("_")
        if only in name:
            (folder / name).mkdir(parents=True)
            targets.append(write(folder / name, name))
    return targets


def _graph(folder: Path, name: str) -> Target:
    generator = np.random.default_rng(0)
    shared = generator.standard_normal((64, 64)).astype("f")
    weights = [numpy_helper.from_array(shared, "a"), numpy_helper.from_array(shared.copy(), "b")]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b"], ["g"], transB=1),
        helper.make_node("Reshape", ["g", "shape"], ["y"]),
    ]
    weights.append(numpy_helper.from_array(np.array([-1, 8, 8]), "shape"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 8])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "in.onnx")
    commands = ["audit {in}/in.onnx --no-load"]
    for dtype in ("", "--dtype int8", "--dtype int4", "--dtype fp16", "--opset 17"):
        commands.append(f"share {{in}}/in.onnx {{out}}.onnx {dtype}")
    return Target(name, "in.onnx", _graph_or_bytes, tuple(commands))


def _manifest(folder: Path, name: str) -> Target:
    _saved(folder / "checkpoint", _bert())
    _quiet(f"export {folder}/checkpoint {folder}/package")
    shutil.rmtree(folder / "checkpoint")
    commands = ("audit {in}/package --no-load", "validate {in}/package")
    return Target(name, "package/ffmerge.json", _json_or_bytes, commands)


def _config(folder: Path, name: str) -> Target:
    _saved(folder, _bert())
    commands = ("inspect {in}", "merge {in} {out} --window 0-1 --method average")
    return Target(name, "config.json", _json_or_bytes, commands)


def _weights(folder: Path, name: str) -> Target:
    _saved(folder, _bert())
    commands = ("inspect {in}", "merge {in} {out} --window 0-1 --method average")
    return Target(name, "model.safetensors", _safetensors_or_bytes, commands)


def _arrays(folder: Path, name: str) -> Target:
    _saved(folder, _bert())
    ids = np.random.default_rng(0).integers(1, 40, (8, 9))
    np.savez(folder / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    commands = ("merge {in} {out} --window 0-1 --data {in}/data.npz",)
    return Target(name, "data.npz", _bytes, commands)


def _table(folder: Path, name: str) -> Target:
    _texts(folder)
    rows = "".join(f"one two three,{i % 2}\n" for i in range(8))
    (folder / "data.csv").write_text(f"text,label\n{rows}")
    return Target(name, "data.csv", _bytes, ("merge {in} {out} --window 0-1 --data {in}/data.csv",))


def _lines(folder: Path, name: str) -> Target:
    _texts(folder)
    rows = "".join(json.dumps({"text": "one two", "label": i % 2}) + "\n" for i in range(8))
    (folder / "data.jsonl").write_text(rows)
    commands = ("merge {in} {out} --window 0-1 --data {in}/data.jsonl",)
    return Target(name, "data.jsonl", _bytes, commands)


def _picture(folder: Path, name: str) -> Target:
    import transformers
    from PIL import Image

    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=2,
    )  # fmt: skip
    _saved(folder, transformers.ViTForImageClassification(config))
    about = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    pixels = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3), np.uint8)
    for label, picture in enumerate(pixels):
        (folder / "data" / str(label)).mkdir(parents=True)
        Image.fromarray(picture).save(folder / "data" / str(label) / "a.png")
    commands = ("merge {in} {out} --window 0-1 --data {in}/data",)
    return Target(name, "data/1/a.png", _bytes, commands)


def _tokenizer(folder: Path, name: str) -> Target:
    _texts(folder)
    (folder / "data.txt").write_text("one two\nthree one\n" * 4)
    commands = ("merge {in} {out} --window 0-1 --data {in}/data.txt",)
    return Target(name, "tokenizer.json", _json_or_bytes, commands)


def _recipe(folder: Path, name: str) -> Target:
    _saved(folder / "bert", _bert())
    steps = (
        "- inspect: {model: bert}\n- merge: {model: bert, out: m, window: [0-1], method: average}\n"
    )
    (folder / "recipe.yaml").write_text(steps)
    return Target(name, "recipe.yaml", _bytes, ("run {in}/recipe.yaml",))


def _bert() -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _texts(folder: Path) -> None:
    """Write a model of texts with a tokenizer of words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    _saved(folder, _bert())
    words = "[PAD] [UNK] one two three".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(folder)


def _saved(folder: Path, model: Any) -> None:
    model.eval().save_pretrained(folder)


def _quiet(words: str) -> None:
    from ffmerge.__main__ import main

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            main(words.split())
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{words} ended with {ended.code}") from None


# ---- mutations


def _unchanged(content: bytes, random: np.random.Generator) -> bytes:
    return content


def _bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Flip, remove, repeat, insert, or cut."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(len(changed) + 1))
        length = int(random.integers(1, 40))
        kind = random.integers(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at:at] = random.bytes(length)
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def _json(content: bytes, random: np.random.Generator) -> bytes:
    """Put something strange in a place of a JSON value, or leave the place out."""
    value = json.loads(content)
    for _ in range(random.integers(1, 3)):
        places = [*_places(value)]
        if not places:
            break
        owner, key = places[random.integers(len(places))]
        if random.random() < 0.3:
            del owner[key]
        else:
            owner[key] = STRANGE[random.integers(len(STRANGE))]
    return json.dumps(value).encode()


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    keys: Iterable[Any] = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _json_or_bytes(content: bytes, random: np.random.Generator) -> bytes:
    return _bytes(content, random) if random.random() < 0.3 else _json(content, random)


def _safetensors_or_bytes(content: bytes, random: np.random.Generator) -> bytes:
    if random.random() < 0.4:
        return _bytes(content, random)
    size = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + size], random)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _graph_or_bytes(content: bytes, random: np.random.Generator) -> bytes:
    """Change fields of a graph that is still protobuf, or its bytes."""
    if random.random() < 0.3:
        return _bytes(content, random)
    model = onnx.load_from_string(content)
    for _ in range(random.integers(1, 4)):
        _change_graph(model, random)
    return bytes(model.SerializeToString())


def _change_graph(model: onnx.ModelProto, random: np.random.Generator) -> None:
    graph = model.graph
    node = graph.node[random.integers(len(graph.node))]
    tensor = graph.initializer[random.integers(len(graph.initializer))]
    names = ("", "x", "a", "b", "y", "nothing", "[/]", "../x")
    ops = ("MatMul", "If", "Gather", "Nothing", "")
    name = names[random.integers(len(names))]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: setattr(node, "op_type", ops[random.integers(len(ops))]),
        lambda: setattr(node, "domain", ("", "com.microsoft", "my")[random.integers(3)]),
        lambda: node.input.insert(0, name),
        lambda: node.input and node.input.pop(),
        lambda: node.output.insert(0, name),
        lambda: setattr(tensor, "name", name),
        lambda: setattr(tensor, "data_type", int(random.integers(0, 26))),
        lambda: tensor.dims.insert(0, int(random.choice([-1, 0, 2, 2**40]))),
        lambda: tensor.dims and tensor.dims.pop(),
        lambda: setattr(tensor, "raw_data", tensor.raw_data[: random.integers(0, 100)]),
        lambda: _external(tensor, random),
        lambda: graph.input[0].type.tensor_type.shape.dim.add(dim_value=-5),
        lambda: setattr(graph.input[0], "name", name),
        lambda: graph.output[0].ClearField("type"),
        lambda: setattr(model, "ir_version", int(random.choice([0, 3, 99]))),
        lambda: setattr(model.opset_import[0], "version", int(random.choice([0, 1, 12, 99]))),
        lambda: node.attribute.add(name="transB", type=2, i=int(random.choice([-1, 2**40]))),
        lambda: graph.node.extend([node]),
        lambda: graph.initializer.extend([tensor]),
    )  # fmt: skip
    changes[random.integers(len(changes))]()


def _external(tensor: TensorProto, random: np.random.Generator) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    places = (f"../../{SECRET}/file", f"../{SECRET}/file", "in.onnx", "/etc/passwd", "", ".")
    tensor.external_data.add(key="location", value=places[random.integers(len(places))])
    if random.random() < 0.5:
        tensor.external_data.add(key="offset", value=str(random.choice(["-1", "5", "9" * 30, "x"])))


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    try:
        main()
    except KeyboardInterrupt:
        traceback.print_exc()
