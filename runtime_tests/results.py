"""What was measured of a package: the dataclasses that hold it, and the JSON of all of it.

``validate.py`` runs the checks and fills these in: a :class:`Validation` has a
:class:`ProviderResult` for each runtime, and that one the outputs (``parity.py``), greedy decoding
(``decode.py``), the first node that is off (``locate.py``), task metrics (``metric.py``) and
memory and latency (``footprint.py``). ``report.py`` puts them into words, once, for the page, the
text file, the terminal and notebooks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Any

from ffmerge.files import plain
from ffmerge.models.manifest import Manifest, MetricResult
from ffmerge.models.notebook import html_of
from ffmerge.runtime_tests.quality import Quality
from ffmerge.runtime_tests.runtimes.base import Placement
from ffmerge.runtime_tests.runtimes.registry import find_runtime

NOISE = 0.01  # a change of a cost by less says nothing
PLACED = 0.9  # the fraction of the compute nodes that a runtime must take to count as used
ROWS, GIVEN = "real rows of the package", "--data"  # what a metric was measured on


@dataclass(frozen=True)
class Worst:
    """The element that uses most of its tolerance; ``index`` is in the full output."""

    case: int
    index: tuple[int, ...]
    expected: float
    got: float


@dataclass(frozen=True)
class CaseParity:
    """One output on one case; ``real`` says that its inputs came with data.

    The differences are None when they could not be computed, ``quality`` where the output has no
    scores of classes.
    """

    case: int
    real: bool
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    quality: Quality | None = None
    worst: Worst | None = None


@dataclass(frozen=True)
class OutputParity:
    """One output of a graph over all cases, at one optimization level.

    ``max_rel`` is over the elements whose expected size exceeds ``atol``. A quantized model is
    judged by the real case if there is one: all numbers are then of it. The differences are
    None when they could not be computed; ``reason`` then says why, as it does whenever not
    ``ok``. ``compared`` of ``elements`` were stored with the package. ``quality`` is that of the
    real case if there is one, else of all.
    """

    graph: str
    name: str
    optimization: str
    max_abs: float | None
    max_rel: float | None
    cosine: float | None
    quality: Quality | None
    worst: Worst | None
    compared: int
    elements: int
    atol: float
    rtol: float
    ok: bool
    reason: str | None
    cases: tuple[CaseParity, ...]
    out: int = 0


@dataclass(frozen=True)
class Generation:
    """Greedy decoding of ``prompts``, at one optimization level.

    ``agreement`` is the fraction of the ``compared`` ids that are PyTorch's. From its first
    difference on a prompt does not agree; where PyTorch's choice was within the tie of its
    second, both ways are right, and from there the prompt is not compared: it is one of ``ties``.
    ``difference`` is the first id that differs: its ``prompt`` and ``step``, the id ``expected``
    and the one ``got``, and the ``margin`` by which PyTorch's exceeded its second.
    """

    optimization: str
    prompts: int
    tokens: int
    compared: int
    agreement: float
    ties: int
    difference: Mapping[str, float] | None
    needed: float
    ok: bool
    reason: str | None


@dataclass(frozen=True)
class Divergence:
    """The first value that is off, in the order of the nodes, on one runtime.

    ``node`` computes ``value`` in ``layer``, the PyTorch module. ``difference`` is the size of
    the difference over the size of the value, ``bound`` what it may be; ``before`` is the last
    value that was right, and ``tensors`` the weights that are read between the two. ``judge``
    gave the right values: "PyTorch", as the package stores them, or a runtime on the same graph.
    """

    graph: str
    optimization: str
    node: str
    op: str
    value: str
    layer: str
    tensors: tuple[str, ...]
    before: str | None
    difference: float
    bound: float
    judge: str

    def __str__(self) -> str:
        """Return it as one sentence."""
        tensors = f", which reads {', '.join(self.tensors)}" * bool(self.tensors)
        where = f" in {self.layer}" * bool(self.layer)
        return (
            f"{self.graph} ({self.optimization}) leaves {self.judge} at {self.op} node "
            f"{self.node}{where}{tensors}: difference {self.difference:.2g} of the value's size, "
            f"{self.bound:.2g} allowed"
        )


@dataclass(frozen=True)
class MetricRow:
    """The task metric of one ``stage`` of a model, computed by ``by``, on ``data``."""

    stage: str
    by: str
    data: str
    name: str
    value: float
    examples: int


@dataclass(frozen=True)
class Footprint:
    """What the sessions of a package cost, one run of each at batch 1, of the sizes ``given``.

    A graph that generates makes one token; ``tokens_per_s`` counts those that a graph with a
    cache makes after a few others, and is None where there is none. The bytes are what creating
    the sessions added to the process: all resident memory, and its anonymous part (a weight that
    stays in the mapped file is resident, not anonymous); ``running_bytes`` are all that is resident
    more once the timed runs have read their weights and made their values. They are None where the
    system does not tell, and ``memory_reason`` says so. ``placement`` is where the nodes ran, over
    all the graphs.
    """

    rss_bytes: int | None
    anonymous_bytes: int | None
    running_bytes: int | None
    memory_reason: str | None
    load_s: float
    first_ms: float
    median_ms: float
    p95_ms: float
    tokens_per_s: float | None
    runs: int
    given: str
    threads: int
    device: str
    placement: Placement | None

    @property
    def file_bytes(self) -> int | None:
        """Return the resident bytes that a file backs, which the system may drop and read again."""
        if self.rss_bytes is None or self.anonymous_bytes is None:
            return None
        return self.rss_bytes - self.anonymous_bytes


@dataclass(frozen=True)
class Sharing:
    """Of the bytes that a package has less than the one it came from, those gone from memory.

    ``fraction`` is ``resident_saved`` over ``bytes_removed``; both None where memory is not told,
    and the fraction where one has fewer bits than the other: then it is no matter of sharing.
    """

    against: str
    bytes_removed: int
    resident_saved: int | None
    fraction: float | None


@dataclass
class ProviderResult:
    """What was found on one runtime so far; it is filled in check by check.

    ``dtype`` is the precision that ran where the package has several; the bounds are those of it.
    ``profile`` is what the graphs that ran are for, where it has them for several.
    ``used`` is None when it did not run, and ``stopped`` says why it did not get to the end.
    ``generation`` is greedy decoding at each optimization level, ``divergences`` the first node of
    each graph that is off. ``metric`` is the task's on the data that were given, ``sample`` that
    on the real rows that the package holds, and ``texts`` what is measured of written texts.
    """

    name: str
    requested: str
    dtype: str | None = None
    profile: str | None = None
    used: str | None = None
    device: str | None = None
    arithmetic: str = "fp32"
    optimization: tuple[str, ...] = ()
    outputs: list[OutputParity] = field(default_factory=list)
    generation: list[Generation] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)
    metric: MetricResult | None = None
    sample: MetricResult | None = None
    texts: list[MetricRow] = field(default_factory=list)
    footprint: Footprint | None = None
    stopped: str | None = None

    @property
    def kind(self) -> str | None:
        """Return which graphs of the package ran, where it has several kinds."""
        return self.profile or self.dtype

    @property
    def label(self) -> str:
        """Return what it is called in a report."""
        if self.kind is None:
            return self.name
        return f"{self.name}, {self.kind}"

    @property
    def reason(self) -> str | None:
        """Return all that is wrong, or None."""
        if self.stopped:
            return self.stopped
        reasons = []
        for output in self.outputs:
            if not output.ok:
                where = f"{output.graph}: {output.name} ({output.optimization})"
                reasons.append(f"{where}: {output.reason}")
        for decoded in self.generation:
            if not decoded.ok:
                reasons.append(f"{decoded.reason} ({decoded.optimization})")
        reasons += map(str, self.divergences)
        if self.footprint and (few := ran_elsewhere(self.requested, self.footprint.placement)):
            reasons.append(few)
        return "; ".join(reasons) or None

    @property
    def ok(self) -> bool:
        """Tell whether nothing is wrong."""
        return self.reason is None

    def worst(self) -> list[OutputParity]:
        """Return of each graph and optimization level the output that fails, or is farthest off."""
        found = []
        for _, outputs in groupby(self.outputs, lambda o: (o.graph, o.optimization)):
            found.append(max(outputs, key=lambda o: (not o.ok, o.max_abs or 0)))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return its fields, with the footprint as memory and latency."""
        cost, found = self.footprint, {**vars(self), "ok": self.ok, "reason": self.reason}
        del found["footprint"], found["stopped"]
        held = getattr(getattr(cost, "placement", None), "device_bytes", None)
        told: str | None = "the engine has no other device, or does not tell"
        if held is not None:
            told = None
        memory = _measured(cost, "rss_bytes", "anonymous_bytes", "running_bytes", "memory_reason")
        memory |= _measured(cost, "file_bytes")
        memory |= {"device_bytes": held, "device_reason": told}
        times = _measured(cost, "first_ms", "median_ms", "p95_ms", "runs", "given")
        found["memory"] = {key.removeprefix("memory_"): value for key, value in memory.items()}
        found["latency_ms"] = {key.removesuffix("_ms"): value for key, value in times.items()}
        return found | _measured(cost, "tokens_per_s", "load_s", "threads", "placement")


