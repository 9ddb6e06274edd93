"""Every error ffmerge raises on purpose.

FfmergeError
├── InputError    what the user gave cannot be used: a path, a model, data, a window, a task
├── TieError      a tie is broken, or would be stored twice
├── ExportError   a model could not be turned into ONNX
└── RuntimeCheckError   a runtime did not do what was asked of it
    ├── CheckFailed     it was asked whether a result holds, and it does not
    └── NotInstalled    it is not on this machine, or the device it needs is not

The command line prints the message of any of them as one line and exits with 2, of CheckFailed
with 1. A message says
what is wrong, where, and what to do.
"""


class FfmergeError(Exception):
    """Head of the tree."""

    exit_code = 2  # of the command line


class InputError(FfmergeError):
    """What the user gave cannot be used."""


class TieError(FfmergeError):
    """A tie is broken, or would be stored twice."""


class ExportError(FfmergeError):
    """A model could not be turned into ONNX."""


class RuntimeCheckError(FfmergeError):
    """A runtime did not do what was asked of it."""


class CheckFailed(RuntimeCheckError):
    """What was asked to hold does not, on input that can be used."""

    exit_code = 1


class NotInstalled(RuntimeCheckError):
    """A runtime is not on this machine, or the device it needs is not; how to get it is said."""


class FfmergeWarning(UserWarning):
    """Something the user should know of a result that is whole; one line on the command line."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of others says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
