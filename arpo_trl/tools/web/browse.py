"""Read web pages as text.

```python
from arpo_trl.tools.web.browse import Browser

browser = Browser()
trainer = ARPOTrainer(..., tools=[browser.browse])
```

Addresses are treated as hostile; see [`~arpo_trl.tools.web.fetch`] for what is refused.

What this module does NOT do: run JavaScript, read PDF or images, or interrupt the extraction of a page, which takes
seconds at the worst of what was tried with two megabytes.
"""

from __future__ import annotations

import codecs
import re
import ssl

from .fetch import HTML, Page, fetch

try:
    import trafilatura
except ImportError as error:
    raise ImportError(f"Browsing needs trafilatura ({error}): pip install 'arpo-trl[browse]'.") from error

# codecs that Python counts as text and no web page means
_NO_CHARSET = frozenset({"idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7", "undefined"})
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Extraction costs about 0.2 ms an element in its fast mode, and time that grows with the square in its thorough one: so
# thorough up to a tenth of this, fast up to this, and above it the words of the whole page
_MOST_ELEMENTS = 20_000


class Browser:
    """Reads web pages as text.

    Args:
        timeout (`float`): Seconds that fetching a page may take, redirects included.
        max_bytes (`int`): Bytes of a page that are read, counted after decompression; the rest is left out.
        max_chars (`int`): Characters of text that a page may fill.
        allow_private (`bool`): Whether this machine and private networks may be browsed. Only for a network that holds
            nothing a model must not reach.
        ssl_context ([`ssl.SSLContext`], *optional*): Certificates to trust; defaults to those of the system.
    """

    def __init__(
        self,
        timeout: float = 20.0,
        max_bytes: int = 2_000_000,
        max_chars: int = 20_000,
        allow_private: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ):
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, not {timeout}.")
        for name, value in (("max_bytes", max_bytes), ("max_chars", max_chars)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        self.timeout = timeout
        self.max_bytes = max_bytes
        self.max_chars = max_chars
        self.allow_private = allow_private
        # reading the system's certificates takes tens of milliseconds: once, not for every page
        self._ssl_context = ssl_context or ssl.create_default_context()

    def browse(self, url: str) -> str:
        """Open a web page and return its text.

        Args:
            url: Address of the page, starting with http:// or https://.

        Returns:
            Title and text of the page.
        """
        page = fetch(
            url,
            timeout=self.timeout,
            max_bytes=self.max_bytes,
            allow_private=self.allow_private,
            ssl_context=self._ssl_context,
        )
        text = readable_text(page)
        if page.cut or len(text) > self.max_chars:
            text = f"{text[: self.max_chars]}\n[The page is longer; the rest was left out.]"
        return text or "The page holds no readable text."


def decode(body: bytes, charset: str | None = None) -> str:
    """Decode a page as a browser would: byte order mark, then the server's charset, the page's own, UTF-8, a guess.

    Args:
        body (`bytes`): The page.
        charset (`str`, *optional*): Charset that the server named.

    Returns:
        `str`: Its text; what cannot be decoded is replaced.
    """
    for mark, name in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    if charset and (known := _known_charset(charset)):
        return body.decode(known, "replace")
    declared = _META_CHARSET.search(body[:2048])
    # a declaration that can be read as ASCII is not UTF-16, whatever it says
    if declared and (known := _known_charset(declared[1].decode("ascii", "replace"))) and known[:6] != "utf-16":
        return body.decode(known, "replace")
    try:
        # the cut may have gone through a character
        return codecs.getincrementaldecoder("utf-8")().decode(body)
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        guess = from_bytes(body[:20_000]).best()
        return body.decode(guess.encoding if guess else "cp1252", "replace")


def _known_charset(name: str) -> str | None:
    try:
        known = codecs.lookup(name.strip().lower()).name
        "".encode(known)  # LookupError for a codec that does not make text, such as zip
    except (LookupError, ValueError):
        return None
    if known in _NO_CHARSET:
        return None
    # on the web both names mean this superset of them
    return "cp1252" if known in ("iso8859-1", "ascii") else known


def readable_text(page: Page) -> str:
    """Take the readable text out of a page.

    Args:
        page (`Page`): What the server sent.

    Returns:
        `str`: Title and main text of HTML, anything else as it stands; empty if there is no text.

    Raises:
        RuntimeError: If the page is not text.
    """
    content_type = page.content_type
    if not content_type:
        if b"\0" in page.body[:1024]:
            raise RuntimeError("The page is not text; only HTML and plain text can be read.")
        content_type = (
            "text/html" if re.search(rb"<(!doctype\s+html|html|head|body)\b", page.body[:1024], re.I) else ""
        )
    text = decode(page.body, page.charset)
    return (_html_to_text(text) if content_type in HTML else text).strip()


def _html_to_text(html: str) -> str:
    tree = trafilatura.load_html(html)
    if tree is None:
        return ""
    title = " ".join((tree.findtext(".//title") or "").split())
    size = sum(1 for _ in tree.iter())
    main = None
    if size <= _MOST_ELEMENTS:
        main = trafilatura.extract(tree, fast=size > _MOST_ELEMENTS // 10, include_comments=False)
    # a page without a main part (a list of links, a form) still has words
    text = main or trafilatura.html2txt(html)
    return f"{title}\n\n{text}" if title and not text.startswith(title) else text
