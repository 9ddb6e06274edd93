"""One command from a checkpoint to a package under a size."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from reference.tasks import REFERENCES

import ffmerge
from ffmerge import compress, ways
from ffmerge.config import CompressConfig, DataConfig, LoadConfig
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.models import sizes
from ffmerge.models.manifest import FileRecord, Manifest
from ffmerge.passes.weights import narrow
from ffmerge.passes.weights.precision import bytes_of
from ffmerge.progress import silent

DIGITS = REFERENCES["digits"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrays = {name: array[:400] for name, array in DIGITS.load("validation").items()}
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, **arrays)
    return file


def test_what_is_shipped_fits_and_is_whole(data: Path, tmp_path: Path, run: Any) -> None:
    """For 390 kB int8 is narrowed, mixed bits are measured beside it; --for is that of export."""
    out, size = tmp_path / "small", "390kB"
    code, found, err = run(
        "compress", DIGITS.folder, out, "--size", size, "--data", data, "--for", "cpu", "--json"
    )
    assert code == 0, err
    package = out / "package"
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    layers = ffmerge.load(DIGITS.folder).config.num_hidden_layers
    assert sum(node.op_type == "Attention" for node in graph.node) == layers
    shipped = [package / name for name in found["files"]]
    assert sum(path.stat().st_size for path in shipped) == found["shipped"] <= found["size"]
    left = {path.name for path in package.iterdir()} - {path.name for path in shipped}
    assert {"reference.safetensors", "report.html", "ffmerge.json"} <= left
    assert ffmerge.audit(package).ok
    page = (package / "report.md").read_text()
    assert f"original | PyTorch | accuracy | {100 * found['original']:.2f} %" in " ".join(
        page.split()
    ), page
    texts = [way["what"] for way in found["ways"]]
    values = [way["value"] for way in found["ways"]]
    assert values == sorted(values, reverse=True)
    model = ffmerge.load(DIGITS.folder)
    assert found["before"] == bytes_of(model, "fp32")
    assert {way.partition(",")[0] for way in texts} == {"int8", "2"}
    narrowed = (out / "checkpoint").exists()
    assert narrowed == ("neurons" in texts[0])
    if narrowed:
        smaller = ffmerge.load(out / "checkpoint")
        assert sum(p.numel() for p in smaller.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


def test_mixed_bits_are_shipped_where_they_keep_most(
    data: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of them is what ONNX Runtime computes with the package."""
    monkeypatch.setattr(ways, "narrower", lambda *_: None)
    out = tmp_path / "small"
    words = ("compress", DIGITS.folder, out, "--size", "345kB", "--data", data, "--json")
    code, found, err = run(*words)
    assert code == 0, err
    best, others = found["ways"][0], found["ways"][1:]
    assert best["what"] == "2, 4 and 8 bits by data" and found["shipped"] <= 345_000
    assert not others
    assert not (out / "checkpoint").exists()
    bits = {
        form["bits"]
        for form in json.loads((out / "package/ffmerge.json").read_text())["bits"].values()
    }
    assert len(bits) > 1
    with np.load(data) as arrays:
        half = {name: arrays[name][1::2] for name in arrays.files}
    served = ffmerge.load_package(out / "package")
    logits = served(pixel_values=torch.from_numpy(half["pixel_values"])).logits
    right = float((logits.argmax(-1).numpy() == half["labels"]).mean())
    assert right == pytest.approx(best["value"])


@pytest.mark.slow
def test_4_bits_of_a_narrowed_model_are_measured_as_they_are_shipped(
    data: Path, tmp_path: Path, run: Any
) -> None:
    """345 kB leave so little for weights that neurons go, and what is left has mixed bits."""
    out = tmp_path / "small"
    words = ("compress", DIGITS.folder, out, "--size", "345kB", "--data", data, "--json")
    code, found, err = run(*words)
    assert code == 0, err
    kinds = [way["what"] for way in found["ways"]]
    assert {what.partition(",")[0] for what in kinds} == {"2"}
    assert ["neurons" in what for what in kinds].count(True) == 1
    served = ffmerge.load_package(out / "package")
    with np.load(data) as arrays:
        half = {name: arrays[name][1::2] for name in arrays.files}
    logits = served(pixel_values=torch.from_numpy(half["pixel_values"])).logits
    right = float((logits.argmax(-1).numpy() == half["labels"]).mean())
    assert right == pytest.approx(found["ways"][0]["value"])


