"""English as it is spoken: numbers, dates, times, money, units, symbols and abbreviations in words.

For models that were only taught letters (a checkpoint's ``"spell_out": true``); CSM-1B reads digits itself. A table of
patterns, tried in its order, each linear in the text's length. Knows no model, no tokenizer and no other language.
"""

import re
import unicodedata
from collections.abc import Callable

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
_FRACTIONS = {"1/2": "one half", "1/3": "one third", "2/3": "two thirds", "1/4": "one quarter", "3/4": "three quarters"}
_MONEY = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "€": ("euro", "euros", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "¥": ("yen", "yen", "sen", "sen"),
}
_MAGNITUDES = {"k": "thousand", "m": "million", "b": "billion"}
_MONTHS = {
    "Jan": "January", "Feb": "February", "Mar": "March", "Apr": "April", "May": "May", "Jun": "June", "Jul": "July",
    "Aug": "August", "Sep": "September", "Oct": "October", "Nov": "November", "Dec": "December",
}  # fmt: skip
_UNITS = {
    "mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer", "mi": "mile", "yd": "yard", "ft": "foot",
    "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "ml": "milliliter", "mL": "milliliter", "l": "liter", "L": "liter", "mph": "mile per hour",
    "ms": "millisecond", "s": "second", "sec": "second", "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
    "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz", "kW": "kilowatt", "kWh": "kilowatt hour",
    "kB": "kilobyte", "KB": "kilobyte", "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte",
}  # fmt: skip
_POWERS = {"2": "square ", "3": "cubic "}
_TITLES = {  # their dot never ends a sentence
    "mr": "Mister", "mrs": "Missus", "ms": "Miss", "dr": "Doctor", "prof": "Professor", "capt": "Captain",
    "gen": "General", "gov": "Governor", "lt": "Lieutenant", "rev": "Reverend", "sen": "Senator", "sgt": "Sergeant",
    "mt": "Mount", "vs": "versus", "approx": "approximately", "dept": "department", "e.g": "for example",
    "i.e": "that is",
}  # fmt: skip
_CLOSERS = {  # theirs may
    "jr": "Junior", "sr": "Senior", "etc": "et cetera", "inc": "Incorporated", "ltd": "Limited", "corp": "Corporation",
    "co": "Company", "ave": "Avenue", "rd": "Road", "blvd": "Boulevard", "a.m": "in the morning",
    "p.m": "in the afternoon",
}  # fmt: skip
_SYMBOLS = {
    "&": "and", "+": "plus", "=": "equals", "@": "at", "%": "percent", "×": "times", "÷": "divided by", "°": "degrees",
    "$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "<": "less than", ">": "greater than",
}  # fmt: skip
_MIXED_FRACTION = re.compile(r"(?<=\d) ?(?=[\u00bc-\u00be\u2150-\u215e])")  # 1½
_LOOSE = re.compile(r" (?=[.,!?;:)])|(?<=\() ")


def spell_out(text: str) -> str:
    """English with numbers, dates, times, money, units, symbols and abbreviations in words; no digit is left.

    Wants clean text and comes before ``split_sentences``. Square brackets go, so nothing looks like a speaker's tag.
    """
    text = unicodedata.normalize("NFKC", _MIXED_FRACTION.sub(" and ", text))
    text = text.replace("\u2044", "/").replace("\u2212", "-")  # the fraction slash of ½, the typographic minus
    for pattern, spoken in _SPOKEN:
        text = pattern.sub(spoken, text)
    return _LOOSE.sub("", " ".join(text.split()))


