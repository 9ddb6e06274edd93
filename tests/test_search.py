"""Selection against a search redone by hand, sizes against files, precisions against packages."""

import json
import os
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from drawn import labelled, pairs_of_texts
from safetensors import safe_open
from tiny import gpt2, permute_neurons, vit
from tiny_wider import SEQ2SEQ, seeded, t5
from transformers import SiglipConfig, SiglipModel

import ffmerge
from ffmerge.config import ExportConfig, MergeConfig, parse_budget
from ffmerge.errors import InputError
from ffmerge.exporter import package
from ffmerge.models import checkpoint
from ffmerge.models.codes import Form, block_codes
from ffmerge.models.examples import from_arrays
from ffmerge.models.find import find
from ffmerge.models.inputs import example_inputs
from ffmerge.models.record import Group
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights import activations, precision
from ffmerge.passes.weights.evaluate import score_for
from ffmerge.passes.weights.evidence import Statistics, pairs_of
from ffmerge.passes.weights.merge import merge_

SEQ2SEQ_TASK = "text2text-generation"


def _model() -> Any:
    """Five layers, of which 1 and 3 compute the same."""
    model = vit(32, 64, 5)
    permute_neurons(model, 1, 3)
    return model


def _pixels(rows: int = 24) -> dict[str, np.ndarray]:
    return {"pixel_values": labelled(_model(), rows)["pixel_values"]}


def _sizes(model: Any) -> set[int]:
    return {sum(model.get_parameter(w.name).nbytes for w in s.weights) for s in find(model)}


def test_neighbours_that_compute_the_same_are_joined_first() -> None:
    model = vit(32, 64, 5)
    permute_neurons(model, 2, 3)
    result = merge_(model, _pixels(), MergeConfig(budget="-5%"))
    first = result.frontier[1]
    assert first.groups == (Group("layers", (2, 3)),)
    assert first.value == pytest.approx(1, abs=1e-6)  # measured 0
    assert [c.groups[0].layers for c in result.candidates] == [(i, i + 1) for i in range(4)]


def _averaged(make: Any, groups: tuple[Group, ...], inputs: dict[str, Any]) -> float:
    """Return the mean cosine to the original's logits, every group's weights their mean."""
    model, original = make(), make()
    for group in groups:
        members = [s for s in find(model) if s.stack == group.stack and s.layer in group.layers]
        for weights in zip(*(m.weights for m in members), strict=True):
            values = [original.get_parameter(w.name).detach().double() for w in weights]
            for weight in weights:
                model.get_parameter(weight.name).data = (sum(values) / len(values)).float()
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (original, model)]
    return float(torch.cosine_similarity(*logits, dim=-1).mean())


@pytest.mark.parametrize("family", ["vit", "t5"])
def test_every_step_of_the_search_redone_by_hand(family: str) -> None:
    """Groups that grow are the mean of all their members' own weights; both stacks compete."""
    make = {"vit": _model, "t5": partial(t5, 3, 3)}[family]
    data = _pixels() if family == "vit" else pairs_of_texts()
    if family == "t5":
        data["decoder_input_ids"] = np.abs(data.pop("labels")) % 50 + 3  # nothing is padded
        del data["attention_mask"]
    odd = {name: torch.from_numpy(array[1::2].copy()) for name, array in data.items()}
    task = SEQ2SEQ_TASK if family == "t5" else None
    config = MergeConfig(budget="-20%", method="average", task=task)
    result = merge_(make(), data, config)
    for candidate in result.candidates:
        by_hand = _averaged(make, candidate.groups, odd)
        assert abs(candidate.value - by_hand) < 1e-6  # measured 1.2e-7
    (one,) = _sizes(make())
    left = list(result.candidates)
    units = [(name, (s.layer,)) for name, found in stacks(find(make())).items() for s in found]
    for before, after in zip(result.frontier, result.frontier[1:], strict=False):
        pairs = [(a, b) for a, b in pairwise(units) if a[0] == b[0]]
        tried, left = left[: len(pairs)], left[len(pairs) :]
        joined = [(a[0], tuple(sorted(a[1] + b[1]))) for a, b in pairs]
        assert [c.groups[-1] for c in tried] == [Group(*unit) for unit in joined]
        assert after.value == max(c.value for c in tried)
        assert before.bytes - after.bytes == one
        (chosen,) = {i for i, c in enumerate(tried) if c.value == after.value}
        units = [u for u in units if u not in pairs[chosen]] + [joined[chosen]]
        units.sort(key=lambda unit: (unit[0] != "encoder", unit[1]))
        assert set(after.groups) == {Group(*unit) for unit in units if len(unit[1]) > 1}
    assert not left
    assert result.record.groups == result.frontier[-1].groups
    assert result.record.metric["merged"] == result.frontier[-1].value


