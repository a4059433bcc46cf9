r"""What two answers in mathematics say of each other before any algebra: units, times, bases, choices, words, lists.

[`readings`] settles a pair of texts, or says which pairs of formulas are to be compared. math-verify drops what it
does not read (a base, the rest of a list, "p.m."), and would take such answers for equal; the kinds it does not read
are settled here, as text. Pure functions on texts that `math_notation.normalise` has been through.
"""

import re

from .math_notation import builder_sets, intervals

# Words after a number that make another number of it: "5 or more" is not 5.
_OTHER_NUMBER = set(
    "or and than to dozen dozens squared cubed plus minus divided multiplied out least most not factorial mod modulo"
    " choose half halves third thirds quarters fourths fifths sixths sevenths eighths ninths tenths hundredths tens"
    " hundreds thousands thousandths millionths through until so if unless when except between up hundred thousand"
    " million billion trillion lakh crore score root power powers sum difference product infinity pi noon midnight"
    " am pm oclock january february march april june july august september october november december".split()
)
_SHORT_WORDS = set(
    "of in on at a an the per for by each men man day egg boy cat dog cow hen pie car toy box pen bag hat cup job bus"
    " way row set pot map cap pig ant bee ton gal min sec oz lb lbs ft yd mi km cm mm dm nm kg mg mcg hr hrs yr yrs ml"
    " cl dl sq cu mph kph kmh rpm fps bps hz khz mhz kw kwh kj kcal cal mol pa kpa psi atm rad deg wk mo pcs cents usd"
    " eur gbp cny rmb inr cc ha gm gms mt rs kb mb gb tb bits bit db ev ohm ohms".split()
)
_LETTER_UNITS = set("mshgLlNJWVACKFcdT")
_UNIT_NAMES = {
    name: canonical
    for canonical, names in {
        "m": "m meter meters metre metres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "km": "km kilometer kilometers kilometre kilometres",
        "in": "inch inches",
        "ft": "ft foot feet",
        "yd": "yd yard yards",
        "mi": "mi mile miles",
        "g": "g gram grams gm gms",
        "kg": "kg kilogram kilograms",
        "mg": "mg milligram milligrams",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "wk week weeks",
        "month": "mo month months",
        "year": "yr yrs year years",
        "l": "l L liter liters litre litres",
        "ml": "ml mL milliliter milliliters",
        "cent": "cent cents",
        "dollar": "dollar dollars usd USD",
        "euro": "euro euros eur EUR",
    }.items()
    for name in names.split()
}
_APART = re.compile(r"(?<![\d_^])\d+\s+\d")
_CJK = "\u3400-\u9fff\uac00-\ud7af\u3040-\u30ff"
# possessive, or a run of letters could be split in 2^n ways
_WORD = rf"[A-Za-zА-Яа-яé]++(?:[-'][A-Za-z]++)*+|[{_CJK}]++"
_POWER = r"\^\s*\{?\s*-?[1-4]\s*\}?"
_UNIT_TAIL = re.compile(rf"(?P<gap>[\s~]*)(?P<tail>(?:{_WORD}|(?<=[A-Za-z]){_POWER}|[\s~./()-]|\\cdot(?![a-z]))++)\Z")
_NUMBER = r"-?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_FORMULA_END = re.compile(r"(?:[\d})\]!%]|\\pi|\\circ)\s*\Z")


def bare(text: str) -> str:
    r"""`text` without the command around its words: `5\text{ cm}^2` is `5 cm^2`."""
    text = re.sub(r"\\(?:text|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", lambda m: f" {m[1].strip()} ", text)
    return re.sub(r"\s+(?=[\^_/])", "", text).strip()


