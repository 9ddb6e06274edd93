"""Numbers in words: sizes and times with three figures, metrics, layers, and a dash for nothing."""

from ffmerge.models.metrics import ACCURACY
from ffmerge.models.record import Group

ABSENT = "\N{EN DASH}"


def number(value: float | None, form: str) -> str:
    """Return a number in this form, or a dash where there is none."""
    if value is None:
        return ABSENT
    return format(value, form)


def yes_or_no(holds: bool) -> str:
    """Return whether something holds, in a word."""
    if holds:
        return "yes"
    return "no"


def time_text(milliseconds: float) -> str:
    """Return a duration in milliseconds or seconds."""
    if milliseconds >= 999.5:
        return f"{_three_figures(milliseconds / 1000)} s"
    return f"{_three_figures(milliseconds)} ms"


def _three_figures(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def metric_text(name: str, value: float) -> str:
    """Return a metric's value: accuracy in percent, others as numbers."""
    if name == ACCURACY.name:
        return f"{100 * value:.2f} %"
    return f"{value:.4g}"


def fraction_text(fraction: float | None) -> str:
    """Return a fraction in percent."""
    if fraction is None:
        return "not measured"
    return signed(f"{100 * fraction:.0f} %")


def layers_text(group: Group) -> str:
    """Return ``3-7`` for consecutive layers, and a list for others."""
    first, last = group.layers[0], group.layers[-1]
    if group.layers == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ", ".join(str(layer) for layer in group.layers)


def signed(text: str) -> str:
    """Return a number's text with a minus sign in place of a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")
