import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from packages import linear_package
from rich.console import Console

from ffmerge.files import size_text
from ffmerge.models.manifest import FileRecord, GraphRecord, Manifest, MetricResult, Skip
from ffmerge.models.probe import Probe
from ffmerge.models.record import Group, MergeRecord, Tie
from ffmerge.runtime_tests.report import Extras, Point, made_by, write_report
from ffmerge.runtime_tests.results import (
    Divergence,
    Footprint,
    Generation,
    MetricRow,
    OutputParity,
    ProviderResult,
    Validation,
)
from ffmerge.runtime_tests.rows import losses, output_rows, rows, summary
from ffmerge.runtime_tests.validate import check_package, validate
from ffmerge.runtime_tests.words import time_text
from ffmerge.tables import cost_table

MINUS = "\N{MINUS SIGN}"
EVIL = "<script>alert('x')</script>"
COST = Footprint(
    rss_bytes=20_000_000,
    anonymous_bytes=None,
    running_bytes=21_000_000,
    memory_reason=None,
    load_s=0.05,
    first_ms=6.0,
    median_ms=4.0,
    p95_ms=5.0,
    tokens_per_s=None,
    runs=50,
    given="x 1 x 8",
    threads=1,
    device="cpu",
    placement=None,
)
MANIFEST = Manifest(
    versions={"ffmerge": "0"},
    source={},
    model_type="linear",
    task="image-classification",
    dtype="fp32",
    opset=20,
    parameters=2_500_000,
    parameter_bytes=10_000_000,
    bytes_total=10_000_000,
    bytes_unique=10_000_000,
    merge=MergeRecord(
        "permute", (Group("stack", (3, 4, 5)), Group("stack", (7, 9))), 9, 5, 36, 20,
        {"name": "accuracy", "before": 0.98, "merged": 0.9, "recovered": 0.97},
    ),
    ties=(Tie("layer.3.up", ("layer.3.up", "layer.4.up")),),
    skipped=(Skip(EVIL, "too small"),),
    graphs=(),
    files=(FileRecord("model.onnx", 10_000_000, ""),),
)  # fmt: skip
OUTPUT = OutputParity(
    graph="model.onnx",
    name="logits",
    optimization="all",
    max_abs=1e-6,
    max_rel=None,
    cosine=1.0,
    quality=None,
    worst=None,
    compared=20,
    elements=20,
    atol=2e-5,
    rtol=1e-5,
    ok=True,
    reason=None,
    cases=(),
)


def measured(manifest: Manifest, label: str = "package", **fields: Any) -> Validation:
    """Return the validation of a package that ran on the CPU."""
    metric = MetricResult("accuracy", 0.9755, 1000)
    known: dict[str, Any] = {"outputs": [OUTPUT], "metric": metric, "footprint": COST, **fields}
    cpu = ProviderResult("cpu", "CPUExecutionProvider", used="CPUExecutionProvider", **known)
    return Validation(manifest, (cpu,), label=label)


def smaller(**fields: Any) -> Validation:
    """Return the validation of the merged package, with other values of some of its fields."""
    files = (FileRecord("model.onnx", 6_200_000, ""),)
    manifest = replace(MANIFEST, files=files, parameters=1_550_000)
    metric = MetricResult("accuracy", 0.9721, 1000)
    label = fields.pop("label", "merged")
    return measured(manifest, label, **{"footprint": SAVED, "metric": metric, **fields})


