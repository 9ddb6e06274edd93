"""How far a runtime may be from PyTorch: one table, used everywhere."""

from dataclasses import dataclass

from ffmerge.errors import InputError

NOISE = 2e-5  # the direction of an output that is all smaller says nothing in float32


@dataclass(frozen=True)
class Tolerance:
    """Bounds on one output, and the largest difference that was seen when they were set.

    An element is within bounds when ``|got - expected| <= atol + rtol * |expected|``. The whole
    output must also have at least this ``cosine``, unless all of it is smaller than ``NOISE``:
    on small logits an absolute bound alone would let a wrong quantized model pass.
    """

    atol: float
    rtol: float
    cosine: float
    measured: float


# PyTorch float32 against ONNX Runtime 1.31.1 on a CPU. fp32: the trained digits ViT, logits up
# to 9.8. The others: a random 6-layer encoder (d 128, f 512), logits up to 2.8; int8 is dynamic,
# int4 is MatMulNBits with blocks of 32.
TOLERANCES = {
    "fp32": Tolerance(2e-5, 1e-5, 0.99999, measured=3.4e-6),
    "fp16": Tolerance(5e-3, 5e-3, 0.9999, measured=3.0e-3),
    "int8": Tolerance(2e-1, 5e-2, 0.999, measured=9.0e-2),
    "int4": Tolerance(1.0, 1e-1, 0.95, measured=6.2e-1),
    "int8-weights": Tolerance(2e-1, 5e-2, 0.999, measured=6.2e-2),
    "int8-static": Tolerance(3e-1, 5e-2, 0.99, measured=1.5e-1),
}


# What a runtime's float32 products may add, where it does not compute them in float32.
ARITHMETIC = {
    "fp32": TOLERANCES["fp32"],
    # Not measured, for want of such a GPU: 10 bits of mantissa are those of fp16.
    "tf32": TOLERANCES["fp16"],
    "bf16": Tolerance(1e-1, 5e-2, 0.999, measured=2.7e-2),
}


def for_dtype(dtype: str, arithmetic: str = "fp32") -> Tolerance:
    """Return the tolerance of a package's dtype on a runtime: the looser of the two rows.

    Raises:
        InputError: the dtype is not in the table.
    """
    if dtype not in TOLERANCES:
        raise InputError(f"no tolerance for dtype {dtype!r}: there is {', '.join(TOLERANCES)}.")
    return max(TOLERANCES[dtype], ARITHMETIC[arithmetic], key=lambda row: row.atol)
