"""The process in which answers are compared: reads one JSON question a line, writes one JSON verdict a line.

Started by `mathematics.py` as a plain script, so that it imports neither torch nor the caller's main module. A
question that burns more CPU time than it is given ends the process (SIGPROF's default action needs no cooperation from
sympy, and CPU time, unlike the wall clock, does not depend on what else the machine is doing); one that takes too much
memory fails inside it. The parent reads the end of the stream as "no verdict". The process ends with its parent.
"""

import json
import logging
import math
import os
import resource
import signal
import sys
from typing import Any


def compare(truth: str, answer: str) -> dict[str, bool]:
    """Compare two answers in LaTeX; `parsed` is false where the truth could be read as text only."""
    from math_verify import verify

    gold, target = _same_variables(_parse(truth), _parse(answer))
    parsed = any(not isinstance(item, str) for item in gold)
    if any(_is_contradiction(item) for item in [*gold, *target]) or _asks_for_equation(gold, target):
        return {"equal": truth == answer, "parsed": parsed}
    equal = verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None)
    return {"equal": bool(equal), "parsed": parsed}


def _parse(text: str) -> list:
    """
    What math-verify makes of the whole text: an expression and the text itself, or the text alone.

    It is not asked for expressions within the text: the 5 of "4 or 5" is no answer. Nor for units, of which its list
    takes the `c` off `x + c`.
    """
    from math_verify import LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    notation = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
    config = LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=notation
    )
    return parse(f"\\boxed{{{text}}}", extraction_config=[config], parsing_timeout=None)


def _same_variables(*answers: list) -> list[list]:
    """
    Variables of one name as one symbol: math-verify takes them for real only where it sees no lone `i` in the text.
    The symbol `i` is the imaginary unit where the other answer has that.
    """
    from sympy import Basic, I, Symbol

    symbols = {symbol for items in answers for item in items for symbol in getattr(item, "free_symbols", ())}
    imaginary = any(isinstance(item, Basic) and item.has(I) for items in answers for item in items)
    if not imaginary and not any(symbol.is_real is False for symbol in symbols):
        return list(answers)
    one = {symbol: I if imaginary and symbol.name == "i" else Symbol(symbol.name, real=True) for symbol in symbols}
    return [[item if isinstance(item, str) else item.xreplace(one) for item in items] for items in answers]


def _is_contradiction(item: Any) -> bool:
    """
    Whether an expression is infinite by a division by zero, or an equation of numbers that are not equal (4 = 5).
    """
    from sympy import Basic, Eq, nan, zoo

    if not isinstance(item, Basic):
        return False
    if item.has(zoo, nan):
        return True
    sides = [(equation.lhs, equation.rhs) for equation in item.atoms(Eq)]
    return any(a.is_number and b.is_number and not numeric_eq(a, b, 6, 15) for a, b in sides)


def _asks_for_equation(gold: list, target: list) -> bool:
    """Whether the truth is an equation (x + y = 5), of which the answer is the right side alone."""
    from sympy import Basic, Eq

    equation, answer = next(iter(gold), None), next(iter(target), None)
    if not isinstance(equation, Eq) or not isinstance(answer, Basic) or answer.is_Relational or answer.atoms(Eq):
        return False
    return bool(equation.lhs.is_Add or equation.lhs.is_Pow)


# Numbers. math-verify rounds decimals to six places and calls all numbers equal that differ by less than 1e-15.


def same_number(truth: Any, answer: Any) -> bool:
    """
    Whether two expressions without variables are the same number.

    Exact ones (no decimals in them) have to agree to 100 digits of their own size. A decimal stands for an exact one
    if it is off by no more than double precision, or if the exact one does not end within five places and rounds to
    the same six (more where it is small: to four digits).
    """
    from sympy import Float, Rational

    truth, answer = (item.doit() if hasattr(item, "doit") else item for item in (truth, answer))
    if isinstance(truth, Rational) and isinstance(answer, Rational):
        return truth == answer
    floats = truth.has(Float), answer.has(Float)
    if not any(floats):
        return _close(truth, answer, 100)
    if _close(truth, answer, 14.3):
        return True
    exact, other = (answer, truth) if floats == (True, False) else (truth, answer)
    parts = [part for item in (exact, other) for part in item.evalf(30).as_real_imag()]
    return all(_rounds_to(parts[i], parts[i + 2]) for i in (0, 1))


def _close(left: Any, right: Any, digits: float) -> bool:
    precision = int(digits) + 15
    difference = abs((left - right).evalf(precision, maxn=4 * precision))
    if difference == 0:
        return True
    size = max(abs(left.evalf(precision)), abs(right.evalf(precision)))
    return bool(difference < size * 10 ** (-digits)) if digits < 50 else bool(difference * 10 ** int(digits) < size)


def _rounds_to(exact: Any, other: Any) -> bool:
    size = abs(exact)
    places = max(6, 3 - math.floor(math.log10(size))) if 0 < size < 1 else 6
    if abs(exact - exact.round(places - 1)) <= size * 1e-14:
        return bool(abs(exact - other) <= size * 5e-15)
    return bool(exact.round(places) == other.round(places))


def numeric_eq(truth: Any, answer: Any, float_rounding: int, numeric_precision: int) -> bool:
    """
    Takes the place of math-verify's function of this purpose. Per cent count as their number and as their hundredth.
    """
    from math_verify.grader import get_pct_val
    from sympy import Float, MatrixBase

    if isinstance(truth, MatrixBase) or isinstance(answer, MatrixBase):
        if not (isinstance(truth, MatrixBase) and isinstance(answer, MatrixBase)) or truth.shape != answer.shape:
            return False
        pairs = zip(truth.doit().flat(), answer.doit().flat(), strict=True)
        return all(a == b or numeric_eq(a, b, float_rounding, numeric_precision) for a, b in pairs)
    try:
        if truth.free_symbols or answer.free_symbols:
            if not (truth.has(Float) or answer.has(Float)):
                return False  # what is left to do is algebra
            return bool((truth - answer).evalf(chop=True, n=numeric_precision) == 0)
        values = get_pct_val(truth, truth), get_pct_val(answer, answer)
        return same_number(*values) or (
            (values[0] is truth) != (values[1] is answer) and same_number(truth.doit(), answer.doit())
        )
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False


def use_own_numbers() -> None:
    """
    Put [`numeric_eq`] in the place of math-verify's function, so that numbers in sets, tuples and matrices go by it
    too.
    """
    from math_verify import grader

    grader.sympy_numeric_eq = numeric_eq


def main() -> None:
    memory = int(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever sympy prints must not pass for a reply
    logging.disable(logging.WARNING)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        use_own_numbers()
        compare("1", "2")  # imports everything, before the clock runs
    except Exception as error:
        reply({"broken": f"{type(error).__name__}: {error}"})
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply({"ready": True})
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        try:
            verdict = compare(question["truth"], question["answer"])
        except Exception:  # RecursionError, MemoryError, and whatever a parser makes of hostile text
            verdict = {"equal": False, "parsed": False}
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(verdict)


if __name__ == "__main__":
    main()
