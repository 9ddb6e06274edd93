"""The demo: the whole line on the shipped model and data."""

import json
import sys
from pathlib import Path

import golden
import pytest

import ffmerge.__main__ as command_line
from ffmerge.passes.graph.audit import audit

PICTURES = 2e-3  # of 1,000 pictures two may be taken for another digit


def test_the_demo_keeps_its_promises(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    golden_result: golden.Check,
) -> None:
    monkeypatch.setattr(sys, "argv", ["ffmerge", "demo", "--out", str(tmp_path / "d"), "--json"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert not ended.value.code
    result = json.loads(capsys.readouterr().out)
    losses, before, after = result["losses"], result["before"], result["after"]
    assert losses["original"] >= 0.95  # measured 0.964 of 4,000 test pictures
    assert losses["merged"] >= 0.99 * losses["original"]  # measured 0.964 against 0.962
    assert losses["exported"] == losses["merged"] == after["metric"]
    removed = 2 * 2 * 64 * 256 - 3 * 256  # every layer keeps its biases, and gets a scale
    assert before["parameters"] - after["parameters"] == removed
    assert before["bytes_on_disk"] - after["bytes_on_disk"] > 0.98 * 4 * removed
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "checkpoint", "merged", "original", "report.html", "report.md",
    ]  # fmt: skip
    assert "How alike the sublayers were" in (tmp_path / "d" / "report.html").read_text()
    assert audit(tmp_path / "d" / "merged").ok
    assert json.loads((tmp_path / "d" / "merged" / "validation.json").read_text())["ok"] is True
    points = result["points"]
    assert len(points) == 9 and points[0]["what"] == "original, fp32"
    assert [p["bytes"] for p in points] == sorted((p["bytes"] for p in points), reverse=True)
    assert min(point["value"] for point in points) > 0.94  # measured 0.959, merged in int4
    assert points[-1]["best"] and points[-1]["bytes"] < points[0]["bytes"] / 7  # measured 7.2
    golden_result("demo", golden.kinds(result))
    golden_result("demo-search", result["merge"], PICTURES)
    for name in ("original", "merged"):
        found = golden.package(tmp_path / "d" / name, name == "original")
        golden_result(f"demo-{name}", found)
