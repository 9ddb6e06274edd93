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
_THINGS = tuple(
    tuple(line.split())
    for line in """
        houses Häuser|trees Bäume|books Bücher|children Kinder|days Tage|cars Autos|apples Äpfel
        words Wörter|eggs Eier|cows Kühe|geese Gänse|mice Mäuse|men Männer|women Frauen|feet Füße
        teeth Zähne|hands Hände|years Jahre|nights Nächte|towns Städte|doors Türen|windows Fenster
        chairs Stühle|tables Tische|glasses Gläser|spoons Löffel|knives Messer|forks Gabeln
        birds Vögel|dogs Hunde|cats Katzen|horses Pferde|pigs Schweine|sheep Schafe|fish Fische
        rivers Flüsse|lakes Seen|hills Hügel|woods Wälder|leaves Blätter|flowers Blumen
        stones Steine|stars Sterne|clouds Wolken|ships Schiffe|trains Züge|roads Straßen
        bridges Brücken|letters Briefe|songs Lieder|friends Freunde|brothers Brüder
        sisters Schwestern|daughters Töchter|sons Söhne|kings Könige|queens Königinnen
        swords Schwerter|rings Ringe|keys Schlüssel
    """.replace("\n", "|").split("|")
    if line.strip()
)


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


def _count(random: Random, top: int = 4) -> tuple[str, str]:
    (english, german), (things, dinge) = _both(1 + _some(random, top)), _thing(random)
    return f"{english} {things}", f"{german} {dinge}"


def _thing(random: Random) -> tuple[str, ...]:
    return _THINGS[random.randint(len(_THINGS))]


def _dozens(random: Random) -> tuple[str, str]:
    """Return a number of dozens, which German counts out."""
    dozens, (things, dinge) = int(random.randint(2, 21)), _thing(random)
    return f"{_both(dozens)[0]} dozen {things}", f"{_both(12 * dozens)[1]} {dinge}"


def _meeting(random: Random) -> tuple[str, str]:
    (things, dinge), hour, minute = _count(random, 2), random.randint(24), random.randint(60)
    at, um = clock(int(hour), int(minute))
    return f"{things} at {at}", f"{dinge} um {um}"


def clock(hour: int, minute: int) -> tuple[str, str]:
    """Return a time of day: of twelve hours, past or to, in English, and of 24 in German."""
    late = minute > 30
    nearest = _both((hour + late - 1) % 12 + 1)[0]
    away = 60 - minute if late else minute
    side = f"{'quarter' if away == 15 else _both(away)[0]} {'to' if late else 'past'} {nearest}"
    told = {0: f"{nearest} sharp", 30: f"half past {nearest}"}.get(minute, side)
    stunde = f"{'ein' if hour == 1 else _both(hour)[1]} Uhr"
    part = "morning" if hour < 12 else "evening"
    return f"{told} in the {part}", f"{stunde} {_both(minute)[1]}" if minute else stunde


def _date(random: Random) -> tuple[str, str]:
    day, tag = _both(int(random.randint(1, 32)), "ordinal")
    month, monat = _MONTHS[random.randint(12)]
    in_year, im_jahre = _both(int(random.randint(1100, 2000)), "year")
    return f"the {day} of {month} {in_year}", f"der {tag} {monat} {im_jahre}"


KINDS: tuple[Callable[[Random], tuple[str, str]], ...] = (
    _number, _number, _ordinal, _year, _price, _date, _count, _dozens, _meeting, _meeting, _meeting,
)  # fmt: skip


def pair(random: Random) -> tuple[str, str]:
    """Return one English text and its German translation."""
    return KINDS[random.randint(len(KINDS))](random)
