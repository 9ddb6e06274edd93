"""A model of 16 bits as one of 32, whose weights are pages of files and not memory.

``ffmerge export`` computes in float32 whatever a checkpoint holds. All weights are widened before:
T5 looks at the type of a weight that it is not running, so a block's cannot be when it runs.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ffmerge.errors import InputError

AT_ONCE = 256 << 20  # bytes that are turned to float32 at a time, a larger weight alone


def float32_(model: Any, folder: Path) -> None:
    """Give ``model`` float32 weights and buffers in place; ties hold.

    The weights lie in files in ``folder`` that must stay as long as they are used. They are read
    when they are needed and can leave memory at any time, as those of a float32 checkpoint do:
    the widened model is never all in memory.

    Raises:
        InputError: the disk cannot hold them.
    """
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    narrow = [p for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    for number, some in enumerate(_parts(narrow)):
        file = folder / f"{number}.safetensors"
        wide = {str(i): p.detach().float().contiguous() for i, p in enumerate(some)}
        try:
            save_file(wide, file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"the model's float32 weights cannot be written: {error}.") from error
        with safe_open(file, "pt") as stored:
            for i, parameter in enumerate(some):
                parameter.data = stored.get_tensor(str(i))


def _parts(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    for parameter in parameters:
        if held and 4 * sum(p.numel() for p in (*held, parameter)) > AT_ONCE:
            yield held
            held = []
        held.append(parameter)
    if held:
        yield held
