"""Every option, once: the command line, recipes and Python read the same fields.

A field made by :func:`option` is a flag of the commands whose configuration it stands in
(``flags.py``), with this help text; other fields are for Python only. Values are checked when a
configuration is made, so a misspelt one fails before a model is loaded. Nothing here needs torch.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ffmerge.errors import InputError
from ffmerge.profiles import (
    DEFAULT,
    FUSED_OPSET,
    PLAIN_OPSET,
    PROFILE_HELP,
    PROFILES,
    WIDE_OPSET,
    check_profile,
    profile_of,
)

Window = tuple[int, int]  # first and last layer, inclusive
Default = TypeVar("Default")

# of merging, by name; other packages may bring more
METHODS = (
    "calibrated",
    "residual",
    "narrow",
    "permute",
    "weights",
    "average",
    "copy-anchor",
    "drop-ffn",
)
CRITERIA = ("metric", "fidelity")
PARTS = ("merged", "all")  # of a model, to recover
MIXED_PRECISION = ("no", "bf16")
FOUR_BITS = ("int4", "q4f16")  # with activations in float32, or in float16
BLOCKED, BLOCKS = ("int8", *FOUR_BITS), (32, 64, 128)  # of weights in blocks
BLOCK_HELP = (
    "Weights that share a scale: 32, 64 or 128; if not given 32 for 4 bits, and for int8 64 in a "
    "graph that keeps a cache, none in others."
)
TUNE_HELP = "Steps of training of each narrowed sublayer alone, on --data, without labels."
BUDGET_HELP = (
    "With --dtype int4 and --data: 2, 4 or 8 bits for each weight, as many as the size has room "
    "for: 60MB, or -25%."
)
CALIBRATED = ("int8-static", *FOUR_BITS)  # what reads data; four bits need not
DTYPES = ("fp32", "fp16", "int8", "int8-dynamic", "int8-static", *FOUR_BITS)
SHORT = {"q8": "int8", "q4": "int4"}  # what transformers.js calls two of them
# ... and what it puts behind the names of the graphs, so that a folder may hold these together
SUFFIXES = {"fp32": "", "fp16": "_fp16", "int8": "_quantized", "int4": "_q4", "q4f16": "_q4f16"}
LAYOUTS = ("optimum", "transformers.js")
OPSETS = range(7, 24)  # ONNX Runtime still runs 7; 23 is the last that PyTorch exports


def option(default: Default, help: str, *names: str, **more: Any) -> Default:
    """Return a field with a flag; ``names`` are the flag's, by default that of the field.

    ``typed`` is the type of what is typed where it is not the field's, and ``parse`` turns the
    one into the other.
    """
    return field(default=default, metadata={"help": help, "names": names, **more})


def parse_windows(texts: Sequence[str]) -> Window | dict[str, Window] | None:
    """Return the window written ``A-B``, or by stack those written ``STACK:A-B``; None: no text.

    Raises:
        InputError: a text has neither form, a window has fewer than two layers, or the texts name
            a stack twice, or none although there are several.
    """
    windows: dict[str, Window] = {}
    for text in texts:
        match = re.fullmatch(r"(?:(.+):)?(\d+)-(\d+)", text)
        if not match:
            raise InputError(f"window {text!r} is not of the form FIRST-LAST, for example 3-7.")
        name, first, last = match[1] or "", int(match[2]), int(match[3])
        if last <= first:
            raise InputError(
                f"window {text} has fewer than two layers: merging needs at least two."
            )
        if name in windows or (windows and "" in (name, *windows)):
            raise InputError(f"window {text}: give one window, or STACK:FIRST-LAST once per stack.")
        windows[name] = (first, last)
    return windows.get("", windows or None)


def parse_budget(text: str, whole: int) -> int:
    """Return the bytes of a budget for a model of ``whole`` bytes.

    ``60MB`` is a size (kB, MB, GB are decimal, KiB, MiB, GiB binary, in either case), ``-25%`` a
    quarter less than the model has, ``75%`` three quarters of it.

    Raises:
        InputError: the text has no such form.
    """
    text, number = str(text), r"(\d+(?:\.\d+)?)"
    if match := re.fullmatch(rf"(-?){number}%", text):
        percent = float(match[2])
        if match[1]:
            percent = 100 - percent
        return int(whole * percent / 100)
    if match := re.fullmatch(rf"(?i){number} ?(?:([kmgt])(i?))?b", text):
        base = 1024 if match[3] else 1000
        power = " KMGT".index((match[2] or " ").upper())
        return int(float(match[1]) * base**power)
    raise InputError(f"size {text!r} is not of the form 60MB, -25% or 75%.")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a checkpoint is read."""

    trust_remote_code: bool = option(
        False, "Run the code that comes with the checkpoint.", "--trust-remote-code"
    )
    ignore_unexpected: bool = option(
        False,
        "Go on without the trained tensors of the checkpoint that its class does not read.",
        "--ignore-unexpected",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model of the hub.")
    token: str | None = option(None, "Access token of the hub; else that of `hf auth login`.")
    subfolder: str = option("", "Folder of the model inside the checkpoint folder or hub model.")

    def __post_init__(self) -> None:
        """Refuse a sub-folder that leads out of the folder."""
        if ".." in Path(self.subfolder).parts or Path(self.subfolder).is_absolute():
            raise InputError(f"the sub-folder {self.subfolder!r} is outside the checkpoint.")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(LoadConfig):
    """How a checkpoint is read, and where its model computes."""

    device: str = option("cpu", "What computes: cpu, cuda, cuda:1.")
    offload: bool = option(
        False,
        "For a model larger than the device: weights stay on disk, each block's are put on the "
        "device while it runs.",
        "--offload",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(DeviceConfig):
    """How a checkpoint is read, where its model computes, and how it is written again."""

    expanded: bool = option(False, "Store every copy, for plain loaders.", "--expanded")


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Which columns of a table are read, where they are not called what public data sets do."""

    text_column: str | None = option(None, "Column or language that the model reads.")
    pair_column: str | None = option(None, "Column of the second text, of a classifier of pairs.")
    label_column: str | None = option(None, "Column of the classes.")
    target_column: str | None = option(None, "Column or language that the model is to write.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ColumnsConfig):
    """Calibration data, and the data that chooses; paths or hub ids, read by ``models/data.py``."""

    data: str | None = option(
        None,
        "Calibration data: .npz of model inputs, text, jsonl, csv, tsv, parquet, a folder of "
        "images or sounds, or a hub data set ID:SPLIT.",
    )
    validation: str | None = option(None, "Data that chooses the layers; else half of --data.")


def check_sources(*sources: str | None) -> None:
    """Raise InputError at data that is no file or folder that is there, and no ``ID:SPLIT``."""
    for source in sources:
        if source and ":" not in source and not Path(source).expanduser().exists():
            raise InputError(f"{source} is not a data file, a folder, or a hub data set ID:SPLIT.")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared at equal size: k layers of the stacks merged by ``method``, and rivals."""

    k: int | None = option(None, "Merge k layers; the best window is chosen.", "--k")
    method: str = option(
        "calibrated",
        "calibrated; residual keeps more for under 1 % of the parameters; narrow shares nothing "
        "but takes neurons; permute is the paper's; weights needs no data; average and copy-anchor "
        "are baselines.",
    )
    stacks: tuple[str, ...] = option(
        (),
        "Which stack, where there are several; may be given several times. Encoder and decoder are "
        "both merged if none is given.",
        "--stack",
        typed=list[str] | None,
        parse=lambda names: tuple(names or ()),
    )
    tokens: int = option(10_000, "Positions the statistics are taken from.")
    batch_size: int = option(32, "Examples per forward pass.")
    task: str | None = option(None, "Task by its optimum name; inferred if not given.")

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.tokens < 2 or self.batch_size < 1:
            raise InputError("tokens must be 2 or more, and batch_size 1 or more.")


@dataclass(frozen=True, kw_only=True)
class MergeConfig(CompareConfig):
    """Settings of a merge.

    Give ``window`` (first and last layer, inclusive; one for every stack, or by stack), ``k``
    (every window of k layers is tried) or ``budget`` (a size such as ``60MB``, or ``-25%``: layers
    are joined one by one, the best measured first, until the model is that small). ``stacks`` may
    be empty for a model's only stack, and for encoder and decoder. For ``k`` each stack is searched
    alone, with those before it merged already, or with ``sync`` all take the same layers; for
    ``budget`` all stacks compete. ``auto_precision`` chooses the precision of the package too,
    whose size then is the budget's. ``criterion`` is what chooses: ``metric``, where there is one,
    or ``fidelity`` to the original, which needs no labels. ``tokens`` are the positions the
    statistics of each stack are taken from, about 10,000 in the paper. ``rank`` is that of
    ``residual``, by default one for every 64 dimensions of the model. ``tune`` are the steps for
    which each narrowed sublayer is trained alone, on what it reads and is to put out.
    """

    window: Window | Mapping[str, Window] | None = option(
        None,
        "First and last layer, from 0, inclusive: 3-7; by stack: --window encoder:1-3 --window "
        "decoder:0-2.",
        typed=list[str] | None,
        parse=lambda texts: parse_windows(texts or ()),
    )
    budget: str | None = option(None, "Join layers, or narrow them, to this size: 60MB, or -25%.")
    auto_precision: bool = option(
        False, "The budget is the package's: its precision is chosen too.", "--auto-precision"
    )
    sync: bool = option(False, "The same layers in all stacks.", "--sync")
    criterion: str = option(
        "metric",
        "What chooses: metric, or fidelity, which needs no labels.",
        choices=CRITERIA,
    )
    rank: int | None = None
    tune: int = option(0, TUNE_HELP, "--tune")

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        _take_window(self)
        if self.tune < 0 or (self.tune and (self.method != "narrow" or self.budget is None)):
            raise InputError("tune is a number of steps, of --method narrow and a --budget.")
        if sum(given is not None for given in (self.k, self.window, self.budget)) != 1:
            raise InputError("give either a window, the number k of layers to merge, or a budget.")
        if self.budget is None and self.auto_precision:
            raise InputError("a precision is chosen for a budget: give one.")
        if self.budget is not None:
            parse_budget(self.budget, 1)
            if self.sync:
                raise InputError("for a budget all stacks compete: leave out sync.")
        if self.criterion not in CRITERIA:
            raise InputError(
                f"there is no criterion {self.criterion!r}: choose metric or fidelity."
            )
        if self.rank is not None and self.rank < 1:
            raise InputError(f"the rank of a residual is 1 or more, not {self.rank}.")


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What a package may weigh, and the task that it is measured by.

    ``size`` is that of the files a runtime needs: ``30MB``, or of the float32 weights ``25%``.
    ``tune`` is as of a merge, where neurons are taken out.
    """

    size: str = option("25%", "What is shipped may weigh so much: 30MB, or 25% of float32.")
    task: str | None = option(None, "Task by its optimum name; inferred if not given.")
    batch_size: int = option(32, "Examples per forward pass.")
    profile: str = option(
        DEFAULT,
        f"{PROFILE_HELP}.",
        "--for",
        choices=PROFILES,
        typed=list[str] | None,
        parse=lambda names: ",".join(names or (DEFAULT,)),
    )
    tune: int = option(0, TUNE_HELP, "--tune")

    def __post_init__(self) -> None:
        """Refuse a size that is none, and what is for nothing."""
        parse_budget(self.size, 1)
        if "," in self.profile:
            raise InputError("compress fits the graphs of one profile to a size: give one --for.")
        if profile_of(self.profile).fixed:
            raise InputError(
                f"compress tries no precision for {self.profile}: give what it writes for another "
                f"provider to ffmerge export --for {self.profile}."
            )
        if self.batch_size < 1:
            raise InputError("batch_size must be 1 or more.")
        if self.tune < 0:
            raise InputError("tune must be 0 or more steps.")


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """Settings of a recovery.

    ``batch_size`` are the rows of one step over all processes, ``micro_batch`` those that one
    process runs at a time (0: as many as keep 1 GiB for the gradients); ``parts`` is ``merged``,
    what the merged layers share and what each has beside it, or ``all``. ``distill`` follows the
    original, with ``labels`` the task's own loss is added to it; either may be had alone.
    ``mixed_precision`` is ``no``, ``bf16``, or None for what ``accelerate launch`` was told. The
    learning rate rises and falls in one cycle (arXiv 1708.07120); with a folder, state is saved
    every ``save_every`` steps.
    """

    steps: int = option(
        300, "Steps of training towards the original on --data, without labels.", "--recover"
    )
    labels: bool = option(False, "Train on the labels of the data as well.", "--recover-labels")
    parts: str = option("merged", "What to train.", "--recover-parts", choices=PARTS)
    learning_rate: float = option(1e-3, "Highest rate of the recovery.")
    batch_size: int = 32
    micro_batch: int = 0
    distill: bool = True
    task: str | None = None
    mixed_precision: str | None = None
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        wrong = None
        if min(self.steps, self.batch_size, self.save_every) < 1:
            wrong = "a step below 1"
        elif self.micro_batch < 0:
            wrong = f"micro batches of {self.micro_batch} rows"
        elif not 0 < self.learning_rate < math.inf:
            wrong = f"a learning rate of {self.learning_rate}"
        elif self.parts not in PARTS:
            wrong = f"parts {self.parts!r}, not merged or all"
        elif not (self.distill or self.labels):
            wrong = "neither distillation nor labels"
        elif self.mixed_precision not in (None, *MIXED_PRECISION):
            wrong = f"mixed precision {self.mixed_precision!r}, not no or bf16"
        if wrong:
            raise InputError(f"recovery is asked for {wrong}.")


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """Settings of a comparison of layers.

    Each stack is compared on ``tokens`` positions. Neurons are aligned for layers at most
    ``reach`` apart (None: all, 0: none). The matrices of one pass over the data take ``memory``
    GB, or those of one pair if that is more: less memory is more passes.
    """

    tokens: int = option(10_000, "Positions each stack is compared on.")
    reach: int | None = option(
        None, "Align neurons of layers at most this far apart, 0: none; else of all."
    )
    memory: float = option(2.0, "GB for the matrices of one pass; less means more passes.")
    batch_size: int = option(32, "Examples per forward pass.")

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        if self.tokens < 2 or self.batch_size < 1 or (self.reach or 0) < 0:
            raise InputError("tokens must be 2 or more, batch_size 1 or more, reach 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of an export; ``task`` None means: inferred from the model's class.

    ``example`` is an ``.npz`` with a row or more of every input by name, where the inputs cannot be
    derived, or of the sizes that a graph for an NPU is to have. ``profile`` is one of
    :data:`ffmerge.profiles.PROFILES`, or several, also with commas between them. ``dtype`` is one
    of :data:`DTYPES`, or several in the same way, None: the profile's own; ``ort`` and
    ``prepack`` add the graphs in ONNX Runtime's format, and with packed weights. ``layout`` is one
    of :data:`LAYOUTS`: optimum's has all its graphs and one data file for them, that of
    transformers.js only the graphs that it loads, each with its weights, in several precisions.
    """

    task: str | None = option(None, "Task by its optimum name; inferred if not given.")
    example: Path | None = option(
        None,
        "A row or more of every input as .npz, for a model whose inputs cannot be derived, or for "
        "an NPU of the sizes that it is to have.",
    )
    profile: str | Sequence[str] | None = option(
        None,
        f"{PROFILE_HELP}, portable with --opset or for transformers.js. Several share one data "
        "file: cpu,portable.",
        "--for",
        choices=PROFILES,
        typed=list[str] | None,
        parse=lambda names: ",".join(names or ()) or None,
    )
    opset: int | None = option(
        None,
        f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]}; {PLAIN_OPSET} for portable if not given, "
        f"{WIDE_OPSET} for npu, {FUSED_OPSET} for the others.",
    )
    dtype: str | Sequence[str] | None = option(
        None,
        "Precision of the weights, or several in one folder: fp32,q8,q4f16. int8-static needs "
        "--data, int4 and q4f16 are better with it. fp32 if not given, for npu int8-static.",
        choices=DTYPES,
        typed=list[str] | None,
        parse=lambda names: ",".join(names or ()) or None,
    )
    block: int | None = option(None, BLOCK_HELP)
    budget: str | None = option(None, BUDGET_HELP)
    layout: str | None = option(
        None,
        "Folder and file names of optimum or transformers.js; optimum's if not given, for several "
        "precisions and for webgpu those of the other.",
        choices=LAYOUTS,
    )
    ort: bool = option(False, "Also model.ort and its required_operators.config.", "--ort")
    prepack: bool = option(
        False, "Also weights packed for this processor; says the costs.", "--prepack"
    )

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        _take_paths(self, "example")
        if self.opset is not None and self.opset not in OPSETS:
            raise InputError(f"opset {self.opset} is not one of {OPSETS[0]} to {OPSETS[-1]}.")
        for dtype in self.dtypes:
            check_dtype(dtype)
        for profile in self.profiles:
            check_profile(profile, self.dtypes, self.opset)
        blocked = [dtype for dtype in self.dtypes if dtype in BLOCKED]
        check_block(self.block, (blocked or self.dtypes)[0])
        check_budget(self.budget, ",".join(self.dtypes), self.block)
        if self.layout not in (None, *LAYOUTS):
            raise InputError(f"no layout {self.layout!r}: there is {', '.join(LAYOUTS)}.")
        if len(self.profiles) > 1:
            self._check_profiles()
        elif len(self.dtypes) > 1:
            self._check_dtypes()

    def _check_profiles(self) -> None:
        """Refuse profiles whose graphs cannot share one data file."""
        for profile in self.profiles:
            if self.profiles.count(profile) > 1:
                raise InputError(f"profile {profile} is there twice: name each once.")
            if profile_of(profile).fixed:
                raise InputError(
                    f"{profile} fixes every size, which the others leave open: export it alone."
                )
        if len(self.dtypes) > 1:
            raise InputError(
                "several profiles share one data file, and several precisions have one each: give "
                "one --dtype, or one --for."
            )
        if self.layout == "transformers.js":
            raise InputError(
                "the layout transformers.js has names for the graphs of one profile: for several "
                "leave it out, or give one --for."
            )
        if self.opset is not None:
            raise InputError("each profile has an opset of its own: for several leave out --opset.")
        if self.budget is not None or self.ort or self.prepack:
            raise InputError(
                "--budget, --ort and --prepack are of one profile: leave them out, or give one "
                "--for."
            )

    def _check_dtypes(self) -> None:
        """Refuse precisions that one folder cannot hold together."""
        for dtype in self.dtypes:
            if self.dtypes.count(dtype) > 1:
                raise InputError(f"dtype {dtype} is there twice: name each precision once.")
            if dtype not in SUFFIXES:
                raise InputError(
                    f"{dtype} has no file name beside other precisions: export each into a folder "
                    "of its own."
                )
        if self.layout == "optimum":
            raise InputError(
                "the layout optimum has one name for the graphs of all precisions: for several "
                "leave it out, or give one --dtype."
            )
        if self.ort or self.prepack:
            raise InputError(
                "--ort and --prepack are of one precision: leave them out, or give one --dtype."
            )

    @property
    def profiles(self) -> tuple[str, ...]:
        """What there are graphs for; those of the first are what is loaded."""
        if self.profile is not None:
            return _names(self.profile)
        if self.opset is not None:  # the others have one each
            return ("portable",)
        several = self.dtype is not None and len(_names(self.dtype)) > 1
        if several or self.layout == "transformers.js":  # WebGPU reads those files, too
            return ("portable",)
        return (DEFAULT,)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The precisions, by their names in :data:`DTYPES`; the first is what is loaded."""
        asked = self.dtype
        if asked is None:
            asked = profile_of(self.profiles[0]).dtype
        return tuple(SHORT.get(name, name) for name in _names(asked))

    @property
    def file_layout(self) -> str:
        """The layout of the files: of several precisions that which has a name for each.

        Of several profiles that which has one data file.
        """
        if self.layout is not None:
            return self.layout
        if len(self.profiles) > 1:
            return "optimum"
        if len(self.dtypes) > 1:
            return "transformers.js"
        return profile_of(self.profiles[0]).layout or "optimum"


def check_without_data(config: ExportConfig) -> None:
    """Raise InputError where an export takes its ranges or its bits from data."""
    if "int8-static" in config.dtypes:
        raise InputError("int8-static takes its ranges from data: give --data.")
    if config.budget is not None:
        raise InputError("for a budget bits are chosen by data of the task: give --data.")


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """Settings of sharing in an ONNX file: ``dtype`` and ``opset`` None are the file's own.

    With ``resident`` a tied embedding is in memory once, too. ``data`` is an ``.npz`` of the
    graph's inputs, from which ``int8-static`` takes its ranges and by which 4 bits are rounded.
    """

    dtype: str | None = option(
        None, "Precision of the weights; as it is if not given.", choices=DTYPES[1:]
    )
    resident: bool = option(
        True,
        "Keep a tied embedding in memory once; not for a file that another tool quantizes next, "
        "which looks for weights on the right of a product.",
    )
    opset: int | None = option(None, "ONNX operator set; the file's if not given.")
    block: int | None = option(None, BLOCK_HELP)
    budget: str | None = option(None, BUDGET_HELP)
    data: Path | None = option(
        None, "Inputs of the graph as .npz, for int4, q4f16 and int8-static."
    )

    def __post_init__(self) -> None:
        """Refuse a precision there is not, and data that would not be read."""
        _take_paths(self, "data")
        if self.dtype is not None:
            check_dtype(self.dtype)
        check_block(self.block, self.dtype)
        check_budget(self.budget, self.dtype, self.block)
        if self.budget is not None and self.data is None:
            raise InputError("for a budget bits are chosen by inputs of the graph: give --data.")
        if self.dtype == "int8-static" and self.data is None:
            raise InputError("int8-static takes its ranges from inputs of the graph: give --data.")
        if self.dtype not in CALIBRATED and self.data is not None:
            raise InputError(
                f"only {_named(CALIBRATED)} read data: leave it out, or give one of them."
            )


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How weights are stored in fewer bits, for those who call the graph passes.

    ``block`` input features share a scale in blocks, by default as many as
    ``models/codes.py`` says. ``calibration`` are the batches from which int8-static takes its
    ranges and by which 4 bits are rounded, inputs of the graph by name. ``multiplied`` names
    weights that another graph of the package multiplies by: a table among them is stored as it
    is there. Of ``looked_up`` another graph looks rows up: they are stored as they are looked up.
    ``plain_lookups`` unpacks the rows of every table in blocks by standard operators:
    onnxruntime-web has no GatherBlockQuantized for wasm. ``rounded`` is where codes, scales and
    zero points in blocks are found and left, by the name of a weight, and ``forms`` where bits and
    block are: they are then the same in all graphs. ``budget`` are bytes for which int4 chooses
    these. Of int8-static ``activations`` are the bits of what products read, 8 where these lose
    little, or 16 of all, and of what they give.
    """

    block: int | None = None
    activations: int = 8
    calibration: Sequence[Mapping[str, Any]] = ()
    multiplied: frozenset[str] = frozenset()
    looked_up: frozenset[str] = frozenset()
    plain_lookups: bool = False
    rounded: dict[str, Any] | None = None
    forms: dict[str, Any] | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        """Refuse a block that no kernel takes."""
        if self.block is not None and (self.block < 16 or self.block & (self.block - 1)):
            raise InputError(f"a block of {self.block} is not a power of two from 16 on.")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig(ColumnsConfig):
    """What a package is checked on: runtimes by name, data, and what it is held against."""

    providers: tuple[str, ...] = option(
        ("cpu",),
        "cpu, cuda, webgpu or another runtime; may be given several times.",
        "--provider",
        typed=list[str] | None,
        parse=lambda names: tuple(names or (DEFAULT,)),
    )
    installed: bool = option(False, "Test also every other runtime that is installed.", "--all")
    data: str | None = option(
        None, "Data to measure the task's metric on, as for merge; .npz needs no transformers."
    )
    similarity: Path | None = option(
        None, "similarity.json of ffmerge similarity: its heat maps in the report."
    )
    against: Path | None = option(
        None, "The package before the merge: is what was removed gone from memory?"
    )
    threads: int = 1

    def __post_init__(self) -> None:
        """Take names and paths as Python has them, and refuse to check nothing."""
        _take_paths(self, "similarity", "against")
        if self.providers:
            object.__setattr__(self, "providers", _names(self.providers))
        elif not self.installed:
            raise InputError("no runtime is named: give providers, or installed for all there are.")