def quantity(text: str) -> tuple[str, str]:
    r"""
    A value and its unit or what is counted: `("18", "eggs")`, `("9.8", "m/s^2")`, `(r"36\pi", "cm^3")`, `("5", "")`.

    Text without a value, or with words that make another number of it ("5 or more"), stays whole.
    """
    plain = bare(text)
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?\s*[CFK]?\s*\Z|(?<=[\d}])\s*degrees?\s*\Z", r"^\\circ", plain)
    plain = re.sub(r"(?<=\d)\s*\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?\s*\Z", "", plain)
    plain = re.sub(r"(?<=[\d}])\s*(?:percentage points|percent(?:age)?|pct)\b", r"\\%", plain)
    match = _UNIT_TAIL.search(plain, _last_of_formula(plain))
    if not match or match.start() == 0:
        return plain, ""
    value, tail = plain[: match.start()].strip(), match["tail"].strip(" .~")
    if not _FORMULA_END.search(value) or not _is_unit(tail, bool(match["gap"]), bool(re.fullmatch(_NUMBER, value))):
        return plain, ""
    return value, re.sub(r"[()]", "", tail).strip()


def _last_of_formula(text: str) -> int:
    """Where the unit may begin: behind the last digit that is no power of a unit, or the last brace or command."""
    without = re.sub(rf"(?<=[A-Za-z]){_POWER}|\\cdot(?=\s*[A-Za-z])", lambda m: "_" * len(m[0]), text)
    ends = [m.end() for m in re.finditer(r"[\d}!%]|\\[a-zA-Z]+|(?<=[\w}])\)(?=\s*[A-Za-z])", without)]
    return ends[-1] if ends else 0


def _is_unit(tail: str, spaced: bool, after_number: bool) -> bool:
    words = re.findall(_WORD, tail)
    if not words or any(word.casefold() in _OTHER_NUMBER for word in words):
        return False
    if not re.match(rf"[({_CJK}A-Za-zА-Яа-я]", tail) or re.search(r"(?:^|\s)-|-(?:\s|$)", tail):
        return False
    return all(
        re.match(f"[{_CJK}А-Яа-я]", word)
        or word.casefold() in _SHORT_WORDS
        or (word in _LETTER_UNITS and after_number)
        or (len(word) > 3 - spaced and re.search("[aeiouyAEIOUY]", word) is not None)
        for word in words
    )


_POWER_WORDS = {"square": "2", "squared": "2", "sq": "2", "cubic": "3", "cu": "3"}
_RATES = {"mph": "miles hour", "kmh": "km hour", "kph": "km hour", "fps": "feet second"}


def _known_units(unit: str) -> list[tuple[str, str]]:
    """
    Units on the list with their powers, in order: `[("km", "1"), ("h", "1")]` for "km/h" and for "kilometers per
    hour".
    """
    found: list[tuple[str, str]] = []
    before = "1"
    unit = re.sub(r"[A-Za-z]+", lambda m: _RATES.get(m[0], m[0]), unit)
    for word, power in re.findall(r"([A-Za-z]+)(?:\^?\s*\{?\s*(-?[1-4]))?", unit):
        if word in _UNIT_NAMES:
            found.append((_UNIT_NAMES[word], power or before))
        before = _POWER_WORDS.get(word, "1")
    return found


def units_clash(left: str, right: str) -> bool:
    """
    Whether two units are both known and differ, as "km" and "m" do. A word that is no known unit clashes with none.
    """
    known = _known_units(left), _known_units(right)
    return bool(known[0] and known[1]) and known[0] != known[1]


_LEAD_END = set(
    "is are was were be equals equal has have had exactly only makes needs costs answer total result".split()
)
_NO_LEAD = set("of by than least most from over under above below minus negative plus times not or and about".split())


