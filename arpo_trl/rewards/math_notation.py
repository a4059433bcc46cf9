r"""Notations of mathematics, rewritten as the LaTeX that math-verify reads. Pure functions from text to text.

One function a kind, in the order of `STEPS`; each leaves alone what is not of its kind. All of them take time linear
in the text. What is not here: what needs both answers (units, intervals, times, bases) is in `math_readings.py`, and
what needs algebra in `math_worker.py`.
"""

import ast
import re
import unicodedata
from fractions import Fraction

_SIGNS = {
    **dict.fromkeys("−–—‐‑‒―﹣", "-"),
    **dict.fromkeys("’‘ʼ′", "'"),
    **dict.fromkeys("“”„«»″", '"'),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u2061\u2062\u2063", ""),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("⟨〈", r"\langle "),
    **dict.fromkeys("⟩〉", r"\rangle "),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    "×": r"\times ",
    "✕": r"\times ",
    "÷": r"\div ",
    "⁄": "/",
    "∕": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "→": r"\to ",
    "∣": r"\mid ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "…": r"\ldots ",
    "⋯": r"\ldots ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "。": ".",
    "、": ",",
    "√": r"\sqrt ",
}
_GREEK = {
    chr(code): f"\\{name.lower() if code >= 0x3B1 else name.capitalize()} "
    for code in [*range(0x391, 0x3AA), *range(0x3B1, 0x3CA)]
    if (name := unicodedata.name(chr(code), "").rpartition(" ")[2])
    in "ALPHA BETA GAMMA DELTA EPSILON ZETA ETA THETA IOTA KAPPA MU NU XI RHO SIGMA TAU PHI CHI PSI OMEGA".split()
    and not (code < 0x3B1 and name not in ("GAMMA", "DELTA", "THETA", "XI", "SIGMA", "PHI", "PSI", "OMEGA"))
    and code != 0x3C2
}
_TYPOGRAPHY = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | _GREEK | _SIGNS)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n")
_FRACTION_SIGN = re.compile("[¼-¾⅐-⅞]")


def typography(text: str) -> str:
    r"""Signs of Unicode as LaTeX, full-width signs as ASCII: `x² ≤ ½` is `x^{2} \le \frac{1}{2}`, `２４` is `24`."""
    if text.isascii():
        return re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f]", "", text)
    text = _FRACTION_SIGN.sub(
        lambda m: re.sub("(.+)⁄(.+)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", m[0])), text
    )
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+", lambda m: "^{" + m[0].translate(_RAISED) + "}", text)
    text = re.sub("[₀-₉₊₋₍₎ₙ]+", lambda m: "_{" + m[0].translate(_LOWERED) + "}", text)
    text = text.translate(_TYPOGRAPHY)
    text = re.sub(r"\\sqrt\s+(\d+)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s+\(([^()]*)\)", r"\\sqrt{\1}", text)
    # lone surrogates and control characters mean nothing, and no pipe carries the former
    return re.sub("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]", "", text)


_WRAPPER = re.compile(
    r"\\(?:textbf|textit|textsf|texttt|textsc|emph|mathbf|mathit|mathsf|mathtt|boldsymbol|bm|bf|underline|boxed|fbox"
    r"|ensuremath|mathring|mathord|textcolor\s*\{[^{}]*\}|colorbox\s*\{[^{}]*\})\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
_NOTHING = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|bf|it|rm|left\.|right\.|color\s*\{[^{}]*\}|(?:big|Big|bigg|Bigg)[lrm]?"
    r"(?![a-zA-Z])|!)(?![a-zA-Z])|\\!"
)
_ENVELOPES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("***", "***"), ("**", "**"), ("`", "`"))


_END = re.compile(r"(?:\\[,;: ]|\\q?quad|[\s.,;~])\Z")


def _without_end(text: str) -> str:
    """
    `text` without the spaces, commas and full stops at its end; looked at from there, so that it takes linear time.
    """
    end = len(text)
    while match := _END.search(text, max(end - 6, 0), end):
        end = match.start()
    return text[:end]


