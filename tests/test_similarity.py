"""How alike sublayers are, against definitions written out, and by properties."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tiny import bert, gpt2, vit
from tiny_wider import SEQ2SEQ

from ffmerge.__main__ import main
from ffmerge.config import SimilarityConfig
from ffmerge.models import checkpoint
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.passes.weights.similarity import _passes, similarity


def _ids(rows: int = 12, length: int = 9) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(1).integers(3, 61, (rows, length))}


def _seen(model: Any, arrays: dict[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (outputs, pre-activations) of every sublayer, (n, d) and (n, f), in float64."""
    found, hooks = [], []
    for sublayer in find(model):
        kept: list[np.ndarray] = []
        for path in (sublayer.output, sublayer.inputs[0]):
            hooks.append(model.get_submodule(path).register_forward_hook(
                lambda m, a, out, k=kept: k.append(out.detach().flatten(0, 1).double().numpy())
            ))  # fmt: skip
        found.append(kept)
    with torch.no_grad():
        model(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    for hook in hooks:
        hook.remove()
    return [(out, pre) for pre, out in found]  # the map d -> f runs first


def _hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """CKA by its definition: (n, n) Gram matrices centred on both sides."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum()))


@pytest.mark.parametrize("make", [gpt2, vit], ids=["gpt2", "vit"])
def test_cka_is_that_of_the_gram_matrices(make: Any) -> None:
    model = make()
    arrays = _ids()
    if model.main_input_name == "pixel_values":
        pixels = np.random.default_rng(1).standard_normal((6, 3, 16, 16)).astype(np.float32)
        arrays = {"pixel_values": pixels}
    (found,) = similarity(model, from_arrays(arrays), SimilarityConfig(batch_size=5))
    outputs = [out for out, _ in _seen(model, arrays)]
    wanted = [[_hsic_cka(x, y) for y in outputs] for x in outputs]
    assert found.positions == len(outputs[0])
    assert np.abs(found.cka - wanted).max() < 1e-7  # measured 9.7e-9
    assert np.array_equal(found.cka.diagonal(), np.ones(6))
    assert np.array_equal(found.cka, found.cka.T)


def test_cka_does_not_see_a_rotation_and_correlation_not_the_order_of_neurons() -> None:
    """Layer 2 becomes layer 1's copy, reordered, and its output turned and scaled."""
    model = gpt2()
    first, second = find(model)[1:3]
    order = torch.randperm(first.d_ff, generator=torch.Generator().manual_seed(3))
    for a, b in zip(first.weights, second.weights, strict=True):
        value = model.get_parameter(a.name).detach().clone()
        model.get_parameter(b.name).data = a.reordered(value, order)
    block = model.transformer.h
    block[2].ln_2.load_state_dict(block[1].ln_2.state_dict())
    for name in ("attn", "ln_1"):  # both layers read the same stream
        for parameter in getattr(block[2], name).parameters():
            parameter.data.zero_()
    for parameter in block[1].mlp.c_proj.parameters():
        parameter.data *= 1e-6  # the first adds next to nothing to it
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(4)))[0]
    block[2].mlp.c_proj.weight.data = block[2].mlp.c_proj.weight.data @ turn * 3e-3
    (found,) = similarity(model, from_arrays(_ids()))
    assert found.cka[1, 2] == pytest.approx(1, abs=2e-7)  # measured 1.6e-8
    assert found.correlation[1, 2] == pytest.approx(1, abs=2e-7)  # measured 0
    assert found.cka[0, 1] < 0.9
    assert found.correlation[0, 1] < 0.9


def test_correlation_is_that_of_numpy_on_the_best_partners() -> None:
    from scipy.optimize import linear_sum_assignment

    model = bert()
    arrays = {**_ids(), "attention_mask": np.ones((12, 9), np.int64)}
    (found,) = similarity(model, from_arrays(arrays))
    pre = [p for _, p in _seen(model, arrays)]
    f = pre[0].shape[1]
    matrix = np.corrcoef(pre[1].T, pre[4].T)[:f, f:]
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    wanted = matrix[rows, columns].mean()
    assert found.correlation[1, 4] == pytest.approx(wanted, abs=1e-7)  # measured 9.5e-9


