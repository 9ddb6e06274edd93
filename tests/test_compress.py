"""One command from a checkpoint to a package under a size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
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
    assert {way.partition(",")[0] for way in ways} == {"int8", "int4"}
    narrowed = (out / "checkpoint").exists()
    assert narrowed == ("neurons" in ways[0])
    if narrowed:
        smaller = ffmerge.load(out / "checkpoint")
        assert sum(p.numel() for p in smaller.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


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
