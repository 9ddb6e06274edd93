"""Results that a change of the code leaves as they are: searches, packages, JSON, errors.

What was right when ``tests/golden`` was written is held there; other tests say why it is right.
A change that is meant to change one of them writes them anew and shows the difference:

    pytest tests/test_golden.py tests/test_demo.py --write-golden
    git diff tests/golden

Look at every line of that difference, and commit it with the change that it comes from. So it was
meant that the JSON of a search names what is searched, or that an option went with its error; an
initializer in another order, a key that is gone or an error in other words was not.

Not held: times, and the values of merged weights, whose last bits depend on the processor.
`bad_calls.py` has the calls whose errors are held.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import bad_calls
import golden
import numpy as np
import onnx_ir as ir
import pytest
import tamper
from graphs import build, normal
from tiny import gpt2, vit
from tiny_wider import t5

import ffmerge
import ffmerge.__main__ as command_line
from ffmerge.errors import FfmergeError
from ffmerge.models import digits
from ffmerge.passes.weights import methods
from ffmerge.passes.weights.methods import METHODS
from ffmerge.runtime_tests.runtimes import registry

DIGITS = Path(ffmerge.__file__).parent / "models" / "digits_vit"
LAYERS = 3  # of the model whose packages are held
FIDELITY = 2e-6  # measured 1.8e-7 between SSE4.2, AVX2 and AVX-512


def call(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        command_line.main([*map(str, arguments)])
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def printed(*arguments: object, code: int = 0) -> Any:
    """Return the JSON that a command prints."""
    ended, out, err = call(*arguments, "--json")
    assert ended == code, err
    return json.loads(out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data of the digits, their model and the first layers of it, and tiny models of language."""
    folder = tmp_path_factory.mktemp("golden")
    np.savez(folder / "some.npz", **digits.load("calibration", count=96))
    np.savez(folder / "few.npz", **digits.load("test", count=16))
    short = ffmerge.load(DIGITS)
    del short.vit.layers[LAYERS:]
    short.config.num_hidden_layers = LAYERS
    ffmerge.save(short, folder / "model")
    window = ("--window", "1-2", "--data", folder / "some.npz")
    printed("merge", folder / "model", folder / "merged-model", *window)
    ffmerge.save(gpt2(32, 64, layers=1), folder / "gpt2-model")
    t5(1, 1).save_pretrained(folder / "t5-model")
    ffmerge.save(vit(32, 64, layers=1), folder / "vit-model")
    yield folder
    shutil.rmtree(folder)


# name of a package -> what it is exported from, and how
EXPORTS = {
    "original-fp32": "model --data few.npz",
    "original-int8": "model --data few.npz --dtype int8",
    "original-int4": "model --dtype int4",  # by data the last bits are the processor's
    "merged-fp32": "merged-model --data few.npz",
    "merged-int8": "merged-model --data few.npz --dtype int8",
    "merged-int4": "merged-model --data few.npz --dtype int4",
    "gpt2": "gpt2-model --task text-generation-with-past",
    "t5": "t5-model --task text2text-generation-with-past",
    "variants": "vit-model --ort --prepack",
    "browser": "vit-model --layout transformers.js --dtype int8",
}


@pytest.fixture(scope="module")
def export(base: Path) -> Callable[[str], Any]:
    """Export a package once; return the JSON of its export."""

    @functools.cache
    def once(name: str) -> Any:
        model, *options = EXPORTS[name].replace("few.npz", str(base / "few.npz")).split()
        return printed("export", base / model, base / name, *options)

    return once


@pytest.mark.parametrize("way", ["windows", "calibrated", "permute"])
def test_a_search(way: str, base: Path, golden_result: golden.Check) -> None:
    """Windows of three layers, and layers joined one by one, by fidelity: every candidate."""
    data = ("--data", base / "some.npz", "--tokens", 2000, "--criterion", "fidelity")
    sought = ("--k", 3) if way == "windows" else ("--budget", "-25%", "--method", way)
    found = printed("merge", DIGITS, base / f"search-{way}", *sought, *data)
    golden_result(f"search-{way}", found, FIDELITY)


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data")  # of prepacked weights
@pytest.mark.parametrize("name", EXPORTS)
def test_a_package(name: str, base: Path, export: Any, golden_result: golden.Check) -> None:
    """Original and merged, with a cache, with parts, with variants, as transformers.js wants it.

    The weights of an original are those of the checkpoint, rounded: they are held as well.
    """
    export(name)
    golden_result(f"package-{name}", golden.package(base / name, "original" in name))


