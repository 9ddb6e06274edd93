"""How a command ends: exit codes, one sentence, and nothing left half-written or in the way."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from graphs import build, normal
from tiny import vit

from ffmerge import files, progress
from ffmerge.errors import InputError
from ffmerge.models import checkpoint, inspection

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 100 kB, as on a disk that is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def saved(folder: Path) -> Path:
    """Write a graph of 1.1 MB of weights, so that its data is a file of its own."""
    model = build("(float[n, 512] x) => (float[n, 540] y) {y = MatMul(x, W)}", W=normal(512, 540))
    ir.save(model, folder / "in.onnx")
    return folder / "in.onnx"


def test_a_fault_is_told_in_a_sentence(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def inspect(*_: Any, **__: Any) -> None:
        raise ValueError("boom\nand more")

    monkeypatch.setattr(inspection, "inspect", inspect)
    code, out, err = command("inspect", tmp_path)
    assert (code, out) == (3, "")
    assert err.startswith(
        "ffmerge: this is a fault of ffmerge and not of its input (ValueError: boom)"
    )
    assert err.count("\n") == 1
    for words in (("--debug", "inspect", tmp_path), ("inspect", tmp_path, "--debug")):
        code, _, err = command(*words)
        assert code == 3
        assert err.startswith("Traceback (most recent call last)")


def test_debug_shows_where_an_input_was_refused(command: Command, tmp_path: Path) -> None:
    code, _, err = command("inspect", tmp_path, "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "holds no config.json" in err.splitlines()[-1]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_told_and_nothing_stays(command: Command, tmp_path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, resource.RLIM_INFINITY))
    source = saved(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    code, _, err = command("share", source, tmp_path / "out.onnx")
    assert code == 2
    assert err == f"ffmerge: cannot write {tmp_path / 'out.onnx'}: File too large.\n"
    with pytest.raises(InputError, match=r"cannot write .*File too large"):
        checkpoint.save(vit(), tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_what_a_killed_share_left_is_not_in_the_way(command: Command, tmp_path: Path) -> None:
    """It was killed when its data stood beside the graph that was still in its folder."""
    source = saved(tmp_path)
    left = tmp_path / ".out.onnx.partial-abc"
    left.mkdir()
    (left / "out.onnx").write_bytes(b"graph")
    (tmp_path / "out.onnx_data").write_bytes(b"data")
    assert command("share", source, tmp_path / "out.onnx")[0] == 0
    assert (tmp_path / "out.onnx_data").stat().st_size > 1_000_000
    assert not left.exists()


def test_data_of_somebody_else_is_left_alone(command: Command, tmp_path: Path) -> None:
    source = saved(tmp_path)
    (tmp_path / "out.onnx_data").write_bytes(b"data")
    code, _, err = command("share", source, tmp_path / "out.onnx")
    assert code == 2
    assert "out.onnx_data exists already" in err
    assert (tmp_path / "out.onnx_data").read_bytes() == b"data"


def test_only_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".out.partial-dead"
    dead.mkdir()
    with files.staged(tmp_path / "out"):
        assert not dead.exists()
        (living,) = tmp_path.glob(".out.partial-*")
        files.clean_up(tmp_path / "out")
        assert living.exists()
    other = tmp_path / ".out2.partial-dead"
    other.mkdir()
    files.clean_up(tmp_path / "out")
    assert other.exists()


def test_a_log_has_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 1.0, 5.5, 7.0, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with progress.shown() as show:
        show("search", 1, 9)
        show("search", 2, 9)
        show("search", 3, 9)
        show("writing", 0, 0)
    assert capsys.readouterr().err == "ffmerge: search 2/9\nffmerge: writing\n"


def test_a_package_of_changed_bytes_does_not_pass_an_audit(
    command: Command, tmp_path: Path
) -> None:
    import ffmerge

    ffmerge.export(vit(32, 64, 2), tmp_path / "package")
    assert command("audit", tmp_path / "package", "--no-load")[0] == 0
    data = tmp_path / "package" / "model.onnx_data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    os.chmod(data, 0o644)
    data.write_bytes(changed)
    code, _, err = command("audit", tmp_path / "package", "--no-load")
    assert code == 2
    assert "the bytes of " in err
