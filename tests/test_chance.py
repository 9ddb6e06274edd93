"""A warning where the original itself does no better than guessing."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import gpt2, vit

from ffmerge.config import MergeConfig
from ffmerge.errors import FfmergeWarning
from ffmerge.passes.weights.evaluate import warn_near_chance
from ffmerge.passes.weights.merge import merge_


def _model(classes: int) -> Any:
    text = SimpleNamespace(vocab_size=classes)
    return SimpleNamespace(
        config=SimpleNamespace(num_labels=classes, get_text_config=lambda decoder: text)
    )


@pytest.mark.parametrize(
    ("name", "classes", "value", "rows", "warned"),
    [
        ("accuracy", 2, 0.55, 100, True),  # 0.5 + 2 * 0.05
        ("accuracy", 2, 0.61, 100, False),
        ("accuracy", 2, 0.0, 4, True),  # worse than guessing is a label turned round
        ("accuracy", 2, 1.0, 2, False),
        ("accuracy", 1000, 0.002, 1000, True),
        ("accuracy", 1000, 0.01, 1000, False),
        ("perplexity", 50_000, 40_000.0, 10, True),
        ("perplexity", 50_000, 900.0, 10, False),
        ("fidelity", 2, 0.0, 10, False),
    ],
)
def test_guessing_is_told_from_knowing(
    name: str, classes: int, value: float, rows: int, warned: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_near_chance(_model(classes), name, value, rows)
    assert [each.category for each in caught] == [FfmergeWarning] * warned


def test_a_merge_warns_of_labels_that_do_not_fit() -> None:
    model = vit(32, 64, layers=3)
    pixels = np.random.default_rng(0).standard_normal((16, 3, 16, 16)).astype("f")
    given = {"pixel_values": pixels, "labels": np.zeros(16, int)}
    right = model(torch.as_tensor(pixels)).logits.argmax(-1).numpy()
    config = MergeConfig(window=(0, 1), method="average")
    fitting = {**given, "labels": right}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_(model, fitting, config, fitting)
    wrong = {**given, "labels": (right + 1) % 7}
    with pytest.warns(FfmergeWarning, match="accuracy is 0 on 16 examples"):
        merge_(vit(32, 64, layers=3), wrong, config, wrong)
    ids = {"input_ids": np.arange(36).reshape(4, 9)}
    with pytest.warns(FfmergeWarning, match="perplexity"):
        merge_(gpt2(), ids, MergeConfig(k=2, method="average"), ids)