SAVED = replace(COST, rss_bytes=12_400_000, anonymous_bytes=12_000_000, median_ms=4.02, p95_ms=6.0)
BEFORE, AFTER = measured(MANIFEST, "original"), smaller()
STAGES = [
    MetricRow("original", "PyTorch", "test", "accuracy", 0.9755, 1000),
    MetricRow("merged", "PyTorch", "test", "accuracy", 0.973, 1000),
    MetricRow("served", "cpu", "test", "accuracy", 0.9721, 1000),
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    linear_package(
        folder, np.eye(4, dtype=np.float32), np.zeros(4, np.float32), merge=MANIFEST.merge
    )
    return folder


def test_rows_are_in_words_with_their_change() -> None:
    table = {row.name: row for row in rows(BEFORE, AFTER, STAGES)}
    size = table["Size on disk"]
    assert (size.before, size.after, size.change) == ("10.0 MB", "6.20 MB", f"{MINUS}38.0 %")
    assert size.verdict == "better"
    assert table["Latency, median"].verdict == "same"  # 0.5 % is noise
    # runs of the merged one lie 49 % apart, so 20 % says nothing, and 25 % with steady runs does
    p95 = table["Latency, p95"]
    assert (p95.change, p95.verdict) == ("+20.0 %, noise", "same")
    steady = measured(MANIFEST, footprint=replace(COST, p95_ms=4.1))
    slower = smaller(footprint=replace(SAVED, median_ms=5.0, p95_ms=5.2))
    median = next(row for row in rows(steady, slower) if row.name == "Latency, median")
    assert (median.change, median.verdict) == ("+25.0 %", "worse")
    assert table["Memory, anonymous"].before is None
    assert (table["Accuracy"].after, table["Accuracy"].change) == ("97.21 %", f"{MINUS}0.34 points")
    assert table["Accuracy"].verdict == "worse"
    assert table["Method loss"].change == f"{MINUS}0.25 points"
    assert table["Export loss"].change == f"{MINUS}0.09 points"
    assert "1e-06" in table["Export loss"].note


def test_a_lower_perplexity_is_better() -> None:
    old = measured(MANIFEST, metric=MetricResult("perplexity", 30.0, 9))
    new = smaller(metric=MetricResult("perplexity", 28.5, 9))
    row = next(row for row in rows(old, new) if row.name == "Perplexity")
    assert (row.before, row.after, row.change, row.verdict) == (
        "30",
        "28.5",
        f"{MINUS}1.5000",
        "better",
    )


def test_what_was_not_measured_has_no_row() -> None:
    bare = smaller(footprint=None, metric=None)
    lines = {row.name: row for row in rows(BEFORE, bare, STAGES[:2])}
    assert "Memory" not in lines and "Accuracy" not in lines
    assert "Method loss" in lines
    assert lines["Export loss"].after == "outputs within 1e-06"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (42_000_000, "42.0 MB"),
        (123_456_789, "123 MB"),
        (5_000_000_000, "5.00 GB"),
        (-4096, "-4.10 kB"),
    ],
)
def test_sizes_have_three_figures(size: int, text: str) -> None:
    assert size_text(size) == text


def test_times_change_to_seconds() -> None:
    assert [time_text(t) for t in (0.0298, 4.0, 999.4, 1500.0)] == [
        "0.0298 ms",
        "4.00 ms",
        "999 ms",
        "1.50 s",
    ]


def test_sharing_kept_is_memory_saved_of_bytes_removed() -> None:
    saved = smaller(footprint=replace(COST, rss_bytes=20_000_000 - 3_610_000))  # of 3,800,000
    kept = next(row for row in rows(BEFORE, saved) if row.name == "Sharing kept")
    assert (kept.before, kept.after) == (None, "95 %")
    untold = measured(MANIFEST, footprint=replace(COST, rss_bytes=None))
    for old, new in ((None, AFTER), (AFTER, BEFORE), (untold, AFTER)):
        assert "Sharing kept" not in {row.name for row in rows(old, new)}


def test_more_tokens_per_second_are_better() -> None:
    old = measured(MANIFEST, footprint=replace(COST, tokens_per_s=1000.0))
    new = smaller(footprint=replace(SAVED, tokens_per_s=2000.0))
    (row,) = (row for row in rows(old, new) if row.name == "Tokens per second")
    assert (row.before, row.after, row.change) == ("1,000.0", "2,000.0", "+100.0 %")
    assert row.verdict == "better"
    assert "Tokens per second" not in {row.name for row in rows(BEFORE, AFTER)}


def test_the_page_and_the_terminal_say_the_same(tmp_path: Path) -> None:
    page = visible(write_report(tmp_path, AFTER, BEFORE, STAGES))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(cost_table(rows(BEFORE, AFTER, STAGES)))
    terminal = console.export_text()
    for row in rows(BEFORE, AFTER, STAGES):
        for text in (row.name, row.before, row.after, row.change):
            assert (text or "") in page
            assert (text or "") in terminal


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write_report(tmp_path, AFTER, BEFORE, STAGES).read_text()
    assert page.count("<svg") == 6  # size, memory, latency, accuracy, two groups
    assert re.findall(r"https?:|//\w|\bsrc=|\bhref=|url\((?!#)|@import|<link|<script", page) == []


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    named = smaller(label=f"merged {EVIL} [red]")
    page = write_report(tmp_path, named, also=Extras([f"run {EVIL}"]))
    assert "<script" not in page.read_text()
    assert visible(page).count(EVIL) >= 3  # title, skipped, command
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    row = replace(rows(None, AFTER)[0], name="[red]x[/red]")
    console.print(cost_table([row]))
    assert "[red]x[/red]" in console.export_text()


