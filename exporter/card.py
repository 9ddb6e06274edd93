"""The model card of a package: what the hub reads of it, what it is, how it is used and cited.

``exporter/write.py`` writes :func:`card` as ``README.md``. Licence, languages, data sets and base
model are those of the checkpoint's own card.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from ffmerge.config import SHORT
from ffmerge.escapes import code_span, markdown
from ffmerge.models.record import MergeRecord, merge_record
from ffmerge.models.tasks import base

_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
_CARD = """---
{metadata}
---
# {architecture}, {parameters:,} parameters

{merge}

Files: {graphs} and their weights, each stored once; `config.json`, `ffmerge.json` (what is tied,
every file's SHA-256), `reference.safetensors` (outputs of PyTorch on the inputs that `ffmerge.json`
describes).

```
ffmerge audit .      # is anything stored twice, is every tie intact
ffmerge validate .   # does ONNX Runtime compute what PyTorch computed
python -c "import ffmerge; model = ffmerge.load_package('.')"   # {architecture} on ONNX Runtime
```
{browser}
The sharing of feed-forward sublayers is from [arXiv 2501.06126](https://arxiv.org/abs/2501.06126):
please cite it where you use a merged model.
"""
_BROWSER = """
In a browser or Node.js, from the folder that holds this one:

```js
import {{ pipeline, env }} from "@huggingface/transformers";
env.localModelPath = "./";
const model = await pipeline("{task}", "FOLDER", {{ dtype: "{dtype}" }});{others}
```
"""
_OTHERS = " // or {}"
_NAMES = {name: short for short, name in SHORT.items()}  # what transformers.js calls precisions


def card(
    model: Any,
    task: str,
    graphs: Mapping[str, str],
    dtypes: Sequence[str] = ("fp32",),
    source: Path | None = None,
) -> str:
    """Return the Markdown model card, with the metadata block the hub reads.

    ``graphs`` are the paths of the graphs, with what each is for, of :data:`ffmerge.profiles`.
    ``source`` is the folder of the checkpoint, whose card tells licence, data and base model.
    """
    record = merge_record(model.config)
    library, browser = "onnxruntime", ""
    if all(path.startswith("onnx/") for path in graphs) and graphs:
        library = "transformers.js"
        first, *others = [_NAMES.get(dtype, dtype) for dtype in dtypes]
        more = _OTHERS.format(", ".join(others)) * bool(others)
        browser = _BROWSER.format(task=base(task), dtype=first, others=more)
    metadata = ModelCardData(
        library_name=library,
        pipeline_tag=base(task),
        tags=["onnx", "ffmerge"],
        **_base(source, dtypes, record),
        **_results(model, task, record),
    )
    return _CARD.format(
        metadata=metadata.to_yaml(),
        graphs=_files(graphs),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        merge=_merge_text(record),
        browser=browser,
    )


def _files(graphs: Mapping[str, str]) -> str:
    """Return the graphs in words; of several profiles with which is for what."""
    several = len(set(graphs.values())) > 1
    return ", ".join(f"`{path}`" + f" (for {name})" * several for path, name in graphs.items())


def _inherited(source: Path | None) -> dict[str, Any]:
    """Return what the card of a checkpoint says that holds for a package of it as well.

    A checkpoint fetched from the hub is the base model; of another one it is that of its card.
    """
    if source is None:
        return {}
    try:
        found = metadata_load(source / "README.md") or {}
    except Exception:  # there is none, or it is no YAML: a card says nothing that must be there
        found = {}
    inherited = {}
    for key in _INHERITED:
        value = found.get(key)
        if isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(each, str) for each in value)
        ):
            inherited[key] = value
    if fetched := re.search(r"models--(.+?)--(.+?)/snapshots/", f"{source.as_posix()}/"):
        inherited["base_model"] = "/".join(fetched.groups())
    return inherited


def _base(source: Path | None, dtypes: Sequence[str], record: MergeRecord | None) -> dict[str, Any]:
    """Return what is inherited, and what the package is to its base model, in the hub's words."""
    inherited = _inherited(source)
    if "base_model" in inherited:
        if any(dtype != "fp32" for dtype in dtypes):
            inherited["base_model_relation"] = "quantized"
        elif record is not None:
            inherited["base_model_relation"] = "finetune"
    return inherited


def _results(model: Any, task: str, record: MergeRecord | None) -> dict[str, Any]:
    """Return what the merged model was measured to keep, if it was, as the hub shows results."""
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


def _merge_text(record: MergeRecord | None) -> str:
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
