"""Heat maps of layers against layers as SVG, for the report and for ``ffmerge similarity``.

A map is drawn in one colour, the more opaque the nearer to 1, with the values in percent where
they have room. It has the colour of the page around it (``color``), and loads nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, SIDE = 352, 346, 32, 320  # of a map, and of its square
NAMED = 12  # layers at most whose numbers stand at the side, and whose cells have numbers
BLUE = "#2f6fde"
# what a stack of similarity.json holds, and what that is
MAPS = {"cka": "linear CKA of outputs", "correlation": "correlation of aligned neurons"}


def heat_map(what: str, stack: Mapping[str, Any], key: str = "cka") -> str:
    """Return the map of a matrix of a stack of ``similarity.json``; what is null is left empty."""
    layers, count = stack["layers"], len(stack["layers"])
    cell, every = SIDE / count, -(-count // NAMED)
    title = escape(f"{what} of {stack['name']}")
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="heat" color="{BLUE}" role="img" '
        f'aria-label="{title}">'
    ]
    for row, values in enumerate(stack[key]):
        middle = cell * (row + 0.5)
        if row % every == 0:
            parts.append(_text(26, middle + 5, layers[row], 14, "end"))
            parts.append(_text(LEFT + middle, 340, layers[row], 14))
        for column, value in enumerate(values):
            if value is not None:
                parts += _cell(LEFT + cell * column, cell * row, cell, value)
    return "\n".join([*parts, "</svg>"])


def _cell(x: float, y: float, side: float, value: float) -> Iterable[str]:
    opacity = round(min(max(value, 0.0), 1.0), 3)
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" fill="currentColor" '
        f'fill-opacity="{opacity}"/>'
    )
    if side >= SIDE / NAMED:
        size = min(14, side / 2.6)
        yield _text(x + side / 2, y + side / 2 + 5, round(100 * value), size)


def _text(x: float, y: float, text: object, size: float, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}">{text}</text>'


def picture(stacks: Sequence[Mapping[str, Any]]) -> str:
    """Return one picture, a row for each stack, with each of its :data:`MAPS`.

    The same numbers give the same bytes.
    """
    wide, high = WIDTH + 24, HEIGHT + 40
    whole = f'width="{wide * len(MAPS)}" height="{high * len(stacks)}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {whole} font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for row, stack in enumerate(stacks):
        for column, (key, title) in enumerate(MAPS.items()):
            x, y = wide * column + 12, high * row + 24
            label = escape(f"{stack['name']}: {title}, %")
            parts.append(_text(x + LEFT + SIDE / 2, y - 6, label, 14))
            parts.append(f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}">')
            parts.append(heat_map(title, stack, key))
            parts.append("</svg>")
    return "\n".join([*parts, "</svg>", ""])
