"""Streaming moments against float64 computed from all data at once."""

from typing import Any

import numpy as np
import pytest
import torch
from drawn import data_of, seen_in
from tiny import bert, gpt2
from tiny_wider import GATED, SEQ2SEQ, relu_bert, seeded, t5

from ffmerge.errors import InputError
from ffmerge.models.find import find
from ffmerge.models.sublayer import stacks
from ffmerge.passes.weights import activations
from ffmerge.passes.weights.moments import Moments


def collect(*given: Any) -> dict[str, Moments]:
    """Return the moments of the features by stack."""
    return {stack: found["features"] for stack, found in activations.collect(*given).items()}


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.corrcoef(x.T.astype(np.float64), y.T.astype(np.float64))[: x.shape[1], x.shape[1] :]


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_correlation_equals_float64(offset: float) -> None:
    # At 1,000,000 a batch that is centred on its mean in float32 is off by 1.6e-4.
    # At an offset of 10,000 the textbook formula E[xy] - E[x]E[y] in float32 is off by over 1.
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((700, 5)) + offset).astype(np.float32)
    y = (0.5 * x[:, ::-1] + generator.standard_normal((700, 5))).astype(np.float32)
    moments = Moments(((0, 3),))
    for start in (0, 1, 300, 650):
        end = {0: 1, 1: 300, 300: 650, 650: 700}[start]
        batch = slice(start, end)
        moments.update({i: torch.from_numpy(z[None, batch]) for i, z in ((0, x), (3, y))})
    error = np.abs(moments.correlation(0, 3).numpy() - _correlation(x, y)).max()
    assert error < 1e-6  # measured 3.4e-7
    assert moments.count == 700
    error = np.abs(moments.mean[0].numpy() - x.astype(np.float64).mean(0)).max()
    assert error < max(2e-11, 1e-15 * offset)  # measured 1.8e-12, and 1.2e-10 at 1e6
    variance = moments.squares[3][0].numpy() / 700
    assert np.abs(variance / y.astype(np.float64).var(0) - 1).max() < 5e-8  # measured 5.3e-9


def test_a_neuron_that_never_changes_correlates_with_nothing() -> None:
    moments = Moments(((0, 1),))
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 4.0
    moments.update({0: x[None], 1: x[None]})
    correlation = moments.correlation(0, 1)
    assert torch.isfinite(correlation).all()
    assert correlation[1].abs().max() == 0
    assert abs(correlation[0, 0] - 1) < 5e-7  # measured 6.0e-8


@pytest.mark.parametrize("make", [bert, gpt2])
def test_padding_counts_for_nothing(make) -> None:
    model = make()
    pairs = {"layers": [find(model)[:2]]}
    ids = np.random.default_rng(0).integers(1, 97, (4, 6))
    mask = np.ones_like(ids)
    plain = collect(model, pairs, [{"input_ids": ids, "attention_mask": mask}], 1000)["layers"]
    padded = {
        "input_ids": np.concatenate([ids, np.full((4, 3), 5)], 1),
        "attention_mask": np.concatenate([mask, np.zeros((4, 3), int)], 1),
    }
    masked = collect(model, pairs, [padded], 1000)["layers"]
    assert plain.count == masked.count == 24
    difference = (plain.correlation(0, 1) - masked.correlation(0, 1)).abs().max()
    assert difference < 1e-6  # measured 5.6e-7


def test_features_are_those_before_the_activation() -> None:
    model = bert()
    ids = np.random.default_rng(0).integers(1, 97, (3, 5))
    seen = []
    hook = model.bert.encoder.layer[2].intermediate.dense.register_forward_hook(
        lambda module, args, out: seen.append(out.detach())
    )
    pairs = {"layers": [find(model)[2:4]]}
    moments = collect(model, pairs, [{"input_ids": ids}], 10)["layers"]
    hook.remove()
    error = (moments.mean[2].float() - seen[-1].flatten(0, 1).mean(0)).abs().max()
    assert error < 5e-7  # measured 6.0e-8
    assert set(moments.mean) == {2, 3}  # of the windows only


def _activated(gate: np.ndarray, name: str) -> np.ndarray:
    functional = torch.nn.functional
    activation = functional.gelu if name == "modernbert" else functional.silu
    return activation(torch.from_numpy(gate)).numpy()