def markup(text: str) -> str:
    r"""
    No fonts, colours, boxes, Markdown and envelopes: `**5**`, `$5$`, `\textcolor{red}{5}`, `\mathbf{5}` are `5`.
    """
    if "\\" in text:
        text = text.replace("\\$", "").replace("\\_", "_")
        for _ in range(4):  # nested wrappers
            text, found = _WRAPPER.subn(r"\1", text)
            if not found:
                break
        text = _NOTHING.sub("", text)
        text = re.sub(r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset", text)
        text = re.sub(r"\\(?:dots|cdots|dotsc|dotsb)(?![a-zA-Z])", r"\\ldots", text)
        text = re.sub(r"\\(?:mathrm|textrm|textnormal|mbox|hbox)\s*\{", r"\\text{", text)
    text = re.sub(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*]+)\*\*(?![\w*(])", r"\1", " ".join(text.split()))
    for _ in range(3):
        before = text
        for opening, closing in _ENVELOPES:
            inner = text[len(opening) : -len(closing)]
            if len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = inner.strip() if opening not in inner and closing not in inner else text
        text = _without_end(text)
        text = text.replace("$", " ").strip() if text.count("$") in (2, 4) else text  # `$24$ dollars`
        whole = re.fullmatch(r"\\text\s*\{([^{}]*)\}", text)
        text = whole[1].strip() if whole else text
        if text == before:
            break
    return text


def dots(text: str) -> str:
    r"""Dots of a list as `\ldots`; none after the digits of a decimal: `1, 2, ..., n`, `0.333...`."""
    text = re.sub(r"\.\s?\.\s?\.+", r"\\ldots ", text)
    return re.sub(r"(\d\.\d+)\s*\\ldots\s*\Z", r"\1", text).strip()


_NAMES = {"pi": r"\pi", "oo": r"\infty", "inf": r"\infty", "E": "e", "I": "i", "zoo": "zoo", "nan": "nan"}
_CALLS = {
    "sqrt": r"\sqrt{%s}",
    "exp": "e^{%s}",
    "log": r"\ln(%s)",
    "ln": r"\ln(%s)",
    "log10": r"\log_{10}(%s)",
    "log2": r"\log_{2}(%s)",
    "factorial": "(%s)!",
    "abs": r"\left|%s\right|",
    "Abs": r"\left|%s\right|",
    "floor": r"\lfloor %s\rfloor",
    "ceil": r"\lceil %s\rceil",
    "ceiling": r"\lceil %s\rceil",
    "cbrt": r"\sqrt[3]{%s}",
    "Integer": "%s",
    "Float": "%s",
    "int": "%s",
    "float": "%s",
    **{name: rf"\{name}(%s)" for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{f"a{name}": rf"\arc{name}(%s)" for name in ("sin", "cos", "tan")},
}
_PYTHON = re.compile(
    r"\*|\d[jJ]\b|(?<![A-Za-z\\])(?:[a-z]+\.)?(?:Fraction|Rational|Matrix|ImmutableMatrix|array|binomial|comb|set|"
    + "|".join(sorted(_CALLS, key=len, reverse=True))
    + r")\(|\[\[|\[\(|(?<![A-Za-z\\])(?:pi|oo)(?![A-Za-z])|\A\{[^{}\\]*\}\Z"
)
# of "2or" Python's parser would print a warning
_GLUED = re.compile(r"\d[jJ]?_?(?:and|else|for|if|in|is|not|or)")
_ENOTATION = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]\s?([+-]?\d+)(?![\w.])")


def python(text: str) -> str:
    r"""
    What Python and sympy print: `3*x**2` is `3 x^{2}`, `Fraction(1, 2)` is `\frac{1}{2}`, `1.5e-05` has a power.
    """
    if "\\" not in text and len(text) <= 2000 and _PYTHON.search(text):
        found = None if _GLUED.search(text) else _from_python(text.strip())
        if found is not None:
            return found
        text = re.sub(r"\*\*\s*\(([^()]*)\)", r"^{\1}", text)
        text = re.sub(r"\*\*\s*(-?[\w.]+)", r"^{\1}", text)
        text = re.sub(r"(?<!\*)\*(?!\*)", r" \\cdot ", text)
    return _powers_of_ten(text)


def _from_python(text: str) -> str | None:
    try:
        return _latex(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _powers_of_ten(text: str) -> str:
    return _ENOTATION.sub(lambda m: rf"{m[1]}\times10^{{{int(m[2])}}}" if len(m[2]) < 9 else m[0], text)


def _latex(node: ast.expr, source: str) -> str:
    """A node of Python's syntax tree in LaTeX. Raises `ValueError` for what is no arithmetic."""
    match node:
        case ast.Constant(value=bool()) | ast.Constant(value=None):
            return str(node.value)
        case ast.Constant(value=int() | float() | complex()):
            number = _powers_of_ten((ast.get_source_segment(source, node) or "").replace("_", ""))
            return f"{number[:-1]} i" if number[-1:] in ("j", "J") else number
        case ast.Name(id=name):
            return _NAMES.get(name, f"\\{name}" if name in _GREEK_NAMES else name)
        case ast.UnaryOp(op=ast.USub()):
            return f"-{_grouped(node.operand, source)}"
        case ast.UnaryOp(op=ast.UAdd()):
            return _latex(node.operand, source)
        case ast.BinOp(left=left, right=right, op=ast.Add()):
            return f"{_latex(left, source)}+{_latex(right, source)}"
        case ast.BinOp(left=left, right=right, op=ast.Sub()):
            return f"{_latex(left, source)}-{_grouped(right, source)}"
        case ast.BinOp(left=left, right=right, op=ast.Mult()):
            return rf"{_grouped(left, source)} \cdot {_grouped(right, source)}"
        case ast.BinOp(left=left, right=right, op=ast.Div()):
            return rf"\frac{{{_latex(left, source)}}}{{{_latex(right, source)}}}"
        case ast.BinOp(left=left, right=right, op=ast.Pow()):
            base = _latex(left, source)
            base = base if isinstance(left, ast.Name) or re.fullmatch(r"[\d.]+", base) else f"({base})"
            return f"{base}^{{{_latex(right, source)}}}"
        case ast.BinOp(left=left, right=right, op=ast.BitXor()):  # a caret is a power in mathematics
            base = _latex(left, source)
            return f"({base})^{{{_latex(right, source)}}}"
        case ast.Tuple(elts=items):
            return "(" + ",".join(_latex(item, source) for item in items) + ")"
        case ast.Set(elts=items):
            return r"\{" + ",".join(_latex(item, source) for item in items) + r"\}"
        case ast.List(elts=[ast.List(), *_] as items):
            return _matrix(items, source)
        case ast.List(elts=items):
            return "[" + ",".join(_latex(item, source) for item in items) + "]"
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments, keywords=[]):
            return _call(name, arguments, source)
    raise ValueError(type(node).__name__)


def _grouped(node: ast.expr, source: str) -> str:
    text = _latex(node, source)
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
    return f"({text})" if is_sum or isinstance(node, ast.UnaryOp) else text


def _call(name: str, arguments: list[ast.expr], source: str) -> str:
    match name, arguments:
        case "Fraction" | "Rational", [above, below]:
            return rf"\frac{{{_latex(above, source)}}}{{{_latex(below, source)}}}"
        case "Fraction" | "Rational", [value]:
            return _latex(value, source)
        case "Matrix" | "ImmutableMatrix" | "array", [ast.List(elts=[ast.List(), *_] as rows)]:
            return _matrix(rows, source)
        case "Matrix" | "ImmutableMatrix", [ast.List(elts=items)]:
            return _matrix([ast.List(elts=[item]) for item in items], source)
        case "set", [ast.List(elts=items)]:
            return r"\{" + ",".join(_latex(item, source) for item in items) + r"\}"
        case "binomial" | "comb", [above, below]:
            return rf"\binom{{{_latex(above, source)}}}{{{_latex(below, source)}}}"
        case _, [value] if name in _CALLS:
            return _CALLS[name] % _latex(value, source)
    raise ValueError(name)


def _matrix(rows: list[ast.expr], source: str) -> str:
    lines = [" & ".join(_latex(item, source) for item in row.elts) for row in rows if isinstance(row, ast.List)]
    return r"\begin{pmatrix}" + r" \\ ".join(lines) + r"\end{pmatrix}"


_GREEK_NAMES = {text.strip("\\ ") for text in _GREEK.values()}
_SEPARATOR = r"(?:\\[,; :]|\{,\}|\\!,\\!|,\\!|['_~ \u00a0\u2009\u202f]|\\thinspace ?)"
_GROUPS = re.compile(rf"(?<![\w.,])(\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+)(?![\w,/]|{_SEPARATOR}?\d)")


def digit_groups(text: str) -> str:
    r"""Digits in groups of three as one number: `1\,234\,567`, `1_000_000`, `10'000`, `12{,}345`."""
    return _GROUPS.sub(lambda m: re.sub(r"\D", "", m[1]), text)


_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\\overline\s*(\d)|\((\d+)\)"
    r"|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)(?![\d(])"
)


