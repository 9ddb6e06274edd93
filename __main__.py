"""The command line: every command is one call of what does the work, and what it prints.

Options stand in ``config.py``, and become flags in ``flags.py``. Work is imported when a command
runs: ``ffmerge --help`` and the device's commands need no torch.
"""

import atexit
import errno
import gc
import json
import os
import shlex
import sys
import traceback
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer

import ffmerge
from ffmerge import early, flags, progress
from ffmerge.config import (
    FOUR_BITS,
    CheckpointConfig,
    ColumnsConfig,
    CompareConfig,
    CompressConfig,
    DataConfig,
    DeviceConfig,
    ExportConfig,
    LoadConfig,
    MergeConfig,
    RecoverConfig,
    ShareConfig,
    SimilarityConfig,
    ValidateConfig,
    check_sources,
    check_without_data,
)
from ffmerge.errors import FfmergeError, FfmergeWarning, InputError
from ffmerge.escapes import printable
from ffmerge.flags import Result
from ffmerge.models import heap
from ffmerge.models.manifest import REFERENCE

app = typer.Typer(
    help="Merge the feed-forward sublayers of a Transformer and ship the shared weights once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.")]
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ANYWHERE = ("--debug", "-v", "-q")
_DATA = "Calibration data, as for merge."


def _quoted(path: str | Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ffmerge {ffmerge.__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; anywhere in a command.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", help="Tell every step as a line; anywhere in a command.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", help="Tell no steps and no warnings; anywhere in a command.")
    ] = False,
) -> None:
    """Take the options of ffmerge itself.

    Exit code 0: it held; 1: a check failed; 2: the input cannot be used; 3: a fault of ffmerge.
    """


def demo(
    out: Annotated[Path, typer.Option(help="New folder for packages and report.")] = Path(
        "ffmerge-demo"
    ),
) -> Result:
    """Run the whole pipeline on a trained model and real data that ffmerge ships.

    Example: [bold]ffmerge demo --out build/demo[/bold]
    """
    with heap.importing():
        from ffmerge.demo import demo

    result = demo(out)
    return Result(result.to_json(), result.table(), result.ok, f"Look: {_quoted(out)}/report.html")


def inspect(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, a folder with only config.json, or a hub id.")
    ],
    load: LoadConfig,
) -> Result:
    """Show the feed-forward stacks of a model and what tying k of them removes.

    Example: [bold]ffmerge inspect google/vit-base-patch16-224[/bold]
    """
    early.folder_of(model, load)
    with heap.importing():
        from ffmerge.models.inspection import inspect
        from ffmerge.models.source import resolve
    from ffmerge.tables import inspection_table

    folder = resolve(model, load, weights=False)
    found = inspect(folder, load.trust_remote_code)
    then = f"Next: ffmerge compress {_quoted(model)} OUT --size 25% --data DATA, or "
    if found.removable:
        then += "merge, or compare"
    elif found.record and not found.record.narrowed:
        then += "merge --method narrow, or export"
    else:
        then += "export"
    return Result(found.to_json(), inspection_table(found), last=then)


def merge(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the merged checkpoint.")],
    config: MergeConfig,
    data: DataConfig,
    recovery: RecoverConfig | None,
    checkpoint: CheckpointConfig,
) -> Result:
    """Merge k feed-forward sublayers and save the checkpoint, every shared weight once.

    Example: [bold]ffmerge merge gpt2 merged --k 5 --data validation.txt[/bold]
    """
    check_sources(data.data, data.validation)
    if recovery and not data.data:
        raise InputError("recovery follows the original on data: give --data.")
    early.check_output(out)
    early.check(model, checkpoint, config, data, data.data, data.validation)
    with heap.importing():
        from ffmerge import commands
    from ffmerge.tables import merge_table

    result = commands.merge(model, out, config, data, recovery, checkpoint)
    then = f"Next: ffmerge export {_quoted(out)} PACKAGE"
    if dtype := result.record.metric.get("dtype"):
        then += f" --dtype {dtype}"
    return Result(result.to_json(), merge_table(result, out), last=then)


