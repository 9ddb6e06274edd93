"""Tasks by their optimum names: what each puts out, and which one a model serves.

Commands ask for the task of a model first (:func:`fit`); it decides which graphs are exported, what
is measured, and how text becomes inputs. The tables need neither torch nor optimum.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ffmerge.errors import InputError
from ffmerge.profiles import profile_of

PAST = "-with-past"  # with a cache of keys and values, as optimum calls it

# task -> names of the graph outputs, as optimum names them; where a model gives others, or where
# there are none, they are all that it gives
OUTPUTS: dict[str, tuple[str, ...]] = {
    "audio-classification": ("logits",),
    "audio-frame-classification": ("logits",),
    "audio-xvector": ("logits", "embeddings"),
    "automatic-speech-recognition": ("logits",),
    "depth-estimation": ("predicted_depth",),
    "feature-extraction": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "image-classification": ("logits",),
    "image-segmentation": (),
    "masked-im": (),
    "object-detection": ("logits", "pred_boxes"),
    "question-answering": ("start_logits", "end_logits"),
    "text-classification": ("logits",),
    "text-generation": ("logits",),
    "text2text-generation": ("logits",),
    "time-series-forecasting": (),
    "token-classification": ("logits",),
    "video-classification": ("logits",),
    "zero-shot-image-classification": (
        "logits_per_image", "logits_per_text", "text_embeds", "image_embeds",
    ),
}  # fmt: skip
# Those that produce a sequence token by token; speech recognition does with a decoder only.
GENERATE = ("text-generation", "text2text-generation", "automatic-speech-recognition")

# transformers' registries of heads whose tasks have other names, the first that knows a class first
_REGISTRIES = {
    "SPEECH_SEQ_2_SEQ": "automatic-speech-recognition",
    "CTC": "automatic-speech-recognition",
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",
    "MASKED_LM": "fill-mask",
    "CAUSAL_LM": "text-generation",
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "MASKED_IMAGE_MODELING": "masked-im",
    "TIME_SERIES_PREDICTION": "time-series-forecasting",
}
# What a task's models read; a task that is not here may be named for any model with its outputs.
_READS = {
    "audio": ("input_values", "input_features"),
    "automatic": ("input_values", "input_features"),
    "fill": ("input_ids",),
    "image": ("pixel_values",),
    "question": ("input_ids",),
    "text": ("input_ids",),
    "token": ("input_ids",),
    "video": ("pixel_values", "pixel_values_videos"),
}


def base(task: str) -> str:
    """Return a task without the cache: what it is about and how it is measured."""
    return task.removesuffix(PAST)


def check_grows(task: str, profiles: Sequence[str]) -> None:
    """Raise InputError if a task writes a text, token by token, and a profile fixes every size."""
    if base(task) not in ("text-generation", "text2text-generation"):
        return
    for profile in profiles:
        if profile_of(profile).fixed:
            raise InputError(
                f"--for {profile} fixes every size, and {task} puts token behind token: choose "
                "another provider, or a task that reads a text at once."
            )


def task_of(model: Any, named: str | None = None) -> str:
    """Return the task that is named for a model, or else the one that it serves.

    Raises:
        InputError: ffmerge serves no such task, or no task of this model.
    """
    if named is None:
        return infer(model)
    return check(named)


def infer(model: Any) -> str:
    """Return the task of a transformers model, as optimum and transformers' registries tell it.

    A model that generates gets the one with a cache; one without a head that is known gives what
    it gives, its features.

    Raises:
        InputError: its class is for something that ffmerge does not serve.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        task = str(TasksManager.infer_task_from_model(type(model)))
    except (ValueError, KeyError, RuntimeError):
        task = ""
    if task in ("", "fill-mask"):  # BART, for one, optimum takes for a masked language model
        task = _by_registry(type(model).__name__)
    has_towers = hasattr(model.config, "text_config") and hasattr(model.config, "vision_config")
    if has_towers and task == "feature-extraction" and hasattr(model, "logit_scale"):
        task = "zero-shot-image-classification"
    if task in GENERATE and (_decodes(model) or task == "text-generation"):
        task += PAST
    return check(task)


def _by_registry(name: str) -> str:
    """Return the task whose registry of transformers has the class, or else one with its head."""
    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    known = [key for key in vars(modeling_auto) if key.endswith("_MAPPING_NAMES")]
    kinds = [key.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES") for key in known]
    heads: dict[str, str] = {}
    for kind in dict.fromkeys((*_REGISTRIES, *kinds)):
        task = _REGISTRIES.get(kind, kind.lower().replace("_", "-"))
        if task not in OUTPUTS:
            continue
        for classes in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).values():
            for each in (classes,) if isinstance(classes, str) else classes:
                if each == name:
                    return task
                heads.setdefault(each.rpartition("For")[2], task)
    _, has_head, head = name.rpartition("For")
    if has_head:
        return heads.get(head, "feature-extraction")
    return "feature-extraction"


def _decodes(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def by_head(name: str) -> str | None:
    """Return the task of a class by the head in its name, without transformers; None: unsure."""
    head = name.rpartition("For")[2].casefold()
    for kind, task in _REGISTRIES.items():
        if kind.replace("_", "").casefold() == head:
            return task
    for task in OUTPUTS:
        if task.replace("-", "") == head:
            return task
    return None


def outputs(task: str, given: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs of a graph: those of its task, or all if the model gives others.

    ``given`` is what the model gives, in its order: its features, where they do not come first, are
    beside what it is for, such as an embedding.
    """
    named = OUTPUTS[base(task)]
    if not named or not set(named) <= set(given):
        return tuple(given)
    if base(task) == "feature-extraction" and given[0] != named[0]:
        return tuple(given)
    return named


def fit(task: str | None, model: Any, given: Callable[[], Sequence[str]]) -> str:
    """Return ``task`` if ``model`` serves it; where none is given, the one that it serves.

    A model serves what its class is for, and any task whose outputs are among those that it gives,
    and whose inputs it takes; ``given`` is asked for their names where that has to be known.

    Raises:
        InputError: it does not, or ffmerge serves no such task.
    """
    served = infer(model)
    if task is None or base(check(task)) == base(served):
        if task and task.endswith(PAST) and task != served:
            raise InputError(_refusal(task, served, model))
        return task or served
    accepted = inspect.signature(model.forward).parameters
    reads = _READS.get(task.partition("-")[0].rstrip("0123456789"), tuple(accepted))
    reads_it = any(name in accepted for name in reads)
    writes_it = base(task) not in GENERATE or model.can_generate()
    if not (reads_it and writes_it and set(OUTPUTS[base(task)]) <= set(given())):
        raise InputError(_refusal(task, served, model))
    return task


def _refusal(task: str, served: str, model: Any) -> str:
    choices = " or ".join(dict.fromkeys((served, base(served))))
    return f"{type(model).__name__} does not serve {task}: it serves {choices}."


def check(task: str) -> str:
    """Return ``task`` if ffmerge serves it.

    Raises:
        InputError: it does not.
    """
    if base(task) not in OUTPUTS or (task.endswith(PAST) and base(task) not in GENERATE):
        named = [*OUTPUTS, *(each + PAST for each in GENERATE)]
        raise InputError(f"task {task!r} is not served: choose one of {', '.join(named)}.")
    return task
