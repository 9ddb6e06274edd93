"""A column of pictures as model inputs: decoded and processed when their rows are asked for."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ffmerge.errors import InputError, first_line
from ffmerge.models.examples import Examples
from ffmerge.models.labels import Numbered
from ffmerge.models.packages import of_model, package
from ffmerge.models.probe import Array

Labels = tuple[str, Numbered] | None  # a column and what numbers its values


def of_images(
    table: Any, image: str, labels: Labels, source: str, folder: str | Path | None
) -> Examples:
    """Return the rows of a table as ``pixel_values``, with ``labels`` where there are any."""
    processor = of_model("AutoImageProcessor", folder, source)
    stored = _stored(table, image)
    mode = _mode(processor)

    def take(rows: Sequence[int]) -> dict[str, Array]:
        part = stored[list(rows)]
        colours = []
        for row, content in zip(rows, part[image], strict=True):
            colours.append(_opened(content, row, source, mode))
        inputs = {"pixel_values": _processed(processor, colours, source)}
        if labels:
            inputs["labels"] = labels[1](part[labels[0]])
        return {name: np.asarray(array) for name, array in inputs.items()}

    return Examples(range(len(table)), take)


def _mode(processor: Any) -> str:
    """Return Pillow's mode of the pictures that a processor takes: grey if its mean is one."""
    mean = getattr(processor, "image_mean", None)
    if isinstance(mean, (list, tuple)) and len(mean) == 1:
        return "L"
    return "RGB"


def _processed(processor: Any, colours: Sequence[Any], source: str) -> Array:
    try:
        pixels: Array = processor(colours, return_tensors="np")["pixel_values"]
    except Exception as error:  # a processor of a hub model raises what it likes
        raise InputError(
            f"the image processor does not take the pictures of {source}: {first_line(error)}"
        ) from error
    return pixels


def check_files(table: Any, source: str) -> None:
    """Raise InputError, naming it, for the first picture of a folder that is none.

    Only the beginning of each file is read.
    """
    for name, feature in table.features.items():
        if type(feature).__name__ == "Image":
            for row, content in enumerate(_stored(table, name)[name]):
                _opened(content, row, source)


def _stored(table: Any, image: str) -> Any:
    """Return the table with files as they are, so that one that is broken can be named."""
    datasets = package("datasets", "the data")
    return table.cast_column(image, datasets.Image(decode=False)).with_format(None)


def _opened(
    content: Mapping[str, Any] | None, row: int, source: str, mode: str | None = None
) -> Any:
    """Return a picture, upright, in a mode of Pillow's; without one see that its file begins so."""
    pillow = package("PIL.Image", source)
    content = content or {}
    name = content.get("path") or f"row {row} of {source}, counted from 0,"
    try:
        file = BytesIO(content["bytes"]) if content.get("bytes") else content["path"]
        with pillow.open(file) as picture:
            if mode is None:
                return None
            return package("PIL.ImageOps", source).exif_transpose(picture).convert(mode)
    except Exception as error:  # PIL and its decoders raise errors of their own
        raise InputError(
            f"{name} is no picture that can be read: {type(error).__name__}."
        ) from error
