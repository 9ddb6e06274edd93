"""How far a runtime may be from PyTorch: one table, used everywhere."""

from dataclasses import dataclass, fields, replace

from ffmerge.errors import InputError
from ffmerge.models.manifest import RTOL, Manifest

AT_LEAST = ("cosine", "cache", "agreement", "tokens")  # all other bounds are at most
NOISE = 2e-5  # the direction of an output that is all smaller says nothing in float32
# The cosine that a quantized model keeps even on inputs that are drawn: rounding is not made for
# them, so they say little of its quality. Measured: 0.976 for int4.
DRAWN = 0.9
BELOW = "int4, some 2 bits"
# The part of a quantized model's elements that may be out of bounds where no node is off: single
# ones are thrown far by rounding. Measured on trained models in int8 whose ids are PyTorch's: 1 of
# 3,185 (SmolLM2) and of 3,722 (Gemma 3) in a cache, 8 of 182,788 that Whisper's encoder gives.
SPARED = 2.5e-4


@dataclass(frozen=True)
class Tolerance:
    """Bounds on one output, and the largest difference that was seen when they were set.

    An element is within bounds when ``|got - expected| <= atol + rtol * |expected|``; of a row with
    ``real`` ``atol`` counts in root mean squares of the output, and a few elements are spared
    (:meth:`spared`). The whole output must also have at
    least this ``cosine``, unless all of it is smaller than ``NOISE``: on small logits an absolute
    bound alone would let a wrong model pass. A cached key or value is an inner one, whose rounding
    the layers behind it even out: it must have ``cache``.

    Of scores of classes the first must be PyTorch's in the fraction ``agreement`` of the positions,
    where classes within ``tie`` of the first are as good, and the mean KL divergence at most
    ``kl`` nats; of the ids of greedy decoding the fraction ``tokens`` must agree. ``node`` is how
    far a node may be off what PyTorch gives, as a fraction of its size, before it is the one where
    a wrong output comes from; rounding alone was seen to make 0.07 in int8 and 0.32 in int4. With
    ``real`` a model is judged by its real inputs: rounding is made for them. Where the package has
    none, only the cosine (above ``DRAWN``) and the elements decide.
    """

    atol: float
    rtol: float
    cosine: float
    cache: float
    measured: float
    agreement: float
    kl: float
    tie: float
    tokens: float
    node: float
    real: bool = False

    def for_rounding(self, rounding: float) -> "Tolerance":
        """Return bounds that are no narrower than what ``rounding`` in PyTorch's float32 allows.

        A runtime may be ``MARGIN`` times as far from PyTorch as that is from float64. Two scores
        may then exchange their places where they are within twice that, and a divergence is at
        most of the order of its square.
        """
        off = MARGIN * rounding
        return replace(
            self,
            atol=max(self.atol, off),
            tie=max(self.tie, 2 * off),
            kl=max(self.kl, off**2),
        )

    def for_cache(self) -> "Tolerance":
        """Return the bounds on a cached key or value: it may be ``cache`` off in direction.

        Its elements may be off as much more as the length of what it is off, which is the square
        root of what its cosine lacks. Measured: 0.66 root mean squares, one element of 3,185 of
        SmolLM2 at -20 % in int8, whose logits have PyTorch's first class everywhere.
        """
        wider = ((1 - self.cache) / (1 - self.cosine)) ** 0.5
        return replace(self, cosine=self.cache, atol=self.atol * wider)

    def spared(self, elements: int) -> int:
        """Return how many of so many elements may be out of bounds: none of an exact model."""
        return round(SPARED * elements) if self.real else 0

    def for_size(self, rms: float) -> "Tolerance":
        """Return the bounds on an output of this root mean square."""
        return replace(self, atol=self.atol * rms) if self.real else self


# What a runtime may be off PyTorch's float32, in what that is off float64 on the same inputs.
# Measured: 1.2 on a trained Llama of 135M parameters (3.0e-4, 2.5e-4), 2.3 on a sentence encoder
# (2.7e-5, 1.2e-5).
MARGIN = 4