def test_the_json_of_every_command(base: Path, export: Any, golden_result: golden.Check) -> None:
    """But of the demo, see test_demo.py."""
    package, original = base / "merged-fp32", base / "original-fp32"
    exported = {name: export(name) for name in ("original-fp32", "merged-fp32", "variants", "gpt2")}
    few, some = ("--data", base / "few.npz"), ("--data", base / "some.npz")
    w = normal(64, 64)
    text = "(float[n,64] x) => (float[n,64] y) {h = MatMul(x, W) t = Relu(h) y = MatMul(t, V)}"
    ir.save(build(text, W=w, V=w), base / "twice.onnx")
    shutil.copytree(package, base / "wrong")
    tamper.repoint(base / "wrong", "Gemm", "classifier.weight", 1, lambda weight: weight + 1)
    recipe = f"- audit: {{path: {package}, load: no}}\n- inspect: {{model: {DIGITS}}}\n"
    (base / "recipe.yaml").write_text(recipe)
    recovery = ("--window", "1-2", "--recover", 2, "--tokens", 500, *few)
    found = {
        "inspect": printed("inspect", DIGITS),
        "inspect, merged": printed("inspect", base / "merged-model"),
        "merge, recovery": printed("merge", base / "model", base / "recovered", *recovery),
        "compare": printed("compare", base / "model", "--k", 2, *some),
        "export": exported["merged-fp32"],
        "export, variants": exported["variants"],
        "share": printed("share", base / "twice.onnx", base / "once.onnx", "--dtype", "int8"),
        "audit": printed("audit", package),
        "audit, twice": printed("audit", base / "twice.onnx", code=1),
        "validate": printed("validate", package, "--against", original, *few),
        "validate, gpt2": printed("validate", base / "gpt2"),
        "validate, wrong": printed("validate", base / "wrong", code=1),
        "similarity": printed("similarity", base / "model", "--out", base / "alike", *few),
        "run": printed("run", base / "recipe.yaml"),
    }
    golden_result("json", golden.kinds(found))
    written = {
        "validation.json": package / "validation.json",
        "similarity.json": base / "alike" / "similarity.json",
        "config.json": base / "merged-model" / "config.json",
    }
    kept = {name: golden.kinds(json.loads(path.read_text())) for name, path in written.items()}
    golden_result("files", kept)


@pytest.fixture
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods and runtimes as a user has them: other tests register some, or change the order."""
    shipped = {n: m for n, m in METHODS.items() if m.merge.__module__.startswith("ffmerge.")}
    monkeypatch.setattr(methods, "METHODS", shipped)
    runtimes = {runtime.name: runtime for e in registry.ENGINES for runtime in e.RUNTIMES}
    monkeypatch.setattr(registry, "RUNTIMES", runtimes)


@pytest.mark.usefixtures("as_shipped")
def test_the_text_of_errors(tmp_path: Path, golden_result: golden.Check) -> None:
    """Exit code and text of command lines, kind and text of what Python raises."""
    given, out = tmp_path / "in", tmp_path / "out"
    bad_calls.prepare(given)
    found: dict[str, Any] = {}
    for line in bad_calls.COMMANDS:
        words = line.replace("{in}", str(given)).replace("{out}", str(out)).split()
        out.mkdir()
        code, _, err = call(*words)
        found[line] = [code, _without_paths(err, tmp_path)]
        assert not list(out.iterdir()), line
        out.rmdir()
    for name, function in bad_calls.PYTHON.items():
        out.mkdir()
        try:
            function(given, out)
            found[name] = ["no error", ""]
        except FfmergeError as error:
            found[name] = [type(error).__name__, _without_paths(str(error), tmp_path)]
        assert not list(out.iterdir()), name
        out.rmdir()
    golden_result("errors", found)


def _without_paths(text: str, folder: Path) -> str:
    """Return the sentence; what comes before it is a library's progress."""
    return text[max(text.find("ffmerge: "), 0) :].replace(str(folder), "").strip()