@pytest.mark.parametrize("name", GATED)
def test_both_branches_of_a_gated_sublayer_count_and_their_product(name: str) -> None:
    """The sum of correlations by NumPy; a fused map holds gate and up one after the other."""
    model = GATED[name]()
    ids = np.random.default_rng(0).integers(3, 61, (3, 25))
    first, second = find(model)[1:3]
    pairs = {"layers": [(first, second)]}
    moments = collect(model, pairs, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], 75)["layers"]
    branches = []
    for sublayer in (first, second):
        rows = [
            np.concatenate([_rows(model, path, {"input_ids": row}) for row in ids])
            for path in sublayer.inputs
        ]
        gate, up = rows if len(rows) == 2 else np.split(rows[0], 2, axis=1)
        branches.append([gate, up, _activated(gate, name) * up])
    expected = sum(_correlation(x, y) for x, y in zip(*branches, strict=True))
    error = np.abs(moments.correlation(1, 2).numpy() - expected).max()
    assert error < 2e-6  # measured 2.9e-7


def _rows(model, path: str, inputs: dict[str, list[int]]) -> np.ndarray:
    """Return what the module at ``path`` puts out for one unpadded row, in float64."""
    out: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, a, o: out.append(o[0]))
    with torch.no_grad():
        model(**{name: torch.tensor(np.array([ids])) for name, ids in inputs.items()})
    hook.remove()
    return out[0].double().numpy()


def _pad(rows: list[list[int]], value: int) -> np.ndarray:
    longest = max(map(len, rows))
    return np.array([row + [value] * (longest - len(row)) for row in rows])


