"""Tasks by their optimum names: what each puts out, and which one a model serves."""

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

    name = type(model).__name__
    try:
        task = str(TasksManager.infer_task_from_model(type(model)))
    except (ValueError, KeyError, RuntimeError):
        task = ""
    if task in ("", "fill-mask"):
        task = next((t for suffix, t in _BY_SUFFIX.items() if name.endswith(suffix)), task)
    if hasattr(model.config, "text_config") and hasattr(model.config, "vision_config"):
        task = "zero-shot-image-classification" if task == "feature-extraction" else task
    if not task:
        raise InputError(f"no task is known for {name}.")
    return check(task + PAST * _caches(model, task))


def fit(task: str, model: Any) -> str:
    """Return ``task`` if ``model`` serves it.

    Raises:
        InputError: it does not, or ffmerge serves no such task.
    """
    served = infer(model)
    if base(check(task)) != base(served) or (task.endswith(PAST) and task != served):
        other = f" or {base(served)}" * (base(served) != served)
        raise InputError(
            f"{type(model).__name__} does not serve {task}: it serves {served}{other}."
        )
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


def _caches(model: Any, task: str) -> bool:
    decoder = model.config.is_encoder_decoder or task == "text-generation"
    return task in GENERATE and decoder
