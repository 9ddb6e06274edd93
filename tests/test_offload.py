"""Models that stay at home and compute elsewhere: a block at a time, and the same numbers.

The other device is one that PyTorch only pretends to have (shapes and devices are real, and two
devices in one operation are an error), or this processor with copies in the place of transfers.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, model_of
from recovering import MODELS, difference, rows_of, values_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ffmerge import commands
from ffmerge.config import CheckpointConfig, DataConfig, MergeConfig, RecoverConfig
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, offload
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs, forward
from ffmerge.models.offload import device_of, offload_
from ffmerge.models.prove import proven
from ffmerge.models.ties import SharedWeights
from ffmerge.passes.weights import calibrated, methods, recover
from ffmerge.passes.weights.evidence import Evidence
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.moments import Moments
from ffmerge.passes.weights.recover import clone_sharing_parameters, recover_

DEVICE = torch.device("lazy:0")  # has no kernels in PyTorch's wheels, so nothing real runs there
Lent = list[tuple[StorageWeakRef, int]]


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Lent:
    """Let weights be copied where they would be moved; give the copies, as weak references."""
    copies: Lent = []

    def there(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copy = tensor.clone()
        copies.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        return copy

    monkeypatch.setattr(offload, "_there", there)
    return copies


# Their forward pass looks at values (where a text ends, what is sampled), which fake tensors have
# not; what lies where is that of their siblings without a head.
LOOKS_AT_VALUES = {
    "XLMForSequenceClassification", "BartForSequenceClassification", "T5ForSequenceClassification",
    "InformerForPrediction",
}  # fmt: skip


INDICES = []
for index, case in enumerate(CASES):
    looks = pytest.mark.xfail(
        case[0] in LOOKS_AT_VALUES, reason="looks at values", raises=InputError, strict=True
    )
    INDICES.append(pytest.param(index, marks=looks))


@pytest.mark.parametrize("index", INDICES)
def test_all_that_is_computed_is_on_the_device(index: int) -> None:
    model = model_of(*CASES[index][:3])
    if hasattr(model.config, "num_local_experts"):  # the fused product wants bfloat16 there
        model.set_experts_implementation("batched_mm")
    inputs = example_inputs(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        offload_(model, DEVICE)
        output = forward(model, inputs)
        found = [x for x in tree_leaves(dict(output)) if isinstance(x, torch.Tensor)]
        next(x for x in found if x.requires_grad).sum().backward()
    assert {x.device for x in found} == {DEVICE} == {device_of(model)}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {b.device.type for b in model.buffers()} <= {"cpu"}
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert {g.device.type for g in grads} == {"cpu"}


@pytest.mark.parametrize("method", ["calibrated", "drop-ffn"])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_moments_there_and_weights_at_home_make_weights_at_home(name: str, method: str) -> None:
    """What is not real cannot be solved for: the steps before and after are run."""
    model = MODELS[name]()
    members = find(model)[:2]
    d, f = members[0].d_model, members[0].d_ff
    with FakeTensorMode(allow_non_fake_inputs=True):
        offload_(model, DEVICE)
        draw = partial(torch.ones, device=DEVICE)
        inputs, hidden = Moments(()), Moments((), 7)
        for layer in (0, 1):
            inputs.mean[layer], inputs.cross[layer, layer] = draw(1, d).double(), draw(1, d, d)
            hidden.mean[layer], hidden.squares[layer] = draw(1, f).double(), draw(1, f).double()
        inputs.count = 7
        evidence = Evidence(Moments(((0, 1),), 7), inputs, hidden)
        if method == "calibrated":
            order = torch.arange(f)
            layers = [calibrated._layer(model, m, order, evidence) for m in members]
            means = calibrated.weighted_means(layers)
            assert {mean.device for mean in means} == {DEVICE}
            for layer in layers:
                calibrated._draft_(layer, *means, rank=0)
            weights = calibrated._shared_weights(model, members, layers, *means)
        else:
            weights = methods.drop_ffn(model, members, evidence)
            assert isinstance(weights, SharedWeights)
    tensors = [*weights.shared.values(), *(t for own in weights.own for t in own.values())]
    assert len(tensors) > 4
    assert {t.device.type for t in tensors} == {"cpu"}


@pytest.mark.parametrize("name", ["vit", "gpt2", "llama", "marian", "clip"])
def test_no_more_than_a_block_is_there(name: str, lent: Lent) -> None:
    """Beside what is in no block; when running, and when going back."""
    model = MODELS[name]()
    blocks: dict[str, int] = {}
    for path, x in (*model.named_parameters(), *model.named_buffers()):
        numbers = [i for i, part in enumerate(path.split(".")) if part.isdigit()]
        block = ".".join(path.split(".")[: numbers[0] + 1]) if numbers else ""
        blocks[block] = blocks.get(block, 0) + x.nbytes
    bound = blocks.pop("") + max(blocks.values())
    held: list[int] = []

    def note(*_: Any) -> None:
        held.append(sum(size for storage, size in lent if not storage.expired()))

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    offload_(model, "cpu")
    for module in model.modules():
        if not [*module.children()]:
            module.register_forward_hook(note)
            module.register_full_backward_hook(note)
    inputs = {k: torch.as_tensor(x) for k, x in rows_of(model, 2).items()}
    if name == "vit":
        inputs["pixel_values"].requires_grad_()
        forward(model, inputs)["logits"].sum().backward()
        assert inputs["pixel_values"].grad is not None
    else:
        with torch.no_grad():
            forward(model, inputs)
    assert blocks and len(held) > 3
    assert bound / 2 < max(held) <= bound
    assert all(storage.expired() for storage, _ in lent)


def test_no_weight_is_kept_for_a_backward_pass_in_mixed_precision(lent: Lent) -> None:
    """Autocast makes copies of 16 bits: of a block's weights none may wait for its gradient."""
    model = MODELS["vit"]()
    blocks = {p.shape for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    blocks |= {shape[::-1] for shape in blocks}
    pixels = torch.as_tensor(rows_of(model, 2)["pixel_values"]).requires_grad_()
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    offload_(model, "cpu")
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        total = model(pixel_values=pixels)["logits"].sum()
    assert kept
    assert [x.shape for x in kept if x.shape in blocks] == []
    total.backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_what_is_frozen_is_not_moved_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the process computes; a model that is at home is."""
    for away in (False, True):
        model = MODELS["vit"]()
        original, moved = clone_sharing_parameters(model), list[Any]()
        for each in (model, original):
            monkeypatch.setattr(each, "to", moved.append)
            if away:
                offload_(each, "meta")
        with recover._training(model, original, [], torch.device("cpu")):
            assert moved == [] if away else moved == [torch.device("cpu")] * 2


def test_a_twin_of_an_offloaded_model_is_the_original(lent: Lent) -> None:
    model = MODELS["gpt2"]()
    data = rows_of(model)
    offload_(model, "cpu")
    original = clone_sharing_parameters(model)
    with torch.no_grad():
        before = forward(model, data)["logits"]
        merge_(model, data, MergeConfig(window=(0, 2), method="average"))
        assert not torch.equal(forward(model, data)["logits"], before)
        assert torch.equal(forward(original, data)["logits"], before)


@pytest.mark.parametrize("method", ["calibrated", "residual", "weights", "drop-ffn"])
@pytest.mark.parametrize("name", ["vit", "llama", "marian"])
def test_merging_and_recovery_are_those_of_a_model_at_home(
    name: str, method: str, lent: Lent
) -> None:
    found = []
    for away in (False, True):
        model = MODELS[name]()
        data, lent[:] = rows_of(model), []
        sublayers = proven(model)
        if away:
            offload_(model, "cpu")
            assert proven(model) == sublayers
        original = clone_sharing_parameters(model)
        config = MergeConfig(k=2, method=method, batch_size=16)
        merged = merge_(model, data, config)
        recovered = recover_(model, original, data, RecoverConfig(steps=4))
        assert bool(lent) == away
        found.append((merged.candidates, recovered.losses, values_of(model)))
    (tried, losses, values), (tried_away, losses_away, values_away) = found
    assert len(tried) > 1
    for one, other in zip(tried, tried_away, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-6)
    assert np.allclose(losses, losses_away, rtol=1e-6, atol=0)
    assert difference(values, values_away) < 1e-6  # all three measured 0


COPIED = """
from ffmerge.models import offload
from ffmerge.passes.weights import calibrated
offload._there = lambda tensor, device: tensor.clone()
del calibrated.side_by_side  # no process may need passes for a fit: each has all signals
from ffmerge.__main__ import main
main()
"""


@pytest.mark.slow
def test_two_processes_with_weights_on_disk_do_what_one_does_in_memory(tmp_path: Path) -> None:
    """Statistics, search over windows, measuring and recovery, all of one command."""
    model = MODELS["gpt2"]()
    model.save_pretrained(tmp_path / "gpt2")
    np.savez(tmp_path / "data.npz", **rows_of(model))
    (tmp_path / "copied.py").write_text(COPIED)
    source, data = str(tmp_path / "gpt2"), str(tmp_path / "data.npz")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(tmp_path / "copied.py"), "merge", source, str(tmp_path / "two"), "--k", "2",
         "--data", data, "--batch-size", "8", "--recover", "6", "--offload", "--json"],
        env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    one = commands.merge(
        source, tmp_path / "one", MergeConfig(k=2, batch_size=8), DataConfig(data=data),
        RecoverConfig(steps=6), CheckpointConfig(),
    )  # fmt: skip
    assert printed["groups"] == json.loads(json.dumps(one.to_json()["groups"]))
    values = [values_of(checkpoint.load(tmp_path / name)) for name in ("one", "two")]
    assert 0 < difference(*values) < 2e-7  # measured 3.5e-8: gradients are summed by two


def test_a_device_that_is_not_there_is_one_sentence(command: Any, tmp_path: Path) -> None:
    MODELS["vit"]().save_pretrained(tmp_path / "vit")
    np.savez(tmp_path / "data.npz", **rows_of(MODELS["vit"]()))
    code, _, err = command(
        "merge", tmp_path / "vit", tmp_path / "out", "--k", "2", "--data", tmp_path / "data.npz",
        "--device", "xpu", "--offload",
    )  # fmt: skip
    assert code == 2
    assert "cannot be put on --device 'xpu'" in err
    assert not (tmp_path / "out").exists()
