"""Tasks by their optimum names: what each puts out, and which one a model serves.

Commands ask for the task of a model first (:func:`fit`); it decides which graphs are exported, what
is measured, and how text becomes inputs. The tables need neither torch nor optimum.
"""

from typing import Any

from ffmerge.errors import InputError

PAST = "-with-past"  # with a cache of keys and values, as optimum calls it

# task -> names of the graph outputs, as optimum names them
OUTPUTS: dict[str, tuple[str, ...]] = {
    "audio-classification": ("logits",),
    "automatic-speech-recognition": ("logits",),
    "feature-extraction": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "image-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "text-classification": ("logits",),
    "text-generation": ("logits",),
    "text2text-generation": ("logits",),
    "token-classification": ("logits",),
    "zero-shot-image-classification": (
        "logits_per_image", "logits_per_text", "text_embeds", "image_embeds",
    ),
}  # fmt: skip
# Those that produce a sequence token by token; speech recognition does with a decoder only.
GENERATE = ("text-generation", "text2text-generation", "automatic-speech-recognition")

# What optimum's table does not tell: DeiT, for one, and BART it takes for a masked LM.
_BY_SUFFIX = {
    "ForImageClassification": "image-classification",
    "ForConditionalGeneration": "text2text-generation",
}


def base(task: str) -> str:
    """Return a task without the cache: what it is about and how it is measured."""
    return task.removesuffix(PAST)


def infer(model: Any) -> str:
    """Return the task of a transformers model, as optimum's TasksManager tells it by its class.

    A model that generates gets the one with a cache.

    Raises:
        InputError: optimum knows none, or ffmerge does not serve it.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        task = str(TasksManager.infer_task_from_model(type(model)))
    except (ValueError, KeyError, RuntimeError):
        task = ""
    if task in ("", "fill-mask"):
        task = _by_suffix(model) or task
    has_towers = hasattr(model.config, "text_config") and hasattr(model.config, "vision_config")
    if has_towers and task == "feature-extraction":
        task = "zero-shot-image-classification"
    if not task:
        raise InputError(f"no task is known for {type(model).__name__}.")
    if task in GENERATE and (model.config.is_encoder_decoder or task == "text-generation"):
        task += PAST
    return check(task)


def _by_suffix(model: Any) -> str:
    for suffix, task in _BY_SUFFIX.items():
        if type(model).__name__.endswith(suffix):
            return task
    return ""


def fit(task: str | None, model: Any) -> str:
    """Return ``task`` if ``model`` serves it; where none is given, the one that it serves.

    Raises:
        InputError: it does not, or ffmerge serves no such task.
    """
    served = infer(model)
    if task is None:
        return served
    if base(check(task)) != base(served) or (task.endswith(PAST) and task != served):
        choices = " or ".join(dict.fromkeys((served, base(served))))
        raise InputError(f"{type(model).__name__} does not serve {task}: it serves {choices}.")
    return task


def check(task: str) -> str:
    """Return ``task`` if ffmerge serves it.

    Raises:
        InputError: it does not.
    """
    if base(task) not in OUTPUTS or (task.endswith(PAST) and base(task) not in GENERATE):
        named = [*OUTPUTS, *(each + PAST for each in GENERATE)]
        raise InputError(f"task {task!r} is not served: choose one of {', '.join(named)}.")
    return task
