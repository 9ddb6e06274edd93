"""Names of others are shown as they are, by terminal, report and card: no markup, no commands."""

from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from packages import linear_package
from test_runtime_parity import BIAS, WEIGHT
from tiny import vit

from ffmerge.escapes import code_span, markdown, printable
from ffmerge.exporter.card import card
from ffmerge.models.manifest import Skip
from ffmerge.models.record import Group, MergeRecord
from ffmerge.runtime_tests.validate import validate

NAMES = (
    "[bold]x[/bold]", "[/]", "a|b", "`x`", "**x**", "<b>x</b>", "[a](http://b)", "# x", "_x_",
    "<!-- x", "![a](b)", "a\\b", "&amp;", "~~x~~", "- x", "1. x", "+ x",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_as_it_is(name: str) -> None:
    """By a renderer of the standard, in a line, in a cell of a table and in code."""
    render = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render
    for text, tag in ((f"- {markdown(name)}", "li"), (f"|h|\n|-|\n| {markdown(name)} |", "td")):
        shown = render(text)
        assert f"<{tag}>{name}</{tag}>" in unescape(shown), shown
        assert shown.count("<") == render(text.replace(markdown(name), "x")).count("<")
    assert (
        unescape(render(code_span(name))) == f"<p><code>{name.replace('`', chr(39))}</code></p>\n"
    )


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert printable("a\x1b[31mb\x07\r\x9bc\u202ed\ne") == "a\\x1b[31mb\\x07\\r\\x9bc\\u202ed\ne"
    assert "\n" not in markdown("a\nb") + code_span("a\nb")


def test_a_report_and_a_card_hold_no_name_that_does_anything(tmp_path: Path) -> None:
    evil = "<script>x</script>`|\x1b[2J"
    record = MergeRecord(evil, (Group(evil, (0, 1)),), 9, 5, 36, 20, {"name": None})
    manifest = linear_package(
        tmp_path / "package", WEIGHT, BIAS, skipped=(Skip(evil, evil),), merge=record
    )
    validate(tmp_path / "package")
    model = vit(32, 64, 2)
    model.config.ffmerge = replace(record, metric={**record.metric, "recovered": None}).to_json()
    for text in ((tmp_path / "package" / "report.md").read_text(), card(model, "x", {})):
        shown = MarkdownIt("commonmark").enable("table").render(text)
        assert "<script" not in shown
        assert "\x1b" not in text
        assert "<script>x</script>" in unescape(shown)
    assert manifest.skipped[0].name == evil


def test_an_error_does_not_move_the_cursor(command, tmp_path: Path) -> None:
    code, _, err = command("inspect", tmp_path / "a\x1b[2Jb")
    assert code == 2
    assert "\x1b" not in err and "a\\x1b[2Jb" in err
