"""Folders that ffmerge writes load in optimum's ORTModel classes, on transformers 4.57."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import exported, index_of
from optimum_env import require_optimum, run_in_optimum
from tiny import bert

from ffmerge.exporter.package import Package, export

LOAD = """
import json, sys
from pathlib import Path
import numpy as np, torch
from optimum import onnxruntime as optimum

found = {}
for folder in map(Path, sys.argv[1:]):
    given = {k: torch.from_numpy(v) for k, v in np.load(folder / "given.npz").items()}
    expected = np.load(folder / "expected.npz")
    model = getattr(optimum, (folder / "class").read_text()).from_pretrained(folder / "package")
    decoder = {name: given.pop(name) for name in list(given) if name.startswith("decoder_")}
    with torch.no_grad():
        logits = model(**given, **decoder).logits.numpy()
    difference = np.abs(logits - expected["logits"])
    if "attention_mask" in given and logits.shape[:2] == given["attention_mask"].shape:
        difference = difference[given["attention_mask"].bool().numpy()]  # padding gives anything
    found[folder.name] = {"error": float(difference.max())}
    for way, settings in (("greedy", {}), ("beam", {"num_beams": 4})):
        if way in expected:
            ids = model.generate(
                **given, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0,
                **settings,
            )
            found[folder.name][way] = bool(np.array_equal(ids.numpy(), expected[way]))
print(json.dumps(found))
"""

MODELS = {
    "ORTModelForImageClassification": "ViTForImageClassification",
    "ORTModelForSequenceClassification": None,
    "ORTModelForCausalLM": "GPT2LMHeadModel",
    "ORTModelForSeq2SeqLM": "MarianMTModel",
    "ORTModelForSpeechSeq2Seq": "WhisperForConditionalGeneration",
}


def _exported(name: str | None, folder: Path) -> tuple[Any, Package]:
    """Return a model of transformers 5 and its package; of the table, or a classifier of text."""
    if name:
        return exported(index_of(name))
    model = bert(layers=2)
    return model, export(model, folder)


def _given(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    target = torch.randint(3, 60, (2, 4), generator=generator)
    decoder = {"decoder_input_ids": target} if model.config.is_encoder_decoder else {}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 40, generator=generator), **decoder}
    ids = torch.randint(3, 60, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0  # on the right, and for a decoder alone on the left
    mask = mask if decoder or not model.can_generate() else mask.flip(-1)
    return {"input_ids": ids * mask, "attention_mask": mask, **decoder}


def test_optimum_loads_the_folders_and_agrees_with_pytorch(tmp_path: Path) -> None:
    require_optimum()
    folders = []
    for name, architecture in MODELS.items():
        folder = tmp_path / name
        folder.mkdir()
        model, package = _exported(architecture, folder / "exported")
        (folder / "package").symlink_to(package.path)
        given = _given(model)
        with torch.no_grad():
            expected = {"logits": model(**given).logits.numpy()}
        if model.can_generate():
            prompt = {k: v for k, v in given.items() if k != "decoder_input_ids"}
            for way, settings in (("greedy", {}), ("beam", {"num_beams": 4})):
                ids = model.generate(
                    **prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0,
                    **settings,
                )  # fmt: skip
                expected[way] = ids.numpy()
        np.savez(folder / "given.npz", **{k: v.numpy() for k, v in given.items()})
        np.savez(folder / "expected.npz", **expected)
        (folder / "class").write_text(name)
        folders.append(folder)
    found = json.loads(run_in_optimum(LOAD, *folders).splitlines()[-1])
    assert set(found) == set(MODELS)
    for name, result in found.items():
        assert result.pop("error") < 1e-6, name  # measured 1.5e-8 to 1.2e-7
        assert all(result.values()), (name, result)
    assert sum(len(result) for result in found.values()) == 6  # three generate in two ways


@pytest.mark.slow
def test_optimum_loads_what_the_other_environment_exports(tmp_path: Path) -> None:
    """The same exporter runs on transformers 4.57."""
    script = """
import sys
sys.path.insert(0, sys.argv[2])
from architectures import CASES, index_of, model_of
from ffmerge.exporter.package import export
from ffmerge.runtime_tests.parity import check_parity
for name in ("ViTForImageClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"):
    model = model_of(*CASES[index_of(name)][:3])
    package = export(model, sys.argv[1] + "/" + name)
    outputs = check_parity(package.path, package.manifest)
    assert all(o.ok for o in outputs), [o.reason for o in outputs if not o.ok]
    print(name, max(o.max_abs for o in outputs))
"""
    lines = run_in_optimum(script, tmp_path, Path(__file__).parent).splitlines()
    assert [line.split()[0] for line in lines] == [
        "ViTForImageClassification", "LlamaForCausalLM", "T5ForConditionalGeneration",
    ]  # fmt: skip
    assert all(float(line.split()[1]) < 5e-6 for line in lines)  # measured 1.4e-6