def compare(model: Model, config: CompareConfig, data: DataConfig, device: DeviceConfig) -> Result:
    """Tell whether merging is the right tool: its rivals at equal size, on your data.

    Example: [bold]ffmerge compare gpt2 --k 5 --data validation.txt[/bold]
    """
    check_sources(data.data, data.validation)
    if not data.data:
        raise InputError("rivals are compared on data: give --data.")
    early.check(model, device, config, data, data.data, data.validation)
    with heap.importing():
        from ffmerge import commands
    from ffmerge.tables import comparison_table

    result = commands.compare(model, config, data, device)
    return Result(result.to_json(), comparison_table(result))


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the package.")],
    config: ExportConfig,
    load: LoadConfig,
    columns: ColumnsConfig,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data of the task: a few rows are stored, and validate compares on them."
        ),
    ] = None,
) -> Result:
    """Export a checkpoint, merged or not, as an ONNX package.

    Example: [bold]ffmerge export merged package[/bold]
    """
    check_sources(data)
    if data is None:
        check_without_data(config)
    early.check_output(out)
    early.check(model, load, config, columns, data)
    with heap.importing():
        from ffmerge import commands
    from ffmerge.tables import WITHOUT_DATA, package_table

    package = commands.export(model, out, config, load, data, columns)
    blind = bool(set(FOUR_BITS) & set(config.dtypes)) and data is None
    hint = WITHOUT_DATA if blind else None
    value = {**package.to_json(), "hint": hint}
    then = f"Next: ffmerge validate {_quoted(out)}; a runtime needs no {REFERENCE} and no README.md"
    return Result(value, package_table(package, blind), last=then)


def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder: the package, and what was narrowed.")],
    config: CompressConfig,
    data: DataConfig,
    load: LoadConfig,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell the steps, sizes and time, and write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do all anew, and replace what it once wrote.")
    ] = False,
) -> Result:
    """Ship a checkpoint under a size: choose what loses least, export, validate.

    Stopped, the same command goes on where it was: what is done is kept beside OUT until the end.

    Example: [bold]ffmerge compress MODEL small --size 30MB --data validation.csv[/bold]
    """
    check_sources(data.data, data.validation)
    if not data.data:
        raise InputError("what fits is chosen by what it loses: give --data.")
    early.check_output(out, overwrite)
    early.check(model, load, config, data, data.data, data.validation)
    with heap.importing():
        from ffmerge.compress import compress, outline
    from ffmerge.tables import compress_table, outline_table

    if dry_run:
        told = outline(model, out, config, data, load, overwrite)
        return Result(told.to_json(), outline_table(told))
    result = compress(model, out, config, data, load, overwrite)
    return Result(result.to_json(), compress_table(result), result.ok)


def share(
    source: Annotated[Path, typer.Argument(help="An ONNX file from any exporter.")],
    target: Annotated[Path, typer.Argument(help="New ONNX file.")],
    config: ShareConfig,
) -> Result:
    """Store equal weights of any ONNX file once, in the form that stays shared when loaded.

    Example: [bold]ffmerge share model.onnx shared.onnx[/bold]
    """
    from ffmerge.passes.graph.run import share_file
    from ffmerge.tables import WITHOUT_DATA, share_table

    result = share_file(source, target, config)
    blind = config.dtype in FOUR_BITS and config.data is None
    hint = WITHOUT_DATA if blind else None
    then = f"Next: ffmerge audit {_quoted(target)}"
    value = {**result.to_json(), "hint": hint}
    return Result(value, share_table(result, target, blind), last=then)


def audit(
    path: Annotated[Path, typer.Argument(help="An ONNX file or a package folder.")],
    load: Annotated[
        bool, typer.Option(help="Load the model with ONNX Runtime in a fresh process and look.")
    ] = True,
) -> Result:
    """Tell what is stored twice, what is tied, and what a runtime would un-share; 1 if any is.

    Example: [bold]ffmerge audit package[/bold]
    """
    from ffmerge.runtime_tests.loaded import audit
    from ffmerge.tables import audit_table

    found = audit(path, load)
    return Result(found.to_json(), audit_table(found), found.ok)


def validate(
    package: Annotated[Path, typer.Argument(help="A package folder.")], config: ValidateConfig
) -> Result:
    """Compare a package with PyTorch's outputs on real runtimes; measure memory and latency.

    Writes validation.json, report.html and report.md into the package. Exits with 1 on any
    failure; a provider that is not really used is one. What --all does not find installed is
    listed as not tested.

    Example: [bold]ffmerge validate package --provider cpu[/bold]
    """
    from ffmerge.runtime_tests.report import REPORT
    from ffmerge.runtime_tests.validate import validate, written
    from ffmerge.tables import validation_table

    with progress.shown() as show:
        result = validate(package, config, progress=lambda step: show(step, 0, 0))
    page, text, numbers = written(package, result)
    wrote = f"Wrote {page}, {text} and {numbers} into {_quoted(package)}"
    if page != REPORT:
        wrote += f"; {REPORT} is still that of a run that held"
    return Result(result.to_json(), validation_table(result), result.ok, wrote)


