"""Results as tables in a notebook: what ``_repr_html_`` of the public results returns."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

Table = tuple[str, Sequence[str], Sequence[Sequence[Any]]]  # title, headings, rows


def html_of(tables: Iterable[Table]) -> str:
    """Return tables as HTML; every cell is text."""
    parts = []
    for title, headings, rows in tables:
        parts.append(f"<table><caption>{escape(title)}</caption>")
        for tag, cells in [("th", headings), *(("td", row) for row in rows)]:
            parts.append("<tr>" + "".join(f"<{tag}>{escape(str(c))}</{tag}>" for c in cells))
        parts.append("</table>")
    return "\n".join(parts)