def test_below_4_bits_so_many_neurons_go_that_the_widest_blocks_fit() -> None:
    """By hand: a row of 256 takes least in blocks of 128, a row of 192 in blocks of 64."""
    shapes, whole = [(1000, 256), (1000, 192)], 4 * 1000 * (256 + 192)
    least = 1000 * 2 * (64 + 4) + 1000 * 3 * (32 + 4)
    assert sizes.bytes_of(shapes, "int4") == 1000 * 8 * 20 + 1000 * 6 * 20 > least
    # rows that are looked up are in blocks only if those are whole ones: of 224 in 32 each, and of
    # 80 in none, so they are int8
    assert sizes.bytes_of([(1000, 224)], "int4", sizes.WIDER) == 1000 * 2 * (64 + 4)
    assert sizes.bytes_of([sizes.Table((1000, 224))], "int4", sizes.WIDER) == 1000 * 7 * 20
    assert sizes.bytes_of([sizes.Table((1000, 80))], "int4", sizes.WIDER) == 1000 * (80 + 4)
    assert sizes.narrower(shapes, 11 * least // 10) is None  # mixed bits do
    room = 9 * least // 10
    assert sizes.narrower(shapes, room) == ("int4", (whole * room // (102 * least // 100),))


def test_float16_is_tried_where_a_gpu_is_to_run_it(
    data: Path, tmp_path: Path, command: Any, run: Any
) -> None:
    """800 kB of 1.2 MB of float32: fp16 is shipped to a GPU, and elsewhere it is told."""
    words = ("--size", "800kB", "--data", data)
    out = tmp_path / "small"
    code, found, err = run("compress", DIGITS.folder, out, *words, "--for", "cuda", "--json")
    assert code == 0 and "float16 fits" not in err, err
    assert [way["what"] for way in found["ways"]] == ["fp16", "int8"]
    model = ffmerge.load(DIGITS.folder)
    assert found["ways"][1]["bytes"] == bytes_of(model, "int8", rows=False)  # no kernels for rows
    assert Manifest.read(out / "package").dtype == "fp16" and found["shipped"] <= 800_000
    page = (out / "package" / "report.md").read_text()
    assert "ffmerge compress MODEL small --size 800kB --data DATA --for cuda\n" in page
    code, text, err = command("compress", DIGITS.folder, tmp_path / "other", *words, "--dry-run")
    assert code == 0 and "measure int8" in text and "fp16" not in text
    assert "float16 fits as well and keeps more" in err


def test_a_second_try_where_few_neurons_have_to_go_and_where_many() -> None:
    """2 % for blocks that are partly filled; 5 % for better forms, or 3 % too little for these."""
    shapes, whole = [(1000, 256)], 4 * 1000 * 256
    least = 1000 * 2 * (64 + 4)
    assert sizes.narrower(shapes, least) == ("int4", (100 * whole // 105,))
    lowest = 6 * least // 10
    for room, tries in (
        (99 * least // 100, (102, 105)), (3 * least // 4, (102, 97)), (lowest, (102, 97)),
    ):  # fmt: skip
        kept = tuple(whole * room // (percent * least // 100) for percent in tries)
        assert sizes.narrower(shapes, room) == ("int4", kept)
    sizes.check_reach(shapes, lowest, beside=0)
    with pytest.raises(InputError, match="out of reach"):
        sizes.check_reach(shapes, lowest - 1, beside=0)


@pytest.mark.parametrize("failing", [1, 2])
def test_what_does_not_hold_is_shipped_only_where_nothing_does(
    failing: int, data: Path, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ways the best, or both, are found too far from PyTorch."""
    validate, seen = compress.validate, []

    def judged(folder: Path, **given: Any) -> Any:
        found = validate(folder, **given)
        seen.append(folder)
        if len(seen) <= failing:
            found.providers[0].stopped = f"package {len(seen)} is off; so is more of it"
        return found

    monkeypatch.setattr(compress, "validate", judged)
    words = ("compress", DIGITS.folder, tmp_path / "small", "--size", "390kB", "--data", data)
    code, text, err = command(*words)
    assert len(seen) == 2 and code == failing - 1
    text, narrowed = " ".join(text.split()), (tmp_path / "small" / "checkpoint").exists()
    assert "8 bits by data does not hold against PyTorch: package 1 is off; int8" in err
    assert "is tried instead" in err
    assert ("is shipped, the best by the data" in err) == (failing == 2)
    assert ("It does not hold against PyTorch, a larger --size may: package 1 is off." in text) == (
        failing == 2
    )
    # the first rows are what is shipped, and as the folder is; that has a checkpoint if narrowed
    first = text.partition("original")[0]
    assert narrowed == ("neurons" in first)
    assert ffmerge.audit(tmp_path / "small" / "package").ok


def test_what_holds_and_is_too_large_is_not_shipped_where_another_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three ways the first does not hold, and only the last one fits."""
    made = {name: ways.Way("int8", 1, 1.0, f"way {name}") for name in "abc"}
    sizes_of = {"a": 9, "b": 11_000, "c": 10_000}

    def packed(run: Any, steps: Any, order: Any, original: float, step: str) -> Any:
        name = next(iter(order))
        return SimpleNamespace(
            ways=(made[name],), shipped=sizes_of[name], size=10_000, original=original
        )

    def judged(run: Any, found: Any) -> Any:
        stopped = "off; far" if found.ways[0] is made["a"] else None
        return SimpleNamespace(ok=not stopped, providers=[SimpleNamespace(reason=stopped)])

    monkeypatch.setattr(compress, "_package", packed)
    monkeypatch.setattr(compress, "_validated", judged)
    first = packed(None, None, made, 1.0, "best")
    found, result = compress._held(cast(Any, None), cast(Any, None), made, first)
    assert found.ways == (made["c"],) and result.ok
    assert capsys.readouterr().err.splitlines() == [
        "ffmerge: way a does not hold against PyTorch: off; way b is tried instead",
        "ffmerge: way b takes 11.0 kB, more than the size; way c is tried instead",
    ]
    sizes_of["c"] = 10_001
    found, _ = compress._held(cast(Any, None), cast(Any, None), made, first)
    assert found is first
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ffmerge: way c takes 10.0 kB, more than the size; way a is shipped, the best by the data"
    )


def test_what_is_narrowed_is_trained_if_wanted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the sublayers, for so many steps; what is measured is the better of both."""
    steps: list[int] = []

    def counted(*given: Any) -> Any:
        steps.append(given[-1])
        return tune(*given)

    tune = narrow.tune
    monkeypatch.setattr(narrow, "tune", counted)
    config = CompressConfig(size="390kB", tune=5)
    found = compress.compress(
        str(DIGITS.folder), tmp_path / "small", config, DataConfig(data=str(data)), LoadConfig()
    )
    assert found.ok and any("neurons" in way.text for way in found.ways)
    assert steps == [5] * ffmerge.load(DIGITS.folder).config.num_hidden_layers


@pytest.mark.slow
def test_an_encoder_and_a_decoder_are_mixed_and_narrowed_too(tmp_path: Path, run: Any) -> None:
    numerals, file = REFERENCES["numerals"], tmp_path / "pairs.npz"
    np.savez(file, **{name: array[:64] for name, array in numerals.load("test").items()})
    out = tmp_path / "small"
    words = ("compress", numerals.folder, out, "--size", "700kB", "--data", file, "--json")
    code, found, err = run(*words)
    assert code == 0, err
    assert found["shipped"] <= found["size"]
    assert {way["what"].partition(",")[0] for way in found["ways"]} == {"2"}
    neurons = [way["what"] for way in found["ways"] if "neurons" in way["what"]]
    assert len(found["ways"]) == 3 and len(set(neurons)) == 2  # by a quarter, and by less
    assert all(": encoder " in what and "; decoder " in what for what in neurons)


def test_a_size_is_kept_where_the_graph_is_larger_than_expected(
    data: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 weights fit 370 kB and the package would not: bits are mixed, in all of the size."""
    monkeypatch.setattr(sizes, "GRAPH", 0)
    monkeypatch.setattr(ways, "narrower", lambda *_: None)
    out = tmp_path / "small"
    code, found, err = run(
        "compress", DIGITS.folder, out, "--size", "370kB", "--data", data, "--json"
    )
    assert code == 0, err
    assert found["size"] == 370_000 >= found["shipped"]
    assert found["shipped"] > 0.95 * 370_000  # measured 363,546
    shipped = [out / "package" / name for name in found["files"]]
    assert sum(path.stat().st_size for path in shipped) == found["shipped"]
    assert found["ways"][0]["what"] != "int8"


def test_a_way_whose_files_are_too_large_is_left_out_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph may take more than was foretold."""
    file = FileRecord("model.onnx", 9_100_000, "")
    monkeypatch.setattr(ways, "_as_package", lambda *_: {"value": 1.0})
    monkeypatch.setattr(ways.Manifest, "read", lambda _: SimpleNamespace(files=[file]))
    config = SimpleNamespace(task=None, profile="portable")
    for limit, value in ((9_100_000, 1.0), (9_000_000, None)):
        run = SimpleNamespace(folder=tmp_path, config=config, show=silent, limit=limit)
        made = ways._with_mixed_bits(cast(Any, run), None, tmp_path, ways.MIXED)
        assert made["value"] == value
    assert capsys.readouterr().err == f"ffmerge: no {ways.MIXED}: its files take 9.10 MB\n"


def test_what_was_merged_before_is_not_called_the_original(
    data: Path, tmp_path: Path, command: Any
) -> None:
    with np.load(data) as arrays:
        np.savez(tmp_path / "pictures.npz", pixel_values=arrays["pixel_values"][:64])
    given = ["--data", tmp_path / "pictures.npz"]
    merged, out = tmp_path / "merged", tmp_path / "small"
    assert command("merge", DIGITS.folder, merged, "--window", "1-2", *given)[0] == 0
    code, text, err = command("compress", merged, out, "--size", "600kB", *given)
    assert code == 0, err
    assert "as given, merged before" in text and "fidelity to the merged model" in text
    assert "original" not in text
    page = (out / "package" / "report.md").read_text()
    assert "| Measured | Weights | Fidelity to the merged model |" in page
    assert "| merged | 1.08 MB | 1 |" in page and "| original | 1." not in page
    assert "fidelity to the original model on 32 " in (out / "package" / "README.md").read_text()
    narrowed, asked = tmp_path / "narrowed", ["--method", "narrow", "--budget", "-10%", *given]
    assert command("merge", merged, narrowed, *asked)[0] == 0
    code, text, err = command(
        "compress", narrowed, tmp_path / "o", "--size", "290kB", *given, "--dry-run"
    )
    assert code == 0 and "narrowed already: no more neurons" in err and "neurons" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "20kB"], "20.0 kB is out of reach"),
        (["--size", "small"], "not of the form"),
        (["--size", "300kB", "--task", "no-task"], "no-task"),
        (["--task", "fill-mask"], "serves image-classification"),
        (["--tune", "-1"], "tune must be 0 or more steps"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    options: list[str], said: str, data: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr(compress.Steps, "do", None)
    code, _, err = run("compress", DIGITS.folder, tmp_path / "out", "--data", data, *options)
    assert code == 2 and said in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_it_is_chosen_on_data(tmp_path: Path, run: Any) -> None:
    code, _, err = run("compress", DIGITS.folder, tmp_path / "out", "--size", "300kB")
    assert code == 2 and "give --data" in err


def test_the_same_call_goes_on_where_it_was_stopped(
    data: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the validation: nothing is exported again, and another size begins anew."""
    out = tmp_path / "small"
    words = ["compress", DIGITS.folder, out, "--data", data, "--json", "--size"]
    validate, export = compress.validate, package.export
    exported: list[str] = []

    def counted(*given: Any) -> Any:
        exported.append(given[2].dtype)
        return export(*given)

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "export", counted)
    monkeypatch.setattr(compress, "validate", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress.compress(
            str(DIGITS.folder),
            out,
            CompressConfig(size="600kB"),
            DataConfig(data=str(data)),
            LoadConfig(),
        )
    assert exported == ["int8"] and not out.exists()
    monkeypatch.setattr(compress, "validate", validate)
    code, told, err = run(*words, "600kB", "--dry-run")
    assert code == 0, err
    done = {step["what"]: step["done"] for step in told["steps"]}
    assert done["export the best"] and not done["validate it"]
    assert not out.exists()
    code, found, err = run(*words, "600kB")
    assert code == 0 and exported == ["int8"] and "best is done already" in err
    assert ffmerge.audit(out / "package").ok
    assert [path.name for path in tmp_path.iterdir()] == ["small"]

    code, _, err = run(*words, "1.4MB")
    assert code == 2 and "exists already" in err
    code, found, err = run(*words, "1.4MB", "--overwrite")
    assert code == 0, err
    assert exported == ["int8", "fp32"] and found["ways"][0]["what"] == "fp32"
    assert not (out / "step.json").exists()


def test_what_compress_did_not_write_is_not_replaced(data: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "small"
    out.mkdir()
    (out / "mine").write_text("")
    code, _, err = run("compress", DIGITS.folder, out, "--data", data, "--overwrite")
    assert code == 2 and "not what compress wrote" in err
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_another_process_keeps_off_what_is_at_work(data: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "small"
    words = ("compress", DIGITS.folder, out, "--size", "600kB", "--data", data)
    (tmp_path / ".small.steps").mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom ffmerge.files import lock\n"
        "held = lock(Path(sys.argv[1]))\nprint(held is not None, flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".small.steps"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    code, _, err = run(*words)
    assert code == 2 and "another command is at work" in err
    other.communicate("")
    code, _, err = run(*words, "--json")
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
