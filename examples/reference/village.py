"""Text about a made-up village: facts to remember, sums to work out, agreement and lists."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Random = np.random.RandomState

_JOBS = (
    "baker smith farmer weaver miller potter tailor mason carpenter fisher hunter brewer cook "
    "doctor teacher singer painter clerk judge sailor"
).split()
_TOWNS = (
    "Alden Birk Corvale Dunmere Elsby Fenwick Garth Hollin Ivermoor Jarrow Kelby Larkhill Marsden "
    "Norby Oakham Penrith"
).split()
_PETS = "cat dog horse goat hen duck pig sheep mouse parrot".split()
_COLOURS = "red blue green white black brown grey yellow".split()
_FRUITS = "apples pears plums cherries peaches melons figs lemons".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclass(frozen=True)
class Person:
    """One villager and all that is true of them."""

    name: str
    woman: bool
    job: str
    town: str
    pet: str
    colour: str
    age: int
    friend: int
    day: str

    @property
    def they(self) -> str:
        """Return the pronoun."""
        return "she" if self.woman else "he"

    @property
    def their(self) -> str:
        """Return the possessive."""
        return "her" if self.woman else "his"


def _people(count: int) -> tuple[Person, ...]:
    """Return the villagers, always the same."""
    random = Random(0)
    names = [a + b + c for a in "B D F G K L M N R S T V".split() for b in "a e i o u".split()
             for c in "la na ra bin mon len rik do ".split(" ")[:8]]  # fmt: skip
    picked = random.permutation(len(names))[:count]
    of = lambda words: words[random.randint(len(words))]  # noqa: E731
    return tuple(
        Person(names[i], bool(random.randint(2)), of(_JOBS), of(_TOWNS), of(_PETS), of(_COLOURS),
               int(random.randint(10, 100)), int(random.randint(count)), of(_DAYS))
        for i in picked
    )  # fmt: skip


PEOPLE = _people(100)


def _anyone(random: Random) -> Person:
    return PEOPLE[random.randint(len(PEOPLE))]


def _portrait(random: Random) -> str:
    p = _anyone(random)
    said = [
        f"{p.name} is a {p.job}",
        f"{p.name} lives in {p.town}",
        f"{p.name} is {p.age} years old",
        f"{p.name} has a {p.pet} and {p.their} {p.pet} is {p.colour}",
        f"{p.name} likes {PEOPLE[p.friend].name}",
        f"{p.name} goes to market on {p.day}",
    ]
    first, second = random.permutation(len(said))[:2]
    return f"{said[first]} ; {said[second].replace(p.name, p.they, 1)} ."


def _together(random: Random) -> str:
    p, q = _anyone(random), _anyone(random)
    where = f"both live in {p.town}" if p.town == q.town else f"live in {p.town} and in {q.town}"
    who = "women" if p.woman and q.woman else "men" if not (p.woman or q.woman) else "friends"
    return f"{p.name} and {q.name} are {who} and {where} ."


def _older(random: Random) -> str:
    p, q = _anyone(random), _anyone(random)
    than = "older than" if p.age > q.age else "younger than" if p.age < q.age else "as old as"
    return f"{p.name} is {p.age} and {q.name} is {q.age} , so {p.they} is {than} {q.name} ."


def _friend_of(random: Random) -> str:
    p = _anyone(random)
    q = PEOPLE[p.friend]
    return f"the friend of {p.name} is {q.name} , a {q.job} from {q.town} ."


def _sum(random: Random) -> str:
    a, b = (int(n) for n in random.randint(0, 31, 2))
    if random.randint(2):
        return f"{a} plus {b} is {a + b} ."
    return f"{max(a, b)} minus {min(a, b)} is {abs(a - b)} ."


def _product(random: Random) -> str:
    a, b = (int(n) for n in random.randint(2, 11, 2))
    return f"{a} times {b} is {a * b} ."


def _shopping(random: Random) -> str:
    p, day = _anyone(random), _DAYS[random.randint(7)]
    a, b = (int(n) for n in random.randint(2, 13, 2))
    one, two = (_FRUITS[i] for i in random.permutation(len(_FRUITS))[:2])
    return f"on {day} {p.name} buys {a} {one} and {b} {two} , that is {a + b} fruits ."


def _list(random: Random) -> str:
    things = [_FRUITS[i] for i in random.permutation(len(_FRUITS))[: random.randint(2, 5)]]
    return f"say : {' '.join(things)} . backwards : {' '.join(things[::-1])} ."


def _count(random: Random) -> str:
    start, step = int(random.randint(0, 40)), int(random.randint(1, 11))
    return f"count in {step} s : {' '.join(str(start + i * step) for i in range(5))} ."


_KINDS: tuple[Callable[[Random], str], ...] = (
    _portrait, _portrait, _portrait, _together, _older, _friend_of, _sum, _sum, _product,
    _shopping, _list, _count,
)  # fmt: skip


def page(random: Random, words: int) -> list[str]:
    """Return ``words`` words of text, the last sentence cut where they end."""
    page: list[str] = []
    while len(page) < words:
        page += _KINDS[random.randint(len(_KINDS))](random).split()
    return page[:words]
