"""The notebook runs from its first cell to its last, and its texts are what they were."""

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_cell_of_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    shutil.copytree(EXAMPLES / "reference", tmp_path / "reference")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            said = StringIO()
            with redirect_stdout(said):
                exec(compile("".join(cell["source"]), "a cell", "exec"), names)
            for output in cell["outputs"]:
                if output["output_type"] == "stream":
                    assert said.getvalue() == "".join(output["text"])
    merge, served = names["merge"], names["package"]
    assert len(repr(merge)) < 200 and "<table>" in merge._repr_html_()
    assert repr(served).startswith("<Package quickstart/package: text-generation")
    assert names["merge"].record.parameters_after < 0.91 * names["merge"].record.parameters_before
    assert (tmp_path / "quickstart" / "package" / "report.html").is_file()
