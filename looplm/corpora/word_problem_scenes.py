"""What word problems are about, and how quantities are put into words. Draws nothing and computes nothing.

A scene has holders (people, boxes, days) of one kind of thing; every sentence is made of a holder and a phrase that
says how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = [
    "CHANGES",
    "CHANGES_OF_MEASURES",
    "LAST_TAILS",
    "LAST_TAILS_OF_GOODS",
    "LAST_TAILS_OF_MEASURES",
    "SCENES",
    "Scene",
    "Tail",
    "write_number",
]

PEOPLE = (
    *("Ann", "Ben", "Cara", "Dan", "Ella", "Finn", "Gina", "Hugo", "Ida", "Jack"),
    *("Kim", "Leo", "Mia", "Nina", "Omar", "Paul", "Rosa", "Sam", "Tina", "Will"),
)
_COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "purple", "orange", "silver")
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def write_number(value: Fraction, style: Literal["decimal", "fraction"] = "decimal") -> str:
    """Write a number as an integer, a decimal or a fraction; where a decimal has no end, always as a fraction.

    Example:
        >>> [write_number(Fraction(*pair)) for pair in ((6, 2), (5, 2), (2, 3))]
        ['3', '2.5', '2/3']
        >>> write_number(Fraction(5, 2), "fraction")
        '5/2'
    """
    if value.denominator == 1:
        return str(value.numerator)
    if style == "fraction" or 100 % value.denominator:
        return f"{value.numerator}/{value.denominator}"
    hundredths = abs(value.numerator) * 100 // value.denominator
    text = f"{hundredths // 100}.{hundredths % 100:02}".rstrip("0")
    return f"-{text}" if value < 0 else text


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One kind of thing and who holds it.

    Attributes:
        holders: Names, with ``the`` where they need it.
        things: Singular and plural.
        verb: As in "Ann has 3 marbles".
        base: The verb in a question.
        owned: The things of some holders; ``{things}`` and ``{holders}`` stand in it.
        packs: What several of the things come in, plural.
        kinds: Two adjectives, or two phrases that follow the things, that part them; empty: there is none.
        facts: Sentences with a number that say nothing of the question; ``{holder}`` and ``{n}`` stand in them.
        preposition: ``on`` or ``in`` where holders are times; then ``actor`` does what the verb says.
        actor: See there.
        is_past: Whether the verb is past tense.
        is_mass: Whether ``owned`` is singular, as juice is.
        can_change: Whether things can be lost and added later.
        can_move: Whether things can be handed out, as apples can and trees cannot.
        style: How parts of one are written; None: the things come whole.

    Example:
        >>> SCENES[0].number(Fraction(3))
        '3'
    """

    holders: tuple[str, ...]
    things: tuple[str, str]
    verb: str
    base: str
    owned: str
    packs: str
    kinds: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    preposition: str = ""
    actor: str = ""
    is_past: bool = False
    is_mass: bool = False
    can_change: bool = True
    can_move: bool = True
    style: Literal["decimal", "fraction"] | None = None

    def number(self, value: Fraction) -> str:
        """Write a number as this scene does."""
        return write_number(value, self.style or "decimal")

    def thing(self, value: Fraction) -> str:
        """Return the name of the things after a number: singular for one, and for a fraction below one."""
        is_single = value == 1 or (self.style == "fraction" and value < 1)
        return self.things[0] if is_single else self.things[1]

    def amount(self, value: Fraction) -> str:
        """Return for example ``12 marbles``."""
        return f"{self.number(value)} {self.thing(value)}"

    def kind(self, value: Fraction, which: int) -> str:
        """Return for example ``12 red marbles`` or ``12 loaves in the morning``."""
        kind = self.kinds[which]
        if " " in kind:
            return f"{self.amount(value)} {kind}"
        return f"{self.number(value)} {kind} {self.thing(value)}"

    def reference(self, *holders: str) -> str:
        """Return holders as they stand after ``than`` and ``as``."""
        return f"{self.preposition} {' and '.join(holders)}".strip()

    def statement(self, phrase: str, *holders: str) -> str:
        """Return the sentence that one holder has, or several together, what the phrase says."""
        names = " and ".join(holders)
        if self.preposition:
            return f"{self.preposition.capitalize()} {names}, {self.actor} {self.verb} {phrase}."
        verb = self.base if len(holders) > 1 and not self.is_past else self.verb
        return f"{names[0].upper()}{names[1:]} {verb} {phrase}."

    def those(self, *holders: str) -> str:
        """Return for example ``Ann's marbles`` or ``the pens in the red box and the blue box``."""
        if self.owned == "'s":
            names = [f"{holder}'s" for holder in holders]
            return f"{' and '.join(names)} {self.things[1]}"
        return self.owned.format(things=self.things[1], holders=" and ".join(holders))

    def question(self, *holders: str, wording: int = 0) -> str:
        """Ask how much one holder has, or several together."""
        things, names = self.things[1], " and ".join(holders)
        end = " together" if len(holders) > 1 else ("", " in total", " in all")[wording % 3]
        if self.preposition:
            return f"How many {things} did {self.actor} {self.base} {self.preposition} {names}{end}?"
        auxiliary = "did" if self.is_past else ("do" if len(holders) > 1 else "does")
        return f"How many {things} {auxiliary} {names} {self.base}{end}?"

    def question_of_difference(self, greater: str, less: str) -> str:
        """Ask how much more one holder has than another."""
        if self.preposition:
            asked = f"did {self.actor} {self.base} {self.preposition} {greater} than {self.preposition} {less}"
        else:
            asked = f"{'did' if self.is_past else 'does'} {greater} {self.base} than {less}"
        return f"How many more {self.things[1]} {asked}?"


