"""The state of a recovery on disk, by which one that was killed goes on.

``recover.py`` writes it every so many steps and reads it at its start. It is only taken up by a run
of the same settings, data, original and merge, which hashes tell (:func:`what_tells`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ffmerge.errors import InputError
from ffmerge.models.examples import Examples
from ffmerge.models.probe import Array
from ffmerge.models.record import merge_record

FILE = "recover.safetensors"
HASHED = 1024  # rows of the data by which it is known again
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def what_tells(model: Any, original: Any, examples: Examples) -> dict[str, str]:
    """Return what tells a recovery from others beside its settings."""
    about = {
        "examples": _digest_of_rows(examples),
        "original": _digest(original.state_dict()),
    }
    if record := merge_record(model.config):
        about["merge"] = f"{record.method}: {record.groups or record.narrowed}"
    return about


def _digest_of_rows(examples: Examples) -> str:
    """Return a hash of the inputs and labels of the rows, of many those at even distances."""
    step = -(-len(examples) // HASHED)
    hashed = hashlib.sha256(str(len(examples)).encode())
    for batch in examples.of(examples.rows[::step]).batches(1):
        hashed.update(_digest(batch).encode())
    return hashed.hexdigest()


def _digest(tensors: Mapping[str, Array | Tensor]) -> str:
    """Return a hash of tensors by name: of their shapes and bytes."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = torch.as_tensor(tensors[name]).detach().cpu().contiguous()
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


@dataclass(frozen=True)
class Saved:
    """Parameters and optimizer in a file: there is a whole one at any time.

    ``about`` tells one recovery from another; ``norm`` is that of the parameters at the start.
    """

    file: Path
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    about: Mapping[str, Any]
    norm: float

    def write(self, losses: list[float]) -> None:
        """Put what is trained, and the losses of the steps done, into the file."""
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        for name, parameter in self.trained.items():
            tensors[f"value/{name}"] = parameter.detach().contiguous()
            for part in _MOMENTS:
                tensors[f"{part}/{name}"] = self.optimizer.state[parameter][part].contiguous()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        save_file(tensors, partial, {"about": json.dumps({**self.about, "norm": self.norm})})
        partial.replace(self.file)

    def read(self) -> list[float]:
        """Set everything to what was saved; return the losses of the steps done, none at first."""
        if not self.file.exists():
            return []
        try:
            with safe_open(self.file, "pt") as stored:
                then = json.loads(stored.metadata()["about"])
                # a merge computed again may differ by rounding, another model differs by more
                alike = math.isclose(then.pop("norm"), self.norm, rel_tol=1e-4)
                if not alike or then != self.about:
                    raise InputError(
                        f"{self.file} is the state of another recovery: remove it, or go on with "
                        "that one's model, data and settings."
                    )
                losses: list[float] = stored.get_tensor("losses").tolist()
                for name, parameter in self.trained.items():
                    parameter.data.copy_(stored.get_tensor(f"value/{name}"))
                    state = {"step": torch.tensor(float(len(losses)))}
                    for part in _MOMENTS:
                        state[part] = stored.get_tensor(f"{part}/{name}").to(parameter.device)
                    self.optimizer.state[parameter] = state
        except (SafetensorError, KeyError, RuntimeError, OSError) as error:
            raise InputError(f"{self.file} cannot be used: {error}. Remove it.") from error
        return losses