def _stored(folder: Path) -> int:
    """Return the bytes of all tensors in a folder, told by the lengths of its files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        total += len(content) - 8 - int.from_bytes(content[:8], "little")
    return total


@pytest.mark.parametrize(
    ("make", "method", "dtype"),
    [
        (_model, "calibrated", torch.float32),
        (_model, "permute", torch.bfloat16),
        (lambda: t5(2, 3), "residual", torch.float32),
    ],
)
def test_a_size_on_the_frontier_is_what_the_files_hold(make, method, dtype, tmp_path) -> None:
    """The budget that is exactly met takes no step more, one byte less takes one."""
    data = _pixels() if make is _model else pairs_of_texts()
    task = None if make is _model else SEQ2SEQ_TASK
    config = partial(MergeConfig, method=method, task=task, rank=2)
    points = merge_(make().to(dtype), data, config(budget="-11%")).frontier
    assert len(points) > 2
    for number, point in enumerate(points[1:], 1):
        for budget, at in ((point.bytes, number), (points[number - 1].bytes - 1, number)):
            model = make().to(dtype)
            record = merge_(model, data, config(budget=f"{budget}B")).record
            assert (record.bytes_after, record.groups) == (points[at].bytes, points[at].groups)
        checkpoint.save(model, tmp_path / str(number))
        assert _stored(tmp_path / str(number)) == point.bytes
        assert record.bytes_after <= record.bytes_before


def test_what_a_join_costs_is_counted_by_the_byte_it_saves() -> None:
    """The encoder's sublayers are eight times the decoder's: the best metric is not the choice."""
    make = partial(SEQ2SEQ["bart"], 3, 3)
    model = make()
    wide = type(model)(type(model.config)(**{**model.config.to_dict(), "encoder_ffn_dim": 384}))
    torch.manual_seed(0)
    for parameter in wide.parameters():
        parameter.data += torch.randn(parameter.shape) * 0.05
    for layer in wide.model.decoder.layers:  # little is lost where little is added
        layer.fc2.weight.data *= 0.15
    config = MergeConfig(budget="-1%", method="average", task=SEQ2SEQ_TASK, criterion="fidelity")
    result = merge_(wide.eval(), pairs_of_texts(), config)
    start, chosen = result.frontier
    costs = [(start.value - c.value) / (start.bytes - c.bytes) for c in result.candidates]
    cheapest = result.candidates[int(np.argmin(costs))]
    assert (chosen.groups, chosen.value) == (cheapest.groups, cheapest.value)
    assert chosen.value < max(c.value for c in result.candidates)


def test_budgets_of_the_command_line(tmp_path, command) -> None:
    _model().save_pretrained(tmp_path / "m")
    np.savez(tmp_path / "data.npz", **_pixels())
    run = partial(
        command, "merge", tmp_path / "m", tmp_path / "out", "--method",
        "average", "--data", tmp_path / "data.npz", "--budget",
    )  # fmt: skip
    (one,) = _sizes(_model())
    whole = sum(p.nbytes for p in _model().parameters())
    for budget in ("1kB", "-90%", f"{whole - 4 * one - 1}B"):
        code, out, err = run(budget)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"({whole - 4 * one:,} bytes)" in err
        assert not (tmp_path / "out").exists()
    for wrong in ("1GB", "60", "-5MB", "0%", "-100%", "1e3B", "MB", "5 %"):
        code, out, err = run(wrong)
        assert (code, out, len(err.splitlines())) == (2, "", 1), wrong + err
    code, out, _ = run("-30%", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["bytes_after"] <= 0.7 * whole < found["frontier"][-2]["bytes"]
    assert found["bytes_after"] == found["frontier"][-1]["bytes"] == _stored(tmp_path / "out")
    groups = checkpoint.load(tmp_path / "out").config.ffmerge["groups"]
    assert groups == found["groups"] == found["frontier"][-1]["groups"]


def test_what_is_out_of_reach_is_refused_before_anything_is_tried() -> None:
    steps: list[str] = []
    with pytest.raises(InputError, match="out of reach"):
        merge_(
            _model(), _pixels(), MergeConfig(budget="-90%"),
            progress=lambda step, done, total: steps.append(step),
        )  # fmt: skip
    assert not steps


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60MB", 60_000_000), ("1.5kB", 1500), ("2 KiB", 2048), ("1GiB", 2**30), ("77B", 77),
        ("30mb", 30_000_000), ("-25%", 750), ("75%", 750), ("-12.5%", 875),
    ],
)  # fmt: skip
def test_sizes_in_words(text: str, size: int) -> None:
    assert parse_budget(text, 1000) == size


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "either"),
        ({"budget": "-10%", "k": 2}, "either"),
        ({"k": 2, "auto_precision": True}, "budget"),
        ({"budget": "-10%", "sync": True}, "compete"),
        ({"k": 2, "criterion": "taste"}, "metric or fidelity"),
    ],
)
def test_settings_that_do_not_go_together(config, message) -> None:
    with pytest.raises(InputError, match=message):
        merge_(_model(), _pixels(), MergeConfig(**config))
    with pytest.raises(InputError, match="needs data"):
        merge_(_model(), None, MergeConfig(budget="-10%", method="average"))


def test_the_criterion_may_be_fidelity_although_there_are_labels() -> None:
    data = {**_pixels(), "labels": np.arange(24) % 7}
    asked = merge_(_model(), data, MergeConfig(k=2, criterion="fidelity"))
    blind = merge_(_model(), _pixels(), MergeConfig(k=2))
    assert asked.record.metric["name"] == "fidelity"
    assert asked.candidates == blind.candidates
    assert merge_(_model(), data, MergeConfig(k=2)).record.metric["name"] == "accuracy"


def test_statistics_come_when_a_step_needs_them_and_go_when_none_does() -> None:
    model, data = _model(), from_arrays(_pixels())
    a, b, c, d, _ = find(model)
    steps: list[str] = []
    config = MergeConfig(k=2, batch_size=8)
    statistics = Statistics(
        model, data, {"layers": find(model)}, config, lambda step, done, total: steps.append(step)
    )
    for groups, pairs in (
        ([(a, b), (b, c), (c, d)], [(0, 1), (1, 2), (2, 3)]),
        ([(a, b), (b, c, d)], [(0, 1), (1, 2), (1, 3)]),
        ([(b, c, d)], [(1, 2), (1, 3)]),
    ):
        choices = [(group,) for group in groups]
        statistics.learn(choices)
        found = statistics.evidence("layers", None)
        assert sorted(found.features.cross) == pairs
        once = activations.collect(model, pairs_of(choices), data.batches(8), 10_000)["layers"]
        for pair in pairs:
            same = once["features"].correlation(*pair)
            assert torch.equal(found.features.correlation(*pair), same)
        for layer in {layer for pair in pairs for layer in pair}:
            assert torch.equal(found.inputs.covariance(layer), once["inputs"].covariance(layer))
            assert torch.equal(found.hidden.mean[layer], once["hidden"].mean[layer])
    batches = len(data) // 8
    assert len(steps) == 2 * batches  # the last step needs nothing new
    assert steps[0].startswith("statistics: 3 pairs") and steps[-1].startswith("statistics: 1 pair")


TWO = """
import os, sys
from safetensors.torch import save_file
from test_search import _model, _pixels
from ffmerge.config import MergeConfig
from ffmerge.passes.weights.merge import merge_
from ffmerge.passes.weights.search import Trials

