"""Numbers, ordinals, years, prices, times and dates in words: English and German pairs."""

from collections.abc import Callable
from functools import cache

import numpy as np
from num2words import num2words

Random = np.random.RandomState

_MONTHS = (
    ("January", "Januar"), ("February", "Februar"), ("March", "März"), ("April", "April"),
    ("May", "Mai"), ("June", "Juni"), ("July", "Juli"), ("August", "August"),
    ("September", "September"), ("October", "Oktober"), ("November", "November"),
    ("December", "Dezember"),
)  # fmt: skip
_THINGS = (
    ("house", "Haus", "Häuser"), ("tree", "Baum", "Bäume"), ("book", "Buch", "Bücher"),
    ("child", "Kind", "Kinder"), ("day", "Tag", "Tage"), ("car", "Auto", "Autos"),
    ("apple", "Apfel", "Äpfel"), ("word", "Wort", "Wörter"),
)  # fmt: skip


@cache
def _both(number: int, to: str = "cardinal") -> tuple[str, str]:
    english, german = (str(num2words(number, to=to, lang=language)) for language in ("en", "de"))
    return english.replace(",", ""), german


def _some(random: Random, top: int = 6) -> int:
    """Return a number of one to ``top`` digits, every length alike often."""
    digits = random.randint(1, top + 1)
    return int(random.randint(10 ** (digits - 1), 10**digits))


def _number(random: Random) -> tuple[str, str]:
    return _both(_some(random))


def _ordinal(random: Random) -> tuple[str, str]:
    english, german = _both(_some(random, 3), "ordinal")
    return f"the {english}", f"der {german}"


def _year(random: Random) -> tuple[str, str]:
    english, german = _both(int(random.randint(1100, 2000)), "year")
    return f"in {english}", f"im Jahre {german}"


def _price(random: Random) -> tuple[str, str]:
    (euros, euro), (cents, cent) = (_both(int(n)) for n in random.randint(2, 100, 2))
    return f"{euros} euros and {cents} cents", f"{euro} Euro und {cent} Cent"


def _count(random: Random) -> tuple[str, str]:
    (english, german), (thing, _, many) = _both(2 + _some(random, 4)), _THINGS[random.randint(8)]
    plural = "children" if thing == "child" else f"{thing}s"
    return f"{english} {plural}", f"{german} {many}"


def _meeting(random: Random) -> tuple[str, str]:
    children, kinder = _count(random)
    hour, (past, nach) = int(random.randint(1, 12)), _both(int(random.randint(2, 30)))
    (now, jetzt), (_, bald) = _both(hour), _both(hour + 1)
    times = (
        (f"half past {now}", f"halb {bald}"),
        (f"quarter past {now}", f"Viertel nach {jetzt}"),
        (f"{past} past {now}", f"{nach} nach {jetzt}"),
        (f"{past} to {now}", f"{nach} vor {jetzt}"),
    )
    english, german = times[random.randint(len(times))]
    return f"{children} at {english}", f"{kinder} um {german}"


def _date(random: Random) -> tuple[str, str]:
    day, tag = _both(int(random.randint(1, 32)), "ordinal")
    month, monat = _MONTHS[random.randint(12)]
    in_year, im_jahre = _both(int(random.randint(1100, 2000)), "year")
    return f"the {day} of {month} {in_year}", f"der {tag} {monat} {im_jahre}"


KINDS: tuple[Callable[[Random], tuple[str, str]], ...] = (
    _number, _number, _number, _ordinal, _year, _price, _date, _count, _meeting,
)  # fmt: skip


def pair(random: Random) -> tuple[str, str]:
    """Return one English text and its German translation."""
    return KINDS[random.randint(len(KINDS))](random)
