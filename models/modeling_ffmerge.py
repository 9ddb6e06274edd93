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
OWN = "ffmerge.safetensors"  # what layers that share add of their own, if anything
_PARTS = ("scale", "down", "up", "bias")


class SharedLinear(nn.Linear):
    """A map whose weight several layers use: ``scale * (W x) + up (down x) + bias`` in each."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the shared product with this layer's own parts."""
        return _with_own(self, x, nn.functional.linear(x, self.weight))


class SharedConv1D(Conv1D):
    """The same for the (in, out) weights of GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the shared product with this layer's own parts."""
        return _with_own(self, x, x @ self.weight)


def _with_own(module: Any, x: Tensor, y: Tensor) -> Tensor:
    if "scale" in module.own:
        y = y * module.scale
    if "down" in module.own:
        low = nn.functional.linear(x, module.down)
        y = y + nn.functional.linear(low, module.up)
    return y if module.bias is None else y + module.bias


def give_own_(module: Any, parts: dict[str, Tensor]) -> None:
    """Give a linear map parts of its own; ``module.own`` names those its class has not."""
    module.own = tuple(part for part in _PARTS if part in parts)
    module.__class__ = SharedConv1D if isinstance(module, Conv1D) else SharedLinear
    for part in module.own:
        module.register_parameter(part, nn.Parameter(parts[part]))


def place_of(name: str) -> tuple[int, int] | None:
    """Return group and layer of the module or parameter ``name``, None if it is in no group."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    found = [
        (group, place)
        for group, (words, number, layers) in enumerate(GROUPS)
        for place in numbers[number : number + 1]
        if set(words) <= set(parts[:place]) and int(parts[place]) in layers
    ]
    return (found[0][0], int(parts[found[0][1]])) if len(found) == 1 else None


def source_of(name: str) -> str | None:
    """Return the name of the parameter that takes the place of ``name``, None if it is its own."""
    where = place_of(name)
    if where is None:
        return None
    _, number, layers = GROUPS[where[0]]
    parts = name.split(".")
    place = [i for i, part in enumerate(parts) if part.isdigit()][number]
    parts[place] = str(layers[0])
    return ".".join(parts) if where[1] != layers[0] else None


def maps_of(model: nn.Module) -> dict[str, Any]:
    """Return the maps of all groups by ``group.layer.number``, numbered as the model has them."""
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    places = Counter(id(module.weight) for _, module in modules)
    found: dict[tuple[int, int], list[Any]] = {}
    for name, module in modules:
        where = place_of(name)
        if where and places[id(module.weight)] > 1:
            found.setdefault(where, []).append(module)
    return {
        f"{group}.{layer}.{number}": module
        for (group, layer), maps in found.items()
        for number, module in enumerate(maps)
    }


def in_file(maps: dict[str, Any], own: Any) -> set[str]:
    """Return which of the parts ``own`` stand in a file: all but biases that every map has."""
    biased = all(module.bias is not None for module in maps.values())
    return {*own} - ({"bias"} if biased else set())


def load_own_(maps: dict[str, Any], own: Any, file: Any) -> None:
    """Give maps the parts ``own`` that a file holds under ``group.layer.number.part``.

    Raises:
        ValueError: the file is of other maps or parts, or a layer lacks one that another has.
    """
    parts: dict[str, dict[str, Tensor]] = {place: {} for place in maps}
    for key, tensor in load_file(file).items():
        place, _, part = key.rpartition(".")
        parts.setdefault(place, {})[part] = tensor
    for place, tensors in parts.items():
        first = next(p for p in parts if p.split(".")[::2] == place.split(".")[::2])
        if place not in maps or not _fit(maps[place], tensors) or {*parts[first]} != {*tensors}:
            raise ValueError(f"{OWN} is of another model or not whole: {place} differs.")
    held = {part for tensors in parts.values() for part in tensors}
    if held != in_file(maps, own):
        raise ValueError(f"{OWN} holds {sorted(held)}, and config.json tells of {sorted(own)}.")
    for place, tensors in parts.items():
        if tensors:
            give_own_(maps[place], {part: t.to(maps[place].weight) for part, t in tensors.items()})


def _fit(module: Any, parts: dict[str, Tensor]) -> bool:
    shape, rank = tuple(module.weight.shape), len(parts.get("down", ()))
    rows, columns = shape[::-1] if isinstance(module, Conv1D) else shape
    sizes = {"scale": (rows,), "bias": (rows,), "down": (rank, columns), "up": (rows, rank)}
    return all(tensor.shape == sizes.get(part) for part, tensor in parts.items())


def pop_own(model: nn.Module, maps: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the parts that no plain class has out of ``state``; return what ``load_own_`` reads."""
    keys = {id(module): key for key, module in maps.items()}
    return {
        f"{keys[id(module)]}.{part}": state.pop(f"{name}.{part}").contiguous()
        for name, module in model.named_modules()
        for part in getattr(module, "own", ())
        if f"{name}.{part}" in state  # ffmerge.save may have them already
    }


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
        model, info = transformers.PreTrainedModel.from_pretrained(
            *args,
            **{**kwargs, "variant": kwargs.get("variant") or "ffmerge"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        unset = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
        unset |= {name for name, _ in model.named_parameters()} & set(info["missing_keys"])
        for name in sorted(unset):
            source = source_of(name)
            if source and source not in unset:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, model.get_parameter(source))
            elif not new_head or any(part.isdigit() for part in name.split(".")):
                raise ValueError(f"the checkpoint holds no value of the right size for {name}.")
        own = getattr(model.config, "ffmerge", {}).get("own", ())
        if in_file(maps_of(model), own):
            where = {k: v for k, v in kwargs.items() if k in ("revision", "token", "cache_dir")}
            folder = args[0] if args else kwargs["pretrained_model_name_or_path"]
            load_own_(maps_of(model), own, cached_file(folder, OWN, **where))
        model.__class__ = cls
        return (model, info) if wants_info else model

    def save_pretrained(self, folder: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Save as transformers does, every shared weight once, with this file."""
        kwargs = {"variant": "ffmerge", **kwargs}
        state = dict(self.state_dict() if state_dict is None else state_dict)
        places = dict(self.named_parameters(remove_duplicate=False))
        for name in places if kwargs["variant"] == "ffmerge" else ():
            if name in state and places.get(source_of(name)) is places[name]:
                state[name] = state[name].new_empty(0)
        own = pop_own(self, maps_of(self), state)
        tied = type(self)
        self.__class__ = transformers.PreTrainedModel
        try:
            self.save_pretrained(folder, state_dict=state, **kwargs)
        finally:
            self.__class__ = tied
        if own:
            save_file(own, Path(folder) / OWN)
        shutil.copyfile(__file__, Path(folder) / "modeling_ffmerge.py")