# encoder and decoder lengths of each row: the decoder longer, shorter, and as long in all
LENGTHS = [
    ([5, 3, 4], [9, 6, 8]),
    ([9, 8, 6], [3, 5, 2]),
    ([6, 4, 5], [4, 6, 1]),
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("given", ["labels", "ids", "ids and mask"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_decoder_counts_its_own_tokens_and_no_padding(name: str, given: str, lengths) -> None:
    """Against NumPy on unpadded rows; the published code divides by the encoder's tokens.

    The models start the decoder with the token for padding.
    """
    model = SEQ2SEQ[name](encoder=2, decoder=2)
    generator = np.random.default_rng(0)
    sources, targets = ([list(generator.integers(3, 61, n)) for n in each] for each in lengths)
    shifted = [[2, *row[:-1]] for row in targets]
    batch = {
        "input_ids": _pad(sources, 2),
        "attention_mask": _pad([[1] * len(row) for row in sources], 0),
    }
    if given == "labels":
        batch["labels"] = _pad(targets, -100)
    else:
        batch["decoder_input_ids"] = _pad(shifted, 2)
    if given == "ids and mask":
        batch["decoder_attention_mask"] = _pad([[1] * len(row) for row in shifted], 0)
    pairs = {stack: [members] for stack, members in stacks(find(model)).items()}
    moments = collect(model, pairs, [batch], 1000)
    assert moments["encoder"].count == sum(map(len, sources))
    assert moments["decoder"].count == sum(map(len, targets))
    for stack, ((first, second),) in pairs.items():
        x, y = (
            np.concatenate([
                _rows(model, s.inputs[0], {"input_ids": i, "decoder_input_ids": d})
                for i, d in zip(sources, shifted, strict=True)
            ])
            for s in (first, second)
        )  # fmt: skip
        error = np.abs(moments[stack].correlation(0, 1).numpy() - _correlation(x, y)).max()
        assert error < 1e-5, stack  # measured 1.4e-6


def test_padding_of_labels_by_the_padding_token_does_not_count_either() -> None:
    model = t5(encoder=2, decoder=2)
    batch = {"input_ids": np.full((2, 4), 7), "labels": np.array([[5, 6, 1], [5, 1, 2]])}
    pairs = {"decoder": [stacks(find(model))["decoder"]]}
    assert collect(model, pairs, [batch], 1000)["decoder"].count == 5


_SOUND = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}


def test_sound_is_masked_by_sample_and_counted_by_frame() -> None:
    """2,000 and 900 samples give 499 and 224 frames: (n - 3) // 2 + 1, twice."""
    model = seeded(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", hidden_size=32, num_hidden_layers=2, vocab_size=20,
        num_attention_heads=4, intermediate_size=48, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", **_SOUND,
    )  # fmt: skip
    mask = np.ones((2, 2000), int)
    mask[1, 900:] = 0
    sound = np.random.default_rng(0).standard_normal((2, 2000)).astype("f") * mask
    pairs = {"layers": [find(model)[:2]]}
    batch = {"input_values": sound.astype("f"), "attention_mask": mask}
    assert collect(model, pairs, [batch], 5000)["layers"].count == 499 + 224


def test_frames_of_whisper_are_half_of_its_features() -> None:
    model = seeded(
        "WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        vocab_size=60, bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    mask = np.ones((2, 40), int)
    mask[1, 17:] = 0
    features = np.random.default_rng(0).standard_normal((2, 8, 40)).astype("f")
    batch = {"input_features": features, "labels": np.array([[5, 6, 7], [5, -100, -100]])}
    pairs = {stack: [members] for stack, members in stacks(find(model)).items()}
    counts = [
        {stack: found.count for stack, found in collect(model, pairs, [each], 999).items()}
        for each in (batch, {**batch, "attention_mask": mask})
    ]
    # without a mask every frame counts: the model listens to padded silence as well
    assert counts == [{"encoder": 40, "decoder": 4}, {"encoder": 20 + 9, "decoder": 4}]


def test_padding_that_cannot_be_placed_is_refused() -> None:
    """Perceiver reads any number of tokens into four latents."""
    model = seeded(
        "PerceiverForMaskedLM", "PerceiverConfig", d_model=32, d_latents=32, num_latents=4,
        num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
        num_cross_attention_heads=4, vocab_size=60, max_position_embeddings=20,
    )  # fmt: skip
    pairs = {"layers": [find(model)[:2]]}
    batch = {"input_ids": np.full((2, 6), 7), "attention_mask": np.ones((2, 6), int)}
    assert collect(model, pairs, [batch], 99)["layers"].count == 8
    batch["attention_mask"][1, 4:] = 0
    with pytest.raises(InputError, match="rows of one length"):
        collect(model, pairs, [batch], 99)


@pytest.mark.parametrize("chunk", [0, 2])
def test_every_chunk_of_a_chunked_sublayer_counts(chunk: int) -> None:
    model = seeded(
        "BertForMaskedLM", "BertConfig", hidden_size=32, intermediate_size=48, vocab_size=60,
        num_hidden_layers=2, num_attention_heads=4, chunk_size_feed_forward=chunk,
    )  # fmt: skip
    ids, mask = np.random.default_rng(0).integers(3, 60, (3, 6)), np.ones((3, 6), int)
    mask[0, 3:] = 0
    pairs = {"layers": [find(model)[:2]]}
    moments = collect(model, pairs, [{"input_ids": ids, "attention_mask": mask}], 99)["layers"]
    assert moments.count == 15
    whole = seeded(
        "BertForMaskedLM", "BertConfig", hidden_size=32, intermediate_size=48, vocab_size=60,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    rows = [
        _rows(whole, find(whole)[0].inputs[0], {"input_ids": row[:n]})
        for row, n in zip(ids, (3, 6, 6), strict=True)
    ]
    error = np.abs(moments.mean[0].numpy() - np.concatenate(rows).mean(0)).max()
    assert error < 1e-7  # measured 1.3e-8


def test_signals_are_what_the_maps_take_and_give() -> None:
    model = GATED["phi3"]()
    data = data_of(model, 6)
    members = {"layers": find(model)[1:3]}
    batches = [{k: x[i : i + 2] for k, x in data.items()} for i in (0, 2, 4)]
    got = list(activations.watch(model, members, batches, tokens=30))
    assert len(got) == 2  # 18 positions each: the second batch brings it to 30
    seen = seen_in(model, {k: x[:4] for k, x in data.items()})
    for layer in (1, 2):
        signals = [batch["layers"][layer] for batch in got]
        gate, up = np.split(seen[layer]["0 out"], 2, 1)
        wanted = {
            "inputs": seen[layer]["0 in"], "hidden": seen[layer]["1 in"],
            "outputs": seen[layer]["1 out"],
            "features": np.stack([gate, up, seen[layer]["1 in"]]),
        }  # fmt: skip
        for name, want in wanted.items():
            joined = torch.cat([getattr(s, name) for s in signals], -2).numpy()
            # products of other numbers of rows: measured 0 with AVX2, 4.8e-7 with AVX-512
            assert np.abs(joined - want).max() < 2e-6, name


def test_features_are_taken_before_the_nonlinearity() -> None:
    model = relu_bert()
    data = data_of(model)
    moments = activations.collect(model, {"layers": [find(model)[1:3]]}, [data], 1000)["layers"]
    x, y = (seen["0 out"] for seen in seen_in(model, data)[1:3])
    f = x.shape[1]
    want = np.corrcoef(x.T, y.T)[:f, f:]
    got = moments["features"].correlation(1, 2).numpy()
    assert np.abs(got - want).max() < 2e-6  # measured 3.4e-7
    inputs = seen_in(model, data)[2]["0 in"]
    mean = moments["inputs"].mean[2][0].numpy()
    assert np.abs(mean - inputs.mean(0)).max() < 1e-12  # measured 0
