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

_BY_SUFFIX = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
}


def infer(model_class: type[Any]) -> str:
    """Return the task of a transformers class, as optimum's TasksManager tells it.

    Raises:
        InputError: optimum knows none, or ffmerge does not serve it.
    """
    from optimum.exporters.tasks import TasksManager

    name = model_class.__name__
    try:
        task = str(TasksManager.infer_task_from_model(model_class))
    except (ValueError, KeyError, RuntimeError) as error:
        # optimum's table has gaps (DeiT, for one); the class says it as well
        known = [task for suffix, task in _BY_SUFFIX.items() if name.endswith(suffix)]
        if not known:
            raise InputError(f"no task is known for {name}.") from error
        (task,) = known
    return check(task)


def check(task: str) -> str:
    """Return ``task`` if ffmerge serves it.

    Raises:
        InputError: it does not.
    """
    if task not in OUTPUTS:
        raise InputError(f"task {task!r} is not served: choose one of {', '.join(OUTPUTS)}.")
    return task
