"""``optimum-cli ffmerge``: ffmerge's own commands, in both environments."""

import json
import runpy
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from optimum_env import ROOT, require_optimum

import ffmerge

MODEL = ROOT / "models" / "digits_vit"


def _optimum_cli(python: Path, *arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [python, "-m", "optimum.commands.optimum_cli", *map(str, arguments)],
        capture_output=True, text=True, cwd="/", timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "environment", [pytest.param("base", marks=pytest.mark.slow), "optimum-onnx"]
)
def test_it_takes_the_same_arguments_and_gives_the_same_codes(environment: str) -> None:
    python = Path(sys.executable) if environment == "base" else require_optimum() / "python"
    code, out, err = _optimum_cli(python, "ffmerge", "inspect", MODEL, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["parameters"] == ffmerge.inspect(MODEL).parameters == 302_410
    assert found["stacks"][0]["layers"] == 6
    code, _, err = _optimum_cli(python, "ffmerge", "inspect", "/nowhere")
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("ffmerge: /nowhere is not a folder")


def test_help_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "exporter" / "optimum_plugin" / "register_ffmerge.py"
    parser = ArgumentParser("optimum-cli ffmerge")
    vars_of = runpy.run_path(str(path))
    vars_of["FfmergeCommand"].parse_args(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(f" {command} " in shown for command in ("compress", "merge", "export", "audit"))
