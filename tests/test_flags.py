"""Options stand once: what config.py says is what the command line, recipes and Python take."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import ffmerge.__main__ as command_line
from ffmerge import config, flags
from ffmerge.config import (
    ExportConfig,
    MergeConfig,
    RecoverConfig,
    ShareConfig,
    ValidateConfig,
)
from ffmerge.errors import InputError
from ffmerge.flags import Result

# a command, a misspelt value and the word that the refusal has; the checkpoint does not exist
MISSPELT = [
    (("merge", "gone", "out", "--k", "2", "--recover", "3", "--recover-parts", "foo"), "'foo'"),
    (("merge", "gone", "out", "--k", "2", "--recover-parts", "foo"), "'foo'"),
    (("merge", "gone", "out", "--k", "2", "--criterion", "foo"), "'foo'"),
    (("merge", "gone", "out", "--k", "2", "--method", "foo"), "'foo'"),
    (("merge", "gone", "out", "--budget", "foo"), "'foo'"),
    (("merge", "gone", "out", "--window", "3"), "'3'"),
    (("merge", "gone", "out", "--window", "1-3", "--k", "3"), "either a window"),
    (("merge", "gone", "out"), "either a window"),
    (("merge", "gone", "out", "--k", "2", "--auto-precision"), "budget"),
    (("merge", "gone", "out", "--k", "2", "--recover", "0"), "step below 1"),
    (("merge", "gone", "out", "--k", "2", "--recover", "3", "--learning-rate", "0"), "rate of 0"),
    (("merge", "gone", "out", "--k", "2", "--batch-size", "0"), "batch_size"),
    (("merge", "gone", "out", "--k", "2", "--learning-rate", "0.1"), "without --recover"),
    (("merge", "gone", "out", "--k", "2", "--recover-labels"), "without --recover"),
    (("share", "gone.onnx", "out.onnx", "--dtype", "int8-static"), "give --data"),
    (("share", "gone.onnx", "out.onnx", "--dtype", "int4", "--budget", "6MB"), "give --data"),
    (("export", "gone", "out", "--dtype", "int8", "--budget", "6MB"), "give --dtype int4"),
    (("export", "gone", "out", "--dtype", "int4", "--budget", "foo"), "'foo'"),
    (
        ("share", "gone.onnx", "out.onnx", "--dtype", "int8", "--data", "x.npz"),
        "only int8-static, int4 and q4f16 read data",
    ),
    (("compare", "gone", "--k", "2", "--data", "any:train", "--method", "foo"), "'foo'"),
    (("merge", "gone", "out", "--k", "2", "--data", "no.csv"), "no.csv is not a data file"),
    (("merge", "gone", "out", "--k", "2", "--validation", "no"), "no is not a data file"),
    (("export", "gone", "out", "--data", "no.csv"), "no.csv is not a data file"),
    (("compress", "gone", "out", "--size", "1MB", "--data", "no"), "no is not a data file"),
    (("compress", "gone", "out", "--size", "1MB"), "give --data"),
    (("export", "gone", "out", "--dtype", "foo"), "'foo'"),
    (("export", "gone", "out", "--layout", "foo"), "'foo'"),
    (("export", "gone", "out", "--opset", "99"), "99"),
    (("share", "gone.onnx", "out.onnx", "--dtype", "foo"), "'foo'"),
    (("similarity", "gone", "--data", "any:train", "--reach", "-1"), "reach"),
]


@pytest.mark.parametrize(("words", "says"), MISSPELT, ids=lambda x: " ".join(x[3:]) or None)
def test_a_misspelt_value_fails_before_anything_is_opened(
    command: Any, words: tuple[str, ...], says: str
) -> None:
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert says in err and "gone" not in err and len(err.splitlines()) == 1


def test_a_recipe_is_checked_whole_before_its_first_step(command: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"- demo: {{out: {tmp_path / 'demo'}}}\n- export: {{model: a, out: b, dtype: foo}}\n"
    )
    code, _, err = command("run", recipe)
    assert code == 2 and "step 2: no dtype 'foo'" in err
    assert not (tmp_path / "demo").exists()


@pytest.fixture
def merged() -> dict[str, Any]:
    """What a command of some configurations was called with."""
    return {}


@pytest.fixture
def app(merged: dict[str, Any]) -> typer.Typer:
    def work(model: str, config: MergeConfig, recovery: RecoverConfig | None) -> Result:
        """Do some work."""
        merged.update(model=model, config=config, recovery=recovery)
        return Result({"model": model}, "a table", ok=model != "bad")

    made = typer.Typer()
    made.callback()(lambda: None)
    flags.command(made, work)
    return made


def test_flags_become_the_configuration_again(app: typer.Typer, merged: dict[str, Any]) -> None:
    words = ["work", "m", "--window", "encoder:1-3", "--stack", "encoder"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert merged["config"] == MergeConfig(window={"encoder": (1, 3)}, stacks=("encoder",))
    assert merged["recovery"] is None
    words = ["work", "m", "--k", "3", "--recover", "7", "--recover-labels"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert merged["config"] == MergeConfig(k=3)
    assert merged["recovery"] == RecoverConfig(steps=7, labels=True)


def test_what_failed_is_printed_and_exits_with_1(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["work", "bad", "--k", "3", "--json"])
    assert (done.exit_code, done.output) == (1, '{\n  "model": "bad"\n}\n')


def test_every_option_has_a_flag_with_its_help() -> None:
    """Of the configurations that commands have: none is lost between the two."""
    app: Any = typer.main.get_command(command_line.app)
    helps = {p.help for command in app.commands.values() for p in command.params if p.opts}
    for name, kind in vars(config).items():
        if name.endswith("Config"):
            for each in fields(kind):
                if "help" in each.metadata:
                    assert each.metadata["help"] in helps, (name, each.name)


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (MergeConfig, {"k": 2, "rank": 0}, "rank"),
        (MergeConfig, {"k": 2, "rank": -1}, "rank"),
        (RecoverConfig, {"micro_batch": -1}, "micro"),
        (RecoverConfig, {"learning_rate": float("inf")}, "rate of inf"),
        (RecoverConfig, {"learning_rate": float("nan")}, "rate of nan"),
    ],
)
def test_a_number_that_means_nothing_is_refused(
    kind: Any, values: dict[str, Any], says: str
) -> None:
    """In Python too: a rank of -1 would cut the residual's last direction off."""
    with pytest.raises(InputError, match=says):
        kind(**values)


