"""Tasks by their optimum names: what each puts out, and which one a model class serves."""

from typing import Any

from ffmerge.errors import InputError

# task -> names of the graph outputs, as optimum names them
OUTPUTS: dict[str, tuple[str, ...]] = {
    "feature-extraction": ("last_hidden_state",),
    "fill-mask": ("logits",),
    "image-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "text-classification": ("logits",),
    "text-generation": ("logits",),
    "token-classification": ("logits",),
}


def infer(model_class: type[Any]) -> str:
    """Return the task of a transformers class, as optimum's TasksManager tells it.

    Raises:
        InputError: optimum knows none, or ffmerge does not serve it.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        task = str(TasksManager.infer_task_from_model(model_class))
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"no task is known for {model_class.__name__}: name one with --task."
        ) from error
    return check(task)


def check(task: str) -> str:
    """Return ``task`` if ffmerge serves it.

    Raises:
        InputError: it does not.
    """
    if task not in OUTPUTS:
        raise InputError(f"task {task!r} is not served: choose one of {', '.join(OUTPUTS)}.")
    return task