def sentence_value(text: str) -> str | None:
    """
    The one number of a sentence: 18 of "The answer is 18" and of "Janet makes 18 every day"; `None` for the rest.
    """
    plain = re.sub(r"[*$]", "", bare(text))
    numbers = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w/^]|\.\d)", plain)
    match = re.fullmatch(
        rf"(?P<lead>[A-Za-z][A-Za-z' ]*?)(?P<end>\s*[:=]|\s)\s*(?P<value>{_NUMBER})(?P<rest>[^\d\\=<>^/*+{{}}]*)",
        plain,
    )
    if not match or len(numbers) != 1:
        return None
    lead, rest = match["lead"].casefold().split(), match["rest"].strip(" .")
    if set(lead) & (_NO_LEAD | {"no", "level"}) or set(re.findall(r"[a-z']+", rest.casefold())) & _OTHER_NUMBER:
        return None
    if rest and not re.fullmatch(rf"(?:{_WORD}|[\s,%])+", rest):
        return None
    last = match["lead"].split()[-1]
    is_told = match["end"].strip() == ":" or lead[-1] in _LEAD_END or (len(lead) > 1 and last.islower())
    if not is_told or len(last) == 1:
        return None
    return match["value"].replace(" ", "") + ("%" if rest.startswith("%") else "")


_CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?\s*(?P<half>[ap]\.?\s?m\b\.?|noon|midnight|in the "
    r"(?:morning|afternoon|evening))?",
    re.IGNORECASE,
)


def clock(text: str) -> tuple[int, bool] | None:
    """
    A time of day as (minutes, whether it says which half of the day): `3:45 pm` is (945, True), `3:45` (225, False).
    """
    plain = bare(text).strip().casefold()
    plain = {"noon": "12:00 pm", "midnight": "12:00 am"}.get(plain, plain)
    match = _CLOCK.fullmatch(plain)
    if not match or not (match["minute"] or match["half"]):
        return None
    hour, minute, half = int(match["hour"]), int(match["minute"] or 0), match["half"] or ""
    if hour > 24 or minute > 59:
        return None
    if half:
        late = half[0] in "pn" or half.endswith(("noon", "evening"))
        return (hour % 12 + 12 * late) * 60 + minute if hour <= 12 else hour * 60 + minute, True
    return hour * 60 + minute, hour > 12 or hour == 0


def same_clock(truth: tuple[int, bool], answer: tuple[int, bool]) -> bool:
    """Where one of two times does not say which half of the day, the hands of the clock decide."""
    if truth[1] and answer[1]:
        return truth[0] == answer[0]
    return truth[0] % 720 == answer[0] % 720


_BASE_WORDS = dict(
    zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True)
)
_BASE = re.compile(
    r"([0-9A-F]+)\s*_\s*\{?\s*\(?\s*(?:\\text\s*\{\s*(?:base )?)?(\d{1,2}|[a-z]{3,6})\s*\}?\s*\)?\s*\}?"
)


def numeral(text: str) -> tuple[str, int] | None:
    r"""A numeral with its base: `("1011", 2)` for `1011_2`, `1011_{(2)}` and `1011_{\text{two}}`."""
    match = _BASE.fullmatch(text)
    if not match or not re.search(r"\d", match[1][:2]):
        return None
    base = int(match[2]) if match[2].isdigit() else _BASE_WORDS.get(match[2], 0)
    return (match[1].lstrip("0") or "0", base) if base else None


def same_numeral(truth: str, answer: str) -> bool | None:
    """
    Numerals agree in digits and base. One that leaves its base out is taken for the other if it has three digits or
    more: the question has named the base then, and a number in base ten would hardly have the same digits.
    """
    left, right = numeral(truth), numeral(answer)
    if left and right:
        return left == right
    one, other = (left, answer) if left else (right, truth)
    if one is None:
        return None
    digits = re.sub(r"[\s,]", "", other)
    return digits.lstrip("0") == one[0] and (len(one[0]) > 2 or one[1] == 10)