def repeating_decimals(text: str) -> str:
    r"""Decimals with a period as fractions: `0.1\overline{6}`, `0.\dot{3}`, `0.(3)`."""

    def fraction(m: re.Match) -> str:
        period = m[3] or m[4] or m[5] or "".join(part or "" for part in m.group(6, 7, 8))
        if len(m[1] + m[2] + period) > 200:
            return m[0]
        head = Fraction(int(m[1] + m[2] or "0"), 10 ** len(m[2]))
        value = head + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(m[2]))
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    return _REPEATING.sub(fraction, text)


def mixed_numbers(text: str) -> str:
    r"""`2 3/4` as `2\frac{3}{4}`, which math-verify reads as a sum."""
    return re.sub(
        r"(?<![\w./,^])(\d{1,9})(?:\s|\\ )+(?:and )?(\d{1,9})/(\d{1,9})(?![\d/.])",
        lambda m: rf"{m[1]}\frac{{{m[2]}}}{{{m[3]}}}" if 0 < int(m[2]) < int(m[3]) else m[0],
        text,
    )


_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CURRENCY = r"(?:US\s?\$|USD|EUR|GBP|CNY|RMB|INR|Rs\.?|[$€£¥₹₩₽])"


def amounts(text: str) -> str:
    r"""Signs of currency go, words of scale and sign count: `€5`, `USD 5`, `5 million`, `negative 5`, `1.5 x 10^4`."""
    if not re.search(r"\d", text):
        return text
    text = re.sub(rf"\\text\s*\{{\s*({_CURRENCY})\s*\}}", r"\1 ", text)
    text = re.sub(rf"\A(-?)\s*{_CURRENCY}\s*(?=[-\d.])|(?<=\d)\s*{_CURRENCY}\Z", r"\1", text)
    text = re.sub(r"\A(?:negative|minus)\s+(?=[\d.$€£¥])", "-", text)
    text = re.sub(r"(?<=\d)\s*[x×X]\s*(?=10\s*\^)", r"\\times ", text)
    text = re.sub(r"10\s*\^\s*\(?(-?\d+)\)?", r"10^{\1}", text)
    return re.sub(
        rf"(\d)\s*(?:\\text\s*\{{\s*)?({'|'.join(_SCALES)})s?\b(?P<tail>[^{{}}]*)(?P<close>\}}?)",
        lambda m: rf"{m[1]}\times10^{{{_SCALES[m[2]]}}}" + (rf"\text{{{m['tail']}}}" if m["close"] else m["tail"]),
        text,
    )


