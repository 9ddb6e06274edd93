"""The graph passes in their order, on a model in memory (:func:`share`) and on a file.

The exporter calls :func:`share` on every graph it makes, ``ffmerge share`` calls
:func:`share_file`. What comes out stores each weight once, in the form that runtimes load as one
and quantizers see; with a ``dtype`` it then goes through
:func:`ffmerge.passes.graph.quantize.quantize`, and is shared again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)

from ffmerge.config import QuantizeConfig, ShareConfig, parse_budget
from ffmerge.errors import InputError, TieError
from ffmerge.files import clean_up, refuse_existing
from ffmerge.models.codes import Form
from ffmerge.models.manifest import Skip
from ffmerge.models.record import Tie
from ffmerge.passes.graph.calibration import read_calibration
from ffmerge.passes.graph.contract import check_ties, read_ties, write_ties
from ffmerge.passes.graph.loads import check_loads
from ffmerge.passes.graph.opset import to_opset
from ffmerge.passes.graph.prepare import infer_ranks, make_constant, make_liftable
from ffmerge.passes.graph.quantize import int8_products, quantize
from ffmerge.passes.graph.read import read_model
from ffmerge.passes.graph.resident import weights_to_left, weights_to_right
from ffmerge.passes.graph.share import SharePass
from ffmerge.passes.graph.strip import strip
from ffmerge.passes.graph.tensors import Array, bytes_stored, stored
from ffmerge.passes.graph.untangle import UntanglePass
from ffmerge.passes.graph.write import write_models

EMBEDDED = 1_000_000  # bytes of tensors up to which a model stays one file
ROUNDS = 8  # untangling can make tensors equal, sharing can add uses: two rounds are usual
PRODUCTS = ("MatMulInteger", "MatMulNBits")  # of int8, in rows and in blocks


@dataclass(frozen=True)
class ShareResult:
    """The model, what was left alone and why, and the content bytes of its tensors.

    ``ties`` are those that hold in the model; ties whose tensors were equal have become one.
    ``files`` are what was written, the graph first; empty for a model in memory. ``forms`` are bits
    and block of each weight, by name, where they were chosen for a budget. ``int8`` says in which
    form int8 multiplies (:func:`ffmerge.passes.graph.quantize.int8_products`).
    """

    model: ir.Model
    skipped: tuple[Skip, ...]
    bytes_before: int
    bytes_after: int
    ties: tuple[Tie, ...]
    files: tuple[Path, ...] = ()
    forms: Mapping[str, Form] = field(default_factory=dict)
    int8: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        files = [{"path": p.name, "bytes": p.stat().st_size} for p in self.files]
        return {
            "files": files,
            "bytes_total": sum(file["bytes"] for file in files),
            "bytes_before": self.bytes_before,
            "bytes_unique": self.bytes_after,
            "skipped": [asdict(skip) for skip in self.skipped],
            "ties": [tie.to_json() for tie in self.ties],
            "bits": {name: asdict(form) for name, form in self.forms.items()},
            "int8": self.int8,
        }


def share(
    source: ir.Model | str | Path,
    target: str | Path | None = None,
    config: ShareConfig = ShareConfig(),
) -> ShareResult:
    """Store equal weights once: of an ONNX file in a new one, or of a model in place.

    What ``ffmerge share`` does; see :func:`share_file` and :func:`share_model`.

    Raises:
        InputError: as of the two, or a file has no ``target``.
        TieError: a recorded tie does not hold in the result.
    """
    if not isinstance(source, ir.Model):
        if target is None:
            raise InputError(f"{source} is shared into a new file: name it.")
        return share_file(Path(source), Path(target), config)
    if config.opset is not None or config.data is not None:
        raise InputError("a model in memory keeps its opset, and is calibrated as a file only.")
    settings = QuantizeConfig(block=config.block)
    return share_model(source, (), config.dtype, settings, config.resident)


def share_model(
    model: ir.Model,
    ties: Sequence[Tie] = (),
    dtype: str | None = None,
    config: QuantizeConfig = QuantizeConfig(),
    resident: bool = True,
) -> ShareResult:
    """Store every tensor of ``model`` once and let its consumers read it directly, in place.

    Constant nodes become initializers whatever their size, so that equal scalars are one; ONNX
    Runtime does the same when it loads a model. Ties recorded in the model are kept. With a
    ``dtype`` of :data:`ffmerge.config.DTYPES` the shared weights are then brought to it, each
    once. With ``resident`` a tied float embedding is in memory once, too;
    without, every weight stands on the right of its products, where quantizers look for it.

    Raises:
        InputError: the model's opset is not known, so its operators may mean something else, or
            it cannot be brought to ``dtype``.
        TieError: a given or a recorded tie does not hold in the result.
    """
    opset, known = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if opset > known:
        raise InputError(f"opset {opset} is newer than {known}, the last that this onnx knows.")
    make_constant(model)
    if dtype is None or dtype == "fp32":
        return _share(model, ties, resident)
    return bring_to(_share(model, ties, resident=False), dtype, config, resident)


def bring_to(
    shared: ShareResult, dtype: str, config: QuantizeConfig, resident: bool = True
) -> ShareResult:
    """Return a shared model in a precision, in place, its new weights shared again.

    Raises:
        InputError: the model cannot be brought to ``dtype``.
    """
    products = int8_products(shared.model, config) if dtype == "int8" else ""
    skipped = quantize(shared.model, dtype, config)
    make_constant(shared.model)
    nodes = [node for graph in shared.model.graphs() for node in graph]
    if not any(node.op_type in PRODUCTS for node in nodes):
        products = ""  # its weights are in 8 bits already, or too small
    return replace(share_again(shared, skipped, resident), int8=products)


def share_again(
    shared: ShareResult, skipped: Sequence[Skip] = (), resident: bool = True
) -> ShareResult:
    """Return a shared model that has changed since, shared again, in place.

    ``skipped`` is what was left alone meanwhile.
    """
    last = _share(shared.model, (), resident)
    reasons = dict.fromkeys((*shared.skipped, *skipped, *last.skipped))
    return replace(last, skipped=tuple(reasons), bytes_before=shared.bytes_before)


def _share(model: ir.Model, ties: Sequence[Tie], resident: bool) -> ShareResult:
    before = bytes_stored(model)
    untangling, sharing = UntanglePass(), SharePass([*ties, *read_ties(model)])

    # all tensors to the main graph, as initializers
    RemoveUnusedNodesPass()(model)
    make_liftable(model)
    LiftConstantsToInitializersPass(size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    weights_to_right(model)
    RemoveUnusedNodesPass()(model)

    # each once, and read directly
    forget_ranks = infer_ranks(model)
    ir.passes.PassManager([untangling, sharing], steps=ROUNDS)(model)
    skipped = [*untangling.skipped, *sharing.skipped]

    # the form that stays shared when it is loaded
    if resident:
        skipped += weights_to_left(model)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    NameFixPass()(model)
    strip(model)
    forget_ranks()

    write_ties(model, sharing.ties)
    broken = [check for check in check_ties(model, sharing.ties) if not check.ok]
    if broken:
        raise TieError("; ".join(f"tie {check.group}: {check.reason}" for check in broken) + ".")
    return ShareResult(model, tuple(skipped), before, bytes_stored(model), sharing.ties)


def share_file(
    source: Path, target: Path, config: ShareConfig = ShareConfig(), load: bool = True
) -> ShareResult:
    """Share the weights of the ONNX file ``source`` and write it to ``target``.

    Tensors go to ``target`` + ``_data`` beside it if they take more than 1 MB or were external,
    else into the one file. Both are written in a folder beside and renamed; on an error nothing
    is left. With ``load`` the file is loaded before that, in a process of its own.

    Raises:
        InputError: ``source`` cannot be read or be of that opset or precision, or ``target``
            exists or cannot be written.
        TieError: a recorded tie does not hold in the result.
        CheckFailed: ONNX Runtime loads ``source``, but not the result.
    """
    source, target = Path(source), Path(target)
    data = target.with_name(target.name + "_data")
    clean_up(target)
    refuse_existing(target, data)
    model = read_model(source)
    external = any(isinstance(item.tensor, ir.ExternalTensor) for item in stored(model))
    calibration: Sequence[Mapping[str, Array]] = ()
    if config.data is not None:
        calibration = read_calibration(model, config.data)
    if config.opset is not None:
        model = to_opset(model, config.opset)
    forms: dict[str, Form] = {}
    settings = QuantizeConfig(calibration=calibration, block=config.block, forms=forms)
    if config.budget is not None:
        whole = bytes_stored(model)
        settings = replace(settings, budget=parse_budget(config.budget, whole))
    result = share_model(model, (), config.dtype, settings, config.resident)
    check = None
    if load:
        check = partial(check_loads, source)
    if external or result.bytes_after > EMBEDDED:
        written = write_models({target: result.model}, data, check)
    else:
        written = write_models({target: result.model}, check=check)
    result = replace(result, files=written)
    if config.budget is None:
        return result
    return replace(result, forms=forms)
