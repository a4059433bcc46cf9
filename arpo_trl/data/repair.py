r"""The damage of the published data, repaired: text whose escape sequences a string swallowed, stray control
characters.

What is not here: answers are not corrected. A ground truth that was cut off or mixed up at the source is listed by
`report.py`, not guessed.
"""

import re

# An escape sequence that a JSON or Python string swallowed: the letter after the backslash became a control character.
_SWALLOWED = {"\x08oxed": r"\boxed", "\x08egin": r"\begin", "\x08inom": r"\binom", "\x0crac": r"\frac"}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff]")


def repair_text(text: str) -> tuple[str, list[str]]:
    r"""
    Undo the damage of a prompt or a trace.

    Args:
        text (`str`): Text as published.

    Returns:
        `tuple[str, list[str]]`: The repaired text, and the names of what was repaired.
    """
    repairs = []
    for damaged, meant in _SWALLOWED.items():
        if damaged in text:
            text = text.replace(damaged, meant)
            repairs.append(f"`{damaged.encode('unicode_escape').decode()}` → `{meant}`")
    if "\r" in text:
        text = re.sub(r"\r\n?", "\n", text)
        repairs.append("carriage returns → line feeds")
    if _CONTROL.search(text):  # left behind where a ligature was taken apart ("in\x0cfinite"), or never visible
        text = _CONTROL.sub("", text)
        repairs.append("other control and zero-width characters removed")
    if "\xa0" in text:
        text = text.replace("\xa0", " ")
        repairs.append("no-break spaces → spaces")
    return text, repairs


def repair_answer(text: str) -> tuple[str, list[str]]:
    r"""
    Undo the damage of a ground truth: as [`repair_text`], and white space around it, a comma or an `\end{…}` without
    its `\begin` left at its end, doubled backslashes before `{`, `}` and `%`.
    """
    text, repairs = repair_text(text)
    dangling = re.search(r"\s*\\end\{(\w+)\}\s*\Z", text)
    if dangling and rf"\begin{{{dangling.group(1)}}}" not in text:
        text = text[: dangling.start()].removesuffix(".")
        repairs.append(r"`\end{…}` without `\begin` removed")
    if re.search(r"\\\\[{}%]", text):
        text = re.sub(r"\\\\(?=[{}%])", r"\\", text)
        repairs.append(r"doubled backslash before `{`, `}`, `%`")
    if text != text.strip():
        text = text.strip()
        repairs.append("white space around it removed")
    if text.endswith(","):
        text = text.rstrip(",")
        repairs.append("comma at its end removed")
    return text, repairs