def test_the_page_tells_what_is_shared_and_what_was_left_alone(tmp_path: Path) -> None:
    page = visible(write_report(tmp_path, AFTER, BEFORE, STAGES, Extras(["ffmerge demo"])))
    for text in (
        f"merged takes 6.20\xa0MB instead of 10.0\xa0MB ({MINUS}38.0\xa0%) on disk.",
        "layers 3-5 (3 layers",
        "layers 7, 9 (2 layers",
        "layer.4.up",
        "too small",
        "original against merged, both in PyTorch",
        "outputs within 1e-06",
        "ffmerge demo",
        "all checks passed",
    ):
        assert text in page


def test_alone_a_package_has_values_and_no_comparison(tmp_path: Path) -> None:
    page = visible(write_report(tmp_path, AFTER))
    assert "What it costs" in page and "6.20 MB" in page
    assert "Before" not in page and "instead of" not in page


def test_alone_the_first_sentence_tells_what_the_original_was(tmp_path: Path) -> None:
    """Size and score of the original are known without the package before the merge."""
    record = replace(AFTER.manifest.merge, bytes_before=10_000_000)
    found = replace(AFTER, manifest=replace(AFTER.manifest, merge=record))
    page = visible(write_report(tmp_path, found))
    assert "6.20\N{NO-BREAK SPACE}MB (the original: 10.0 MB of weights) on disk" in page


def test_a_run_that_fails_leaves_the_report_of_one_that_held(tmp_path: Path, command: Any) -> None:
    eye, folder = np.eye(4, dtype=np.float32), tmp_path / "package"
    linear_package(folder, eye, np.zeros(4, np.float32), eye)
    assert validate(folder).ok
    page, numbers = (folder / "report.html").read_text(), (folder / "validation.json").read_text()
    code, out, _ = command("validate", folder, "--provider", "cuda")
    assert code == 1 and "Wrote report.failed.html" in out and "run that held" in out
    assert (folder / "report.html").read_text() == page
    assert (folder / "validation.json").read_text() == numbers
    assert "a check failed" in visible(folder / "report.failed.html")
    assert not json.loads((folder / "validation.failed.json").read_text())["ok"]
    assert validate(folder).ok
    assert not list(folder.glob("*.failed.*"))


def test_a_tolerance_is_told_by_the_models_own_rounding() -> None:
    (output,) = AFTER.providers[0].outputs[:1]
    output = replace(output, max_abs=3e-6, atol=8e-6, rtol=1e-3)
    graph = GraphRecord(output.graph, (output.name,), Probe((), ()), rounding={output.name: 2e-6})
    manifest = replace(AFTER.manifest, graphs=(graph,))
    ((_, told, _),) = output_rows([output], manifest)
    assert told.split("\n") == [
        "3e-06",
        "1.5 times the model's own rounding in float32, allowed 4 times, and 0.1 % of each value",
    ]
    ((_, told, _),) = output_rows([replace(output, atol=0.5)], manifest)
    assert told.endswith("allowed 0.5, and 0.1 % of each value")
    ((_, told, _),) = output_rows([replace(output, atol=0.5, out=2)], manifest)
    assert told.endswith("; 2 elements are farther off, as single ones may be")


def test_a_failed_check_is_said_first(tmp_path: Path) -> None:
    eye = np.eye(4, dtype=np.float32)
    linear_package(tmp_path / "package", eye, np.zeros(4, np.float32), eye + 1)
    validate(tmp_path / "package")
    page = visible(tmp_path / "package" / "report.html")
    assert "a check failed" in page and "all checks passed" not in page
    assert "Do not ship it yet" in page
    assert "elements are out of tolerance" in page


def test_the_same_measurements_give_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(tmp_path, AFTER, BEFORE, STAGES).read_bytes()
    assert write_report(tmp_path, AFTER, BEFORE, STAGES).read_bytes() == first


