import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packages import linear_package
from rich.console import Console

from ffmerge.errors import InputError
from ffmerge.files import size_text
from ffmerge.models.manifest import Manifest, MetricResult, Skip
from ffmerge.models.record import Group, MergeRecord, Tie
from ffmerge.runtime_tests.locate import Divergence
from ffmerge.runtime_tests.metric import MetricRow
from ffmerge.runtime_tests.replay import Generation
from ffmerge.runtime_tests.report import (
    Losses,
    Summary,
    collect_losses,
    made_by,
    rows,
    summarize,
    terminal_table,
    time_text,
    write_report,
)
from ffmerge.runtime_tests.validate import NotTested, validate, write_validation

BEFORE = Summary(
    label="original",
    bytes_on_disk=10_000_000,
    parameters=2_500_000,
    rss_bytes=20_000_000,
    anonymous_bytes=None,
    load_s=0.05,
    median_ms=4.0,
    p95_ms=5.0,
    tokens_per_s=None,
    metric_name="accuracy",
    metric=0.9755,
    examples=1000,
    max_abs=1e-6,
)
AFTER = replace(
    BEFORE,
    label="merged",
    bytes_on_disk=6_200_000,
    parameters=1_550_000,
    rss_bytes=12_400_000,
    anonymous_bytes=12_000_000,
    median_ms=4.02,
    p95_ms=6.0,
    metric=0.9721,
)
LOSSES = Losses("accuracy", original=0.9755, merged=0.973, exported=0.9721, max_abs=1.2e-6)
MINUS = "\N{MINUS SIGN}"
EVIL = "<script>alert('x')</script>"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    linear_package(
        folder,
        np.eye(4, dtype=np.float32),
        np.zeros(4, np.float32),
        merge=MergeRecord(
            "permute", (Group("stack", (3, 4, 5)), Group("stack", (7, 9))), 9, 5, 36, 20,
            {"name": "accuracy", "before": 0.98, "merged": 0.9, "recovered": 0.97},
        ),
        ties=(Tie("layer.3.up", ("layer.3.up", "layer.4.up")),),
        skipped=(Skip(EVIL, "too small"),),
    )  # fmt: skip
    write_validation(folder, validate(folder))
    return folder


def test_rows_are_in_words_with_their_change() -> None:
    table = {row.name: row for row in rows(BEFORE, AFTER, LOSSES)}
    size = table["Size on disk"]
    assert (size.before, size.after, size.change) == ("10.0 MB", "6.20 MB", f"{MINUS}38.0 %")
    assert size.verdict == "better"
    assert table["Latency, median"].verdict == "same"  # 0.5 % is noise
    # runs of the merged one lie 49 % apart, so 20 % says nothing, and 25 % with steady runs does
    p95 = table["Latency, p95"]
    assert (p95.change, p95.verdict) == ("+20.0 %, noise", "same")
    steady = replace(BEFORE, p95_ms=4.1), replace(AFTER, median_ms=5.0, p95_ms=5.2)
    median = next(row for row in rows(*steady) if row.name == "Latency, median")
    assert (median.change, median.verdict) == ("+25.0 %", "worse")
    assert table["Memory, anonymous"].before is None
    assert (table["Accuracy"].after, table["Accuracy"].change) == ("97.21 %", f"{MINUS}0.34 points")
    assert table["Accuracy"].verdict == "worse"
    assert table["Method loss"].change == f"{MINUS}0.25 points"
    assert table["Export loss"].change == f"{MINUS}0.09 points"
    assert "1.2e-06" in table["Export loss"].note


def test_a_lower_perplexity_is_better() -> None:
    old = replace(BEFORE, metric_name="perplexity", metric=30.0)
    new = replace(AFTER, metric_name="perplexity", metric=28.5)
    row = next(row for row in rows(old, new) if row.name == "Perplexity")
    assert (row.before, row.after, row.change, row.verdict) == (
        "30",
        "28.5",
        f"{MINUS}1.5000",
        "better",
    )


def test_what_was_not_measured_has_no_row() -> None:
    bare = replace(AFTER, rss_bytes=None, metric_name=None, metric=None, median_ms=None)
    lines = {row.name: row for row in rows(BEFORE, bare, replace(LOSSES, exported=None))}
    assert "Memory" not in lines and "Accuracy" not in lines
    assert "Method loss" in lines
    assert lines["Export loss"].change == "outputs within 1.2e-06"


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
    saved = replace(AFTER, rss_bytes=BEFORE.rss_bytes - 3_610_000)  # of 3,800,000
    kept = next(row for row in rows(BEFORE, saved) if row.name == "Sharing kept")
    assert (kept.before, kept.after) == (None, "95 %")
    for old, new in ((None, AFTER), (AFTER, BEFORE), (replace(BEFORE, rss_bytes=None), AFTER)):
        assert "Sharing kept" not in {row.name for row in rows(old, new)}


