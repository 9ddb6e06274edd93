"""The command line: arguments to function calls, nothing else."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ffmerge.errors import FfmergeError
from ffmerge.files import FIRST_PROCESS

app = typer.Typer(
    help="Merge the feed-forward sublayers of a Transformer and ship the shared weights once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Model = Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.")]
Task = Annotated[str | None, typer.Option(help="Task by its optimum name; inferred if not given.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that comes with the checkpoint.")
]
_DATA = typer.Option(
    help="Calibration data: .npz of model inputs, text, jsonl, csv, parquet, a folder of "
    "images, or a hub data set ID:SPLIT."
)
Data = Annotated[str | None, _DATA]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="New folder for packages and report.")] = Path(
        "ffmerge-demo"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on a trained model and real data that ffmerge ships.

    Example: [bold]ffmerge demo --out build/demo[/bold]
    """
    from ffmerge import pipeline

    result = pipeline.demo(out)
    _emit(as_json, result.to_json(), result.table())
    _exit_unless(result.ok)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A checkpoint, a folder with only config.json, or a hub id.")
    ],
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show the feed-forward stacks of a model and what tying k of them removes.

    Example: [bold]ffmerge inspect google/vit-base-patch16-224[/bold]
    """
    from ffmerge.models.inspection import inspect
    from ffmerge.tables import inspection_table

    found = inspect(model, trust_remote_code)
    _emit(as_json, found.to_json(), inspection_table(found))


@app.command()
def merge(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the merged checkpoint.")],
    window: Annotated[
        list[str] | None,
        typer.Option(
            help="First and last layer, from 0, inclusive: 3-7; by stack: --window encoder:1-3 "
            "--window decoder:0-2."
        ),
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Merge k layers; the best window is chosen.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Join layers until the model is this small: 60MB, or -25%."),
    ] = None,
    auto_precision: Annotated[
        bool,
        typer.Option(
            "--auto-precision", help="The budget is the package's: its precision is chosen too."
        ),
    ] = False,
    data: Data = None,
    validation: Annotated[
        str | None, typer.Option(help="Data that chooses the layers; else half of --data.")
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="What chooses: metric, or fidelity, which needs no labels.")
    ] = "metric",
    method: Annotated[
        str,
        typer.Option(
            help="calibrated; residual keeps more for under 1 % of the parameters; permute is the "
            "paper's; weights needs no data; average and copy-anchor are baselines."
        ),
    ] = "calibrated",
    stack: Annotated[
        list[str] | None,
        typer.Option(
            help="Which stack, where there are several; may be given several times. Encoder and "
            "decoder are both merged if none is given."
        ),
    ] = None,
    sync: Annotated[bool, typer.Option("--sync", help="The same layers in all stacks.")] = False,
    tokens: Annotated[int, typer.Option(help="Positions the statistics are taken from.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.")] = 32,
    task: Task = None,
    recover: Annotated[
        int, typer.Option(help="Steps of training towards the original on --data, without labels.")
    ] = 0,
    recover_labels: Annotated[
        bool, typer.Option("--recover-labels", help="Train on the labels of the data as well.")
    ] = False,
    recover_parts: Annotated[str, typer.Option(help="What to train: merged or all.")] = "merged",
    learning_rate: Annotated[float, typer.Option(help="Highest rate of the recovery.")] = 1e-3,
    device: Annotated[str, typer.Option(help="What computes: cpu, cuda, cuda:1.")] = "cpu",
    offload: Annotated[
        bool,
        typer.Option(
            "--offload",
            help="For a model larger than the device: weights stay on disk, each block's are put "
            "on the device while it runs.",
        ),
    ] = False,
    expanded: Annotated[
        bool, typer.Option("--expanded", help="Store every copy, for plain loaders.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Merge k feed-forward sublayers and save the checkpoint, every shared weight once.

    Example: [bold]ffmerge merge gpt2 merged --k 5 --data validation.txt[/bold]
    """
    from ffmerge import pipeline
    from ffmerge.config import MergeConfig, RecoverConfig, parse_windows
    from ffmerge.tables import merge_table

    windows, stacks = parse_windows(window or ()), tuple(stack or ())
    config = MergeConfig(
        k=k, window=windows, stacks=stacks, sync=sync, method=method, tokens=tokens,
        batch_size=batch_size, task=task, budget=budget, auto_precision=auto_precision,
        criterion=criterion,
    )  # fmt: skip
    recovery = RecoverConfig(
        steps=recover or 1, learning_rate=learning_rate, batch_size=batch_size,
        parts=recover_parts, labels=recover_labels,
    )  # fmt: skip
    result = pipeline.merge(
        model, out, config, data, validation, expanded, trust_remote_code,
        recovery if recover else None, device, offload,
    )  # fmt: skip
    _emit(as_json, result.to_json(), merge_table(result, out))


