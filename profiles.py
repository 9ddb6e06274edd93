"""What a package is for: one row for each provider of ONNX Runtime that ``export --for`` names.

``config.py`` refuses by this table what a provider has no kernels for, and ``exporter/`` makes the
graphs as it says. Where each entry is from: docs/runtimes.md.
"""

from dataclasses import dataclass

from ffmerge.errors import InputError

PLAIN_OPSET, FUSED_OPSET = 20, 23  # 23 is the first with Attention, RMSNormalization and rotation
WIDE_OPSET = 21  # the first whose QuantizeLinear gives 16 bits
HALVES = ("fp16", "q4f16")  # precisions that compute in float16


@dataclass(frozen=True)
class Profile:
    """How graphs are made for a provider.

    ``fused``: attention, RMS norms and rotations are one operator each, of the standard. With
    ``on_cpu`` attention of many tokens of which none is hidden is an operator of ONNX Runtime's
    own, and no sum becomes a part of the layer norm behind it. With
    ``multihead`` attention is an operator of ONNX Runtime's own. ``half_cache``: where a decoder
    computes in float16, it takes and gives keys and values so, as they are. ``dtypes`` are those
    that the provider has kernels for, None: all, and ``dtype`` is the one if none is asked for.
    In int8-static products read ``activations`` of so many bits; of 16 they give them, too.
    ``layout`` is that of the files, if none is asked for, None: optimum's, for several precisions
    that of transformers.js. If it is ``fixed``, a graph takes one row, and no size of it is open.
    """

    opset: int
    fused: bool = False
    on_cpu: bool = False
    multihead: bool = False
    half_cache: bool = False
    dtypes: tuple[str, ...] | None = None
    dtype: str = "fp32"
    activations: int = 8
    layout: str | None = None
    fixed: bool = False

    @property
    def rows(self) -> bool:
        """Whether there are kernels for int8 with a range for each row."""
        return self.dtypes is None or "int8-dynamic" in self.dtypes


_GPU = ("fp32", "fp16", "int8", "int4", "q4f16")
PROFILES = {
    "portable": Profile(PLAIN_OPSET),
    "cpu": Profile(FUSED_OPSET, fused=True, on_cpu=True),
    "cuda": Profile(FUSED_OPSET, fused=True, half_cache=True, dtypes=_GPU),
    "webgpu": Profile(
        FUSED_OPSET, fused=True, multihead=True, half_cache=True, dtypes=_GPU,
        layout="transformers.js",
    ),
    "npu": Profile(
        WIDE_OPSET, dtypes=("int8-static", "fp16", "fp32"), dtype="int8-static", activations=16,
        fixed=True,
    ),
}  # fmt: skip
DEFAULT = "cpu"
PROFILE_HELP = (
    "What the package is for: a provider of ONNX Runtime, with attention, RMS norms and rotation "
    "as one operator each: cpu, cuda, or webgpu, that of the browser; portable, whatever runs "
    f"ONNX; or npu: one row at a time, of one size, in int8-static. {DEFAULT} if not given"
)


def profile_of(name: str) -> Profile:
    """Return the profile of that name.

    Raises:
        InputError: there is none.
    """
    if name not in tuple(PROFILES):  # a list has no hash
        raise InputError(f"no profile {name!r}: there is {', '.join(PROFILES)}.")
    return PROFILES[name]


def check_profile(name: str, dtypes: tuple[str, ...], opset: int | None) -> None:
    """Raise InputError unless a profile has the precisions, and the opset if one is asked for."""
    profile = profile_of(name)
    if profile.opset != PLAIN_OPSET and opset not in (None, profile.opset):
        raise InputError(
            f"for {name} the opset is {profile.opset}, not {opset}: leave out one of the two."
        )
    for dtype in dtypes:
        if profile.dtypes is not None and dtype not in profile.dtypes:
            raise InputError(
                f"{name} has no kernels for {dtype}: choose one of {', '.join(profile.dtypes)}."
            )
