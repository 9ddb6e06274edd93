"""Modules of every kind, called in every way, rounded for a block and whole again after it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from graphs import build
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ffmerge
from ffmerge.config import ExportConfig
from ffmerge.exporter.package import export
from ffmerge.passes.graph.run import share_model
from ffmerge.passes.weights import precision

DTYPES = ("fp16", "int8", "int4")


class Called(nn.Module):
    """A map that is called by name, as code that comes with a checkpoint may do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """Return what the map gives."""
        return self.inner(input=x)


def _rounded(model: nn.Module, dtype: str, x: Tensor) -> Tensor:
    """Return what a rounded model gives; afterwards it is as it was."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(x)
        with precision.rounded(model, dtype):
            found: Tensor = model(x)
        assert torch.equal(model(x), plain) and not torch.equal(found, plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_map_that_is_called_by_name_is_rounded_like_any(dtype: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    if kind != torch.float32 and dtype == "fp16":
        return  # it holds all that these do
    inner, x = nn.Linear(64, 64, dtype=kind), torch.randn(2, 5, 64, dtype=kind)
    assert torch.equal(_rounded(Called(inner), dtype, x), _rounded(inner, dtype, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_of_a_weight_norm_what_it_computes_is_rounded(dtype: str, old: bool) -> None:
    """Nothing but two parts of it is a parameter."""
    norm = torch.nn.utils.weight_norm if old else parametrizations.weight_norm
    for make, shape in ((nn.Linear, (2, 5, 64)), (lambda *n: nn.Conv1d(*n, 3), (2, 64, 5))):
        torch.manual_seed(0)
        plain, normed = make(64, 96), make(64, 96)
        normed.load_state_dict(plain.state_dict())
        normed = norm(normed)
        x = torch.randn(shape)
        expected, found = _rounded(plain, dtype, x), _rounded(normed, dtype, x)
        off = (found - expected).norm() / (plain(x) - expected).norm()
        # a last bit may turn a code; measured 0.029 in fp16, else 2.4e-5
        assert float(off.detach()) < 0.1, make
        more = precision.bytes_of(normed, dtype) / precision.bytes_of(plain, dtype)
        assert 1 <= more < 1.15  # measured 1.004 to 1.12: the norms are parameters


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_head_of_one_score_stays_as_it_is_in_a_package(dtype: str) -> None:
    """As of a cross encoder: its weight is a vector."""
    torch.manual_seed(0)
    head, x = nn.Linear(1024, 1), torch.randn(2, 5, 1024)
    with torch.no_grad(), precision.rounded(head, dtype):
        found = head(x)
    weight = head.weight.detach().numpy().T
    model = build("(float[n,1024] x) => (float[n,1] y) {y = MatMul(x, W)}", W=weight)
    (skip,) = share_model(model, dtype=dtype).skipped
    assert skip.reason == "FLOAT: a vector of 1024 elements"
    assert torch.equal(found, head(x))
    assert precision.bytes_of(head, dtype) == 4 * 1025


def test_int8_for_a_gpu_is_in_blocks_as_foretold(tmp_path: Path) -> None:
    """Its provider has no kernels for rows."""
    model = tiny.vit(64, 128, 2)
    made = export(model, tmp_path / "p", ExportConfig(dtype="int8", profile="cuda")).manifest
    more = precision.bytes_of(model, "int8", rows=False) / made.bytes_unique - 1
    assert abs(more) < 0.003  # measured -0.0008; -0.0070 by rows
    given = {"pixel_values": torch.randn(8, 3, 16, 16)}
    found = ffmerge.load_package(tmp_path / "p")(**given).logits
    with torch.no_grad():
        plain = model(**given).logits
        with precision.rounded(model, "int8", rows=False):
            foretold = model(**given).logits
    off = (found - foretold).norm(dim=-1) / (found - plain).norm(dim=-1)
    assert float(off.median()) < 1e-2  # measured 3.1e-5; 1.5 by rows


def test_no_rows_are_rounded_to_none() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for dtype in DTYPES:
        with torch.no_grad(), precision.rounded(model, dtype):
            assert model(torch.zeros(0, 5, 64)).shape == (0, 5, 64)