def _people(things: str, kinds: tuple[str, str], packs: str, verb: str = "has", base: str = "have") -> Scene:
    return Scene(
        holders=PEOPLE,
        things=(things.removesuffix("s"), things),
        verb=verb,
        base=base,
        owned="'s",
        packs=packs,
        kinds=kinds,
        facts=_ABOUT_PEOPLE,
    )


def _places(
    holder: str,
    verb: str,
    base: str,
    things: str,
    kinds: tuple[str, str],
    packs: str,
    fact: str,
    can_move: bool = True,
) -> Scene:
    return Scene(
        holders=tuple(f"the {colour} {holder}" for colour in _COLOURS),
        things=(things.removesuffix("s"), things),
        verb=verb,
        base=base,
        owned="the {things} in {holders}",
        packs=packs,
        kinds=kinds,
        facts=(fact,),
        can_move=can_move,
    )


def _times(holders: tuple[str, ...], actor: str, verb: str, base: str, things: tuple[str, str], packs: str) -> Scene:
    at = "on" if holders is _DAYS else "in"
    return Scene(
        holders=holders,
        things=things,
        verb=verb,
        base=base,
        owned=f"the {{things}} {verb} {at} {{holders}}",
        packs=packs,
        kinds=("in the morning", "in the afternoon") if at == "on" else ("in the first week", "after that"),
        facts=(f"{actor.capitalize()} is {{n}} years old.", f"{actor.capitalize()} has {{n}} workers."),
        preposition=at,
        actor=actor,
        is_past=True,
        can_move=False,
    )


_ABOUT_PEOPLE = (
    "{holder} is {n} years old.",
    "{holder} lives {n} kilometres from school.",
    "{holder} has {n} cousins.",
    "{holder} gets up at {n} o'clock.",
)

