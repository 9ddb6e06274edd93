"""Whether what was written still loads: ONNX Runtime is asked, in a process of its own.

``run.share_file`` calls :func:`check_loads` on the file before it stands under its name. A process
of its own, because a runtime may die of a file.
"""

import subprocess
import sys
from pathlib import Path

from ffmerge.errors import CheckFailed

# Without ffmerge: the process starts in a fifth of a second. Without packing, weights of a data
# file stay mapped: a large file needs no memory of its size.
_LOAD = """
import sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.intra_op_num_threads = 1
options.add_session_config_entry("session.disable_prepacking", "1")
try:
    onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
except Exception as error:
    sys.exit(" ".join(str(error).split()) or type(error).__name__)
"""


def check_loads(source: Path, written: Path) -> None:
    """Pass if ONNX Runtime loads what was ``written``, or did not load its ``source`` either.

    Raises:
        CheckFailed: it took the source and refuses the written file, or dies of it.
    """
    reason = refusal(written)
    if reason and not refusal(source):
        raise CheckFailed(
            f"ONNX Runtime loads {source}, but not what became of it, so nothing was written: "
            f"{reason.rstrip('.')}."
        )


def refusal(path: Path) -> str | None:
    """Return why ONNX Runtime does not load a file, None where it does."""
    command = [sys.executable, "-P", "-c", _LOAD, str(path)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"it died of signal {-child.returncode}"
    reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
    return reason.replace(str(path), path.name)[:500]