# PyTorch float32 against ONNX Runtime 1.31.1 on a CPU: the trained digits ViT and the two other
# reference models, merged and not; int8-static: the three unmerged; fp16: the digits ViT (OpenVINO
# 1.0e-2). float32 on that: ONNX Runtime 9.8e-6, WebGPU 8.1e-6, OpenVINO 6.4e-6, the evaluator
# 1.2e-5. int8 and int8-dynamic on real rows: cosine 0.9999, KL 2e-4; a processor without VNNI
# multiplies floats in blocks of int8, which moves probabilities by 1e-3.
# Trained language models lose more than those: SmolLM2 of 135M parameters, and narrowed by a tenth,
# on 181 real positions in int8: cosine 0.9986 (cache 0.9971), agreement 0.978, KL 0.0095; in int4,
# rounded by data, 0.982 (0.932), 0.906, 0.108, and 0.83 of greedy ids.
# The measured values of each column are in docs/parity.md. The columns: atol, rtol, cosine,
# cache, measured, agreement, kl, tie, tokens, node.
TOLERANCES = {
    "fp32": Tolerance(2e-5, RTOL, 0.99999, 0.99999, 1.2e-5, 1.0, 1e-9, 1e-4, 1.0, 1e-5),
    "fp16": Tolerance(2e-2, 5e-3, 0.9999, 0.9999, 1.5e-2, 0.99, 1e-3, 2e-2, 0.9, 2e-2),
    "int8": Tolerance(0.5, 5e-2, 0.998, 0.99, 0.13, 0.95, 1.5e-2, 0.25, 0.8, 0.5, real=True),
    "int8-dynamic": Tolerance(
        0.5, 5e-2, 0.998, 0.99, 0.15, 0.95, 1.5e-2, 0.25, 0.8, 0.5, real=True
    ),
    "int4": Tolerance(3.0, 1e-1, 0.97, 0.9, 2.2, 0.85, 0.2, 0.5, 0.7, 0.5, real=True),
    # With some weights of 2 bits, as a budget chooses. Measured on trained models in 65 to 85 % of
    # int4's bytes: cosine 0.965 (cache 0.914), agreement 0.84, KL 0.22, node 0.55.
    BELOW: Tolerance(3.0, 1e-1, 0.95, 0.88, 2.2, 0.8, 0.3, 0.5, 0.6, 0.7, real=True),
    "q4f16": Tolerance(3.0, 1e-1, 0.97, 0.9, 2.2, 0.85, 0.2, 0.5, 0.7, 0.5, real=True),
    "int8-static": Tolerance(1.0, 5e-2, 0.99, 0.99, 0.6, 0.95, 2e-2, 0.25, 0.8, 0.5, real=True),
}


# What a runtime's float32 products may add, where it does not compute them in float32.
ARITHMETIC = {
    "fp32": TOLERANCES["fp32"],
    # H100, ViT-B and GPT-2 small with random weights, whose logits are small: cosine 0.9999997. The
    # room in atol is for larger logits, and estimated. The columns from agreement on are
    # an eighth of bf16's, rounded up: 10 bits of mantissa and not 7.
    "tf32": Tolerance(2e-2, 5e-3, 0.99999, 0.99999, 1.7e-3, 0.99, 1e-3, 2e-2, 0.9, 2e-2),
    # OpenVINO 2026.4 on a processor with avx512_bf16: the digits ViT (logits up to 9.8)
    "bf16": Tolerance(3e-1, 2e-2, 0.9995, 0.9995, 0.228, 0.98, 1e-2, 0.1, 0.8, 0.1),
    # The evaluator and WebGPU add float16 numbers in float16, other engines in float32: fp16
    # packages, the digits ViT on the evaluator; on WebGPU (llvmpipe) the tokens of a trained
    # sentence encoder are 2.9e-2 off.
    "native": Tolerance(6e-2, 5e-3, 0.9999, 0.9999, 4.8e-2, 0.99, 1e-3, 2e-2, 0.9, 2e-2),
}


def row_of(manifest: Manifest) -> str:
    """Return the row of a package of one precision: that, or of one with weights of 2 bits."""
    if any(form.bits < 4 for form in manifest.bits.values()):
        return BELOW
    return manifest.dtype


def for_dtype(dtype: str, arithmetic: str = "fp32") -> Tolerance:
    """Return the tolerance of a package's dtype on a runtime: of each bound the looser of two.

    Raises:
        InputError: the dtype is not in the table.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"no tolerance for dtype {dtype!r}: there is {', '.join(TOLERANCES)}.")
    if arithmetic == "native" and dtype != "fp16":
        arithmetic = "fp32"
    loosest = {}
    for field in fields(Tolerance):
        looser = max
        if field.name in AT_LEAST:
            looser = min
        rows = (TOLERANCES[dtype], ARITHMETIC[arithmetic])
        loosest[field.name] = looser(getattr(row, field.name) for row in rows)
    return Tolerance(**loosest)
