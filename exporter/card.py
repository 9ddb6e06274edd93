"""The model card of a package: what the hub reads of it, what it is, how it is used and cited.

``exporter/write.py`` writes :func:`card` as ``README.md``. What it says of the merge, and what it
has of the checkpoint's own card, is that of ``models/card.py``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ffmerge.config import SHORT
from ffmerge.models.card import CITED, inherited, merge_text, results
from ffmerge.models.record import merge_record
from ffmerge.models.tasks import base

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
{cited}
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
    relation = None
    if any(dtype != "fp32" for dtype in dtypes):
        relation = "quantized"
    elif record is not None:
        relation = "finetune"
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
        **inherited(source, relation),
        **results(model, task),
    )
    return _CARD.format(
        metadata=metadata.to_yaml(),
        graphs=_files(graphs),
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        merge=merge_text(record),
        browser=browser,
        cited=CITED,
    )


def _files(graphs: Mapping[str, str]) -> str:
    """Return the graphs in words; of several profiles with which is for what."""
    several = len(set(graphs.values())) > 1
    return ", ".join(f"`{path}`" + f" (for {name})" * several for path, name in graphs.items())
