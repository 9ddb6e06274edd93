"""Names of others' files in text: what a model calls its tensors is no markup and no command.

A name that comes from a checkpoint, an ONNX file or a manifest is shown by the terminal's tables
and by error messages (:func:`printable`), and written into reports and model cards in Markdown
(:func:`markdown`, :func:`code_span`). JSON needs neither.
"""

import html
import re

_MARKS = re.compile(r"([\\`*_\[\]|#~!]|^[-+](?=\s|$)|(?<=^\d)[.)](?=\s|$))")


def printable(text: str) -> str:
    r"""Return text without control characters, such as those that move a cursor: ``\x1b`` is shown.

    Newlines stay.
    """
    return "".join(_shown(character) for character in text)


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is: neither its marks nor HTML mean anything."""
    escaped = _MARKS.sub(r"\\\1", html.escape(printable(text), quote=False))
    return escaped.replace("\n", " ")


def code_span(text: str) -> str:
    """Return text in Markdown's code, of which it cannot get out."""
    return f"`{printable(text).replace('`', chr(39)).replace(chr(10), ' ')}`"


def _shown(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