SCENES = (
    _people("marbles", ("red", "blue"), "bags"),
    _people("stickers", ("round", "square"), "sheets"),
    _people("shells", ("white", "pink"), "jars"),
    _people("stamps", ("old", "new"), "pages", "owns", "own"),
    _people("coins", ("gold", "silver"), "piles", "keeps", "keep"),
    _people("cards", ("large", "small"), "packs", "owns", "own"),
    _people("books", ("thick", "thin"), "shelves", "owns", "own"),
    _people("buttons", ("black", "white"), "boxes", "keeps", "keep"),
    _people("apples", ("green", "red"), "baskets"),
    _people("pencils", ("long", "short"), "boxes"),
    _places("box", "holds", "hold", "pens", ("black", "blue"), "packs", "{holder} is {n} years old."),
    _places("shelf", "holds", "hold", "plates", ("large", "small"), "piles", "{holder} is {n} years old."),
    _places("bus", "has", "have", "seats", ("old", "new"), "rows", "{holder} has {n} windows.", False),
    _places("house", "has", "have", "lamps", ("tall", "small"), "rows", "{holder} has {n} doors.", False),
    _places("garden", "has", "have", "trees", ("old", "young"), "rows", "{holder} has {n} paths.", False),
    _times(_DAYS, "the bakery", "sold", "sell", ("loaf", "loaves"), "trays"),
    _times(_DAYS, "the museum", "sold", "sell", ("ticket", "tickets"), "books"),
    _times(_MONTHS, "the farm", "sold", "sell", ("pumpkin", "pumpkins"), "carts"),
    _times(_MONTHS, "the library", "bought", "buy", ("map", "maps"), "parcels"),
    Scene(
        holders=tuple(f"the {colour} jug" for colour in _COLOURS),
        things=("litre of juice", "litres of juice"),
        verb="holds",
        base="hold",
        owned="the juice in {holders}",
        packs="bottles",
        facts=("{holder} is {n} years old.",),
        is_mass=True,
        style="decimal",
    ),
    Scene(
        holders=tuple(f"the {colour} sack" for colour in _COLOURS),
        things=("kilogram of rice", "kilograms of rice"),
        verb="holds",
        base="hold",
        owned="the rice in {holders}",
        packs="bags",
        facts=("{holder} is {n} weeks old.",),
        is_mass=True,
        style="decimal",
    ),
    Scene(
        holders=PEOPLE,
        things=("kilometre", "kilometres"),
        verb="walked",
        base="walk",
        owned="the kilometres that {holders} walked",
        packs="laps",
        kinds=("before lunch", "after lunch"),
        facts=_ABOUT_PEOPLE,
        is_past=True,
        can_change=False,
        style="decimal",
    ),
    Scene(
        holders=PEOPLE,
        things=("hour", "hours"),
        verb="worked",
        base="work",
        owned="the hours that {holders} worked",
        packs="shifts",
        kinds=("before lunch", "after lunch"),
        facts=_ABOUT_PEOPLE,
        is_past=True,
        can_change=False,
        style="decimal",
    ),
    Scene(
        holders=PEOPLE,
        things=("cup of flour", "cups of flour"),
        verb="used",
        base="use",
        owned="the flour that {holders} used",
        packs="bowls",
        kinds=("for bread", "for cake"),
        facts=_ABOUT_PEOPLE,
        is_past=True,
        is_mass=True,
        can_change=False,
        style="fraction",
    ),
)


@dataclass(frozen=True)
class Tail:
    """What happens to a quantity at the end of a problem.

    Attributes:
        operation: The step, with the quantity first; ``goal`` takes the quantity from the number.
        sentence: ``{those}`` stands for the things, ``{k}`` for the number, ``{amount}`` for it with the things,
            ``{later}`` for a word of time, ``{are}`` for the verb of those, ``{were}`` and ``{was}`` for the verb of
            plurals and singulars.
        question: What is asked if the problem ends here; also with ``{things}``.
        unit: Singular and plural of what results; None: the things themselves.
        rest: What there is then, for a further tail; empty: there is none.

    Example:
        >>> tail = Tail("/", "They share them equally.", "How many does each get?")
        >>> tail.operation
        '/'
    """

    operation: Literal["+", "-", "*", "/", "goal"]
    sentence: str
    question: str
    unit: tuple[str, str] | None = None
    rest: str = ""


_MISSING = Tail("goal", "{amount} {were} needed, and there {are} only {those}.", "How many {things} {were} missing?")
LAST_TAILS = (
    Tail("/", "All of {those} {are} split into {k} equal groups.", "How many {things} {were} there in each group?"),
    Tail(
        "*",
        "Each of {those} {was} worth {k} points.",
        "How many points {were} they worth together?",
        ("point", "points"),
    ),
    _MISSING,
)
LAST_TAILS_OF_GOODS = (
    *LAST_TAILS,
    Tail("/", "All of {those} {are} put into bags of {k}.", "How many bags {were} filled?", ("bag", "bags")),
    Tail(
        "/",
        "All of {those} {are} shared equally among {k} children.",
        "How many {things} {were} there for each child?",
    ),
)
LAST_TAILS_OF_MEASURES = (
    Tail("/", "All of {those} {are} split into {k} equal parts.", "How many {things} {were} there in each part?"),
    Tail("*", "The plan for next time {was} {k} times {those}.", "How many {things} {were} planned?"),
    _MISSING,
)
CHANGES = (
    Tail(
        "-",
        "{later}, {k} of {those} {are} lost.",
        "How many {things} {were} left?",
        rest="the {things} that {were} left",
    ),
    Tail(
        "+",
        "{later}, {amount} {were} added to {those}.",
        "How many {things} {were} there by then?",
        rest="the {things} that {were} there by then",
    ),
)
CHANGES_OF_MEASURES = (
    Tail(
        "-",
        "{later}, {amount} {were} taken from {those}.",
        "How many {things} {were} left?",
        rest="the {things} that {were} left",
    ),
    CHANGES[1],
)