attempt, count = Trials.attempt, []
Trials.attempt = lambda *given: (count.append(1), attempt(*given))[1]
model = _model()
result = merge_(model, _pixels(), MergeConfig(budget="-25%", method="calibrated"))
values = {name: p.detach().contiguous() for name, p in model.named_parameters()}
groups = str([[group.stack, *group.layers] for group in result.record.groups])
tried = {"own": str(len(count)), "all": str(len(result.candidates))}
save_file(values, sys.argv[1] + os.environ["RANK"], {"groups": groups, **tried})
"""


def test_two_processes_choose_and_compute_what_one_does(tmp_path) -> None:
    paths = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         str(tmp_path / "two.py"), str(tmp_path / "rank")],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = _model()
    result = merge_(model, _pixels(), MergeConfig(budget="-25%", method="calibrated"))
    steps, all_tried = len(result.frontier) - 1, len(result.candidates)
    own = 0
    for rank in ("rank0", "rank1"):
        with safe_open(tmp_path / rank, "pt") as found:
            groups = str([[group.stack, *group.layers] for group in result.record.groups])
            assert found.metadata()["groups"] == groups
            assert int(found.metadata()["all"]) == all_tried
            own += int(found.metadata()["own"])
            assert {*found.keys()} == {name for name, _ in model.named_parameters()}
            for name, value in model.named_parameters():  # measured 0
                assert torch.allclose(value, found.get_tensor(name), rtol=1e-6, atol=1e-7)
    # who has not tried the winner of a step merges it again
    assert own == all_tried + steps


@pytest.mark.parametrize("shape", [(48, 64), (33, 50)])
def test_weights_are_rounded_as_the_exporter_does(shape) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype, form in (("int8", Form(8, 64)), ("int4", Form(4, 32))):
        blocks = block_codes(weight.numpy(), form).values(shape[1])
        assert np.abs(precision.to_dtype(weight, dtype).numpy() - blocks).max() == 0


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (partial(gpt2, 64, 128, 2), "int8"),
        (partial(vit, 48, 96, 2), "int8"),
        (partial(vit, 64, 128, 2), "int8"),  # its position embeddings are large enough to be int8
        (partial(vit, 64, 128, 2), "int4"),
        (partial(gpt2, 80, 160, 2), "int4"),  # no whole blocks: its tables are int8
        (partial(gpt2, 100, 200, 2), "int8"),
    ],
)
def test_rounding_is_what_a_package_does(make, dtype, tmp_path) -> None:
    """Sizes and outputs of the exported graph."""
    model = make()
    inputs = {name: array for name, array in labelled(model, 8).items() if name != "labels"}
    task = "text-generation-with-past" if "input_ids" in inputs else None
    made = package.export(model, tmp_path / "p", ExportConfig(task=task, dtype=dtype)).manifest
    session = onnxruntime.InferenceSession(tmp_path / "p" / made.graphs[0].path)
    fed = dict(inputs)
    for value in session.get_inputs():
        if value.name.startswith("past"):
            fed[value.name] = np.zeros((8, value.shape[1], 0, value.shape[3]), np.float32)
        elif value.name not in fed:
            ones = np.ones_like(inputs["input_ids"])
            fed[value.name] = ones if value.name == "attention_mask" else ones.cumsum(1) - 1
    logits = session.run(["logits"], fed)[0]
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(**tensors).logits.numpy()
        with precision.rounded(model, dtype):
            rounded = model(**tensors).logits.numpy()
        assert np.array_equal(model(**tensors).logits.numpy(), plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    size = np.linalg.norm(logits - plain)
    more = precision.bytes_of(model, dtype) / made.bytes_unique - 1
    assert abs(more) < 0.03  # measured 0.0024, 0.022, 0.012, 0.0016, 0.0019, 0.0008
    # measured 1.7e-5 (blocks), 1.7e-5 and 2.3e-5 (rows), 0.035, 0.0036, 0.034
    assert np.linalg.norm(logits - rounded) < 0.2 * size


def _outputs(model: Any, inputs: Any, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first output of a model as it is, and as it is foretold in a precision."""
    with torch.no_grad():
        plain = model(**inputs)[0]
        with precision.rounded(model, dtype):
            return plain, model(**inputs)[0]


