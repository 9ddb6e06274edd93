"""The model card: what the hub reads of a package is what the checkpoint's card says, and true."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import vit

from ffmerge.config import MergeConfig
from ffmerge.exporter.card import card
from ffmerge.models import checkpoint
from ffmerge.models.record import Group, MergeRecord
from ffmerge.passes.weights.merge import merge_

RECORD = MergeRecord("calibrated", (Group("layers", (0, 1)),), 9, 5, 36, 20, {"name": None})
MEASURED = {"name": "accuracy", "examples": 50, "before": 0.9, "merged": 0.875, "recovered": None}


def metadata(source: Path | None = None, **options: Any) -> dict[str, Any]:
    """Return the metadata block of a card, as a YAML parser reads it."""
    model = options.pop("model", vit(32, 64, 2))
    graphs = options.pop("graphs", {"model.onnx": "portable"})
    text = card(model, "image-classification", graphs, source=source, **options)
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_licence_data_and_base_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ndatasets: [mnist]\nbase_model: org/base\ntags: [x]\n"
        "model-index: [1]\nlanguage: {a: b}\n---\n# of it\n"
    )
    found = metadata(tmp_path, dtypes=("int8",))
    assert found["license"] == "mit" and found["datasets"] == ["mnist"]
    assert found["base_model"] == "org/base" and found["base_model_relation"] == "quantized"
    assert found["tags"] == ["onnx", "ffmerge"] and found["library_name"] == "onnxruntime"
    assert "language" not in found and "model-index" not in found


@pytest.mark.parametrize("text", ["no block", "---\na: [\n---\n", "---\n- a\n---\n", None])
def test_a_checkpoint_whose_card_says_nothing_has_none(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert set(metadata(tmp_path)) == {"library_name", "pipeline_tag", "tags"}


def test_what_was_fetched_from_the_hub_is_the_base(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--a-name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert metadata(snapshot)["base_model"] == "org/a-name"


def test_results_are_those_of_the_merge() -> None:
    model = vit(32, 64, 2)
    model.config.ffmerge = replace(RECORD, metric=MEASURED).to_json()
    found = metadata(model=model)
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
    assert "base_model_relation" not in found  # of no base that is known


def test_a_folder_for_the_browser_is_called_so() -> None:
    graphs = {"onnx/model_quantized.onnx": "portable"}
    assert metadata(graphs=graphs, dtypes=("int8",))["library_name"] == "transformers.js"
    text = card(vit(32, 64, 2), "image-classification", graphs, ("int8",))
    assert 'pipeline("image-classification", "FOLDER", { dtype: "q8" })' in text


def test_a_merged_checkpoint_has_a_card_of_its_own(tmp_path: Path) -> None:
    """What the original's says of its results is not true of it; what it tells is kept once."""
    snapshot = tmp_path / "models--org--a-name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text(
        "---\nlicense: mit\nmodel-index: [1]\nbase_model: org/older\n---\n# Pictures\n\nUs.\n"
    )
    model = vit(32, 64, 2)
    record = merge_(model, None, MergeConfig(window=(0, 1), method="weights")).record
    model.config.ffmerge = replace(record, metric=MEASURED).to_json()
    source = snapshot
    for name in ("once", "twice"):
        checkpoint.save(model, tmp_path / name, source)
        source = tmp_path / name
        text = (source / "README.md").read_text()
        found = yaml.safe_load(text.split("---\n")[1])
        assert found["base_model"] == "org/a-name" and found["base_model_relation"] == "finetune"
        assert found["license"] == "mit" and found["pipeline_tag"] == "image-classification"
        (result,) = found["model-index"][0]["results"]
        assert result["metrics"] == [{"type": "accuracy", "value": 0.875}]
        assert "layers 0, 1 of stack `layers` share" in text
        assert text.count("# Pictures\n\nUs.") == 1
        assert text.count("The card of the original") == 1


def test_a_merged_checkpoint_of_one_without_a_card_names_no_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    model = vit(32, 64, 2)
    merge_(model, None, MergeConfig(window=(0, 1), method="weights"))
    checkpoint.save(model, tmp_path / "merged", source)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "The card of the original" not in text and "model-index" not in text
    (source / "README.md").write_text("# Pictures\n")  # a card with no metadata is one, too
    checkpoint.save(model, tmp_path / "again", source)
    text = (tmp_path / "again" / "README.md").read_text()
    assert text.endswith("## The card of the original\n\n# Pictures\n")
    assert not [each for each in caplog.records if each.name.startswith("huggingface_hub")]