_RELATION = r"(?:(?:\\leqslant|\\geqslant|\\leq|\\geq|\\le|\\ge|\\lt|\\gt)(?![a-zA-Z])|<=|>=|<|>)"
_OPERATORS = {"<": "<", r"\lt": "<", ">": ">", r"\gt": ">"} | {
    sign: sign[0] + "=" if sign[0] in "<>" else "<=" if "l" in sign[:2] else ">="
    for sign in (r"\leqslant", r"\geqslant", r"\leq", r"\geq", r"\le", r"\ge", "<=", ">=")
}
_VARIABLE = r"[a-zA-Z]|\\(?:alpha|beta|gamma|theta|lambda|mu|varphi|phi|omega)"
_BUILDER = re.compile(
    rf"\\\{{\s*({_VARIABLE})\s*(?:\\in\s*\\mathbb\s*\{{R\}})?\s*(?:\\mid|\||:|\\vert|\\,\|\\,)(.+)\\\}}"
)


def builder_sets(text: str) -> str:
    r"""A set of the reals between two numbers as an interval: `\{x \mid 1 < x \le 2\}` is `(1,2]`."""
    if "{" not in text:
        return text
    match = _BUILDER.fullmatch(re.sub(r"\\left(?=\\\{|\|)|\\right(?=\\\}|\|)|\\[,;:!]", "", text))
    if not match:
        return text
    condition = re.sub(r",?\s*[a-zA-Z]\s*\\in\s*\\mathbb\s*\{R\}\s*\Z", "", match[2].replace(r"\\", ""))
    found = intervals(condition)
    return found[1] if found and found[0] == match[1] else text


