"""Folders and columns of sound become what the model's feature extractor makes of them."""

import json
import wave
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor

from ffmerge.errors import InputError
from ffmerge.models.data import as_examples

RATE = 16_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    extractor.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"label2id": {"no": 0, "yes": 1}}))
    return tmp_path / "model"


def tone(count: int, rate: int = RATE) -> Any:
    return (8000 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)).astype("<i2")


def write(file: Path, samples: Any, rate: int = RATE, channels: int = 1) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return file


def _batch(given: Any, model: Path, task: str = "audio-classification") -> dict[str, Any]:
    (batch,) = as_examples(given, model, task).batches(9)
    return batch


def test_a_folder_of_classes(model: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "Yes" / "a.wav", tone(800))
    write(tmp_path / "d" / "no" / "b.wav", tone(400))
    batch = _batch(tmp_path / "d", model)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [800, 400]
    right = Wav2Vec2FeatureExtractor()(tone(800) / 32768, sampling_rate=RATE, return_tensors="np")
    assert np.abs(batch["input_values"][0] - right["input_values"][0]).max() < 1e-5


def test_channels_are_averaged_and_the_rate_is_the_models(model: Path, tmp_path: Path) -> None:
    both = np.stack([tone(400, 8000), np.zeros(400, "<i2")], 1)
    write(tmp_path / "d" / "yes" / "a.wav", both, 8000, 2)
    found = _batch(tmp_path / "d", model)["input_values"][0]
    assert found.shape == (800,)
    middle, right = found[100:700], tone(800)[100:700] / 1.0
    assert np.corrcoef(middle, right)[0, 1] > 0.999


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_names_the_files(name: str, model: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "clips" / "a.wav", tone(400))
    write(tmp_path / "d" / "b.wav", tone(800))
    rows = [{"file_name": "b.wav", "label": "no"}, {"file_name": "clips/a.wav", "label": "yes"}]
    table = datasets.Dataset.from_list(rows)
    file = tmp_path / "d" / name
    table.to_csv(file, index=False) if name.endswith("csv") else table.to_json(file)
    batch = _batch(tmp_path / "d", model)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [800, 400]
    (tmp_path / "d" / "b.wav").unlink()
    with pytest.raises(InputError, match=r"names .*b\.wav, which is not there"):
        _batch(tmp_path / "d", model)


def test_a_column_of_files(model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.wav", tone(400))
    contents = [{"bytes": file.read_bytes(), "path": None}, {"bytes": None, "path": str(file)}]
    table = datasets.Dataset.from_dict({"speech": contents, "label": ["yes", "no"]})
    batch = _batch(table.cast_column("speech", datasets.Audio(decode=False)), model)
    assert batch["labels"].tolist() == [1, 0]
    assert (batch["input_values"][0] == batch["input_values"][1]).all()


@pytest.mark.parametrize("content", [b"", b"RIFF nothing", b"\0" * 100])
def test_a_broken_sound_is_named(content: bytes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "d" / "yes").mkdir(parents=True)
    (tmp_path / "d" / "yes" / "broken.wav").write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.wav is no sound") as caught:
        _batch(tmp_path / "d", model)
    assert len(str(caught.value).splitlines()) == 1


def test_without_soundfile_the_package_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    write(tmp_path / "d" / "yes" / "a.wav", tone(400))
    with pytest.raises(InputError, match="pip install soundfile"):
        _batch(tmp_path / "d", model)


def test_what_is_said_is_written_as_far_as_the_decoder_reads(model: Path, tmp_path: Path) -> None:
    """A sound of which nothing is written is left out; four places end a long transcription."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "yes": 1, "no": 2, "<unk>": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(model)
    config = {"decoder_start_token_id": 3, "pad_token_id": 0, "max_target_positions": 4}
    (model / "config.json").write_text(json.dumps(config))
    said = {"a": "yes no", "b": None, "c": "no yes no yes no yes", "d": " "}
    rows = []
    for name, text in said.items():
        write(tmp_path / "d" / f"{name}.wav", tone(400))
        rows.append({"file_name": f"{name}.wav", "transcription": text})
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "d" / "metadata.csv", index=False)
    batch = _batch(tmp_path / "d", model, "automatic-speech-recognition")
    assert batch["labels"].tolist() == [[1, 2, -100, -100], [2, 1, 2, 1]]
    assert batch["decoder_input_ids"].tolist() == [[3, 1, 2, 0], [3, 2, 1, 2]]
    assert batch["input_values"].shape == (2, 400)