def test_bars_start_at_zero_and_keep_their_proportion(tmp_path: Path) -> None:
    page = write_report(tmp_path, AFTER, BEFORE, STAGES).read_text()
    size = page.split("<svg", 2)[1]
    bars = re.findall(r'<rect x="(\S+)" .*? width="(\S+)" fill="var\((--\w+)\)"', size)
    widths = {colour: float(width) for start, width, colour in bars if start == bars[0][0]}
    assert widths["--after"] / widths["--before"] == pytest.approx(0.62, abs=1e-8)  # measured 0
    assert 'aria-label="Size on disk: Before 10.0 MB, After 6.20 MB"' in size
    alone = write_report(tmp_path, AFTER).read_text()
    assert 'height="26"' not in alone  # one bar says nothing


def test_what_every_runtime_did_is_told(package: Path) -> None:
    found = check_package(package)
    (cpu,) = found.providers
    divergence = Divergence(
        "model.onnx", "all", "node_7", "MatMul", "value_7", "layer.3.up", ("layer.3.up.weight",),
        None, 0.5, 1e-5, "PyTorch",
    )  # fmt: skip
    decoded = Generation("all", 4, 16, 64, 0.96875, 1, None, 1.0, False, "2 of 64 ids differ")
    metric = MetricResult("accuracy", 0.9725, 400)
    told = replace(cpu, divergences=[divergence], generation=[decoded], metric=metric)
    merge = replace(MANIFEST.merge, metric={"name": "accuracy", "before": 0.98, "examples": 1000})
    manifest = replace(found.manifest, merge=merge, dtype="int8")
    absent = {"web-webgpu": "no browser is installed"}
    write_report(package, replace(found, manifest=manifest, providers=(told,), not_tested=absent))
    page = visible(package / "report.html")
    for text in (
        "cpu first leaves PyTorch at the MatMul node node_7 in layer.3.up, which reads "
        "layer.3.up.weight.",
        "greedy decoding gives PyTorch's token in 96.88% of 64 places: 2 of 64 ids differ",
        "web-webgpuno browser is installednot tested",
        "original1,000 of merge's validation dataPyTorch98.00 %accuracy",
        "int8400 of --datacpu97.25 %accuracy",
    ):
        assert text in page
    markdown = (package / "report.md").read_text()
    assert "| int8 | cpu | accuracy | 97.25 % | 400 of --data |" in markdown
    assert "| web-webgpu | not tested: no browser is installed |" in markdown


def test_validate_draws_the_heat_map_it_is_given(
    package: Path, tmp_path: Path, command: Any
) -> None:
    stack = {"name": "encoder", "layers": [0, 1], "cka": [[1.0, 0.37], [0.37, 1.0]]}
    (tmp_path / "s.json").write_text(json.dumps({"stacks": [stack]}))
    assert command("validate", package, "--similarity", tmp_path / "s.json")[0] == 0
    assert 'fill-opacity="0.37"' in (package / "report.html").read_text()
    (tmp_path / "s.json").write_text("{}")
    code, _, err = command("validate", package, "--similarity", tmp_path / "s.json")
    assert code == 2 and "is not what ffmerge similarity --out writes" in err


def test_every_member_of_a_group_leads_to_the_one_that_is_stored(tmp_path: Path) -> None:
    page = write_report(tmp_path, AFTER).read_text()
    drawings = re.findall(r"<svg class=\"wide\".*?</svg>", page, re.DOTALL)
    assert [re.findall(r">([^<>\s]+)</text>", d) for d in drawings] == [["3", "4", "5"], ["7", "9"]]
    assert [d.count("<line") for d in drawings] == [3, 2]
    assert [d.count("stored once") for d in drawings] == [1, 1]


def test_the_heat_map_shows_the_numbers_it_was_given(tmp_path: Path) -> None:
    stack = {"name": "encoder", "layers": [2, 5], "cka": [[1.0, 0.25], [0.25, None]]}
    page = write_report(tmp_path, AFTER, also=Extras((), [stack])).read_text()
    (heat,) = re.findall(r"<svg viewBox=\"0 0 352 346\".*?</svg>", page, re.DOTALL)
    assert re.findall(r'fill-opacity="(\S+)"', heat) == ["1.0", "0.25", "0.25"]  # one is unknown
    assert re.findall(r">(\d+)</text>", heat) == ["2", "2", "100", "25", "5", "5", "25"]