def intervals(text: str) -> tuple[str, str] | None:
    r"""
    Inequalities of one variable as intervals.

    Returns:
        `tuple[str, str] | None`: The variable and the set, for example `("x", "(-\infty,1)\cup(2,\infty)")` for
        `x<1 \text{ or } x>2`; `None` for anything else.
    """
    text = re.sub(r"\\text\s*\{\s*(and|or|且|或)\s*\}", r" \1 ", text)
    both = [_interval(part.strip()) for part in re.split(r"\band\b|且|\\land(?![a-z])|\\wedge(?![a-z])", text)]
    if len(both) == 2 and both[0] and both[1] and both[0][0] == both[1][0]:
        (low, high) = sorted((item[1] for item in both if item), key=lambda interval: interval.startswith(r"(-\infty"))
        if low.endswith(r"\infty)") and high.startswith(r"(-\infty") and r"\cup" not in low + high:
            return both[0][0], low.removesuffix(r"\infty)") + high.removeprefix(r"(-\infty,")
    parts = re.split(r"\s*(?:\bor\b|或|\\lor(?![a-z])|\\vee(?![a-z]))\s*", text)
    found = [_interval(part.strip()) for part in parts]
    known = [item for item in found if item]
    if not known or len(known) < len(parts) or len({variable for variable, _ in known}) != 1:
        return None
    return known[0][0], r"\cup".join(interval for _, interval in known)


def _interval(text: str) -> tuple[str, str] | None:
    unequal = re.fullmatch(rf"({_VARIABLE})\s*(?:\\neq|\\ne|!=)(?![a-z])(.+)", text)
    if unequal and _is_bound(unequal[2]):
        bound = unequal[2].strip()
        return unequal[1], rf"(-\infty,{bound})\cup({bound},\infty)"
    pieces = re.split(rf"({_RELATION})", text)
    if len(pieces) not in (3, 5):
        return None
    terms, signs = [piece.strip() for piece in pieces[::2]], [_OPERATORS[sign] for sign in pieces[1::2]]
    if len(terms) == 3:
        low, variable, high = terms
        if signs[0][0] != signs[1][0] or not re.fullmatch(_VARIABLE, variable):
            return None
        if signs[0][0] == ">":
            low, high, signs = high, low, signs[::-1]
        if not (_is_bound(low) and _is_bound(high)):
            return None
        return variable, f"{'[' if '=' in signs[0] else '('}{low},{high}{']' if '=' in signs[1] else ')'}"
    left, right, sign = *terms, signs[0]
    if not re.fullmatch(_VARIABLE, left):
        left, right, sign = right, left, {"<": ">", ">": "<"}[sign[0]] + sign[1:]
    if not (re.fullmatch(_VARIABLE, left) and _is_bound(right)):
        return None
    if sign[0] == "<":
        return left, rf"(-\infty,{right}{']' if '=' in sign else ')'}"
    return left, rf"{'[' if '=' in sign else '('}{right},\infty)"


def _is_bound(text: str) -> bool:
    """Whether text is a number: it has no letters but those of roots, fractions, pi and e."""
    rest = re.sub(r"\\(?:frac|dfrac|tfrac|sqrt|pi|ln|log|infty|cdot|times)(?![a-zA-Z])", "", text)
    return bool(text.strip()) and not re.search(r"[^\W\de_]|\\|[,;=]", rest)


def degrees_of_functions(text: str) -> str:
    r"""An angle in degrees under a function as radians: `\cos 60^\circ` is `\cos(\frac{60\pi}{180})`."""
    return re.sub(
        r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?)\s*[({]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?",
        r"\1(\\frac{\2\\pi}{180})",
        text,
    )


def tidy(text: str) -> str:
    r"""Angle brackets as round ones, no leading plus sign, single spaces."""
    text = re.sub(r"(?:\\left\s?)?\\langle(?![a-zA-Z])", "(", text)
    text = re.sub(r"(?:\\right\s?)?\\rangle(?![a-zA-Z])", ")", text)
    text = re.sub(r"\A<\s*([^<>=]*,[^<>=]*)>\Z", r"(\1)", text)
    text = re.sub(r"\A\+\s*(?=[\d\\.])", "", text)
    text = re.sub(r"(?<!\\)\\(?:[,;: ]|(?:quad|qquad)(?![a-zA-Z]))|~", " ", text)
    text = re.sub(r"(?<!\\)\s+([,;)\]])", r"\1", text)
    return _without_end(" ".join(text.split()))


STEPS = (
    typography,
    markup,
    dots,
    amounts,
    digit_groups,
    repeating_decimals,
    python,
    mixed_numbers,
    builder_sets,
    degrees_of_functions,
    tidy,
)


MAX_LENGTH = 10_000


def normalise(text: str) -> str:
    """`text` after all `STEPS`; one that has more than `MAX_LENGTH` characters goes no further."""
    for step in STEPS:
        if len(text) > MAX_LENGTH:
            break
        text = step(text)
    return text
