"""The data flow of one forward pass: which op made each tensor from which.

:func:`follow` runs a model on its smallest inputs, on the meta device if it has no weights, and
returns what it saw as a :class:`DataFlow`, in which ``models/find.py`` looks for sublayers.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from ffmerge.errors import InputError
from ffmerge.models.inputs import example_inputs, refused, unchunked

# Ops that move no neuron, and ops that take a fused gate and up projection apart. Elementwise ops
# are known by PyTorch's own ``pointwise`` tag; hardswish lacks it. A product of tensors, as in
# attention, is also what is called mm or attention.
VIEWS = {"view", "_unsafe_view", "clone", "_to_copy", "detach", "alias", "squeeze", "unsqueeze"}
HALVES = {"split", "chunk", "split_with_sizes", "slice"}
_PRODUCTS = {"convolution", "dot", "embedding"}
ELEMENTWISE, PRODUCT, NONE = "elementwise", "product", ""  # ops that go by these names here

# On the meta device there is no value to look at: any will do, only the structure is read.
_WITHOUT_VALUES: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": lambda x: 1,
    "nonzero": lambda x: x.new_empty((x.numel(), x.ndim), dtype=torch.int64),
    "_grouped_mm": lambda a, b, *_, **__: a.new_empty((a.shape[0], b.shape[-1])),
}
_AUTOCAST = threading.RLock()


class NeedsWeights(InputError):
    """The code of a model without weights has to look at values."""


class DataFlow(TorchDispatchMode):
    """Which op made each tensor from which, and which linear map took and gave which.

    Tensors go by their ids. ``sides`` are by name the linear maps, in the sense of the data from
    how many to how many dimensions each goes; ``calls`` are their calls in order, each with what
    the map read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sides: dict[str, tuple[int, int]] = {}
        self.convolutions: set[str] = set()  # of the maps, those of size 1
        self.calls: list[tuple[str, int]] = []
        self._given_by: dict[int, int] = {}  # what a map gave, and the number of the call
        # the op that made a tensor, and from which; what no op made is there from the start
        self._made_by: dict[int, tuple[str, tuple[int, ...]]] = defaultdict(lambda: (NONE, ()))
        self._changed: dict[int, tuple[int, ...]] = defaultdict(tuple)  # in place, from which
        self._inputs: dict[int, str] = {}  # of the model
        self._alive: list[Tensor] = []  # an id is only an address while it lives

    def begin(self, inputs: dict[str, Tensor]) -> None:
        """Note the inputs of the model."""
        for name, tensor in inputs.items():
            self._inputs[id(tensor)] = name
            self._alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        call = func
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            call = _WITHOUT_VALUES.get(name, func)
        out = call(*args, **(kwargs or {}))
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ids = tuple(map(id, sources))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if id(tensor) in ids:
                self._changed[id(tensor)] += ids
            elif isinstance(tensor, Tensor):
                self._made_by[id(tensor)] = _kind(func, name, args), ids
                self._alive += [tensor, *sources]
        return out

    def record(self, name: str, _: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        """Note the call of the map ``name``: a forward hook, but for the name."""
        self._given_by[id(out)] = len(self.calls)
        self.calls.append((name, id(args[0])))
        self._alive += [args[0], out]

    def before(self, tensor: int) -> tuple[list[str], list[int], set[str]]:
        """Return the maps that a tensor comes from, what they read, and the ops in between."""
        calls, ops, queue, seen = set(), set(), [tensor], set()
        while queue:
            current = queue.pop()
            if current in seen:
                continue
            seen.add(current)
            if self._changed[current]:
                ops.add(ELEMENTWISE)
            if current in self._given_by:
                calls.add(self._given_by[current])
                continue
            op, made_of = self._made_by[current]
            ops.add(op)
            if op != PRODUCT:
                queue += made_of
        maps, sources = [], []
        for call in sorted(calls):
            name, source = self.calls[call]
            maps.append(name)
            sources.append(source)
        return maps, sources, ops

    def origin(self, tensor: int, through: set[str]) -> int:
        """Return the tensor that ``tensor`` is a mere view or copy of, by the ops ``through``."""
        name, sources = self._made_by[tensor]
        while name in through:
            tensor = sources[0]
            name, sources = self._made_by[tensor]
        return tensor

    def maker(self, tensor: int) -> str:
        """Return the name of the op that made a tensor."""
        return self._made_by[tensor][0]

    def reads(self, tensor: int) -> tuple[str, ...]:
        """Return the names of the model inputs that ``tensor`` depends on."""
        seen: set[int] = set()
        queue = [tensor]
        while queue:
            current = queue.pop()
            if current not in seen:
                seen.add(current)
                queue += self._made_by[current][1] + self._changed[current]
        return tuple(name for at, name in self._inputs.items() if at in seen)


def follow(model: nn.Module) -> DataFlow:
    """Return the data flow of one forward pass on the smallest inputs.

    Raises:
        InputError: the model is on the meta device and its code has to look at values.
    """
    flow = DataFlow()
    with ExitStack() as stack:
        stack.enter_context(unchunked(model))
        for name, module in model.named_modules():
            sides = _sides(module)
            if sides:
                flow.sides[name] = sides
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    flow.convolutions.add(name)
                hook = module.register_forward_hook(partial(flow.record, name))
                stack.callback(hook.remove)
        run_example(model, flow)
    return flow


def run_example(model: nn.Module, flow: DataFlow | None = None) -> None:
    """Run the model on its smallest inputs, for its hooks and for ``flow`` to see.

    Raises:
        InputError: the model is on the meta device and its code has to look at values.
    """
    inputs = example_inputs(model)
    is_meta = any(p.is_meta for p in model.parameters())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(model.train, model.training)
        model.eval()
        if flow is not None:
            flow.begin(inputs)
            stack.enter_context(flow)
        if not is_meta:
            try:
                model(**inputs)
            except Exception as error:  # a model's code may raise anything
                raise InputError(refused(model, inputs, error)) from error
            return
        stack.enter_context(_no_autocast_on_meta())
        try:
            model(**inputs)
        except Exception as error:  # a model's code may raise anything
            raise NeedsWeights(
                f"the code of {type(model).__name__} cannot be followed without weights: give a "
                "checkpoint that holds them."
            ) from error


@contextmanager
def _no_autocast_on_meta() -> Iterator[None]:
    """Let code switch off autocast on the meta device, as rotary positions in transformers 4 do.

    There is none to switch off, and to say so is an error. Other devices are not concerned, so
    that other threads may compute; only one may be here at a time.
    """
    with _AUTOCAST:
        known = torch.autocast

        def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
            if device_type == "meta":
                return nullcontext()
            return known(device_type, *args, **kwargs)

        torch.autocast = autocast
        try:
            yield
        finally:
            torch.autocast = known


def _kind(func: Any, name: str, args: Any) -> str:
    """Return by what name an op counts."""
    if name == "convolution" and args[8] > 1:
        return "depthwise_convolution"
    if name.endswith("mm") or "attention" in name or name in _PRODUCTS:
        return PRODUCT
    if name in VIEWS | HALVES:
        return name
    if torch.Tag.pointwise in func.tags or name == "hardswish":
        return ELEMENTWISE
    return name


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """Return from how many to how many dimensions a linear map goes, None for other modules."""
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return rows, columns
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.groups == 1 and set(module.kernel_size) == {1}:
            return module.in_channels, module.out_channels
    return None
