"""Runs of a model that start behind all that cannot have changed.

A search changes a few blocks of a model at a time. Whatever runs before the first of them gives,
for the same inputs, what it gave before: the last of these blocks' outputs are kept for each batch,
and the blocks hand them on instead of computing. No code of the model is known for that, only the
lists of blocks and the order in which a pass runs them. A model that reads more of a block than its
successors do is told by running it both ways, and is then run whole.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ffmerge.errors import InputError
from ffmerge.models.inputs import example_inputs, forward
from ffmerge.models.sublayer import FeedForward, block_of

MEMORY = 1 << 30  # bytes of outputs that are kept in memory, more are kept in files
_SAME = 1e-5  # of the largest output; measured 0, a wrong structure is off by its whole size


@dataclass
class _Kept:
    """What the first ``depth`` blocks gave for a batch: for each list its last output."""

    depth: int
    outputs: dict[str, Any]
    weights: dict[str, tuple[int, int]]
    held: list[Tensor]  # an address is only an identity while it lives


class Resumed:
    """Passes of one model from the first changed block; ``reason`` tells why not, if it cannot.

    ``ran`` and ``skipped`` count the blocks before the first changed one.
    """

    def __init__(self, model: Any, sublayers: Iterable[FeedForward], memory: int = MEMORY) -> None:
        """Find in which order the blocks run, and whether their outputs are all that is read."""
        self.model, self.memory = model, memory
        self.reason = ""
        self.ran = self.skipped = 0
        self._kept: dict[bytes, _Kept] = {}
        self._boundary, self._key, self._fresh = 0, b"", dict[str, Any]()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files, self._bytes = 0, 0
        self.blocks: list[str] = []
        places = {s.output: block_of(model, s.output) for s in sublayers}
        self._block = {output: f"{at[0]}.{at[1]}" for output, at in places.items() if at}
        self._check({at[0] for at in places.values() if at})

    @contextmanager
    def behind(self, members: Iterable[FeedForward]) -> Iterator[None]:
        """Let the model, for the length of the block, run from the first of ``members`` on.

        Only they may change meanwhile, and blocks that run after the first of them.
        """
        changed = [self._block[m.output] for m in members]
        with self._from(0 if self.reason else min(map(self.blocks.index, changed))):
            yield

    @contextmanager
    def _from(self, boundary: int) -> Iterator[None]:
        self._boundary = boundary
        now = {kept.depth: self._weights(kept.depth)[0] for kept in self._kept.values()}
        for key, kept in [*self._kept.items()]:
            if kept.depth > boundary or kept.weights != now[kept.depth]:
                self._drop(key)
        with ExitStack() as stack:
            hook = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(hook.remove)
            for place, path in enumerate(self.blocks[:boundary]):
                block = self.model.get_submodule(path)
                own = {key: x for key, x in vars(block).items() if key == "forward"}
                stack.callback(vars(block).update, own)
                stack.callback(vars(block).pop, "forward")
                block.forward = partial(self._run, place, path.rpartition(".")[0], block.forward)
            yield

    def _begin(self, _: Any, args: Any, kwargs: Any) -> None:
        """Tell by the inputs which batch this is."""
        found = hashlib.blake2b(digest_size=16)
        named = [*enumerate(args), *sorted(kwargs.items())]
        for name, value in ((n, v) for n, v in named if isinstance(v, Tensor)):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self._key, self._fresh = found.digest(), {}

    def _run(
        self, place: int, owner: str, compute: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return what was kept, or compute it; keep what the last block before the change gives."""
        kept = self._kept.get(self._key)
        if kept and place < kept.depth:
            self.skipped += 1
            return self._read(kept.outputs[owner])
        self.ran += 1
        out = compute(*args, **kwargs)
        self._fresh[owner] = _copied(out)  # the next block may change it in place
        if place == self._boundary - 1:
            outputs = (kept.outputs if kept else {}) | {
                name: self._store(each) for name, each in self._fresh.items()
            }
            self._drop(self._key, keep=outputs)
            weights, held = self._weights(self._boundary)
            self._kept[self._key] = _Kept(self._boundary, outputs, weights, held)
            self._fresh = {}
        return out

    def _weights(self, depth: int) -> tuple[dict[str, tuple[int, int]], list[Tensor]]:
        """Return what tells whether the parameters before block ``depth`` are the same."""
        later = tuple(f"{path}." for path in self.blocks[depth:])
        before = {n: p for n, p in self.model.named_parameters() if not n.startswith(later)}
        return {n: (p.data_ptr(), p._version) for n, p in before.items()}, [*before.values()]

    def _store(self, out: Any) -> Any:
        """Return a block's output, or where it lies on disk."""
        leaves, form = tree_flatten(out)
        size = sum(x.nbytes for x in leaves if isinstance(x, Tensor))
        if self._bytes + size <= self.memory:
            self._bytes += size
            return out
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ffmerge-")
        path = Path(self._folder.name, str(self._files))
        self._files += 1
        tensors = {str(i): x.contiguous() for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        save_file(tensors, path)
        rest = [None if isinstance(x, Tensor) else x for x in leaves]
        return _OnDisk(path, rest, form, next(iter(tensors.values())).device)

    @staticmethod
    def _read(stored: Any) -> Any:
        """Return a copy of a block's output."""
        if not isinstance(stored, _OnDisk):
            return _copied(stored)
        leaves = [*stored.leaves]
        for number, tensor in load_file(stored.path, str(stored.device)).items():
            leaves[int(number)] = tensor
        return tree_unflatten(leaves, stored.form)

    def _drop(self, key: bytes, keep: Any = ()) -> None:
        """Forget a batch, but for what ``keep`` takes over."""
        kept = self._kept.pop(key, None)
        for owner, stored in kept.outputs.items() if kept else ():
            if keep and keep[owner] is stored:
                continue
            if isinstance(stored, _OnDisk):
                stored.path.unlink()
            else:
                self._bytes -= sum(x.nbytes for x in tree_leaves(stored) if isinstance(x, Tensor))

    def _check(self, lists: Iterable[str]) -> None:
        """Set ``blocks`` in the order they run, or ``reason``."""
        inputs = {name: x[:1] for name, x in example_inputs(self.model).items()}
        with ExitStack() as stack:
            for owner in lists:
                for number, block in self.model.get_submodule(owner).named_children():
                    note = partial(self._note, f"{owner}.{number}")
                    stack.callback(block.register_forward_hook(note).remove)
            whole = self._outputs(inputs)
        if self.reason or len({*self.blocks}) < len(self.blocks):
            self.reason = self.reason or "a block runs several times in one pass"
            return
        last = len(self.blocks) - 1
        for boundary in (last // 2, last, last):  # kept; kept further; read
            try:
                with self._from(boundary):
                    got = self._outputs(inputs)
            except (InputError, LookupError, AttributeError) as error:
                self.reason = f"a later part needs what an earlier block does: {error}"
                return
            if not all(_alike(x, y) for x, y in zip(got, whole, strict=True)):
                self.reason = "a later part reads what an earlier block gave"
                return
        for key in [*self._kept]:
            self._drop(key)
        self.ran = self.skipped = 0

    def _note(self, path: str, _: Any, args: Any, out: Any) -> None:
        self.blocks.append(path)
        known = (Tensor, bool, int, float, type(None))
        if unlike := [x for x in tree_leaves(out) if not isinstance(x, known)]:
            self.reason = f"a block gives a {type(unlike[0]).__name__}, which is not kept"

    def _outputs(self, inputs: Any) -> Sequence[Tensor]:
        with torch.no_grad():
            out = forward(self.model, inputs)
        leaves = tree_leaves(dict(out) if hasattr(out, "keys") else out)
        return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass(frozen=True)
class _OnDisk:
    path: Path
    leaves: list[Any]
    form: Any
    device: torch.device


def _alike(got: Tensor, wanted: Tensor) -> bool:
    apart = (got - wanted).abs().nan_to_num()
    return not wanted.numel() or bool(apart.max() <= _SAME * wanted.abs().max())


def _copied(out: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, out)
