"""Text as a model wrote it between tags or in an argument, and the code in it."""

import re
import textwrap

# A Markdown fence around everything; one that was never closed ends with the text
_FENCE = re.compile(r"(?P<fence>`{3,})[^\n`]*\n(?P<code>.*?)(?:\n[ \t]*)?(?P=fence)?", re.DOTALL)


def trimmed(text: str) -> str:
    """`text` without blank lines and spaces around it. The indentation of the first of several lines stays."""
    text = re.sub(r"\A(?:[ \t\r]*\n)+", "", text).rstrip()
    return text if "\n" in text else text.strip()


def unindented(text: str) -> str:
    """`text` without blank lines around it, nor the indentation that all of its lines have in common."""
    text = trimmed(text)
    return textwrap.dedent(text).strip() if text[:1].isspace() else text


def source_code(text: str) -> str:
    """The code in `text`: out of its Markdown fence, if it is in one, and unindented."""
    text = unindented(text)
    fenced = _FENCE.fullmatch(text)
    return unindented(fenced["code"]) if fenced else text
