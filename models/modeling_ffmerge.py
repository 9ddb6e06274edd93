"""Loads and saves this checkpoint with the weights that its layers share stored once.

A copy stands beside the weights, with the class and the groups filled in, for
``from_pretrained(..., trust_remote_code=True)``: it needs torch and transformers, not ffmerge.
"""

import shutil
from pathlib import Path
from typing import Any

import transformers

# words that the names of the stack hold, which number in a name counts its layers, the layers that
# share: the first holds the weights, the others are stored as empty tensors
GROUPS: list[tuple[tuple[str, ...], int, tuple[int, ...]]] = []


def source_of(name: str) -> str | None:
    """Return the name of the parameter that takes the place of ``name``, None if it is its own."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    found = [
        ".".join([*parts[:place], str(layers[0]), *parts[place + 1 :]])
        for words, number, layers in GROUPS
        for place in numbers[number : number + 1]
        if set(words) <= set(parts[:place]) and int(parts[place]) in layers[1:]
    ]
    return found[0] if len(found) == 1 else None


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
        tied = type(self)
        self.__class__ = transformers.PreTrainedModel
        try:
            self.save_pretrained(folder, state_dict=state, **kwargs)
        finally:
            self.__class__ = tied
        shutil.copyfile(__file__, Path(folder) / "modeling_ffmerge.py")