def test_what_else_was_measured_is_drawn_and_told(tmp_path: Path) -> None:
    points = [Point("original", 4_000_000, 0.9), Point("int8", 1_000_000, 0.8, best=True)]
    also = Extras(points=points, metric="accuracy")
    page = write_report(tmp_path, AFTER, also=also).read_text()
    (drawn,) = re.findall(r'<svg[^>]*aria-label="accuracy by bytes.*?</svg>', page, re.DOTALL)
    circles = re.findall(r'cx="(\S+)" cy="(\S+)" r="9" fill="var\(--(\w+)\)"', drawn)
    # from 10 to 320 by bytes, from 180 up to 50 by the metric
    assert circles == [("320.0", "50.0", "before"), ("87.5", "180.0", "after")]
    table = visible(tmp_path / "report.html").split("Size and quality")[1]
    told = ["1: original", "4.00 MB", "90.00 %", "2: int8", "1.00 MB", "80.00 %", "★"]
    places = [table.index(text) for text in told]
    assert places == sorted(places)
    text = (tmp_path / "report.md").read_text()
    assert "| int8 | 1.00 MB | 80.00 % | best |" in text
    alike = replace(also, points=[replace(point, value=0.5) for point in points])
    assert 'cy="115.0"' in write_report(tmp_path, AFTER, also=alike).read_text()


def test_the_markdown_says_what_the_page_says(tmp_path: Path) -> None:
    page = visible(write_report(tmp_path, AFTER, BEFORE, STAGES, Extras(["ffmerge demo"])))
    text = (tmp_path / "report.md").read_text()
    first = text.split("| Stage |")[0]
    table = [line.strip("|").split(" | ") for line in first.splitlines() if line.startswith("| ")]
    cells = [cell.strip(" |") for line in table[1:] for cell in line if cell.strip(" |")]
    assert len(table) == 1 + len(rows(BEFORE, AFTER, STAGES))
    assert [cell for cell in cells if cell not in page] == []
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert "<script" not in shown
    assert EVIL in unescape(shown)
    assert "```\nffmerge demo\n```" in text


def test_the_commands_name_the_layers_of_every_stack() -> None:
    manifest = MANIFEST
    assert manifest.merge
    groups = (Group("encoder", (1, 2)), Group("decoder", (0, 1, 2)))
    both = replace(manifest, dtype="int8", merge=replace(manifest.merge, groups=groups))
    assert made_by(both, "out") == [
        "ffmerge merge MODEL merged --window encoder:1-2 --window decoder:0-2 --method permute"
        " --data DATA --recover STEPS",
        "ffmerge export merged out --task image-classification --opset 20 --dtype int8",
    ]
    one = replace(manifest.merge, groups=groups[:1])
    assert "merged --window 1-2 --method" in made_by(replace(manifest, merge=one), "out")[0]
    apart = made_by(manifest, "out")[0]  # two groups of one stack; 20 bytes
    assert "merged --budget 20B --method" in apart
    assert made_by(replace(manifest, merge=None), "out")[0].startswith("ffmerge export MODEL out")


def test_summary_and_losses_come_from_the_package(package: Path) -> None:
    found = check_package(package)
    (cpu,) = found.providers
    cpu.metric = MetricResult("accuracy", 0.969, 50)
    after = summary(found)
    files = [package / name for name in ("model.onnx", "model.onnx_data")]
    assert after["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    assert (after["metric"], after["examples"], after["parameters"]) == (0.969, 50, 20)
    assert after["max_abs"] is not None and after["max_abs"] <= 5e-8  # measured 0
    along = losses(found.metrics, found.max_abs)
    assert along == {
        "name": "accuracy", "original": 0.98, "merged": 0.97, "exported": None,
        "max_abs": found.max_abs,
    }  # fmt: skip
    unmerged = replace(found, manifest=replace(found.manifest, merge=None))
    assert losses(unmerged.metrics, found.max_abs) is None


def visible(page: Path) -> str:
    """Return the text a reader sees, without tags and styles."""
    body = page.read_text().split("</style>", 1)[1]
    return unescape(re.sub(r"<[^>]*>", "", body))
