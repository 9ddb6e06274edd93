"""One command from a checkpoint to a package under a size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.tasks import REFERENCES

import ffmerge
from ffmerge import compress
from ffmerge.passes.weights.precision import bytes_of

DIGITS = REFERENCES["digits"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrays = {name: array[:400] for name, array in DIGITS.load("validation").items()}
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, **arrays)
    return file


def test_what_is_shipped_fits_and_is_whole(data: Path, tmp_path: Path, run: Any) -> None:
    """For 390 kB int8 is narrowed, and int4 is measured beside it."""
    out, size = tmp_path / "small", "390kB"
    code, found, err = run("compress", DIGITS.folder, out, "--size", size, "--data", data, "--json")
    assert code == 0, err
    package = out / "package"
    shipped = [package / name for name in found["files"]]
    assert sum(path.stat().st_size for path in shipped) == found["shipped"] <= found["size"]
    left = {path.name for path in package.iterdir()} - {path.name for path in shipped}
    assert {"reference.safetensors", "report.html", "ffmerge.json"} <= left
    assert ffmerge.audit(package).ok
    ways = [way["what"] for way in found["ways"]]
    values = [way["value"] for way in found["ways"]]
    assert values == sorted(values, reverse=True)
    model = ffmerge.load(DIGITS.folder)
    assert found["before"] == bytes_of(model, "fp32")
    assert {way.partition(",")[0] for way in ways} == {"int8", "int4", "2"}
    narrowed = (out / "checkpoint").exists()
    assert narrowed == ("neurons" in ways[0])
    if narrowed:
        smaller = ffmerge.load(out / "checkpoint")
        assert sum(p.numel() for p in smaller.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


def test_mixed_bits_are_shipped_where_they_keep_most(data: Path, tmp_path: Path, run: Any) -> None:
    """What is told of them is what ONNX Runtime computes with the package."""
    out = tmp_path / "small"
    words = ("compress", DIGITS.folder, out, "--size", "345kB", "--data", data, "--json")
    code, found, err = run(*words)
    assert code == 0, err
    best, others = found["ways"][0], found["ways"][1:]
    assert best["what"] == "2, 4 and 8 bits by data" and found["shipped"] <= 345_000
    assert others and all(way["value"] <= best["value"] for way in others)
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
def test_a_size_is_kept_where_the_graph_is_larger_than_expected(
    data: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 weights fit 370 kB and the package would not: int4 is taken."""
    monkeypatch.setattr(compress, "GRAPH", 0)
    out = tmp_path / "small"
    code, found, err = run(
        "compress", DIGITS.folder, out, "--size", "370kB", "--data", data, "--json"
    )
    assert code == 0, err
    assert found["size"] == 370_000 >= found["shipped"]
    shipped = [out / "package" / name for name in found["files"]]
    assert sum(path.stat().st_size for path in shipped) == found["shipped"]
    assert found["ways"][0]["what"] != "int8"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "20kB"], "20.0 kB is out of reach"),
        (["--size", "small"], "not of the form"),
        (["--size", "300kB", "--task", "no-task"], "no-task"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    options: list[str], said: str, data: Path, tmp_path: Path, run: Any
) -> None:
    code, _, err = run("compress", DIGITS.folder, tmp_path / "out", "--data", data, *options)
    assert code == 2 and said in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_it_is_chosen_on_data(tmp_path: Path, run: Any) -> None:
    code, _, err = run("compress", DIGITS.folder, tmp_path / "out", "--size", "300kB")
    assert code == 2 and "give --data" in err