def push(
    package: Annotated[Path, typer.Argument(help="A package folder.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Of the hub; by default what hf auth login left.")
    ] = None,
) -> Result:
    """Upload a package to the Hugging Face hub, after seeing that it is whole.

    Example: [bold]ffmerge push package ORG/NAME[/bold]
    """
    from ffmerge.push import push
    from ffmerge.tables import pushed_table

    found = push(package, repository, private, token)
    return Result(found.to_json(), pushed_table(found))


def similarity(
    model: Model,
    config: SimilarityConfig,
    device: DeviceConfig,
    columns: ColumnsConfig,
    data: Annotated[str, typer.Option(help=_DATA)],
    out: Annotated[
        Path | None,
        typer.Option(help="New picture, .svg, or new folder with one for each stack."),
    ] = None,
) -> Result:
    """Show how alike the feed-forward sublayers are: CKA of outputs, correlation of neurons.

    Example: [bold]ffmerge similarity gpt2 --data validation.txt --out gpt2.svg[/bold]
    """
    check_sources(data)
    early.check_output(out)
    early.check(model, device, config, columns, data)
    with heap.importing():
        from ffmerge import commands
    from ffmerge.tables import similarity_table

    found, files = commands.similarity(model, data, config, out, device, columns)
    stacks = [stack.to_json() for stack in found]
    value = {"stacks": stacks, "files": [str(file) for file in files]}
    wrote = ""
    if files:
        wrote = f"Wrote {', '.join(map(_quoted, files))}"
    return Result(value, similarity_table(found), last=wrote)


for each in (
    demo,
    compress,
    inspect,
    merge,
    compare,
    export,
    share,
    audit,
    validate,
    push,
    similarity,
):
    flags.command(app, each)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML: a list of `command: {option: value}`.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all steps and list them, and do none.")
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Do the steps of a recipe in order, until one fails; options are those of the commands.

    Example: [bold]ffmerge run recipe.yaml[/bold]
    """
    from ffmerge.recipe import steps

    group: Any = typer.main.get_command(app)
    commands = {name: command for name, command in group.commands.items() if name != "run"}
    results: list[dict[str, Any]] = []
    code = 0
    planned = steps(recipe, commands)
    for number, (name, *words) in enumerate(planned, 1):
        typed = " ".join([name, *(_as_typed(word) for word in words if word != "--")])
        progress.announce(f"step {number} of {len(planned)}: {typed}")
        if dry_run:
            results.append({"command": typed})
            continue
        said = StringIO()
        out = sys.stdout
        if as_json:
            words, out = ["--json", *words], said
        with redirect_stdout(out):
            code = commands[name].main(words, f"ffmerge {name}", standalone_mode=False) or 0
        if as_json:
            value = json.loads(said.getvalue())
            results.append({"command": name, "exit_code": code, "result": value})
        if code:
            break
    if as_json:
        print(json.dumps({"steps": results}, indent=2))
    if code:
        raise typer.Exit(code)


def _as_typed(word: str) -> str:
    """Return a word of a step as it is told: a token stays secret."""
    if word.startswith("--token="):
        return "--token=***"
    return shlex.quote(word)


def _formatted(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """Return a warning as it is shown: one of ffmerge's as one line, like its errors."""
    if issubclass(category, FfmergeWarning):
        return f"ffmerge: {message}\n"
    return _usual_format(message, category, *place)


_usual_format = warnings.formatwarning


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one sentence, and with ``--debug`` its traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    progress.tell(verbose="-v" in words, quiet="-q" in words)
    if "-q" in words:
        warnings.simplefilter("ignore", FfmergeWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.formatwarning = _formatted  # type: ignore[assignment]
    atexit.register(gc.freeze)  # all goes with the process: to look for cycles in it takes 1 s
    try:
        app([word for word in words if word not in _ANYWHERE], prog_name="ffmerge")
    except Exception as error:  # whatever leaves a command is told, and is no success
        if debug:
            traceback.print_exc()
        sentence, code = _told(error)
        print(f"ffmerge: {printable(sentence)}", file=sys.stderr)
        sys.exit(code)


def _told(error: Exception) -> tuple[str, int]:
    """Return the sentence that tells an error, and the exit code."""
    if isinstance(error, FfmergeError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.filename or 'the disk'} cannot be written: {error.strerror}.", 2
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # PyTorch's
        return "there is not enough memory for this: give fewer rows at a time (--batch-size).", 2
    what = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return (
        f"this is a fault of ffmerge and not of its input ({what}): please "
        "open an issue with the command, its input, and what --debug adds to this line.",
        3,
    )


if __name__ == "__main__":
    main()
