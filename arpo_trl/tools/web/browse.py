"""Read web pages as text.

```python
from arpo_trl.tools.web.browse import Browser

browser = Browser()
trainer = ARPOTrainer(..., tools=[browser.browse])
```

Addresses are treated as hostile; see [`~arpo_trl.tools.web.fetch`] for what is refused.

A page that is more than small is parsed in one of a few processes, with limits on memory and time: markup can be made
to cost a parser gigabytes and minutes, and a thread inside the parser cannot be stopped.

What this module does NOT do: run JavaScript, or read PDF or images.
"""

from __future__ import annotations

import codecs
import html as html_entities
import re
import ssl
from typing import Any

from ...execution.executor import ToolCall, ToolExecutor
from ...execution.options import tool
from .fetch import HTML, Page, fetch

try:
    import trafilatura
except ImportError as error:
    raise ImportError(f"Browsing needs trafilatura ({error}): pip install 'arpo-trl[browse]'.") from error

# Names of the Encoding standard (https://encoding.spec.whatwg.org/#names-and-labels) that Python does not know
_LABELS = {
    "cn-big5": "big5hkscs",
    "cseuckr": "cp949",
    "csgb2312": "gb18030",
    "csiso88596e": "iso8859-6",
    "csiso88596i": "iso8859-6",
    "csiso88598e": "iso8859-8",
    "csiso88598i": "iso8859-8",
    "csisolatin9": "iso8859-15",
    "csisolatingreek": "iso8859-7",
    "csmacintosh": "mac-roman",
    "cseucpkdfmtjapanese": "euc_jp",
    "csksc56011987": "cp949",
    "dos-874": "cp874",
    "gb_2312": "gb18030",
    "gb_2312-80": "gb18030",
    "iso-8859-6-e": "iso8859-6",
    "iso-8859-6-i": "iso8859-6",
    "iso-8859-8-e": "iso8859-8",
    "iso-8859-8-i": "iso8859-8",
    "koi": "koi8-r",
    "koi8": "koi8-r",
    "koi8-ru": "koi8-u",
    "iso-ir-149": "cp949",
    "ks_c_5601-1989": "cp949",
    "ksc5601": "cp949",
    "ksc_5601": "cp949",
    "logical": "iso8859-8",
    "mac": "mac-roman",
    "sun_eu_greek": "iso8859-7",
    "unicode-1-1-utf-8": "utf-8",
    "unicode11utf8": "utf-8",
    "unicode20utf8": "utf-8",
    "visual": "iso8859-8",
    "windows-31j": "cp932",
    "windows-874": "cp874",
    "windows-949": "cp949",
    "x-euc-jp": "euc_jp",
    "x-gbk": "gb18030",
    "x-mac-cyrillic": "mac-cyrillic",
    "x-mac-roman": "mac-roman",
    "x-mac-ukrainian": "mac-cyrillic",
    "x-sjis": "cp932",
    "x-unicode20utf8": "utf-8",
    "x-x-big5": "big5hkscs",
}
# Names that on the web mean a superset of what Python takes them for
_SUPERSETS = {
    "ascii": "cp1252",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "iso8859-1": "cp1252",
    "iso8859-11": "cp874",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
    "tis-620": "cp874",
    "utf-16": "utf-16-le",
}
# codecs that Python counts as text and no web page means
_NO_CHARSET = frozenset({"idna", "punycode", "unicode-escape", "raw-unicode-escape", "utf-7", "undefined"})
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Extraction costs about 0.2 ms an element in its fast mode, and time that grows with the square in its thorough one:
# so thorough up to a tenth of this, fast up to this, and above it the words of the whole page
_MOST_ELEMENTS = 20_000
# An element costs some 600 bytes of memory: markup with more tags is cut
_MOST_TAGS = 100_000
# Bytes up to which a page is parsed where it was fetched
_SMALL_PAGE = 50_000
# Of the processes that parse: how many, bytes of memory of each, and seconds that a page may take
_READERS = 4
_READER_MEMORY = 2**30
_READER_SECONDS = 30.0
_CUT = "\n[The page is longer; the rest was left out.]"


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
        self._readers = ToolExecutor()

    @tool(deterministic=True)
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
        text = readable_text(page) if len(page.body) <= _SMALL_PAGE else self._read_apart(page)
        if page.cut or len(text) > self.max_chars:
            text = f"{text.removesuffix(_CUT)[: self.max_chars]}{_CUT}"
        return text or "The page holds no readable text."

    def _read_apart(self, page: Page) -> str:
        (call,) = self._readers.run([(ToolCall("readable_text", {"page": page}), _read_apart)])
        if call.error is not None:
            kind, _, message = call.error.partition(": ")
            if kind == "TimeoutError":
                message = f"its text could not be found within {_READER_SECONDS:g} s"
            raise RuntimeError(message if kind == "RuntimeError" else f"The page cannot be read: {message or kind}.")
        return str(call.result)


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
        return _decode(body, known)
    declared = _META_CHARSET.search(body[:2048])
    # a declaration that can be read as ASCII is not UTF-16, whatever it says
    if declared and (known := _known_charset(declared[1].decode("ascii", "replace"))) and known[:6] != "utf-16":
        return _decode(body, known)
    try:
        # the cut may have gone through a character
        return codecs.getincrementaldecoder("utf-8")().decode(body)
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        guess = from_bytes(body[:20_000]).best()
        return body.decode(guess.encoding if guess else "cp1252", "replace")