def choice_readings(truth: str) -> list[str]:
    """What may be answered where a cleaned truth is a choice with its value: "C: 12" is also "C" and "12"."""
    choice = re.fullmatch(r"\(?([A-E])\s*(?:(?::|\.|\\?\)|\\colon)\s+|\)(?=[-\d]))(.+)", truth)
    if choice:
        return [truth, choice[1], builder_sets(choice[2])]
    told = re.search(r"\b(?:answer|option|choice)(?: is)?:? (?:option |choice )?\(?([A-E])\)?\Z", bare(truth))
    return [truth, told[1]] if told else [truth]


def words_of(text: str) -> str:
    """Words in lower case, without markup, a leading article and punctuation at the ends."""
    plain = re.sub(r"[\s~]+", " ", bare(text).replace("*", "")).strip(" .,;:!\"'()").casefold()
    return re.sub(r"\A(?:the|a|an) (?=\w)", "", plain)


def is_words(text: str) -> bool:
    """Whether text is words rather than a formula: "Yes", "fourth quadrant", "偶函数"."""
    return bool(re.fullmatch(rf"(?=.*(?:[^\W\d_]{{2}}|[{_CJK}]))[^\W\d_]+(?:[ '-][^\W\d_]+)*", words_of(text)))


def same_text(truth: str, answer: str) -> bool:
    """
    Whether two cleaned answers are the same text; words ("Yes", "Fourth Quadrant") and choices ("B", "(b)") in any
    case.
    """
    if truth == answer:
        return True
    if (
        re.sub(r"\s", "", truth) == re.sub(r"\s", "", answer)
        and not _APART.search(truth)
        and not _APART.search(answer)
    ):
        return True
    if is_words(truth) or re.fullmatch("[A-E]", words_of(truth).upper()):
        return words_of(truth) == words_of(answer)
    return False


def _choices(text: str) -> set[str] | None:
    letters = re.sub(r"\band\b|\\text|[\s,;{}()\\]", "", text)
    return set(letters) if re.fullmatch("[A-H]{2,6}", letters) and sorted(set(letters)) == list(letters) else None


_RELATIONS = r"[=<>]|\\(?:le|ge|leq|geq|ne|neq|in|approx|equiv|leqslant|geqslant)(?![a-z])"
_DATE = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})")
_GEOMETRY = re.compile(r"\\(?:triangle|angle|overline|overrightarrow|overleftrightarrow|widehat|odot|square)(?![a-z])")


def readings(truth: str, answer: str) -> bool | list[tuple[str, str]]:
    """
    What a truth and an answer, both normalised, have to say of each other.

    Returns:
        `bool | list[tuple[str, str]]`: Whether the answer is right, where text settles it; otherwise pairs of
        formulas, of which one has to be equal as mathematics.
    """
    if same_text(truth, answer):
        return True
    options, offered = choice_readings(truth), choice_readings(answer)
    if len(options) > 2 and len(offered) > 2:
        return options[1] == offered[1] and _compare(options[2], offered[2])
    pairs: list[tuple[str, str]] = []
    for left, right in [(left, answer) for left in options] + [(truth, right) for right in offered[1:]]:
        found = _compare(left, right)
        if found is True:
            return True
        pairs += found or []
    return pairs or False


def _compare(truth: str, answer: str) -> bool | list[tuple[str, str]]:
    """As [`readings`], for one reading of each."""
    if "=" in answer and not re.search(_RELATIONS, truth):
        answer = re.sub(r"\A[a-zA-Z]\s*=\s*(?=[^=]+\Z)", "", answer)
    if "=" in truth and not re.search(_RELATIONS, answer):
        truth = re.sub(r"\A[a-zA-Z]\s*=\s*(?=[^=]+\Z)", "", truth)
    if same_text(truth, answer):
        return True
    if is_words(truth) and not re.fullmatch(r"\\[a-z]+", answer):
        return False
    sets = _choices(truth), _choices(answer)
    if sets[0] and sets[1] and ("," in truth + answer):
        return sets[0] == sets[1]
    times = clock(truth), clock(answer)
    if times[0] and times[1]:
        return same_clock(times[0], times[1])
    if times[0]:
        return False  # 10:30 is no ratio, so 1:3 is not the same
    base = same_numeral(truth, answer)
    if base is not None:
        return base
    dates = [
        [int(part) for part in match.groups()] if match else None for match in map(_DATE.fullmatch, (truth, answer))
    ]
    if any(dates):
        return dates[0] == dates[1]
    if r"\ldots" in truth or r"\ldots" in answer or _GEOMETRY.match(truth):
        return re.sub(r"\s|\\,", "", truth) == re.sub(r"\s|\\,", "", answer)
    return _formulas(truth, answer)


