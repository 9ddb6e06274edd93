"""Sums of two handwritten digits: pictures made of the digits that scikit-learn ships."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "calibration", "validation", "test"]
Arrays = dict[str, npt.NDArray[np.generic]]

# Of 1,797 digits: how many each split draws from, and how many pictures it has.
SIZES: dict[Split, tuple[int, int]] = {
    "train": (1277, 10_000),
    "calibration": (120, 500),
    "validation": (100, 1000),
    "test": (300, 4000),
}
# How much the pictures differ from the digits: of the affine map, in pixels, of full ink.
_STRONG, _MILD = (0.12, 0.7, 0.1), (0.08, 0.5, 0.05)  # for training, and for all the rest


def load(split: Split, seed: int = 0, count: int | None = None) -> Arrays:
    """Return the pictures of one split, the same on every machine for one ``seed``.

    ``pixel_values`` (N, 1, 8, 16) in [-1, 1] show two digits side by side, each bent and shifted,
    with noise; ``labels`` (N,) are their sums modulo ten. No digit is in two splits.
    """
    pixels, pairs = draw(split, seed, count)
    return {"pixel_values": pixels, "labels": pairs.sum(0) % 10}


def draw(
    split: Split, seed: int = 0, count: int | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the pictures of ``load`` and (2, N) the digits in them."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    own = sources(split)
    bend, shift, noise = _STRONG if split == "train" else _MILD
    random = np.random.RandomState([list(SIZES).index(split), seed])
    pairs = own[random.randint(len(own), size=(2, count or SIZES[split][1]))]
    ink = [_bent(images[rows].reshape(-1, 8, 8) / 16, bend, shift, random) for rows in pairs]
    pixels = np.concatenate(ink, -1)[:, None]
    pixels += noise * random.uniform(-1, 1, pixels.shape)
    return np.clip(2 * pixels - 1, -1, 1).astype(np.float32), digits[pairs].astype(np.int64)


def sources(split: Split) -> npt.NDArray[np.int64]:
    """Return which of scikit-learn's digits a split's pictures are made of."""
    sizes = [size for size, _ in SIZES.values()]
    order = np.random.RandomState(0).permutation(sum(sizes))  # legacy stream: frozen by NumPy
    return np.split(order, np.cumsum(sizes))[list(SIZES).index(split)]


def _bent(
    ink: npt.NDArray[np.float64], bend: float, shift: float, random: np.random.RandomState
) -> npt.NDArray[np.float64]:
    """Return each (8, 8) image under a small affine map of its own: turned, sheared, zoomed."""
    from scipy.ndimage import map_coordinates

    n = len(ink)
    centred = np.indices((8, 8)).reshape(2, 64) - 3.5
    linear = np.eye(2) + random.uniform(-bend, bend, (n, 2, 2))
    at = linear @ centred + random.uniform(-shift, shift, (n, 2, 1)) + 3.5
    which = np.broadcast_to(np.arange(n)[:, None], (n, 64))
    bent = map_coordinates(ink, [which, at[:, 0], at[:, 1]], order=1)
    return np.asarray(bent).reshape(n, 8, 8)
