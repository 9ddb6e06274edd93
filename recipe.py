"""A recipe: commands and their options in a YAML file, checked whole before the first one runs.

``ffmerge run`` reads one. The file is a list of ``command: {option: value}``, options named as on
the command line, arguments too; a list gives an option several times.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from ffmerge.errors import InputError

_USAGE_ERROR: Any = typer.BadParameter.__base__  # of what the parser finds wrong


def steps(path: Path, commands: Mapping[str, Any]) -> list[list[str]]:
    """Return the words of every step, the command first, as they would be typed.

    ``commands`` are Typer's by name.

    Raises:
        InputError: the file is no such list, or a command would not take its options.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the recipe {path} cannot be read: {reason}.") from error
    if not isinstance(found, list):
        found = [found]
    checked = []
    for number, step in enumerate(found, 1):
        checked.append(_step(f"{path}, step {number}", step, commands))
    return checked


def _step(where: str, step: Any, commands: Mapping[str, Any]) -> list[str]:
    """Return the words of one step, which its command would take."""
    if not isinstance(step, dict) or len(step) != 1:
        raise InputError(f"{where}: write `- COMMAND: {{option: value}}`, one command a step.")
    ((name, options),) = step.items()
    if name not in commands:
        raise InputError(f"{where}: no command {name!r}, choose from {', '.join(commands)}.")
    if not isinstance(options, dict | None):
        raise InputError(f"{where}: {name} takes its options as `option: value`.")
    command = commands[name]
    words = [*_words(where, command, options or {})]
    try:
        typed = command.make_context(name, [*words]).params
        command.callback.configured(typed)
    except _USAGE_ERROR as error:
        raise InputError(f"{where}: {error.format_message()}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return [name, *words]


def _words(where: str, command: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield options as ``--name=value``, then the arguments in their order."""
    known = {_key(p.opts[0]): p for p in command.params if p.name != "as_json"}
    given = {_key(str(name)): value for name, value in options.items()}
    if unknown := given.keys() - known:
        wrong, right = ", ".join(sorted(unknown)), ", ".join(known)
        raise InputError(f"{where}: {command.name} has no {wrong}; it has {right}.")
    arguments = []
    for name, parameter in known.items():
        value = given.get(name)
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            arguments.append(str(value))
            continue
        if isinstance(value, bool) and not parameter.is_flag:
            raise InputError(f"{where}: {name} takes a value, not {value}.")
        yield from _option(parameter, value)
    yield from ("--", *arguments)


def _option(parameter: Any, value: Any) -> Iterator[str]:
    """Yield an option as it is typed: a flag or its opposite, or a value, or several."""
    if isinstance(value, bool):
        yield from parameter.opts if value else parameter.secondary_opts
    elif isinstance(value, list):
        for each in value:
            yield f"{parameter.opts[0]}={each}"
    else:
        yield f"{parameter.opts[0]}={value}"


def _key(option: str) -> str:
    return option.lstrip("-").replace("_", "-")
