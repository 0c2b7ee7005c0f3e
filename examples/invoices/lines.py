"""Draws messy invoice lines, each with its one right answer.

Every line holds an invoice number, a date and an amount of money, written in one of several thousand layouts, often
among other numbers. These rules decide between possible readings, so that a perfect reader scores 100 %:

* Dates of digits only are year first (2024-03-09, 2024/03/09) or day first (9.3.2024, 09/03/24). Years are 2019-2029.
* A separator before exactly two final digits is the decimal sign; all others group thousands: 1.204 is 1204.00.
* Letters belong to the invoice number only when "-" or "/" ties them to it ("Inv4821" is 4821); they are upper case.
* Other dates and sums on the line carry a label of their own ("issued", "subtotal"): they are never the answer.
* "$" is USD, "¥" is JPY, and "Fr." is CHF.
"""

import json
import random
import re
import unicodedata
import zlib
from collections.abc import Iterator
from datetime import date, timedelta
from typing import NamedTuple

from words import (
    CURRENCIES,
    EARLIER_DATES,
    LANGUAGES,
    NOISE,
    NUMBER_NOISE,
    PARTIAL_AMOUNTS,
    WHOLE_UNITS,
    Language,
)

# One seed for each use of the lines, so that no two uses draw the same ones.
TRAIN_SEED, TOKENIZER_SEED, VALIDATION_SEED, JOB_SEED = 1, 2, 3, 5
FIELDS = ("invoice", "date", "amount", "currency")

