"""The handwritten digits that scikit-learn ships, as model inputs with fixed splits."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "calibration", "validation", "test"]

# 1,797 images in all. Validation chooses the window, test is only ever reported.
SIZES: dict[Split, int] = {"train": 997, "calibration": 100, "validation": 300, "test": 400}


def load(split: Split) -> dict[str, npt.NDArray[np.generic]]:
    """Return one split as ``pixel_values`` (N, 1, 8, 8) in [-1, 1] and ``labels`` (N,).

    The shuffle is seeded, so every split holds the same images on every machine.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))  # legacy stream: frozen by NumPy
    names = list(SIZES)
    start = sum(SIZES[name] for name in names[: names.index(split)])
    rows = order[start : start + SIZES[split]]
    pixels = (images[rows].reshape(-1, 1, 8, 8) / 8.0 - 1.0).astype(np.float32)
    return {"pixel_values": pixels, "labels": labels[rows].astype(np.int64)}