def test_few_bytes_mean_more_passes_and_the_same_numbers() -> None:
    model = gpt2()
    whole = similarity(model, from_arrays(_ids()))[0]
    parts = similarity(model, from_arrays(_ids()), SimilarityConfig(memory=1e-9))[0]
    assert np.array_equal(whole.cka, parts.cka)
    assert np.array_equal(whole.correlation, parts.correlation)
    near = similarity(model, from_arrays(_ids()), SimilarityConfig(reach=1))[0]
    assert np.isnan(near.correlation[0, 2])
    assert near.correlation[0, 1] == whole.correlation[0, 1]


def test_the_matrices_of_a_pass_fit_the_memory() -> None:
    members = find(gpt2())  # 21 products of 64 x 64, 15 of 256 x 256, in float32
    memory = 3 * 4 * 256 * 256
    passes = list(_passes({"layers": members}, SimilarityConfig(memory=memory / 1e9)))
    sizes = {"outputs": 4 * 64 * 64, "features": 4 * 256 * 256}
    sums = [sum(len(found) * sizes[what] for (_, what), found in p.items()) for p in passes]
    assert max(sums) <= memory
    assert sum(sums) == 21 * sizes["outputs"] + 15 * sizes["features"]
    assert len(passes) == 6  # the small ones leave room for two of the first three


def test_padding_and_the_other_stack_do_not_count() -> None:
    model = SEQ2SEQ["marian"]()
    mask = np.ones((6, 9), np.int64)
    mask[:, 6:] = 0
    arrays = {**_ids(6), "attention_mask": mask, "decoder_input_ids": _ids(6, 4)["input_ids"]}
    before = similarity(model, from_arrays(arrays))
    changed = {**arrays, "input_ids": np.where(mask == 1, arrays["input_ids"], 5)}
    after = similarity(model, from_arrays(changed))
    assert [s.name for s in before] == ["encoder", "decoder"]
    assert [s.positions for s in before] == [36, 24]
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a.cka, b.cka)
        assert np.array_equal(a.correlation, b.correlation)


def test_the_command_prints_numbers_and_writes_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(gpt2(), tmp_path / "model")
    np.savez(tmp_path / "data.npz", **_ids())
    data = ["--data", str(tmp_path / "data.npz"), "--json"]

    def run(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main(["similarity", str(tmp_path / "model"), *data, *arguments])
        assert stop.value.code == 0
        return json.loads(capsys.readouterr().out)

    found = run("--out", str(tmp_path / "heat"))
    assert found["stacks"][0]["layers"] == [0, 1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "heat" / "similarity.json").read_text()) == {
        "stacks": found["stacks"]
    }
    names = sorted(path.name for path in (tmp_path / "heat").iterdir())
    assert names == ["layers.svg", "similarity.json"]
    (stack,) = found["stacks"]
    drawn = cells(tmp_path / "heat" / "layers.svg")
    assert drawn == np.ravel([stack["cka"], stack["correlation"]]).round(3).tolist()
    run("--out", str(tmp_path / "heat.svg"))
    assert (tmp_path / "heat.svg").read_bytes() == (tmp_path / "heat" / "layers.svg").read_bytes()


def cells(picture: Path) -> list[float]:
    """Return the values of the cells of a picture, which is XML, in the order they are drawn."""
    rects = ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}rect")
    return [float(rect.get("fill-opacity", "nan")) for rect in rects if rect.get("fill-opacity")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "1"], "tokens must be 2 or more"),
        (["--out", "heat.png"], "is no .svg"),
        (["--data", "nothing.npz"], "is not a data file"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(gpt2(), tmp_path / "model")
    np.savez(tmp_path / "data.npz", **_ids())
    with pytest.raises(SystemExit) as stop:
        main(["similarity", str(tmp_path / "model"), "--data", str(tmp_path / "data.npz"),
              *arguments])  # fmt: skip
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