def _known_charset(name: str) -> str | None:
    name = re.sub(r"^iso8859(\d+)$|^x-cp(\d+)$", _with_hyphen, name.strip().lower())
    try:
        known = codecs.lookup(_LABELS.get(name, name)).name
        "".encode(known)  # LookupError for a codec that does not make text, such as zip
    except (LookupError, ValueError):
        return None
    return None if known in _NO_CHARSET else _SUPERSETS.get(known, known)


def _with_hyphen(match: re.Match) -> str:
    return f"iso8859-{match[1]}" if match[1] else f"cp{match[2]}"


def _euc_jp_extension(error: UnicodeError) -> tuple[str, int]:
    """Read what browsers know of EUC-JP beyond Python's codec: the rows that Shift_JIS of Windows has as well."""
    assert isinstance(error, UnicodeDecodeError)
    row, cell = (*error.object[error.start : error.start + 2], 0)[:2]
    if not (0xA1 <= row <= 0xFE and 0xA1 <= cell <= 0xFE):
        return "\ufffd", error.start + 1
    row, cell = row - 0xA1, cell - 0xA1
    lead = row // 2 + (0x81 if row < 62 else 0xC1)
    trail = cell + 0x9F if row % 2 else cell + (0x40 if cell < 63 else 0x41)
    return bytes((lead, trail)).decode("cp932", "replace")[:1], error.start + 2


codecs.register_error("arpo_trl.euc_jp", _euc_jp_extension)


def _decode(body: bytes, charset: str) -> str:
    return body.decode(charset, "arpo_trl.euc_jp" if charset == "euc_jp" else "replace")


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


