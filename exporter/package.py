"""A model as a folder that a runtime serves: graphs, weights, configuration, manifest, card.

:func:`export` is what ``ffmerge export`` calls, in four steps of a file each: a plan
(``plan.py``), graphs (``convert.py``), files (``write.py``) and the manifest (``describe.py``).
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffmerge.config import ExportConfig
from ffmerge.exporter.convert import (
    Translated,
    as_taken,
    convert,
    copied,
    translate,
    with_checked_attention,
)
from ffmerge.exporter.describe import describe
from ffmerge.exporter.plan import Plan, by_dtype, make_plan, with_one_size
from ffmerge.exporter.torch_onnx import SizeError
from ffmerge.exporter.write import Written, write_graphs, write_rest
from ffmerge.files import refuse_existing, staged
from ffmerge.models import heap, pages
from ffmerge.models.data import Data
from ffmerge.models.finite import check_has_weights
from ffmerge.models.inputs import unchunked
from ffmerge.models.manifest import Manifest
from ffmerge.models.notebook import html_of
from ffmerge.models.read_once import give_back_weights


@dataclass(frozen=True, repr=False)
class Package:
    """A package on disk; ``costs`` are the footprints of its graph and variants, if measured.

    ``defaults`` are the arguments of ``forward`` that are no inputs of it: they keep their default.
    """

    path: Path
    manifest: Manifest
    defaults: tuple[str, ...] = ()
    costs: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "path": str(self.path),
            "task": self.manifest.task,
            "files": [{"path": f.path, "bytes": f.bytes} for f in self.manifest.files],
            "bytes_total": self.manifest.bytes_total,
            "bytes_unique": self.manifest.bytes_unique,
            "defaults": list(self.defaults),
            "skipped": [vars(skip) for skip in self.manifest.skipped],
            "variants": [vars(variant) for variant in self.manifest.variants],
            "costs": dict(self.costs),
            "bits": {name: vars(form) for name, form in self.manifest.bits.items()},
        }

    def __repr__(self) -> str:
        held = self.manifest
        about = f"{held.task}, {', '.join(held.dtypes)}, {held.bytes_total:,} bytes"
        return f"<Package {self.path}: {about}>"

    def _repr_html_(self) -> str:
        files = [(file.path, f"{file.bytes:,}") for file in self.manifest.files]
        return html_of([(repr(self), ("file", "bytes"), files)])


def export(
    model: Any,
    target: str | Path,
    config: ExportConfig = ExportConfig(),
    source: Path | None = None,
    data: Data | None = None,
) -> Package:
    """Write ``model`` as an ONNX package; weights that PyTorch shares are stored once.

    ``source`` is the checkpoint folder the model came from, by default the one it was loaded from:
    its tokenizer and processor files travel along, the inputs of the comparison are drawn as they
    say, and its weight files are named in the manifest. Of ``data`` a few rows are stored, to
    compare on as well; int8-static takes its ranges from others, and int4 is rounded by others.

    Raises:
        ExportError: the model cannot be exported.
        TieError: a shared weight would be stored twice.
        InputError: the task is not served, the data lacks what the model takes, ``model`` is a
            package itself, or ``target`` exists or cannot be written.
    """
    check_has_weights(model)
    refuse_existing(Path(target))
    with unchunked(model), heap.rarely_collected(), heap.kept():
        pages.give_back_code()  # little is run of all that was imported
        plan = make_plan(model, config, source, data)
        with staged(Path(target)) as folder:
            plan = with_checked_attention(plan)
            try:
                translated = translate(plan)
            except SizeError:
                plan = with_checked_attention(with_one_size(plan))
                translated = translate(plan)
            plan = as_taken(plan, translated)
            several, written = len(config.dtypes) > 1, list[Written]()
            for one in by_dtype(plan):
                written += _written(folder, translated, one, several)
            del translated  # neither graphs nor programs are held while PyTorch computes
            gc.collect()
            heap.trim()
            give_back_weights(model)
            pages.give_back_code()
            records, variants, skipped = write_rest(folder, plan, written)
            manifest = describe(folder, plan, written, records, variants, skipped)
            manifest.write(folder)
    return Package(Path(target), manifest, plan.defaults)


def _written(folder: Path, translated: Translated, plan: Plan, several: bool) -> list[Written]:
    """Bring the graphs to one precision and write them; they are no longer held after that."""
    if several:
        translated = copied(translated, plan)
    return write_graphs(folder, plan, convert(translated, plan))