def test_more_tokens_per_second_are_better() -> None:
    old, new = replace(BEFORE, tokens_per_s=1000.0), replace(AFTER, tokens_per_s=2000.0)
    (row,) = (row for row in rows(old, new) if row.name == "Tokens per second")
    assert (row.before, row.after, row.change) == ("1,000.0", "2,000.0", "+100.0 %")
    assert row.verdict == "better"
    assert "Tokens per second" not in {row.name for row in rows(BEFORE, AFTER)}


def test_the_page_and_the_terminal_say_the_same(package: Path) -> None:
    page = visible(write_report(package, BEFORE, AFTER, LOSSES, []))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(terminal_table(rows(BEFORE, AFTER, LOSSES)))
    terminal = console.export_text()
    for row in rows(BEFORE, AFTER, LOSSES):
        for text in (row.name, row.before, row.after, row.change):
            assert (text or "") in page
            assert (text or "") in terminal


def test_the_page_loads_nothing_from_elsewhere(package: Path) -> None:
    page = write_report(package, BEFORE, AFTER, LOSSES, []).read_text()
    assert page.count("<svg") == 6  # size, memory, latency, accuracy, two groups
    assert re.findall(r"https?:|//\w|\bsrc=|\bhref=|url\((?!#)|@import|<link|<script", page) == []


def test_names_are_text_not_markup(package: Path) -> None:
    label = f"merged {EVIL} [red]"
    page = write_report(package, None, replace(AFTER, label=label), None, [f"run {EVIL}"])
    assert "<script" not in page.read_text()
    assert visible(page).count(EVIL) >= 3  # title, skipped, command
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    row = replace(rows(None, AFTER)[0], name="[red]x[/red]")
    console.print(terminal_table([row]))
    assert "[red]x[/red]" in console.export_text()


def test_the_page_tells_what_is_shared_and_what_was_left_alone(package: Path) -> None:
    page = visible(write_report(package, BEFORE, AFTER, LOSSES, ["ffmerge demo"]))
    for text in (
        f"merged takes 6.20\xa0MB instead of 10.0\xa0MB ({MINUS}38.0\xa0%) on disk.",
        "layers 3-5 (3 layers",
        "layers 7, 9 (2 layers",
        "layer.4.up",
        "too small",
        "original against merged, both in PyTorch",
        "outputs within 1.2e-06",
        "ffmerge demo",
        "all checks passed",
    ):
        assert text in page


def test_alone_a_package_has_values_and_no_comparison(package: Path) -> None:
    page = visible(write_report(package, None, AFTER, None, []))
    assert "What it costs" in page and "6.20 MB" in page
    assert "Before" not in page and "instead of" not in page


def test_a_failed_check_is_said_first(tmp_path: Path) -> None:
    eye = np.eye(4, dtype=np.float32)
    linear_package(tmp_path / "package", eye, np.zeros(4, np.float32), eye + 1)
    write_validation(tmp_path / "package", validate(tmp_path / "package"))
    page = visible(write_report(tmp_path / "package", None, AFTER, None, []))
    assert "a check failed" in page and "all checks passed" not in page
    assert "Do not ship it yet" in page
    assert "elements are out of tolerance" in page


def test_the_same_measurements_give_the_same_bytes(package: Path) -> None:
    first = write_report(package, BEFORE, AFTER, LOSSES, []).read_bytes()
    assert write_report(package, BEFORE, AFTER, LOSSES, []).read_bytes() == first


def test_a_page_can_stand_outside_the_package_it_tells_of(package: Path, tmp_path: Path) -> None:
    page = write_report(tmp_path, BEFORE, AFTER, LOSSES, [], package)
    assert page == tmp_path / "report.html"
    assert not (package / "report.html").exists()
    with pytest.raises(InputError, match="does not exist"):
        write_report(tmp_path, BEFORE, AFTER, LOSSES, [])


def test_bars_start_at_zero_and_keep_their_proportion(package: Path) -> None:
    page = write_report(package, BEFORE, AFTER, LOSSES, []).read_text()
    size = page.split("<svg", 2)[1]
    bars = re.findall(r'<rect x="(\S+)" .*? width="(\S+)" fill="var\((--\w+)\)"', size)
    widths = {colour: float(width) for start, width, colour in bars if start == bars[0][0]}
    assert widths["--after"] / widths["--before"] == pytest.approx(0.62, abs=1e-8)  # measured 0
    assert 'aria-label="Size on disk: Before 10.0 MB, After 6.20 MB"' in size
    alone = write_report(package, None, AFTER, None, []).read_text()
    assert alone.count('height="26"') == 4 and "--before)" not in alone.split("<svg", 1)[1]


