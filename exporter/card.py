"""The model card of a package."""

from collections.abc import Sequence
from typing import Any

from ffmerge.escapes import code_span, markdown
from ffmerge.models.record import merge_record
from ffmerge.models.tasks import base

_CARD = """---
library_name: onnxruntime
pipeline_tag: {task}
tags: [onnx, ffmerge]
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
"""


def card(model: Any, task: str, graphs: Sequence[str]) -> str:
    """Return the Markdown model card, with the metadata block the hub reads."""
    return _CARD.format(
        task=base(task),
        graphs=", ".join(f"`{path}`" for path in graphs),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        merge=_merge_text(model),
    )


def _merge_text(model: Any) -> str:
    record = merge_record(model.config)
    if record is None:
        return "Exported by ffmerge; no feed-forward sublayers are merged."
    groups = "; ".join(
        f"{', '.join(map(str, g.layers))} of stack {code_span(g.stack)}" for g in record.groups
    )
    done = f"Feed-forward sublayers of layers {groups} share one set of weights"
    if record.narrowed:
        widths = [f"{each.text} in stack {code_span(each.stack)}" for each in record.narrowed]
        done = f"Feed-forward sublayers are narrowed: {'; '.join(widths)}"
    removed = 1 - record.parameters_after / record.parameters_before
    text = (
        f"{done} (method {code_span(record.method)}): {removed:.2%} of "
        f"{record.parameters_before:,} parameters removed."
    )
    metric = record.metric
    if metric["name"]:
        text += (
            f" Untuned {markdown(metric['name'])} on {metric['examples']} validation examples: "
            f"{metric['before']:.4f} before, {metric['merged']:.4f} after."
        )
    return text