@dataclass(frozen=True, repr=False)
class Validation:
    """What was found of a package on every runtime that was asked for.

    ``not_tested`` are runtimes that were not asked for by name, and why they are not on this
    machine; ``not_measured`` is why a metric is missing. ``label`` is the package's name in a
    report, where a validation of only ``costs`` may stand beside this one.
    """

    manifest: Manifest
    providers: tuple[ProviderResult, ...]
    not_tested: Mapping[str, str] = field(default_factory=dict)
    not_measured: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    sharing: Sharing | None = None
    label: str = "package"

    @property
    def ok(self) -> bool:
        """Tell whether there is a runtime, and all hold."""
        return bool(self.providers) and all(result.ok for result in self.providers)

    @property
    def metric(self) -> MetricResult | None:
        """Return the task metric of the first runtime that measured one on the data given."""
        return next((p.metric for p in self.providers if p.metric), None)

    @property
    def footprint(self) -> Footprint | None:
        """Return memory and latency of the first runtime that was measured."""
        return next((p.footprint for p in self.providers if p.footprint), None)

    @property
    def max_abs(self) -> float | None:
        """Return the largest difference in any output on any runtime, in the first precision."""
        known: list[float] = []
        for result in self.providers:
            if result.dtype in (None, self.manifest.dtype):
                known += [each.max_abs for each in result.outputs if each.max_abs is not None]
        return max(known, default=None)

    @property
    def metrics(self) -> list[MetricRow]:
        """Return the metric of the original and the merged model, the exported one, each runtime.

        Those on other data are not to be compared.
        """
        found = stages(self.manifest)
        if self.manifest.metric:
            found.append(metric_row("exported", "PyTorch", ROWS, self.manifest.metric))
        for data, name in ((ROWS, "sample"), (GIVEN, "metric")):
            for result in self.providers:
                if metric := getattr(result, name):
                    stage = result.kind or self.manifest.dtype
                    found.append(metric_row(stage, result.name, data, metric))
        for result in self.providers:
            found += result.texts
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a number that is NaN or infinite becomes null."""
        absent = []
        for name, reason in self.not_tested.items():
            requested = find_runtime(name).requested
            absent.append({"name": name, "requested": requested, "reason": reason})
        manifest = self.manifest
        return plain(
            {
                "ok": self.ok,
                "providers": [result.to_json() for result in self.providers],
                "not_tested": absent,
                "metric": self.metric,
                "metrics": self.metrics,
                "not_measured": self.not_measured,
                "environment": dict(self.environment),
                "package": {
                    "bytes_total": sum(file.bytes for file in manifest.files),
                    "bytes_model": model_bytes(manifest),
                    "initializer_bytes_unique": manifest.bytes_unique,
                    "parameters": manifest.parameters,
                    "dtype": ",".join(manifest.dtypes),
                },
                "sharing": self.sharing,
            }
        )

    def __repr__(self) -> str:
        """Return the verdict of each runtime."""
        found = []
        for result in self.providers:
            found.append(f"{result.label}: {result.reason or 'ok'}")
        return f"Validation({'; '.join(found)})"

    def _repr_html_(self) -> str:
        """Return what the terminal shows, for a notebook."""
        from ffmerge.runtime_tests.rows import tables

        return f"<p>{escape(repr(self))}</p>{html_of(tables(self))}"


def _measured(cost: Footprint | None, *names: str) -> dict[str, Any]:
    """Return some numbers of a footprint; None where nothing was measured."""
    return {name: getattr(cost, name, None) for name in names}


def ran_elsewhere(requested: str, placement: Placement | None) -> str | None:
    """Return the reason why a runtime that took few of the nodes was not really used."""
    if placement is None or placement.fraction(requested) >= PLACED:
        return None
    others = []
    for part, ops in placement.compute.items():
        if part != requested:
            others += [f"{count} {op} on {part}" for op, count in ops.items()]
    counts = placement.counts()
    return (
        f"{requested} ran {counts.get(requested, 0)} of {sum(counts.values())} compute nodes, at "
        f"least {PLACED:.0%} are needed; elsewhere: {', '.join(others)}"
    )


def metric_row(stage: str, by: str, data: str, metric: MetricResult) -> MetricRow:
    """Return a metric with where it comes from."""
    return MetricRow(stage, by, data, metric.name, metric.value, metric.examples)


def stages(manifest: Manifest) -> list[MetricRow]:
    """Return the metrics that the merge measured: before it, after it and recovered."""
    if not manifest.merge:
        return []
    along, found = manifest.merge.metric, []
    names = (*manifest.merge.stages, "recovered")
    for key, stage in zip(("before", "merged", "recovered"), names, strict=True):
        if along.get("name") and along.get(key) is not None:
            metric = MetricResult(along["name"], along[key], along.get("examples", 0))
            found.append(metric_row(stage, "PyTorch", "merge's validation data", metric))
    return found


def sharing(before: Validation, after: Validation) -> Sharing | None:
    """Return what sharing kept of the bytes removed since ``before``; None if hardly any are."""
    whole = model_bytes(before.manifest)
    removed = whole - model_bytes(after.manifest)
    if removed <= NOISE * whole:
        return None
    first, last = (getattr(each.footprint, "rss_bytes", None) for each in (before, after))
    if first is None or last is None:
        return Sharing(before.label, removed, None, None)
    fraction: float | None = None
    if _same_bits(before.manifest, after.manifest):
        fraction = (first - last) / removed
    return Sharing(before.label, removed, first - last, fraction)


def _same_bits(before: Manifest, after: Manifest) -> bool:
    """Say whether what both packages hold has as many bits in both: a budget may choose others.

    Without a budget, where none are told of single weights, int4 has 4.
    """
    old = {name: form.bits for name, form in before.bits.items()}
    new = {name: form.bits for name, form in after.bits.items()}
    both = old.keys() | new.keys()
    if old and new:
        both = old.keys() & new.keys()
    alike = [old.get(name, 4) == new.get(name, 4) for name in both]
    return before.dtype == after.dtype and all(alike)


def model_bytes(manifest: Manifest, kind: str | None = None) -> int:
    """Return the bytes of the files a runtime loads: graphs and their external data.

    Of several precisions or profiles it loads one, by default the first; profiles share their data.
    """
    other = set()
    for each in manifest.kinds:
        if each != (kind or manifest.kinds[0]):
            other |= {graph.path for graph in manifest.of_kind(each).graphs}
    if len(manifest.profiles) == 1:
        other |= {f"{path}_data" for path in other}
    total = 0
    for file in manifest.files:
        if file.path.removesuffix("_data").endswith(".onnx") and file.path not in other:
            total += file.bytes
    return total