NUMBER_DATES = (
    "{y}-{mm}-{dd}", "{y}-{mm}-{dd}", "{y}/{mm}/{dd}", "{dd}.{mm}.{y}", "{d}.{n}.{y}", "{dd}/{mm}/{y}", "{d}/{n}/{y}",
    "{dd}-{mm}-{y}", "{dd}.{mm}.{yy}", "{dd}/{mm}/{yy}", "{d}.{n}.{yy}",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FIRST_DAY, LAST_DAY = date(2019, 1, 1), date(2029, 12, 31)

# Thousands separator and decimal sign; a sign that is no single character stands for whole amounts.
AMOUNT_STYLES = (
    ("", "."), ("", "."), ("", ","), (",", "."), (",", "."), (".", ","), (".", ","), (" ", ","), (" ", "."),
    ("\u202f", ","), ("'", "."), ("", ""), (",", ""), (".", ""), (" ", ""), ("'", ".-"), ("", ",-"),
)  # fmt: skip

# Each `#` becomes a digit, each `@` one of the prefixes.
INVOICE_PATTERNS = (
    "###", "####", "####", "#####", "######", "00####", "INV-####", "INV-#####", "INV-20##/####", "20##-####",
    "##-####", "##/####", "@-####", "@-####", "@-#####", "@/####", "@/20##/###", "@-20##-####", "@-####-#", "@/##/20##",
)  # fmt: skip
INVOICE_PREFIXES = ("A", "B", "C", "F", "K", "R", "X", "FA", "FV", "RE")

SEPARATORS = (" - ", ", ", " | ", "; ", " / ", " // ", " – ", " · ", ";", "|", " -- ", " ", "  ", "\t")
RECORDS = (
    "invoice={i};date={d};amount={n};currency={c}",
    "inv={i}&due={d}&total={n}&cur={c}",
    '{{"inv": "{i}", "due": "{d}", "total": "{n}", "cur": "{c}"}}',
    '{{"currency":"{c}","total":"{n}","number":"{i}","due":"{d}"}}',
    '<invoice no="{i}" due="{d}" amount="{n}" currency="{c}"/>',
    "id: {i} / due: {d} / sum: {n} {c}",
    "{c};{n};{d};{i}",
    "{i};{d};{n};{c}",
    "{d}\t{i}\t{n}\t{c}",
    "[{i}] {d} -> {n} {c}",
    "Rechnung;{i};Datum;{d};Betrag;{n};Währung;{c}",
    "amount:{n},cur:{c},inv:{i},due:{d}",
    "inv({i}) due({d}) sum({c} {n})",
)


class Sample(NamedTuple):
    """A line, its answer by field, and the name of the layout it was written in."""

    line: str
    answer: dict[str, str]
    layout: str


class Frame(NamedTuple):
    """A line without its values: templates with {i} {d} {a} {n} {c}, and the separator between them."""

    parts: list[str]
    separator: str
    name: str


def answer_text(answer: dict[str, str]) -> str:
    """Returns the answer as the model writes it: one line of JSON, keys in the order of `FIELDS`."""
    return json.dumps({field: answer[field] for field in FIELDS})


def is_held_out(layout: str) -> bool:
    """Returns whether a layout is kept away from training, as one in eight is."""
    return zlib.crc32(layout.encode()) % 8 == 0


def stream(seed: int, held_out: bool) -> Iterator[Sample]:
    """Yields samples without end, all from layouts that training uses or all from layouts that it never sees.

    Args:
        seed: The same seed yields the same samples.
        held_out: Whether to yield the layouts kept away from training, or the others.
    """
    rng = random.Random(seed)
    while True:
        sample = make_line(rng)
        if is_held_out(sample.layout) == held_out:
            yield sample


def make_line(rng: random.Random) -> Sample:
    """Draws one line: the facts, a frame, a style for each value, then noise and slips of the typist.

    Args:
        rng: The source of all randomness.

    Returns:
        The line, its answer and its layout.
    """
    language = LANGUAGES[rng.choice(tuple(LANGUAGES))]
    frame = _frame(rng, language)
    code = rng.choice((*CURRENCIES, "USD", "EUR", "EUR", "GBP"))
    invoice, day, cents = _fill(rng, rng.choice(INVOICE_PATTERNS), INVOICE_PREFIXES), _day(rng), _cents(rng)
    group, sign = _amount_style(rng, code, frame)
    cents -= cents % 100 if len(sign) != 1 else 0
    number = _amount(cents, group, sign)
    pattern, months = _date_style(rng, language)
    values = {"i": invoice, "d": _date(day, pattern, months), "a": _money(rng, number, code), "n": number, "c": code}
    parts = [part.format(**values) for part in frame.parts]
    noisy = _with_noise(rng, parts, frame.separator, code, language)
    line = _slips(rng, frame.separator.join(noisy))
    amount = _amount(cents, "", ".")
    answer = {"invoice": invoice, "date": day.isoformat(), "amount": amount, "currency": code}
    return Sample(line, answer, f"{frame.name}~{pattern}~{group}{sign}")


def _frame(rng: random.Random, language: Language) -> Frame:
    kind = rng.choices((_labelled, _sentence, _bare, _record), weights=(45, 25, 15, 15))[0]
    return kind(rng, language)


def _labelled(rng: random.Random, language: Language) -> Frame:
    """Returns three labelled values in any order: `Inv #4821 - due 3 March 2024 - total USD 1,204.50`."""
    if rng.random() < 0.2:
        language = LANGUAGES["en"]
    labels = {"i": rng.choice(language.invoice), "d": rng.choice(language.due), "a": rng.choice(language.total)}
    order, separator = rng.sample("ida", 3), rng.choice(SEPARATORS)
    parts = [_label(rng, labels[slot]) + f"{{{slot}}}" for slot in order]
    return Frame(parts, separator, f"labelled {language.invoice[0]} {''.join(order)}{separator}")


def _label(rng: random.Random, label: str) -> str:
    if not label[-1].isalpha():
        return label + ("" if label[-1] in " #" else " ")
    return label + rng.choice((" ", " ", " ", ": ", ":", " = ", " : "))


def _sentence(rng: random.Random, language: Language) -> Frame:
    """Returns one sentence in the language of the line: `Please pay $10.00 by 3 March 2024 for invoice 4821`."""
    template = rng.choice(language.sentences)
    return Frame([template + rng.choice(("", "", ".", "!"))], rng.choice((" - ", " | ", " / ", "; ", " -- ")), template)


def _bare(rng: random.Random, language: Language) -> Frame:
    """Returns three values without labels; where only blanks separate them, the invoice number keeps a `#`."""
    order, separator = rng.sample("ida", 3), rng.choice(SEPARATORS)
    mark = "#" if separator.isspace() or rng.random() < 0.5 else ""
    parts = [mark * (slot == "i") + f"{{{slot}}}" for slot in order]
    return Frame(parts, separator, f"bare {mark}{''.join(order)}{separator}")


def _record(rng: random.Random, language: Language) -> Frame:
    """Returns a line as another program writes it: `inv=4821&due=2024-03-03&total=1204.50&cur=USD`."""
    template = rng.choice(RECORDS)
    return Frame([template], rng.choice((" - ", " | ", " / ", " # ")), template)


def _day(rng: random.Random) -> date:
    return FIRST_DAY + timedelta(days=rng.randrange((LAST_DAY - FIRST_DAY).days + 1))


def _date_style(rng: random.Random, language: Language) -> tuple[str, tuple[str, ...]]:
    """Returns a pattern and the month names to use in it."""
    if rng.random() < 0.3:
        return rng.choice(NUMBER_DATES), language.months
    if rng.random() < 0.2:
        language = LANGUAGES["en"]
    short = language.short and rng.random() < 0.4
    return rng.choice(language.dates), language.short if short else language.months


def _date(day: date, pattern: str, months: tuple[str, ...]) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}.get(day.day, "th")
    return pattern.format(
        d=day.day, dd=f"{day.day:02d}", th=f"{day.day}{suffix}", er="1er" if day.day == 1 else day.day,
        n=day.month, mm=f"{day.month:02d}", m=months[day.month - 1],
        y=day.year, yy=f"{day.year % 100:02d}", weekday=WEEKDAYS[day.weekday()],
    )  # fmt: skip


