"""An ``.npz`` of arrays, read only if what its headers promise fits and is there.

A few kilobytes of zip can unpack to more than any memory has, and a header can claim a shape that
no bytes follow. Sizes are therefore checked against each other before anything is unpacked.
"""

import math
import zipfile
from pathlib import Path

import numpy as np

from ffmerge.errors import InputError, first_line
from ffmerge.files import size_text
from ffmerge.models.probe import Array

LARGEST = 16_000_000_000  # bytes that an archive may unpack to


def read_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an archive by name.

    Raises:
        InputError: it cannot be read, holds no arrays or pickles, or unpacks to more than
            :data:`LARGEST` bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST:
                raise InputError(
                    f"{path} unpacks to {size_text(size)}, and {size_text(LARGEST)} are read at "
                    "most: give fewer rows."
                )
            for member in archive.infolist():
                _check_member(archive, member)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except InputError:
        raise
    except Exception as error:  # zip, decompressors and numpy each raise errors of their own
        reason = first_line(error).rstrip(".")
        raise InputError(f"{path} cannot be read as an .npz of arrays: {reason}.") from error


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError unless a member is an array of the size that its header claims."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_2_0
        if version == (1, 0):
            read = np.lib.format.read_array_header_1_0
        shape, _, dtype = read(file)
        held = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds objects, which are pickles.")
    if math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"{member.filename} claims the shape {shape}, but holds {held} bytes.")