@tool(process=True, timeout=_READER_SECONDS, max_concurrency=_READERS)
def _read_apart(page: Page) -> str:
    """`readable_text` in a process of its own."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = _READER_MEMORY if hard == resource.RLIM_INFINITY else min(_READER_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return readable_text(page)


def _html_to_text(html: str) -> str:
    if not re.search(r"<[a-z!/?]", html, re.IGNORECASE):
        return html_entities.unescape(html)  # plain text under the wrong name
    cut = html.count("<") > _MOST_TAGS
    if cut:
        html = "<".join(html.split("<", _MOST_TAGS)[:-1])
    tree = trafilatura.load_html(html)
    if tree is None:
        return ""
    title = " ".join((tree.findtext(".//title") or "").split())
    size = sum(1 for _ in tree.iter())
    main = None
    if size <= _MOST_ELEMENTS:
        _keep_facts(tree)
        main = trafilatura.extract(tree, fast=size > _MOST_ELEMENTS // 10, include_comments=False)
    if not main:
        # a page without a main part (a list of links, a form) still has words
        tree = trafilatura.load_html(html)  # anew, since extraction takes a tree apart
        if size <= _MOST_ELEMENTS:
            _keep_facts(tree)
        main = trafilatura.html2txt(tree)
    text = main
    text = f"{title}\n\n{text}" if title and not text.startswith(title) else text
    return text + _CUT if cut else text


def _keep_facts(tree: Any) -> None:
    """Turn elements that extraction throws away with their text into ones that it keeps."""
    for element in list(tree.iter("math")):
        _replace(element, _formula(element))
    for element in list(tree.iter("time", "output", "label", "legend")):
        if element.getparent() is not None:
            element.drop_tag()
    for figure in list(tree.iter("figure")):
        if next(figure.iter("table", "pre"), None) is not None:
            figure.tag = "div"
    for item in tree.xpath("//td//li | //td//dt | //td//dd | //th//li | //th//dt | //th//dd"):
        if item.getnext() is not None:
            item.tail = f"{': ' if item.tag == 'dt' else ', '}{(item.tail or '').strip()}"
        item.drop_tag()
    for inner in tree.xpath(
        "//td//ul | //td//ol | //td//dl | //td//menu | //th//ul | //th//ol | //th//dl | //th//menu"
    ):
        inner.drop_tag()


def _replace(element: Any, text: str) -> None:
    """Put a text in the place of an element, also where style sheets hide it for a picture of it."""
    parent, before = element.getparent(), element.getprevious()
    if parent is None:
        return
    if "none" in parent.get("style", ""):
        del parent.attrib["style"]
    text = f"{text}{element.tail or ''}"
    if before is None:
        parent.text = f"{parent.text or ''}{text}"
    else:
        before.tail = f"{before.tail or ''}{text}"
    parent.remove(element)


def _formula(math: Any) -> str:
    """A formula of MathML in one line: in the TeX of its author where that is given, else built from its parts."""
    for annotation in math.iter("annotation"):
        if "tex" in annotation.get("encoding", "").lower() and annotation.text:
            return annotation.text.strip()
    if math.get("alttext"):
        return math.get("alttext").strip()
    try:
        return _in_one_line(math)
    except RecursionError:
        return "".join(math.itertext())


def _in_one_line(element: Any) -> str:
    kind = element.tag.rpartition(":")[2] if isinstance(element.tag, str) else ""
    if kind in ("", "annotation", "annotation-xml"):
        return ""
    parts = [_in_one_line(child) for child in element]
    grouped = [part if len(part) == 1 or part.isalnum() else f"({part})" for part in parts]
    match kind, len(parts):
        case "mfrac", 2:
            return f"{grouped[0]}/{grouped[1]}"
        case "msup" | "mover", 2:
            return f"{grouped[0]}^{grouped[1]}"
        case "msub" | "munder", 2:
            return f"{grouped[0]}_{grouped[1]}"
        case "msubsup" | "munderover", 3:
            return f"{grouped[0]}_{grouped[1]}^{grouped[2]}"
        case "mroot", 2:
            return f"{grouped[0]}^(1/{parts[1]})"
        case "msqrt", _:
            return f"sqrt({''.join(parts)})"
        case "mtable", _:
            return "[" + "; ".join(parts) + "]"
        case "mtr" | "mlabeledtr", _:
            return ", ".join(parts)
    texts = [element.text or "", *(part + (child.tail or "") for part, child in zip(parts, element, strict=True))]
    return "".join(" ".join(text.split()) for text in texts)
