"""Data that is broken is one sentence with the file and the line, and nothing that is no number."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import gpt2, vit
from transformers import ViTImageProcessor

from ffmerge.config import CompareConfig, MergeConfig, RecoverConfig, SimilarityConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, npz
from ffmerge.models.data import as_examples, read
from ffmerge.passes.weights.compare import compare
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.methods import METHODS
from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_
from ffmerge.passes.weights.similarity import similarity


def _refused(call: Any, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["a.jsonl", "line 2"]),
        ("a.jsonl", b'{"text": "a"}\n\n\n\xff\n', ["a.jsonl", "line 4", "UTF-8"]),
        ("a.jsonl", b"", ["a.jsonl", "empty"]),
        ("a.jsonl", b"\n\n", ["a.jsonl"]),
        ("a.json", b"{", ["a.json"]),
        ("a.txt", b"one\n\xff\xfe\n", ["a.txt", "line 2"]),
        ("a.txt", b"", ["a.txt", "empty"]),
        ("a.csv", b"text,label\na,1\nb,2,3\n", ["a.csv", "line 3"]),
        ("a.csv", b"text,label\n", ["a.csv", "empty"]),
        ("a.tsv", b"text\tlabel\na\t1\nb\t2\t3\n", ["a.tsv", "line 3"]),
        ("a.parquet", b"PAR1 nothing", ["a.parquet"]),
        ("a.npz", b"PK\x03\x04 nothing", ["a.npz"]),
        ("a.npz", b"", ["a.npz"]),
        ("a.npz", b"\x93NUMPY", ["a.npz"]),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    name: str, content: bytes, words: list[str], tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(lambda: read(str(tmp_path / name), tmp_path, "text-generation"), *words)
    assert capfd.readouterr() == ("", "")  # of the libraries that were asked


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    ViTImageProcessor(size={"height": 4, "width": 4}).save_pretrained(tmp_path / "model")
    (tmp_path / "d" / "a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 9, 9)).save(tmp_path / "d" / "a" / f"{number}.png")
    return tmp_path / "d"


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nnothing", b"text", "cut"])
def test_a_broken_picture_is_named(content: Any, pictures: Path) -> None:
    file = pictures / "a" / "1.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    if content == "cut":
        whole = BytesIO()
        Image.fromarray(noise).save(whole, "png")
        content = whole.getvalue()[:-900]
    file.write_bytes(content)

    def read_all() -> None:
        model = pictures.parent / "model"
        list(as_examples(pictures, model, "image-classification").batches(9))

    _refused(read_all, "1.png", "no picture")


def _archive(file: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file


def _npy(array: Any, shape: tuple[int, ...] | None = None) -> bytes:
    written = BytesIO()
    np.save(written, array)
    if shape is None:
        return written.getvalue()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
    written = BytesIO()
    np.lib.format.write_array_header_1_0(written, header)
    return written.getvalue() + array.tobytes()


def test_an_archive_may_not_unpack_to_more_than_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(npz, "LARGEST", 1_000_000)
    file = _archive(tmp_path / "a.npz", x=_npy(np.zeros(400_000)))
    assert file.stat().st_size < 10_000
    _refused(lambda: read(str(file), None, None), "a.npz", "3.20 MB", "1.00 MB")
    for shape in ((10**12,), (10**6, 10**6, 10**6), (3,)):
        claims = _archive(tmp_path / "b.npz", x=_npy(np.zeros(4), shape))
        _refused(lambda file=claims: read(str(file), None, None), "b.npz", "claims")
    fine = _archive(tmp_path / "c.npz", x=_npy(np.zeros((4, 2))), labels=_npy(np.arange(4)))
    assert len(read(str(fine), None, None)) == 4
    _refused(lambda: read(str(_archive(tmp_path / "d.npz")), None, None), "d.npz")


def _pixels(bad: float | None = None) -> dict[str, Any]:
    pixels = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype("f")
    if bad is not None:
        pixels[5, 2, 1, 3] = bad
    return {"pixel_values": pixels, "labels": np.arange(8) % 7}


SAVED = sorted(name for name, method in METHODS.items() if method.saved)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", SAVED)
def test_no_method_takes_data_that_is_not_finite(method: str, bad: float, tmp_path: Path) -> None:
    config = MergeConfig(method=method, window=(0, 1))
    model = vit(32, 64, layers=3)
    _refused(lambda: merge_(model, _pixels(bad), config), "row 5", "pixel_values")
    np.savez(tmp_path / "a.npz", **_pixels(bad))
    _refused(lambda: merge_(model, tmp_path / "a.npz", config), "a.npz", "row 5")


@pytest.mark.parametrize("method", ["average", "weights", "permute", "calibrated"])
def test_no_method_takes_weights_that_are_not_finite(method: str) -> None:
    model = vit(32, 64, layers=3)
    with torch.no_grad():
        model.vit.layers[2].mlp.fc1.weight[3, 4] = float("nan")
    config = MergeConfig(window=(0, 1), method=method)
    _refused(lambda: merge_(model, _pixels(), config), "NaN or infinite", "2.mlp.fc1.weight")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nor_do_compare_similarity_recovery_and_loading(bad: float, tmp_path: Path) -> None:
    model = vit(32, 64, layers=3)
    merged = clone_sharing_parameters(model)
    steps = RecoverConfig(steps=1, parts="all")
    two, few = CompareConfig(k=2), SimilarityConfig(tokens=9)
    _refused(lambda: compare(model, _pixels(bad), None, two), "row 5")
    _refused(lambda: similarity(model, _pixels(bad), few), "row 5")
    _refused(lambda: recover_(merged, model, _pixels(bad), steps), "row 5")
    with torch.no_grad():
        model.classifier.weight[0, 0] = bad
    _refused(lambda: compare(model, _pixels(), None, two), "NaN")
    _refused(lambda: similarity(model, _pixels(), few), "classifier")
    _refused(lambda: recover_(merged, model, _pixels(), steps), "classifier")
    checkpoint.save(model, tmp_path / "bad")
    _refused(lambda: checkpoint.load(tmp_path / "bad"), "bad", "classifier.weight")


def test_statistics_and_results_that_overflow_are_refused() -> None:
    """Finite data and weights whose products are not."""
    model = vit(32, 64, layers=3)
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight.mul_(1e38)
    config = MergeConfig(window=(0, 1), method="permute")
    _refused(lambda: merge_(model, _pixels(), config, _pixels()), "NaN or infinite")
    config = MergeConfig(window=(0, 1), method="average")
    _refused(lambda: merge_(model, _pixels(), config, _pixels()), "NaN or infinite")
    text = gpt2()
    with torch.no_grad():
        text.transformer.ln_f.weight.mul_(3e38)
    ids = {"input_ids": np.arange(36).reshape(4, 9)}
    _refused(lambda: merge_(text, ids, MergeConfig(k=2, method="average")), "NaN or infinite")
