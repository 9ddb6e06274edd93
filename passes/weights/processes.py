"""The processes that torchrun or ``accelerate launch`` has started, joined once."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ffmerge.errors import InputError


def join() -> PartialState:
    """Join the other processes; alone, be the only one.

    Without an accelerator accelerate must be told so: it would let each process run for itself.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise InputError(
            f"{started} processes were started and {state.num_processes} joined: make no "
            "PartialState or Accelerator before, or on the CPU one with cpu=True."
        )
    return state


def rank_and_world_size() -> tuple[int, int]:
    """Return which of how many processes this is; alone, none are joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    state = join()
    return state.process_index, state.num_processes