def _cents(rng: random.Random) -> int:
    """Draws a sum from 1.00 up to, but not including, 1,000,000.00, every number of digits about as often."""
    return int(10 ** rng.uniform(2, 8))


def _amount_style(rng: random.Random, code: str, frame: Frame) -> tuple[str, str]:
    """Draws the separators; no blank groups thousands where blanks also stand between the values."""
    blank_is_taken = frame.separator.isspace()
    while True:
        group, sign = rng.choice(AMOUNT_STYLES)
        if not (blank_is_taken and group.isspace()) and not (code in WHOLE_UNITS and len(sign) == 1):
            return group, sign


def _amount(cents: int, group: str, sign: str) -> str:
    whole = f"{cents // 100:,}".replace(",", group)
    return f"{whole}{sign}{cents % 100:02d}" if len(sign) == 1 else whole + sign


def _money(rng: random.Random, number: str, code: str) -> str:
    """Puts the currency before the number as a sign or code, or after it as a sign, code or word."""
    currency = CURRENCIES[code]
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(currency.signs) + rng.choice(("", " ")) + number
    if draw < 0.8:
        return number + rng.choice(("", " ")) + rng.choice((code, *currency.signs))
    return number + " " + rng.choice(currency.words)


def _fill(rng: random.Random, pattern: str, letters: tuple[str, ...] = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")) -> str:
    """Replaces each # by a digit and each @ by one of the letters, or groups of letters."""
    digits = re.sub("#", lambda _: rng.choice("0123456789"), pattern)
    return re.sub("@", lambda _: rng.choice(letters), digits)


def _with_noise(rng: random.Random, parts: list[str], separator: str, code: str, language: Language) -> list[str]:
    """Adds up to two parts that do not belong to the answer; words only if blanks separate the parts."""
    parts = list(parts)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        kinds = (_word_noise,) if separator.isspace() else NOISE_KINDS
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(kinds)(rng, code, language))
    return parts


def _word_noise(rng: random.Random, code: str, language: Language) -> str:
    return rng.choice(NOISE)


def _number_noise(rng: random.Random, code: str, language: Language) -> str:
    return _fill(rng, rng.choice(NUMBER_NOISE))


def _date_noise(rng: random.Random, code: str, language: Language) -> str:
    return f"{rng.choice(EARLIER_DATES)} {_date(_day(rng), *_date_style(rng, language))}"


def _sum_noise(rng: random.Random, code: str, language: Language) -> str:
    group, sign = rng.choice(AMOUNT_STYLES)
    return f"{rng.choice(PARTIAL_AMOUNTS)} {_money(rng, _amount(_cents(rng), group, sign), code)}"


NOISE_KINDS = (_word_noise, _number_noise, _number_noise, _date_noise, _sum_noise)


def _slips(rng: random.Random, line: str) -> str:
    """Removes accents, capitals or blanks, or doubles blanks, as a typist may, and never changes a value."""
    if rng.random() < 0.15:
        line = "".join(c for c in unicodedata.normalize("NFD", line) if not unicodedata.combining(c))
    draw = rng.random()
    line = line.lower() if draw < 0.12 else line.upper() if draw < 0.22 else line
    if rng.random() < 0.15:
        line = re.sub(r"(?<=[^\W\d_]) (?=\d)|(?<=\d) (?=[^\W\d_])", lambda _: rng.choice(("", " ")), line)
    if rng.random() < 0.1:
        line = re.sub(r"(?<!\d) (?!\d)", lambda _: rng.choice((" ", " ", "  ")), line)
    return line