def _formulas(truth: str, answer: str) -> bool | list[tuple[str, str]]:
    (value, unit), (other, other_unit) = quantity(truth), quantity(answer)
    if units_clash(unit, other_unit):
        return False
    if re.fullmatch(_NUMBER, value) and not re.fullmatch(_NUMBER, other):
        told = sentence_value(other)
        other = told if told is not None else other
    if _APART.search(value) or _APART.search(other):
        return False  # "1 2" is no number
    ranges = intervals(truth), intervals(answer)
    if ranges[0] and ranges[1]:
        return ranges[0][0] == ranges[1][0] and [(ranges[0][1], ranges[1][1])]
    if ranges[0] and re.match(r"[(\[]|\\left|[a-z]\s*\\in", other):
        return [(ranges[0][1], re.sub(r"\A[a-z]\s*\\in\s*", "", other))]
    if ranges[1]:
        return [(re.sub(r"\A[a-z]\s*\\in\s*", "", value), ranges[1][1])] if re.search(r"[\])]\Z", value) else False
    value, other = _alike(value, other)
    return [(value, other)]


def _alike(truth: str, answer: str) -> tuple[str, str]:
    r"""Both in one notation where only one has it: degrees and radians, `[1, 2]` for a list, `P(3,4)`, `+ c`."""
    if ("\\circ" in truth) != ("\\circ" in answer) and "\\pi" in truth + answer:
        truth, answer = (
            re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?", r"\\frac{\1\\pi}{180}", text)
            for text in (truth, answer)
        )
    if re.fullmatch(r"\[.*\]", answer) and not re.match(r"\\left|[\[(]", truth) and not _is_set_of_reals(truth):
        answer = answer[1:-1]
    if re.match(r"\\begin\{.?matrix\}", truth) and re.fullmatch(r"\[\s*\[.*\]\s*\]", answer):
        rows = re.findall(r"\[([^\[\]]*)\]", answer)
        answer = r"\begin{pmatrix}" + r" \\ ".join(row.replace(",", "&") for row in rows) + r"\end{pmatrix}"
    if re.match(r"\(", truth):
        answer = re.sub(r"\A[A-Z]\s*(?:=\s*)?(?=\(.*,.*\)\Z)", "", answer)
    if re.match(r"\(", answer):
        truth = re.sub(r"\A[A-Z]\s*(?:=\s*)?(?=\(.*,.*\)\Z)", "", truth)
        truth = re.sub(r"\A([a-z]=[^=,]+)((?:,\s*[a-z]=[^=,]+)+)\Z", _coordinates, truth)
    elif re.match(r"\(", truth):
        answer = re.sub(r"\A([a-z]=[^=,]+)((?:,\s*[a-z]=[^=,]+)+)\Z", _coordinates, answer)
    if re.search(r"\+\s*[cC]\Z", truth) and re.search(r"\+\s*[cC]\Z", answer):
        truth, answer = truth[:-1] + "C", answer[:-1] + "C"
    return truth, answer


def _coordinates(match: re.Match) -> str:
    return "(" + ",".join(part.partition("=")[2].strip() for part in match[0].split(",")) + ")"


def _is_set_of_reals(text: str) -> bool:
    return r"\cup" in text or r"\infty" in text or r"\in" in text