def test_what_every_runtime_did_is_told(package: Path) -> None:
    found = validate(package)
    (cpu,) = found.providers
    divergence = Divergence(
        "model.onnx", "all", "node_7", "MatMul", "value_7", "layer.3.up", ("layer.3.up.weight",),
        None, 0.5, 1e-5, "PyTorch",
    )  # fmt: skip
    decoded = Generation("all", 4, 16, 64, 0.96875, 1, None, 1.0, False, "2 of 64 ids differ")
    told = replace(cpu, divergences=(divergence,), generation=(decoded,))
    absent = NotTested("web", "Web", "no browser is installed")
    stages = (
        MetricRow("original", "PyTorch", "validation data", "accuracy", 0.98, 1000),
        MetricRow("int8", "webgpu", "--data", "accuracy", 0.9725, 400),
    )
    write_validation(
        package, replace(found, providers=(told,), not_tested=(absent,), metrics=stages)
    )
    page = visible(write_report(package, None, AFTER, None, []))
    for text in (
        "cpu first leaves PyTorch at the MatMul node node_7 in layer.3.up, which reads "
        "layer.3.up.weight.",
        "greedy decoding gives PyTorch's token in 96.88% of 64 places: 2 of 64 ids differ",
        "webno browser is installednot tested",
        "original1,000 of validation dataPyTorch98.00 %accuracy",
        "int8400 of --datawebgpu97.25 %accuracy",
    ):
        assert text in page
    markdown = (package / "report.md").read_text()
    assert "| int8 | webgpu | accuracy | 97.25 % | 400 of --data |" in markdown
    assert "| web | not tested: no browser is installed |" in markdown


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


def test_every_member_of_a_group_leads_to_the_one_that_is_stored(package: Path) -> None:
    page = write_report(package, None, AFTER, None, []).read_text()
    drawings = re.findall(r"<svg class=\"wide\".*?</svg>", page, re.DOTALL)
    assert [re.findall(r">([^<>\s]+)</text>", d) for d in drawings] == [["3", "4", "5"], ["7", "9"]]
    assert [d.count("<line") for d in drawings] == [3, 2]
    assert [d.count("stored once") for d in drawings] == [1, 1]


def test_the_heat_map_shows_the_numbers_it_was_given(package: Path) -> None:
    stack = {"name": "encoder", "layers": [2, 5], "cka": [[1.0, 0.25], [0.25, None]]}
    page = write_report(package, None, AFTER, None, [], similarity=[stack]).read_text()
    (heat,) = re.findall(r"<svg viewBox=\"0 0 352 346\".*?</svg>", page, re.DOTALL)
    assert re.findall(r'fill-opacity="(\S+)"', heat) == ["1.0", "0.25", "0.25"]  # one is unknown
    assert re.findall(r">(\d+)</text>", heat) == ["2", "2", "100", "25", "5", "5", "25"]


def test_the_markdown_says_what_the_page_says(package: Path) -> None:
    page = visible(write_report(package, BEFORE, AFTER, LOSSES, ["ffmerge demo"]))
    text = (package / "report.md").read_text()
    first = text.split("| Stage |")[0]
    table = [line.strip("|").split(" | ") for line in first.splitlines() if line.startswith("| ")]
    cells = [cell.strip(" |") for line in table[1:] for cell in line if cell.strip(" |")]
    assert len(table) == 1 + len(rows(BEFORE, AFTER, LOSSES))
    assert [cell for cell in cells if cell not in page] == []
    assert "&lt;script&gt;" in text and "<script" not in text
    assert "```\nffmerge demo\n```" in text


def test_the_commands_name_the_layers_of_every_stack(package: Path) -> None:
    manifest = Manifest.read(package)
    assert manifest.merge
    groups = (Group("encoder", (1, 2)), Group("decoder", (0, 1, 2)))
    both = replace(manifest, dtype="int8", merge=replace(manifest.merge, groups=groups))
    assert made_by(both, "out") == [
        "ffmerge merge MODEL merged --window encoder:1-2 --window decoder:0-2 --method permute"
        " --data DATA --recover STEPS",
        "ffmerge export merged out --task image-classification --opset 20 --dtype int8",
    ]
    apart = made_by(manifest, "out")[0]  # layers 3-5, and 7 with 9, of one stack; 20 bytes
    assert "merged --budget 20B --any-layers --method" in apart
    assert made_by(replace(manifest, merge=None), "out")[0].startswith("ffmerge export MODEL out")


def test_summary_and_losses_come_from_the_package(package: Path) -> None:
    result = replace(validate(package), metric=MetricResult("accuracy", 0.969, 50))
    manifest = linear_package(
        package.parent / "other", np.eye(4, dtype=np.float32), np.zeros(4, np.float32),
        merge=MergeRecord("permute", (), 9, 5, 36, 20,
                          {"name": "accuracy", "before": 0.98, "merged": 0.9, "recovered": 0.97}),
    )  # fmt: skip
    after = summarize("merged", manifest, result)
    files = [package.parent / "other" / name for name in ("model.onnx", "model.onnx_data")]
    assert after.bytes_on_disk == sum(file.stat().st_size for file in files)
    assert (after.metric, after.examples, after.parameters) == (0.969, 50, 20)
    assert after.max_abs is not None and after.max_abs <= 5e-8  # measured 0
    assert collect_losses(manifest, after) == Losses("accuracy", 0.98, 0.97, None, after.max_abs)
    assert collect_losses(replace(manifest, merge=None), after) is None


def visible(page: Path) -> str:
    """Return the text a reader sees, without tags and styles."""
    body = page.read_text().split("</style>", 1)[1]
    return unescape(re.sub(r"<[^>]*>", "", body))