def _take_window(config: Any) -> None:
    """Let a window that Python gives as text be what the command line makes of it."""
    if isinstance(config.window, str):
        object.__setattr__(config, "window", parse_windows([config.window]))


def _take_paths(config: Any, *names: str) -> None:
    """Let fields that Python may give as text be paths, or none."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, Path(value))  # frozen for all others


def check_dtype(dtype: str) -> None:
    """Raise InputError unless a package can have this precision."""
    if dtype not in DTYPES:
        raise InputError(f"no dtype {dtype!r}: there is {', '.join(DTYPES)}.")


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return names that are given one by one, or with commas between them."""
    if not isinstance(given, str):
        given = ",".join(given)
    return tuple(name.strip() for name in given.split(","))


def _named(names: tuple[str, ...]) -> str:
    """Return names as a sentence has them."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


def check_block(block: int | None, dtype: str | None) -> None:
    """Raise InputError unless weights of this precision can share a scale so."""
    if block is not None and dtype not in BLOCKED:
        raise InputError(f"only {_named(BLOCKED)} have blocks: leave it out, or give one of them.")
    if block is not None and block not in BLOCKS:
        raise InputError(f"a block of {block} weights is not one of 32, 64 and 128.")


def check_budget(budget: str | None, dtype: str | None, block: int | None) -> None:
    """Raise InputError unless the bits of weights can be chosen for this size."""
    if budget is None:
        return
    parse_budget(budget, 1)
    if dtype != "int4":
        raise InputError("a budget chooses the bits of each weight: give --dtype int4 with it.")
    if block is not None:
        raise InputError("a budget chooses the blocks of each weight: leave out --block.")
