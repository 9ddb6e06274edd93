"""Loads and saves this checkpoint with the weights that its layers share stored once.

A copy stands beside the weights, with the class and the groups filled in, for
``from_pretrained(..., trust_remote_code=True)``: it needs torch and transformers, not ffmerge.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

# words that the names of the stack hold, which number in a name counts its layers, the layers that
# share: the first holds the weights, the others are stored as empty tensors
GROUPS: list[tuple[tuple[str, ...], int, tuple[int, ...]]] = []
# layers with narrower maps, found in the same way: which of a layer's linear maps has what shape
Rules = list[tuple[tuple[str, ...], int, int, dict[int, tuple[int, ...]]]]
NARROW: Rules = []
OWN_FILE = "ffmerge.safetensors"  # what layers that share add of their own, if anything
_PARTS = ("scale", "down", "up", "bias")


class SharedLinear(nn.Linear):
    """A map whose weight several layers use: ``scale * (W x) + up (down x) + bias`` in each."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the shared product with this layer's own parts."""
        return _add_own(self, x, nn.functional.linear(x, self.weight))


class SharedConv1D(Conv1D):
    """The same for the (in, out) weights of GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the shared product with this layer's own parts."""
        return _add_own(self, x, x @ self.weight)


def _add_own(module: Any, x: Tensor, y: Tensor) -> Tensor:
    if "scale" in module.own:
        y = y * module.scale
    if "down" in module.own:
        low = nn.functional.linear(x, module.down)
        y = y + nn.functional.linear(low, module.up)
    if module.bias is not None:
        y = y + module.bias
    return y


def give_own_(module: Any, parts: dict[str, Tensor]) -> None:
    """Give a linear map parts that its class has not; ``module.own`` are their names.

    ffmerge reads that attribute of models which were loaded by an older copy of this file.
    """
    module.own = tuple(part for part in _PARTS if part in parts)
    module.__class__ = SharedConv1D if isinstance(module, Conv1D) else SharedLinear
    for part in module.own:
        module.register_parameter(part, nn.Parameter(parts[part]))


def fit_sizes_(module: Any) -> None:
    """Have a linear map know the sizes of the weight that it was given."""
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    else:
        module.out_features, module.in_features = module.weight.shape


def narrow_class(kind: Any, rules: Rules) -> Any:
    """Return a class whose models have the narrower maps from the start, as their weights have."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        narrow_(self, rules)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def narrow_(model: nn.Module, rules: Rules) -> None:
    """Cut the maps of the layers that ``rules`` name to their shapes, whatever they hold.

    Raises:
        ValueError: a layer is not there, or could be several.
    """
    for words, number, layer, shapes in rules:
        found = []
        for path, module in model.named_modules():
            parts = path.split(".")
            numbers = _numbers(parts)
            if numbers[number : number + 1] == [len(parts) - 1] and int(parts[-1]) == layer:
                maps = [each for each in module.modules() if isinstance(each, (nn.Linear, Conv1D))]
                if set(words) <= set(parts) and _can_be_cut(maps, shapes):
                    found.append(maps)
        if len(found) != 1:
            raise ValueError(
                f"layer {layer} {words}, which is narrower, is there {len(found)} times."
            )
        for at, shape in shapes.items():
            _cut_(found[0][at], shape)


def _can_be_cut(maps: list[Any], shapes: dict[int, tuple[int, ...]]) -> bool:
    """Tell whether each map has its shape, or is larger on one side."""
    for at, shape in shapes.items():
        if at >= len(maps):
            return False
        pairs = [*zip(maps[at].weight.shape, shape, strict=True)]
        if any(old < new for old, new in pairs) or all(old > new for old, new in pairs):
            return False
    return True


def _cut_(module: Any, shape: tuple[int, ...]) -> None:
    rows, columns = shape
    weight, bias = module.weight, module.bias
    module.weight = nn.Parameter(weight.detach()[:rows, :columns].clone(), weight.requires_grad)
    fit_sizes_(module)
    if bias is not None:
        size = columns if isinstance(module, Conv1D) else rows
        module.bias = nn.Parameter(bias.detach()[:size].clone(), bias.requires_grad)


def layer_of(name: str) -> tuple[int, int] | None:
    """Return group and layer of the module or parameter ``name``, None if it is in no group."""
    parts = name.split(".")
    numbers = _numbers(parts)
    found = []
    for group, (words, number, layers) in enumerate(GROUPS):
        if number < len(numbers):
            at = numbers[number]
            if set(words) <= set(parts[:at]) and int(parts[at]) in layers:
                found.append((group, int(parts[at])))
    return found[0] if len(found) == 1 else None


def source_of(name: str) -> str | None:
    """Return the name of the parameter that takes the place of ``name``, None if it is its own."""
    where = layer_of(name)
    if where is None:
        return None
    group, layer = where
    _, number, layers = GROUPS[group]
    if layer == layers[0]:
        return None
    parts = name.split(".")
    parts[_numbers(parts)[number]] = str(layers[0])
    return ".".join(parts)


def _numbers(parts: list[str]) -> list[int]:
    """Return where in a name the numbers stand."""
    return [at for at, part in enumerate(parts) if part.isdigit()]


def shared_maps(model: nn.Module) -> dict[str, Any]:
    """Return the maps of all groups by ``group.layer.number``, numbered as the model has them."""
    maps = []
    uses: Counter[int] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            maps.append((name, module))
            uses[id(module.weight)] += 1
    found = {}
    numbers: Counter[tuple[int, int]] = Counter()
    for name, module in maps:
        where = layer_of(name)
        if where and uses[id(module.weight)] > 1:
            group, layer = where
            found[f"{group}.{layer}.{numbers[where]}"] = module
            numbers[where] += 1
    return found


def parts_in_file(maps: dict[str, Any], own: Any) -> set[str]:
    """Return which of the parts ``own`` stand in a file: all but biases that every map has."""
    if all(module.bias is not None for module in maps.values()):
        return set(own) - {"bias"}
    return set(own)


def load_own_(maps: dict[str, Any], own: Any, file: Any) -> None:
    """Give maps the parts ``own`` that a file holds under ``group.layer.number.part``.

    Raises:
        ValueError: the file is of other maps or parts, or a layer lacks one that another has.
    """
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in maps}
    for name, tensor in load_file(file).items():
        key, _, part = name.rpartition(".")
        parts.setdefault(key, {})[part] = tensor
    held: set[str] = set()
    alike: dict[tuple[str, ...], set[str]] = {}  # by group and number: the same for every layer
    for key, tensors in parts.items():
        wanted = alike.setdefault(tuple(key.split(".")[::2]), set(tensors))
        if key not in maps or not _fit(maps[key], tensors) or set(tensors) != wanted:
            raise ValueError(f"{OWN_FILE} is of another model or not whole: {key} differs.")
        held |= wanted
    if held != parts_in_file(maps, own):
        raise ValueError(
            f"{OWN_FILE} holds {sorted(held)}, and config.json tells of {sorted(own)}."
        )
    for key, tensors in parts.items():
        if tensors:
            weight = maps[key].weight
            give_own_(maps[key], {part: tensor.to(weight) for part, tensor in tensors.items()})


def _fit(module: Any, parts: dict[str, Tensor]) -> bool:
    rows, columns = module.weight.shape
    if isinstance(module, Conv1D):
        rows, columns = columns, rows
    rank = len(parts.get("down", ()))
    sizes = {"scale": (rows,), "bias": (rows,), "down": (rank, columns), "up": (rows, rank)}
    return all(tensor.shape == sizes.get(part) for part, tensor in parts.items())


def pop_own(model: nn.Module, maps: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the parts that no plain class has out of ``state``; return what ``load_own_`` reads."""
    keys = {id(module): key for key, module in maps.items()}
    own = {}
    for name, module in model.named_modules():
        for part in getattr(module, "own", ()):
            if f"{name}.{part}" in state:  # ffmerge.save may have them already
                own[f"{keys[id(module)]}.{part}"] = state.pop(f"{name}.{part}").contiguous()
    return own