@app.command()
def compare(
    model: Model,
    data: Annotated[str, typer.Option(help="Calibration data, as for merge.")],
    k: Annotated[int, typer.Option("--k", help="Layers to merge.")],
    validation: Annotated[
        str | None, typer.Option(help="Data that measures; else half of --data.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="The method to hold against the rest.")
    ] = "calibrated",
    stack: Annotated[list[str] | None, typer.Option(help="Which stack, as for merge.")] = None,
    tokens: Annotated[int, typer.Option(help="Positions the statistics are taken from.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.")] = 32,
    task: Task = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tell whether merging is the right tool: its rivals at equal size, on your data.

    Example: [bold]ffmerge compare gpt2 --k 5 --data validation.txt[/bold]
    """
    from ffmerge import pipeline
    from ffmerge.config import CompareConfig
    from ffmerge.tables import comparison_table

    config = CompareConfig(
        k=k, stacks=tuple(stack or ()), method=method, tokens=tokens, batch_size=batch_size,
        task=task,
    )  # fmt: skip
    result = pipeline.compare(model, config, data, validation, trust_remote_code)
    _emit(as_json, result.to_json(), comparison_table(result))


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="New folder for the package.")],
    task: Task = None,
    opset: Annotated[int, typer.Option(help="ONNX operator set, 7 to 23.")] = 20,
    dtype: Annotated[str, typer.Option(help="fp32, fp16, int8 or int4.")] = "fp32",
    layout: Annotated[
        str, typer.Option(help="optimum, or transformers.js with its folder and file names.")
    ] = "optimum",
    ort: Annotated[
        bool, typer.Option("--ort", help="Also model.ort and its required_operators.config.")
    ] = False,
    prepack: Annotated[
        bool,
        typer.Option("--prepack", help="Also weights packed for this processor; says the costs."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Data of the task: a few rows are stored, and validate compares on them."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint, merged or not, as an ONNX package.

    Example: [bold]ffmerge export merged package[/bold]
    """
    from ffmerge import pipeline
    from ffmerge.config import ExportConfig
    from ffmerge.tables import package_table

    config = ExportConfig(
        task=task, opset=opset, dtype=dtype, ort=ort, prepack=prepack, layout=layout
    )
    package = pipeline.export(model, out, config, data, trust_remote_code)
    _emit(as_json, package.to_json(), package_table(package))


@app.command()
def share(
    source: Annotated[Path, typer.Argument(help="An ONNX file from any exporter.")],
    target: Annotated[Path, typer.Argument(help="New ONNX file.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="fp16, int8, int8-static, int8-weights or int4; as it is if not given."),
    ] = None,
    resident: Annotated[
        bool,
        typer.Option(
            help="Keep a tied embedding in memory once; not for a file that another tool "
            "quantizes next, which looks for weights on the right of a product."
        ),
    ] = True,
    opset: Annotated[
        int | None, typer.Option(help="ONNX operator set; the file's if not given.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Inputs of the graph as .npz, for int8-static.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Store equal weights of any ONNX file once, in the form that stays shared when loaded.

    Example: [bold]ffmerge share model.onnx shared.onnx[/bold]
    """
    from ffmerge.config import ShareConfig
    from ffmerge.passes.graph.run import share_file
    from ffmerge.tables import share_table

    result = share_file(
        source, target, ShareConfig(dtype=dtype, resident=resident, opset=opset, data=data)
    )
    _emit(as_json, result.to_json(), share_table(result, target))


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(help="An ONNX file or a package folder.")],
    load: Annotated[
        bool, typer.Option(help="Load the model with ONNX Runtime in a fresh process and look.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Tell what is stored twice, what is tied, and what a runtime would un-share; 1 if any is.

    Example: [bold]ffmerge audit package[/bold]
    """
    from ffmerge.passes.graph.audit import audit
    from ffmerge.runtime_tests.loaded import look
    from ffmerge.tables import audit_table

    found = audit(path, look if load else None)
    _emit(as_json, found.to_json(), audit_table(found))
    _exit_unless(found.ok)


@app.command()
def validate(
    package: Annotated[Path, typer.Argument(help="A package folder.")],
    provider: Annotated[
        list[str] | None,
        typer.Option(help="cpu, cuda, webgpu or another runtime; may be given several times."),
    ] = None,
    installed: Annotated[
        bool, typer.Option("--all", help="Test also every other runtime that is installed.")
    ] = False,
    data: Data = None,
    similarity: Annotated[
        Path | None,
        typer.Option(help="similarity.json of ffmerge similarity: its heat maps in the report."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="The package before the merge: is what was removed gone from memory?"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a package with PyTorch's outputs on real runtimes; measure memory and latency.

    Writes validation.json, report.html and report.md into the package. Exits with 1 on any
    failure; a provider that is not really used is one. What --all does not find installed is
    listed as not tested.

    Example: [bold]ffmerge validate package --provider cpu[/bold]
    """
    from ffmerge import pipeline
    from ffmerge.config import ValidateConfig
    from ffmerge.tables import validation_table

    config = ValidateConfig(
        providers=tuple(provider or ("cpu",)), installed=installed, data=data,
        similarity=similarity, against=against,
    )  # fmt: skip
    result = pipeline.validate(package, config)
    _emit(as_json, result.to_json(), validation_table(result))
    _exit_unless(result.ok)


@app.command()
def similarity(
    model: Model,
    data: Annotated[str, _DATA],
    out: Annotated[
        Path | None,
        typer.Option(help="New picture .svg, or new folder with one for each stack."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Positions each stack is compared on.")] = 10_000,
    reach: Annotated[
        int | None,
        typer.Option(help="Align neurons of layers at most this far apart, 0: none; else of all."),
    ] = None,
    memory: Annotated[
        float, typer.Option(help="GB for the matrices of one pass; less means more passes.")
    ] = 2.0,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass.")] = 32,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show how alike the feed-forward sublayers are: CKA of outputs, correlation of neurons.

    Example: [bold]ffmerge similarity gpt2 --data validation.txt --out gpt2.png[/bold]
    """
    from ffmerge import pipeline
    from ffmerge.config import SimilarityConfig
    from ffmerge.tables import similarity_table

    config = SimilarityConfig(tokens=tokens, reach=reach, batch_size=batch_size, memory=memory)
    found, files = pipeline.similarity(model, data, config, out, trust_remote_code)
    value = {"stacks": [stack.to_json() for stack in found], "files": [str(f) for f in files]}
    _emit(as_json, value, similarity_table(found))


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="YAML: a list of `command: {option: value}`.")],
    as_json: Json = False,
) -> None:
    """Do the steps of a recipe in order, until one fails; options are those of the commands.

    Example: [bold]ffmerge run recipe.yaml[/bold]
    """
    from contextlib import redirect_stdout
    from io import StringIO

    from ffmerge.recipe import steps

    group: Any = typer.main.get_command(app)
    commands = {name: command for name, command in group.commands.items() if name != "run"}
    results, code = [], 0
    for name, *words in steps(recipe, commands):
        with redirect_stdout(StringIO() if as_json else sys.stdout) as out:
            words = ["--json", *words] if as_json else words
            code = commands[name].main(words, f"ffmerge {name}", standalone_mode=False) or 0
        if isinstance(out, StringIO):
            results.append(
                {"command": name, "exit_code": code, "result": json.loads(out.getvalue())}
            )
        if code:
            break
    if as_json:
        print(json.dumps({"steps": results}, indent=2))
    _exit_unless(not code)


def _emit(as_json: bool, value: dict[str, Any], table: Any) -> None:
    if not FIRST_PROCESS:
        return
    if as_json:
        print(json.dumps(value, indent=2))
        return
    from rich.console import Console

    Console().print(table)


def _exit_unless(ok: bool) -> None:
    if not ok:
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: one line and exit code 2 for anything the user can mend."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        app(arguments, prog_name="ffmerge")
    except FfmergeError as error:
        print(f"ffmerge: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