@pytest.mark.parametrize(("width", "dtype"), [(64, "int8"), (64, "int4"), (80, "int8")])
def test_attention_of_pytorch_is_rounded_as_in_a_package(width, dtype, tmp_path) -> None:
    """SigLIP pools by nn.MultiheadAttention, whose three maps are one weight that is split."""
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    text = {**sizes, "vocab_size": 97, "max_position_embeddings": 16}
    text["projection_size"] = width
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    made = package.export(model, tmp_path / "p", ExportConfig(dtype=dtype)).manifest
    assert not [skip for skip in made.skipped if "attention" in skip.name]
    given = {"pixel_values": torch.randn(16, 3, 16, 16)}
    given["input_ids"] = torch.randint(0, 97, (3, 16))
    found = ffmerge.load_package(tmp_path / "p")(**given)["image_embeds"]
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        plain = model(**given)["image_embeds"]
        with precision.rounded(model, dtype):
            rounded = model(**given)["image_embeds"]
        assert torch.equal(model(**given)["image_embeds"], plain)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    off = (found - rounded).norm(dim=-1) / (found - plain).norm(dim=-1)
    # of the pictures between, as a last bit may turn a code of what is read, which moves one by
    # half of its rounding; measured 1.2e-5, 2.3e-6, 1.3e-5
    assert float(off.median()) < 1e-3
    more = precision.bytes_of(model, dtype) / made.bytes_unique - 1
    assert abs(more) < 0.1  # measured 0.041, 0.076, 0.040: biases that are zero are left out


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_chooses_experts_is_rounded_as_in_a_package(dtype, tmp_path) -> None:
    """Its weight is a parameter of no map."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 16}
    model = seeded("MixtralForCausalLM", "MixtralConfig", max_position_embeddings=64, **sizes)
    made = package.export(model, tmp_path / "p", ExportConfig(dtype=dtype)).manifest
    assert "model.layers.0.mlp.gate.weight" not in {skip.name for skip in made.skipped}
    ids = torch.randint(0, 97, (8, 32))
    found = ffmerge.load_package(tmp_path / "p")(input_ids=ids, attention_mask=ids * 0 + 1).logits
    plain, rounded = _outputs(model, {"input_ids": ids}, dtype)
    off = (found - rounded).norm(dim=-1) / (found - plain).norm(dim=-1)
    # between: another expert may be chosen by a last bit
    assert float(off.median()) < 1e-3  # measured 2.0e-5, 1.5e-6; 0.22 and 0.064 before


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_positions_of_a_sound_are_rounded_as_in_a_package(dtype, tmp_path) -> None:
    """Whisper looks all of them up, by ids that it makes itself: a constant of its graph."""
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 64}
    sizes |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 50}
    model = seeded(
        "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=97, encoder_layers=1,
        decoder_layers=1, num_mel_bins=16, max_target_positions=32, pad_token_id=2, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        **sizes,
    )  # fmt: skip
    package.export(model, tmp_path / "p", ExportConfig(dtype=dtype))
    inputs = example_inputs(model)
    found = ffmerge.load_package(tmp_path / "p")(**inputs).logits
    plain, rounded = _outputs(model, inputs, dtype)
    off = (found - rounded).norm(dim=-1) / (found - plain).norm(dim=-1)
    assert float(off.median()) < 1e-3  # measured 1.5e-5, 1.5e-6; 0.66 and 0.098 before


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_positions_that_are_resized_are_rounded_as_in_a_package(dtype, tmp_path) -> None:
    """DINOv2 cuts those of 144 parts of a picture, and makes fewer of them."""
    model = seeded(
        "Dinov2Model", "Dinov2Config", hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=48, patch_size=4,
    )  # fmt: skip
    made = package.export(model, tmp_path / "p", ExportConfig(dtype=dtype)).manifest
    positions = "embeddings.position_embeddings"
    reasons = {skip.name: skip.reason for skip in made.skipped}
    assert reasons[positions] == "INT8, a scale for each row: it is not a matrix"
    given = {"pixel_values": torch.randn(16, 3, 20, 24)}
    found = ffmerge.load_package(tmp_path / "p")(**given).last_hidden_state
    plain, rounded = _outputs(model, given, dtype)
    off = (found - rounded).norm(dim=-1) / (found - plain).norm(dim=-1)
    assert float(off.median()) < 1e-3  # measured 2.4e-5, 4.9e-6; 0.49 and 0.066 before
    more = precision.bytes_of(model, dtype) / made.bytes_unique - 1
    assert abs(more) < 0.03  # measured -0.013, 0.0024


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_that_a_decoder_reads_is_rounded_in_rows(tied, tmp_path) -> None:
    """In blocks if the decoder multiplies by one of its weights, as both are then."""
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 80}
    sizes |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 40}
    model = seeded(
        "BartForConditionalGeneration", "BartConfig", vocab_size=97, encoder_layers=1,
        decoder_layers=1, pad_token_id=2, decoder_start_token_id=2, **sizes,
    )  # fmt: skip
    if tied:
        model.model.decoder.layers[0].fc1.weight = model.model.encoder.layers[0].fc1.weight
    made = package.export(model, tmp_path / "p", ExportConfig(dtype="int8")).manifest
    assert ("rows" in made.int8.values()) != tied
    inputs = example_inputs(model)
    found = ffmerge.load_package(tmp_path / "p")(**inputs).logits
    plain, rounded = _outputs(model, inputs, "int8")
    # measured 2.8e-5 and 2.6e-5; of the first 0.18 before
    assert float((found - rounded).norm()) < 0.1 * float((found - plain).norm())
    more = precision.bytes_of(model, "int8") / made.bytes_unique - 1
    assert abs(more) < 0.05  # measured 0.013, 0.007


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_of_zeros_is_rounded_to_zeros_in_any_type(dtype) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    found = precision.rounded_rows(x)
    assert found.dtype == dtype and not found[1].any()
    # measured 0.0055, in bfloat16 0.0059
    assert float((found - x).float().norm() / x.float().norm()) < 0.01
    assert precision.rounded_rows(x[:, None][:, :0]).shape == (3, 0, 64)


def test_the_best_precision_that_fits_is_chosen(command, tmp_path) -> None:
    """What fits is measured anew by hand; half the size needs no merging, a fifth does."""
    pixels = _pixels()
    odd = from_arrays({"pixel_values": pixels["pixel_values"][1::2]})
    whole = sum(p.numel() * 4 for p in _model().parameters())
    for budget in ("-50%", "19%"):
        model, original = _model(), _model()
        result = merge_(
            model, pixels, MergeConfig(budget=budget, auto_precision=True, method="calibrated")
        )
        metric, fits = result.record.metric, parse_budget(budget, whole)
        fitting = [point for point in result.frontier if point.bytes <= fits]
        best = max(fitting, key=lambda point: point.value)
        assert (best.dtype, best.value) == (metric["dtype"], metric["rounded"])
        assert best.groups == result.record.groups
        score = score_for(original, "image-classification", odd, 32)
        assert score.measure(model) == pytest.approx(metric["merged"], abs=1e-6)
        with precision.rounded(model, best.dtype):
            assert score.measure(model) == pytest.approx(best.value, abs=1e-6)
        last = [point for point in result.frontier if point.groups == result.frontier[-1].groups]
        assert best.value >= last[0].value or last[0].bytes <= fits
        if budget == "-50%":
            assert (best.dtype, best.groups) == ("fp16", ())
            checkpoint.save(model, tmp_path / "m")
            assert not hasattr(checkpoint.load(tmp_path / "m").config, "ffmerge")
        else:
            assert best.groups
    np.savez(tmp_path / "data.npz", **pixels)
    code, out, _ = command(
        "merge", tmp_path / "m", tmp_path / "out", "--method", "average",
        "--data", tmp_path / "data.npz", "--budget", "-50%", "--auto-precision",
    )  # fmt: skip
    assert code == 0
    assert "--dtype fp16" in " ".join(out.split())
