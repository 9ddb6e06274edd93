"""What tracing took for granted of sizes: a program that holds for some is not shipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FunnelConfig, FunnelForMaskedLM, LongT5Config
from transformers import LongT5ForConditionalGeneration as LongT5

from ffmerge.errors import ExportError
from ffmerge.exporter.package import export
from ffmerge.exporter.sizes import taken_for_granted
from ffmerge.models.probe import InputSpec, Probe

INPUT = InputSpec("x", "float32", ("rows", "tokens", 3))


class Blocks(torch.nn.Module):
    """Means of blocks of four tokens; rows are padded to whole blocks, if they are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 4:
            x = torch.nn.functional.pad(x, (0, 0, 0, 4 - x.shape[1] % 4))
        return x.reshape(x.shape[0], x.shape[1] // 4, 4, 3).mean(2)


def traced(module: torch.nn.Module, tokens: int) -> Any:
    any_size = torch.export.Dim.DYNAMIC
    return torch.export.export(
        module, (torch.zeros(2, tokens, 3),), dynamic_shapes=({0: any_size, 1: any_size},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip


def of(*lengths: int) -> Probe:
    return Probe((INPUT,), tuple({"rows": 3, "tokens": length} for length in lengths))


def test_a_branch_by_a_size_is_told_where_a_case_takes_the_other() -> None:
    program = traced(Blocks(), 8)
    assert taken_for_granted(program, of(12, 9)) == "Eq(Mod(tokens, 4), 0)"
    assert taken_for_granted(program, of(12, 8)) is None
    assert taken_for_granted(traced(torch.nn.Linear(3, 5), 8), of(12, 9, 1)) is None


@pytest.mark.slow
def test_a_model_of_whole_blocks_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = LongT5(LongT5Config(vocab_size=97, local_radius=4, **sizes))
    with pytest.raises(ExportError, match=r"any size: .* Eq\(Mod\(encoder_sequence_length, 5\), 0"):
        export(model, tmp_path / "package")


def test_a_size_that_is_fixed_by_a_models_code_is_told_so(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]}
    model = FunnelForMaskedLM(FunnelConfig(vocab_size=97, **sizes)).eval()
    with pytest.raises(ExportError, match="its code takes one size for granted where any may"):
        export(model, tmp_path / "package")
