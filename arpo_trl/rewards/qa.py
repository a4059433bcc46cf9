"""Short answers in words: exact match and token F1 after SQuAD's normalisation, best of several ground truths.

Two departures from SQuAD's script. The sign and the decimal point of a number are kept: with all punctuation dropped,
-40 would equal 40, and 1.95 would equal 195. And LaTeX text markup is taken off, since the paper's prompt asks for the
answer "with latex format": `\\text{Paris}` is Paris.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from .completions import final_answers, ground_truths, mean

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|emph)\s*\{([^{}]*)\}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# what survives the removal of punctuation: the sign of a number that starts a word, the point between or before digits
_KEPT = re.compile(r"(?<!\S)-(?=\.?\d)|(?<=\d)\.(?=\d)|(?<![\w.])\.(?=\d)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces; numbers keep their sign and decimal point."""
    for _ in range(3):  # nested markup
        text = _LATEX_TEXT.sub(r"\1", text)
    text = re.sub(r"\\([ ,;!&%$#_])|~", lambda m: {"&": "&", "%": "%", "$": "$"}.get(m.group(1), " "), text)
    text = unicodedata.normalize("NFC", text).replace("−", "-").lower()
    pieces, position = [], 0
    for kept in _KEPT.finditer(text):
        pieces += [text[position : kept.start()].translate(_PUNCTUATION), kept.group()]
        position = kept.end()
    text = "".join([*pieces, text[position:].translate(_PUNCTUATION)])
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
        completions (`list`): Strings or messages; the answer is the last `\boxed{}` of `<answer>`, or of the last turn.
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