def _cardinal(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    size, name = next(scale for scale in _SCALES if number >= scale[0])
    high, low = divmod(number, size)
    return f"{_cardinal(high)} {name}" + (f" {_cardinal(low)}" if low else "")


def _digits(digits: str) -> str:
    return " ".join(_ONES[int(digit)] for digit in digits)


def _whole(digits: str) -> str:
    """A number without a fraction. Codes (007) and numbers past the trillions are read digit by digit."""
    digits = digits.replace(",", "")
    is_code = len(digits) > 1 and int(digits[0]) == 0
    return _digits(digits) if is_code or len(digits) > 15 else _cardinal(int(digits))


def _number(match: re.Match[str]) -> str:
    whole, *fractions = match[0].split(".")
    words = [_whole(whole)] if whole else []
    return f" {' '.join(words + [f'point {_digits(fraction)}' for fraction in fractions])} "


def _ordinal(digits: str) -> str:
    head, last = re.fullmatch(r"(.*?)(\w+)", _whole(digits)).groups()  # type: ignore[union-attr]
    return f"{head}{_ORDINALS.get(last) or (f'{last[:-1]}ieth' if last.endswith('y') else f'{last}th')}"


def _year(digits: str) -> str:
    high, low = divmod(int(digits), 100)
    if high % 10 == 0 and low < 10:
        return _cardinal(int(digits))
    return f"{_cardinal(high)} " + (_cardinal(low) if low > 9 else f"oh {_ONES[low]}" if low else "hundred")


def _decade(match: re.Match[str]) -> str:
    words = _year(match[1]) if len(match[1]) == 4 else _cardinal(int(match[1]))
    return f" {words[:-1]}ies " if words.endswith("y") else f" {words}s "


def _date(match: re.Match[str]) -> str:
    """A day in its month, in the order in which they stand: November 20, the 20th Nov."""
    month, day = _MONTHS[match["month"][:3]], _ordinal(str(int(match["day"])))
    if match.start("month") < match.start("day"):
        return f" {month} {day} "
    return f" {match['the'] or 'the'} {day} of {month} "


def _iso_date(match: re.Match[str]) -> str:
    year, month, day = match.groups()
    return f" {list(_MONTHS.values())[int(month) - 1]} {_ordinal(str(int(day)))}, {_year(year)} "


def _time(match: re.Match[str]) -> str:
    hour, minute = int(match["hour"]), int(match["minute"] or 0)
    if hour > 24 or minute > 59:
        return match[0]
    words = _cardinal(hour)
    if minute:
        words += f" {_cardinal(minute)}" if minute > 9 else f" oh {_ONES[minute]}"
    part = match.groupdict()
    if half := part.get("half"):
        return f" {words} {_part_of_day(hour, minute > 0, half)}{' to' if part['to'] else ''} "
    if minute:
        return f" {words} "
    return f" {words} o'clock " if 0 < hour < 13 else f" {words} hundred "


def _spoken_time(match: re.Match[str]) -> str:
    """Seven p.m., seven thirty p.m."""
    hour, minute, half = match.groups()
    return f"{hour}{minute} {_part_of_day(_ONES.index(hour.lower()), bool(minute), half)}"


def _part_of_day(hour: int, past: bool, half: str) -> str:
    """What a.m. and p.m. mean, for who has learnt words and no names of letters. ``past``: some minutes after."""
    if hour == 12 and not past:
        return "noon" if half in "pP" else "midnight"
    if half in "aA":
        return "at night" if hour % 12 == 0 else "in the morning"
    return "in the afternoon" if hour % 12 < 6 else "in the evening" if hour % 12 < 10 else "at night"


def _money(match: re.Match[str]) -> str:
    sign, whole, fraction, magnitude = match.groups()
    unit, units, coin, coins = _MONEY[sign]
    if magnitude or (fraction and len(fraction) != 2):
        point = f" point {_digits(fraction)}" if fraction else ""
        magnitude = (magnitude or "").lower()
        return f" {_whole(whole)}{point} {_MAGNITUDES.get(magnitude, magnitude)} {units} "
    words = f" {_whole(whole)} {unit if whole == '1' else units} "
    cents = int(fraction or 0)
    return words + f"and {_cardinal(cents)} {coin if cents == 1 else coins} " if cents else words


def _quantity(match: re.Match[str]) -> str:
    """A number with a unit; the number stays for later. One kilometer, five kilometers, a five-kilometer run."""
    number, joint, unit, power, per = match.groups()
    words = _UNITS[unit]
    if number != "1" and joint != "-" and not words.endswith("hertz"):
        noun, _, rest = words.partition(" per ")
        words = ("feet" if noun == "foot" else f"{noun}s") + (f" per {rest}" if rest else "")
    return f"{number} {_POWERS.get(power, '')}{words}" + (f" per {_UNITS[per]}" if per else "")


_BEGIN = r"(?<![\d,])"  # a number is not looked for again within itself: 20,000 characters of 1,111,111 took 2 s
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_STOP = r"\.(?!\s+(?-i:[A-Z])|\s*$)"  # the dot of an abbreviation, where it does not end the sentence as well
_MONTH = rf"(?P<month>{'|'.join(_MONTHS.values())}|(?:{'|'.join(_MONTHS)}|Sept)\b)(?:{_STOP})?"
_YEAR = r"(?:1[1-9]|20)\d\d"
_DAY = r"(?P<day>0?[1-9]|[12]\d|3[01])"
_UNIT = "|".join(sorted(_UNITS, key=len, reverse=True))
_HOURS = "|".join(_ONES[1:13])

_SPOKEN: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(rf"(?<![\w-])({_YEAR})-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])(?![\w-])"), _iso_date),
    (re.compile(r"\b(?:\d{3}-)?\d{3}-\d{4}\b"), lambda match: f" {', '.join(map(_digits, match[0].split('-')))} "),
    (re.compile(rf"(?<!-){_BEGIN}({_NUMBER})[-–](?=\d+(?![\d-]))"), r"\1 to "),  # 5-10, but not 1-2-3
    (
        re.compile(
            r"(?i)\b(?P<hour>\d{1,2})(?::(?P<minute>\d\d))? ?(?P<half>[ap])\.?m\b"
            rf"(?:{_STOP})?(?P<to> ?[-–] ?(?=\d))?"
        ),
        _time,
    ),
    (re.compile(rf"(?i)\b({_HOURS})((?: [a-z'-]+)?) ([ap])\.m\b(?:{_STOP})?"), _spoken_time),
    (re.compile(r"(?<!\w)-(?=[$€£¥]?\.?\d)"), "minus "),
    (re.compile(r"(?<=\d) - (?=\d)"), " minus "),
    (
        re.compile(rf"(?i)([$€£¥]) ?({_NUMBER})(?:\.(\d+))?(?: ?(hundred|thousand|million|billion|trillion|[kmb])\b)?"),
        _money,
    ),
    (re.compile(r"'?\b(\d{2}|\d{4})'?s\b"), _decade),
    (
        re.compile(rf"(?<![\w.]){_BEGIN}({_NUMBER}(?:\.\d+)?)([ -]?)({_UNIT})([23])?(?:/({_UNIT}))?\b(?:{_STOP})?"),
        _quantity,
    ),
    (re.compile(r"(?<!\w)(\d)['’′] ?(\d{1,2})[\"”″]"), r"\1 foot \2"),
    (
        re.compile(rf"(?i)(?<![\w.])({'|'.join(map(re.escape, _TITLES))})\.(?!\w)"),
        lambda match: _TITLES[match[1].lower()],
    ),
    (
        re.compile(rf"(?i)(?<![\w.])({'|'.join(map(re.escape, _CLOSERS))})(?:{_STOP}|(?=\.))(?!\w)"),
        lambda match: _CLOSERS[match[1].lower()],
    ),
    (re.compile(r"\bSt\.(?=\s+[A-Z])"), "Saint"),
    (re.compile(r"\bSt(?:\.(?!\s*$)|(?=\.))"), "Street"),
    (re.compile(r"\bNo\. ?(?=\d)|#(?=\d)"), "number "),
    (re.compile(rf"\b({'|'.join(_MONTHS)}|Sept)\b\.?(?= \d)"), lambda match: _MONTHS[match[1][:3]]),
    (re.compile(rf"(?<![\w.,:/$€£¥-])(?:(?P<the>[Tt]he) )?{_DAY}(?:st|nd|rd|th)? {_MONTH}(?!\w)"), _date),
    (  # a day where the number does not count what follows: In March 20 people came
        re.compile(
            rf"\b{_MONTH} {_DAY}(?:(?:st|nd|rd|th)\b|(?=$|[,.;:!?)](?!\d)|,? {_YEAR}\b|"
            r" (?:and|at|by|for|from|in|is|or|the|to(?! \d)|until|was|we|will|with)\b))"
        ),
        _date,
    ),
    (re.compile(r"\b(?:[A-Za-z]\.)+[A-Za-z]\b(?:\.(?!\s*$))?"), lambda match: match[0].replace(".", " ")),  # U.S.
    (re.compile(r"(?<=[^\W\d])-(?=\d)|(?<=\d)-(?=\w)"), " "),  # COVID-19, 5-year
    (re.compile(r"\b(?P<hour>\d{1,2}):(?P<minute>\d\d)(?!:?\d)"), _time),
    (re.compile(rf"(?i)\b{_BEGIN}({_NUMBER})(?:st|nd|rd|th)\b"), lambda match: f" {_ordinal(match[1])} "),
    (re.compile(r"(?<![\d/])(?:1/[234]|2/3|3/4)(?![\d/])"), lambda match: _FRACTIONS[match[0]]),
    (re.compile(rf"(?<![\w.,]){_YEAR}(?!\w|[.,]\d)"), lambda match: _year(match[0])),
    (re.compile(r"(?<=\d) ?[*x×] ?(?=\d)"), " times "),
    (re.compile(rf"{_NUMBER}(?:\.\d+)*|(?<!\w)\.\d+"), _number),
    (re.compile(r"° ?C\b"), " degrees Celsius "),
    (re.compile(r"° ?F\b"), " degrees Fahrenheit "),
    (re.compile(f"[{''.join(_SYMBOLS)}]"), lambda match: f" {_SYMBOLS[match[0]]} "),
    (re.compile(r"(?<=[a-z])\.(?=[a-z])"), " dot "),
    (re.compile(r"[\[\]{}|\\^~_*#/`]"), " "),
)
