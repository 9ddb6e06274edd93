"""The model card of a merged checkpoint, and what the card of a package says of the merge.

``models/checkpoint.py`` writes :func:`checkpoint_card` as ``README.md``: the original's card has
the original's results. ``exporter/card.py`` takes the other functions. Licence, languages, data
sets and base model are those of the original's card.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load

from ffmerge.errors import InputError
from ffmerge.escapes import code_span, markdown
from ffmerge.models.record import MergeRecord, merge_record
from ffmerge.models.tasks import base, infer

CITED = (
    "The sharing of feed-forward sublayers is from "
    "[arXiv 2501.06126](https://arxiv.org/abs/2501.06126):\n"
    "please cite it where you use a merged model."
)
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_ORIGINAL = "## The card of the original"
_CARD = """---
{metadata}
---
# {architecture}, {parameters:,} parameters

{merge}

```python
import ffmerge

model = ffmerge.load(".")
```

`ffmerge export . PACKAGE` makes an ONNX package of it.

{cited}
"""


def checkpoint_card(model: Any, source: Path, original: str) -> str:
    """Return the Markdown model card of a merged checkpoint, the original's below it.

    ``source`` is the folder of the original, and ``original`` its card. Of a checkpoint that was
    merged before it is the card of what that was made of.
    """
    try:
        task = base(infer(model))
    except InputError:  # ffmerge serves it for none
        task = None
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["ffmerge"],
        **inherited(source, "finetune"),
        **results(model, task or "other"),
    )
    text = _CARD.format(
        metadata=metadata.to_yaml(),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        merge=merge_text(merge_record(model.config)),
        cited=CITED,
    )
    described = REGEX_YAML_BLOCK.sub("", original, count=1)  # ModelCard logs a card without one
    described = described.split(_ORIGINAL)[-1].strip()
    if described:
        text += f"\n{_ORIGINAL}\n\n{described}\n"
    return text


def inherited(source: Path | None, relation: str | None) -> dict[str, Any]:
    """Return what the card of a checkpoint says that holds for what is made of it as well.

    A checkpoint fetched from the hub is the base model; of another one it is that of its card.
    ``relation`` is what the hub calls what is made of it.
    """
    if source is None:
        return {}
    found, kept = _metadata(source / "README.md"), {}
    for key in _INHERITED:
        value = found.get(key)
        if isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            kept[key] = value
    if fetched := re.search(r"models--(.+?)--(.+?)/snapshots/", f"{source.as_posix()}/"):
        kept["base_model"] = "/".join(fetched.groups())
    if "base_model" in kept and relation is not None:
        kept["base_model_relation"] = relation
    return kept


def _metadata(card: Path) -> dict[str, Any]:
    """Return the metadata block of a card, empty where there is none that can be read."""
    try:
        return metadata_load(card) or {}
    except Exception:  # a card says nothing that must be there
        return {}


def results(model: Any, task: str) -> dict[str, Any]:
    """Return what the merged model was measured to keep, if it was, as the hub shows results."""
    record = merge_record(model.config)
    if record is None or not record.metric["name"]:
        return {}
    if (record.stages[0], record.metric["name"]) == ("merged", "fidelity"):
        return {}  # to the merged model: what it keeps of the original nobody measured
    measured = EvalResult(
        task_type=base(task),
        dataset_type="custom",
        dataset_name=f"{record.metric['examples']} validation examples",
        metric_type=record.metric["name"],
        metric_value=round(record.metric["merged"], 4),
    )
    return {"model_name": type(model).__name__, "eval_results": [measured]}


def _measure(record: MergeRecord) -> str:
    """Return what the metric of a merge is called: of fidelity also to what."""
    name = str(record.metric["name"])
    if name == "fidelity":
        name += f" to the {record.stages[0]} model"
    return name


def merge_text(record: MergeRecord | None) -> str:
    """Return in words what a merge did, and what the model was measured to keep."""
    if record is None:
        return "Exported by ffmerge; no feed-forward sublayers are merged."
    groups = "; ".join(
        f"{', '.join(map(str, g.layers))} of stack {code_span(g.stack)}" for g in record.groups
    )
    done = f"Feed-forward sublayers of layers {groups} share one set of weights"
    if record.narrowed:
        widths = [f"{each.text} in stack {code_span(each.stack)}" for each in record.narrowed]
        cut = f"Feed-forward sublayers are narrowed: {'; '.join(widths)}"
        done = f"{done}. {cut}" if record.groups else cut
    removed = 1 - record.parameters_after / record.parameters_before
    of = ""
    if record.stages[0] == "merged":
        of = " of the merged model"
    text = (
        f"{done} (method {code_span(record.method)}): {removed:.2%} of "
        f"{record.parameters_before:,} parameters{of} removed."
    )
    metric = record.metric
    if metric["name"]:
        text += (
            f" Untuned {markdown(_measure(record))} on {metric['examples']} validation examples: "
            f"{metric['before']:.4f}{of} before, {metric['merged']:.4f} after."
        )
    return text
