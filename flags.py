"""Commands whose parameters are configurations: every option of one is a flag.

``__main__`` writes a command as a function of few parameters. Those that Typer knows stay as they
are; one whose type is a dataclass of ``config.py`` stands for its fields. What is typed becomes
that configuration again, which checks it, before the function is called; the function's
:class:`Result` is printed as a table, or with ``--json`` as one object.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from keyword import iskeyword
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ffmerge.errors import InputError
from ffmerge.escapes import printable
from ffmerge.files import FIRST_PROCESS

# what the extra ffmerge[torch] brings and modules import at their head
TORCH_SIDE = (
    "torch", "transformers", "optimum", "onnxscript", "scipy", "accelerate", "huggingface_hub",
    "datasets", "sklearn", "PIL",
)  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@dataclass(frozen=True)
class Result:
    """What a command prints, for machines and for people; ``ok`` False is exit code 1.

    ``last`` is the last line for people: what was written, or the command that comes next.
    """

    value: dict[str, Any]
    table: Any
    ok: bool = True
    last: str = ""


def command(app: typer.Typer, function: Callable[..., Result]) -> None:
    """Register ``function`` as the command of its name, with ``--json``.

    A parameter ``Config | None`` is None unless the first flag of the configuration is given.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for given in inspect.signature(function).parameters.values():
        kind, optional = _config(hints[given.name])
        if kind is None:
            parameters.append(_parameter(given.name, hints[given.name], given.default))
        else:
            parameters += _flags(kind, optional)
    parameters.append(_parameter("as_json", Json, False))

    def configured(typed: dict[str, Any]) -> dict[str, Any]:
        return {name: _argument(name, hints[name], typed) for name in hints if name != "return"}

    def run(**typed: Any) -> None:
        as_json = typed.pop("as_json")
        try:
            result = function(**configured(typed))
        except ModuleNotFoundError as error:
            raise _missing(function.__name__, error) from error
        show(result, as_json)
        if not result.ok:
            raise typer.Exit(1)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__dict__ |= {"__signature__": inspect.Signature(parameters), "configured": configured}
    app.command()(run)


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout; of several processes the first one does."""
    if not FIRST_PROCESS:
        return
    if as_json:
        print(json.dumps(result.value, indent=2))
        return
    from rich.console import Console

    Console().print(result.table)
    if result.last:
        print(printable(result.last))


def _missing(command: str, error: ModuleNotFoundError) -> Exception:
    """Return what to say where a command needs what only ``ffmerge[torch]`` brings."""
    package = str(error.name).partition(".")[0]
    if package not in TORCH_SIDE:
        return error
    return InputError(
        f"{command} needs {package}, which is not installed: pip install 'ffmerge[torch]'."
    )


def _config(hint: Any) -> tuple[Any, bool]:
    """Return the configuration that a type is, if it is one, and whether it may be None."""
    optional = isinstance(hint, UnionType) and NoneType in get_args(hint)
    kind = get_args(hint)[0] if optional else hint
    if is_dataclass(kind):
        return kind, optional
    return None, False


def _options(kind: Any) -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield the options of a configuration: the parameter's name, the field, its type."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        if "help" in each.metadata:
            names = each.metadata["names"] or (each.name,)
            name = names[0].lstrip("-").replace("-", "_")
            if iskeyword(name):  # no parameter can be called so
                name += "_"
            yield name, each, hints[each.name]


def _flags(kind: Any, optional: bool) -> Iterator[inspect.Parameter]:
    for number, (name, each, hint) in enumerate(_options(kind)):
        about, default = each.metadata, each.default
        hint = about.get("typed", hint)
        if "typed" in about:
            default = None
        if optional and number == 0:
            hint, default = hint | None, None
        metavar = None
        if "choices" in about:
            metavar = "|".join(about["choices"])
        flag = typer.Option(*about["names"], help=about["help"], metavar=metavar)
        yield _parameter(name, Annotated[hint, flag], default)


def _argument(name: str, hint: Any, typed: dict[str, Any]) -> Any:
    """Return what a command's function is given for a parameter."""
    kind, optional = _config(hint)
    if kind is None:
        return typed[name]
    options = [*_options(kind)]
    values: dict[str, Any] = {}
    for option, each, _ in options:
        values[each.name] = typed[option]
        if "parse" in each.metadata:
            values[each.name] = each.metadata["parse"](typed[option])
    first, field, _ = options[0]
    if not optional or values[field.name] is not None:
        return kind(**values)
    del values[field.name]
    kind(**values)  # checked though it is not wanted
    for option, each, _ in options[1:]:
        if values[each.name] != each.default:
            raise InputError(f"{_flag(option)} does nothing without {_flag(first)}: give both.")
    return None


def _flag(option: str) -> str:
    return "--" + option.rstrip("_").replace("_", "-")


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)