def test_what_the_extra_brings_is_known_by_the_name_it_is_imported_by() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    names = {"scikit-learn": "sklearn", "pillow": "PIL", "huggingface-hub": "huggingface_hub"}
    wanted = set()
    for requirement in project["optional-dependencies"]["torch"]:
        name = re.split(r"[<>=!~\[]", requirement)[0]
        wanted.add(names.get(name, name))
    assert wanted - {"requests"} == {*flags.TORCH_SIDE}  # which only optimum imports


def test_another_missing_module_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the extra brings is named; a fault of ours stays a traceback."""

    def work() -> Result:
        raise ModuleNotFoundError("no", name="ffmerge.nothing")

    app = typer.Typer()
    app.callback()(lambda: None)
    flags.command(app, work)
    done = CliRunner().invoke(app, ["work"])
    assert isinstance(done.exception, ModuleNotFoundError)
    monkeypatch.setattr(flags, "TORCH_SIDE", ("ffmerge",))
    done = CliRunner().invoke(app, ["work"])
    assert isinstance(done.exception, InputError)
    assert "pip install 'ffmerge[torch]'" in str(done.exception)


def test_python_may_give_text_for_paths_and_windows() -> None:
    """As the command line does; what was text met ``.suffix`` or ``/`` before."""
    assert ExportConfig(example="rows.npz").example == Path("rows.npz")
    assert ShareConfig(dtype="int4", data="rows.npz").data == Path("rows.npz")
    checked = ValidateConfig(similarity="similarity.json", against="before")
    assert (checked.similarity, checked.against) == (Path("similarity.json"), Path("before"))
    assert MergeConfig(window="1-3").window == (1, 3)
    assert MergeConfig(window="encoder:1-3").window == {"encoder": (1, 3)}
    with pytest.raises(InputError, match="not of the form FIRST-LAST"):
        MergeConfig(window="few")