def tie_(model: Any, unset: set[str], new_head: bool) -> None:
    """Give every parameter that was not in the file the one of its group that was.

    Raises:
        ValueError: there is none; with ``new_head`` only if it is one of a layer.
    """
    for name in sorted(unset):
        source = source_of(name)
        if source and source not in unset:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, model.get_parameter(source))
        elif not new_head or _numbers(name.split(".")):
            raise ValueError(f"the checkpoint holds no value of the right size for {name}.")


class PreTrainedModel(transformers.PreTrainedModel):
    """The model with one Parameter in all places of a shared weight.

    Loading and saving are left to the class of transformers itself: it renames weights between
    its releases for its own classes only.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does and tie; a parameter that would be left random is an error."""
        wants_info = kwargs.pop("output_loading_info", False)
        new_head = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs["variant"] = kwargs.get("variant") or "ffmerge"
        kind = transformers.PreTrainedModel
        if NARROW:
            kind = narrow_class(kind, NARROW)
        model, info = kind.from_pretrained(
            *args, **kwargs, ignore_mismatched_sizes=True, output_loading_info=True
        )
        unset = {name for name, _ in model.named_parameters()} & set(info["missing_keys"])
        for key in info["mismatched_keys"]:  # a name, or a name and two sizes
            unset.add(key if isinstance(key, str) else key[0])
        tie_(model, unset, new_head)
        own = getattr(model.config, "ffmerge", {}).get("own", ())
        maps = shared_maps(model)
        if parts_in_file(maps, own):
            folder = args[0] if args else kwargs["pretrained_model_name_or_path"]
            where = {
                key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs
            }
            load_own_(maps, own, cached_file(folder, OWN_FILE, **where))
        model.__class__ = cls
        return (model, info) if wants_info else model

    def save_pretrained(self, folder: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Save as transformers does, every shared weight once, with this file."""
        kwargs = {"variant": "ffmerge", **kwargs}
        state = dict(self.state_dict() if state_dict is None else state_dict)
        if kwargs["variant"] == "ffmerge":
            parameters = dict(self.named_parameters(remove_duplicate=False))
            for name, parameter in parameters.items():
                if name in state and parameters.get(source_of(name)) is parameter:
                    state[name] = state[name].new_empty(0)
        own = pop_own(self, shared_maps(self), state)
        tied = type(self)
        self.__class__ = transformers.PreTrainedModel
        try:
            self.save_pretrained(folder, state_dict=state, **kwargs)
        finally:
            self.__class__ = tied
        if own:
            save_file(own, Path(folder) / OWN_FILE)
        shutil.copyfile(__file__, Path(folder) / "modeling_ffmerge.py")
