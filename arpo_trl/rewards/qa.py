r"""Short answers in words: exact match and token F1 after SQuAD's normalisation, best of several ground truths.

Where this departs from SQuAD's script, it does so for answers that the script cannot tell apart or takes for
different:

- Punctuation that makes a number or a name another one stays: the sign (-40), the point (1.95), what stands between
  digits (1988-1990, 1/2, 2:1, but not the comma of 1,200), and `+` and `#` behind a letter (C++, C#).
- An article stands before a word: the "A" of "Serie A" is none.
- Typography is no difference: quotes and dashes of Unicode, full-width characters, punctuation of other scripts.
- LaTeX markup goes, since the paper's prompt asks for the answer "with latex format": `\text{Paris}` is Paris.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from .completions import final_answers, ground_truths, mean

_COMMAND = re.compile(
    r"\\(?:text\w*|math\w*|operatorname\*?|emph|underline|[mhf]box|boxed|bm|boldsymbol)\s*\{([^{}]*)\}"
)
_SPACE = re.compile(r"\\(?:[ ,;:!]|(?:quad|qquad|,)(?![a-zA-Z]))|~")
_ARTICLES = re.compile(r"\b(a|an|the)\b(?=\s+\w)")
_CURRENCY = "$€£¥₹"
# what survives the removal of punctuation: the sign of a number (also before a currency or in brackets), a point
# before digits, what stands between digits, and the signs of C++ and C#
_KEPT = re.compile(
    rf"(?<![\w.)\]])-(?=[{_CURRENCY}]?\.?\d)|(?<=\d)[-./:^](?=\d)|(?<=\d),(?=\d)(?!\d{{3}}(?!\d))|(?<![\w.])\.(?=\d)"
    r"|(?<=\b[a-z])[+#]+(?![\w+#])"
)
_DASHES = "−–—‐‑‒―﹣"
_RAISED = re.compile("(?<=[0-9])[⁰¹²³⁴-⁹]+")


def _plain_text(text: str) -> str:
    r"""Typography and LaTeX markup off: `\textbf{Rosemary’s Baby}` is `Rosemary's Baby`, `10²` is `10^2`."""
    for _ in range(4):  # nested markup
        text, found = _COMMAND.subn(r"\1", text)
        if not found:
            break
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = _SPACE.sub(" ", text).replace("\\&", "&").replace("\\%", "%").replace("\\$", "$").replace("\\#", "#")
    if text.isascii():
        return text
    text = _RAISED.sub(lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    # "½" becomes "1⁄2"
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").translate(dict.fromkeys(map(ord, _DASHES), "-"))
    # format characters (zero width) and lone surrogates mean nothing
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Cs"))
    return "".join("'" if char in "’‘" else " " if char.isspace() else char for char in text)


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or (not char.isascii() and unicodedata.category(char)[0] == "P")


def normalize_answer(text: str) -> str:
    """
    Lower case, no punctuation, no articles, single spaces; numbers keep their sign and what stands between digits.
    """
    text = _plain_text(text).lower()
    kept = {position for found in _KEPT.finditer(text) for position in range(*found.span())}
    text = "".join(char for i, char in enumerate(text) if i in kept or not _is_punctuation(char))
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, truth: str) -> float:
    """1 if the two are the same after normalisation."""
    predicted, true = _words(prediction, truth)
    return float(predicted == true)


def token_f1(prediction: str, truth: str) -> float:
    """
    F1 over the words of the two, each counted as often as it occurs. "yes", "no" and "noanswer" agree entirely or not
    at all, as in HotpotQA's evaluation: "no" in a longer sentence is no evidence of a "no".
    """
    predicted, true = _words(prediction, truth)
    if predicted == true:
        return 1.0
    if any(words in (["yes"], ["no"], ["noanswer"]) for words in (predicted, true)):
        return 0.0
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def _words(prediction: str, truth: str) -> tuple[list[str], list[str]]:
    """Both as lists of words. Where normalisation leaves nothing of one ("The The", "!!!"), both stay as they are."""
    predicted, true = normalize_answer(prediction).split(), normalize_answer(truth).split()
    return (predicted, true) if predicted and true else (prediction.lower().split(), truth.lower().split())


def exact_match_reward(
    completions: list,
    model_text: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""
    1 for a row whose boxed answer is one of its ground truths after SQuAD's normalisation, else 0.

    Args:
        completions (`list`): Strings or messages; the answer is the last `\boxed{}` of `<answer>`, or of the last
            turn.
        model_text (`list[str]`, *optional*): What the model wrote, as [`ARPOTrainer`] passes it.
        log_metric (`Callable`, *optional*): Provided by the trainer.
        **kwargs: The dataset's columns; `answer` (or `solution`, `ground_truth`) holds a string or a list per row.

    Returns:
        `list[float]`: One value per row; `None` for a row without ground truth.
    """
    return _best_of(exact_match, "exact_match_reward", completions, model_text, log_metric, kwargs)


def token_f1_reward(
    completions: list,
    model_text: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Token F1 of each row's boxed answer with its best ground truth. Arguments as [`~rewards.exact_match_reward`]."""
    return _best_of(token_f1, "token_f1_reward", completions, model_text, log_metric, kwargs)


def _best_of(
    metric: Callable[[str, str], float],
    name: str,
    completions: list,
    model_text: list[str] | None,
    log_metric: Callable[[str, float], None] | None,
    columns: dict[str, Any],
) -> list[float | None]:
    rewards: list[float | None] = []
    for answer, truths in zip(final_answers(completions, model_text), ground_truths(columns), strict=True):
        if not truths:
            rewards.append(None)
        else:
            rewards.append(0.0 if answer is None else max(metric(answer, truth) for truth in truths))
    if log_metric is not None:
        log_metric(f"{name}/mean", mean([reward for reward in rewards if reward is not None]))
    return rewards
