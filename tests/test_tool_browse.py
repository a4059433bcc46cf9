"""Browsing against a real server on loopback: what is refused, what is bounded, and what a page reads like."""

import gzip
import socket
import ssl
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import tool_samples
from loopback import Loopback, http
from transformers.utils import get_json_schema

from arpo_trl.execution.errors import TransientToolError
from arpo_trl.tools import tool
from arpo_trl.tools.web import browse as browsing
from arpo_trl.tools.web import fetch as fetching
from arpo_trl.tools.web.browse import Browser, decode, readable_text
from arpo_trl.tools.web.fetch import is_public, split_url

ARTICLE = """<!doctype html><html><head><title>Vesk</title><script>var hidden = 1;</script></head><body>
<nav><a href="/">Home</a><a href="/x">Shop</a></nav>
<article><h1>Vesk</h1><p>Vesk is a town on the river Orn. It was founded in 1204 by fishermen who came from Talmar.</p>
<p>Its bridge, finished in 1388, is the oldest of the valley and still carries the road to the sea.</p></article>
<footer>Imprint</footer></body></html>"""


def html(body: str = ARTICLE, **headers) -> bytes:
    return http(body, **{"Content_Type": "text/html; charset=utf-8", **headers})


def browse(answer, path: str = "/", **options) -> str:
    """What a browser that may see loopback makes of one answer."""
    with Loopback({path: answer}) as server:
        return Browser(allow_private=True, **options).browse(server.url + path)


# --- reading


def test_a_page_reads_as_its_title_and_main_text():
    text = browse(html())
    assert text.startswith("Vesk\n")
    assert "founded in 1204" in text and "oldest of the valley" in text
    assert "hidden" not in text and "Imprint" not in text and "<p>" not in text


def test_a_page_without_a_main_part_still_gives_its_words():
    assert "Sign in" in browse(html("<html><body><form><label>Sign in</label><input></form></body></html>"))


@pytest.mark.parametrize("body", ["", "<html></html>", "   ", "<html><body><script>1</script></body></html>"])
def test_an_empty_page_says_so(body):
    assert browse(html(body)) == "The page holds no readable text."


def test_plain_text_under_the_name_of_html_is_read():
    assert browse(html("Talmar was founded in 1204.\nSalt &amp; cheese, 3 < 4.")) == (
        "Talmar was founded in 1204.\nSalt & cheese, 3 < 4."
    )


PROSE = "<p>" + "Vesk is a town on the river Orn, and a harbour. " * 6 + "</p>"


@pytest.mark.parametrize("paragraphs", [0, 1, 1100])  # no main part, and extraction in its thorough and its fast mode
@pytest.mark.parametrize(
    ("piece", "fact"),
    [
        (
            "<p>She was born on <time datetime='1990-05-12'>12 May 1990</time> in Lyon.</p>",
            "born on 12 May 1990 in Lyon",
        ),
        ("<p>The answer is <output>42 days</output> long.</p>", "answer is 42 days long"),
        ("<table><tr><td>Mon</td><td><ul><li>10:00 AM<li>noon</ul> or so</td></tr></table>", "10:00 AM, noon"),
        ("<table><tr><td>Born</td><td><dl><dt>in</dt><dd>Lyon</dd></dl></td></tr></table>", "in: Lyon"),
        ("<figure><table><tr><td>Length</td><td>42 km</td></tr></table></figure>", "42 km"),
        ("<p>Energy is <math><mi>E</mi><mo>=</mo><mn>42</mn></math> joule.</p>", "Energy is E=42 joule."),
        ("<p>Half is <math><mfrac><mn>1</mn><mn>2</mn></mfrac></math>.</p>", "Half is 1/2."),
        (
            "<p>So <math><msqrt><msup><mi>x</mi><mrow><mi>n</mi><mo>+</mo><mn>1</mn></mrow></msup></msqrt></math>."
            "</p>",
            "So sqrt(x^(n+1)).",
        ),
        (
            "<p>Mass: <span style='display: none'><math><semantics><mi>m</mi><annotation encoding='application/x-tex'>"
            "m c^2</annotation></semantics></math></span> is energy.</p>",
            "Mass: m c^2 is energy.",
        ),
        ("<p>With <math alttext='a_1'><mi>a</mi></math> given.</p>", "With a_1 given."),
    ],
)
def test_facts_in_elements_that_extraction_throws_away(paragraphs, piece, fact):
    prose = PROSE * paragraphs
    body = f"<html><body><article><h1>Vesk</h1>{prose}{piece}{prose}</article></body></html>"
    page = fetching.Page("text/html", "utf-8", body.encode(), False)
    assert fact in " ".join(readable_text(page).split())


def test_formulas_beyond_reason_are_read_as_text():
    body = "<html><body><p>x" + "<math>" + "<mfrac>" * 5000 + "<mn>42</mn>"
    assert isinstance(readable_text(fetching.Page("text/html", None, body.encode(), False)), str)


def test_plain_text_and_json_are_returned_as_they_are():
    assert browse(http("a <b> c\n", Content_Type="text/plain")) == "a <b> c"
    assert browse(http('{"a": 1}', Content_Type="application/json")) == '{"a": 1}'


def test_a_page_of_no_declared_type_is_looked_at():
    assert browse(http(ARTICLE)).startswith("Vesk\n")
    assert browse(http("just words")) == "just words"
    with pytest.raises(RuntimeError, match="not text"):
        browse(http(b"\x7fELF\0\0\0"))


@pytest.mark.parametrize(
    "content_type, complaint",
    [("application/pdf", "is a PDF"), ("image/png", "image/png"), ("video/mp4", "video/mp4")],
)
def test_other_types_are_refused_by_name(content_type, complaint):
    with pytest.raises(RuntimeError, match=complaint) as caught:
        browse(http(b"%PDF-1.7", Content_Type=content_type))
    assert not isinstance(caught.value, TransientToolError)


def test_the_request_is_that_of_a_browser():
    with Loopback({"*": html()}) as server:
        Browser(allow_private=True).browse(f"{server.url}/straße und weg?q=é&a=b%20c#part")
    (request,) = server.requests
    assert request.line == "GET /stra%C3%9Fe%20und%20weg?q=%C3%A9&a=b%20c HTTP/1.1"
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert "cookie" not in request.headers


def test_the_tool_has_a_schema():
    function = get_json_schema(Browser().browse)["function"]
    assert function["name"] == "browse"
    assert function["parameters"]["required"] == ["url"]


# --- charsets


@pytest.mark.parametrize(
    "body, charset, text",
    [
        ("žluť".encode(), None, "žluť"),
        ("žluť".encode("cp1250"), "windows-1250", "žluť"),
        ("“q” €".encode("cp1252"), "iso-8859-1", "“q” €"),  # what the web calls Latin-1
        ("数学".encode("gb18030"), "gb2312x", None),  # an unknown name is passed over
        ("数学".encode("shift_jis"), "Shift_JIS", "数学"),
        # names that on the web mean more than they say
        ("朱镕基".encode("gbk"), "gb2312", "朱镕基"),
        ("𠮷镕".encode("gb18030"), "GBK", "𠮷镕"),
        ("①髙".encode("cp932"), "shift_jis", "①髙"),
        ("①髙".encode("cp932"), "x-sjis", "①髙"),
        ("똠방각하".encode("cp949"), "euc-kr", "똠방각하"),
        ("똠방각하".encode("cp949"), "ks_c_5601-1987", "똠방각하"),
        ("“ş”".encode("cp1254"), "iso-8859-9", "“ş”"),
        ("“ş”".encode("cp1254"), "latin5", "“ş”"),
        ("“ก”".encode("cp874"), "tis-620", "“ก”"),
        ("啫喱".encode("big5hkscs"), "big5", "啫喱"),
        ("日本".encode("euc_jp") + b"\xad\xa1\xfc\xe2\xff" + "語".encode("euc_jp"), "euc-jp", "日本①髙\ufffd語"),
        ("שלום".encode("iso8859-8"), "iso-8859-8-i", "שלום"),
        ("Ґ".encode("koi8-u"), "koi8-ru", "Ґ"),
        ("é".encode("utf-16-le"), "utf-16", "é"),
        (b'<meta charset="gb2312">' + "镕".encode("gbk"), None, '<meta charset="gb2312">镕'),
        (b'<meta charset="koi8-r">' + "вода".encode("koi8-r"), None, '<meta charset="koi8-r">вода'),
        ('<meta charset="utf-16">é'.encode(), None, '<meta charset="utf-16">é'),
        (b"\xef\xbb\xbf" + "é".encode(), "latin-1", "é"),  # the mark wins
        ("é".encode("utf-16"), None, "é"),
        (b"a\xffb", "utf-8", "a\ufffdb"),
        ("né".encode()[:-1], None, "n"),  # cut in the middle of a character
        (b"+AGE-", "utf-7", "+AGE-"),
        (b"eJw=", "zip", "eJw="),
        (b"\\x41", "unicode_escape", "\\x41"),
    ],
)
def test_decoding(body, charset, text):
    decoded = decode(body, charset)
    assert isinstance(decoded, str)
    if text is not None:
        assert decoded == text


@pytest.mark.parametrize(
    "label",
    """unicode-1-1-utf-8 866 csisolatin2 iso88592 iso_8859-3:1988 latin4 cyrillic asmo-708 csiso88596e sun_eu_greek
    visual iso-8859-8-i logical csisolatin6 iso885913 iso-8859-14 csisolatin9 iso-8859-16 cskoi8r koi koi8-ru
    csmacintosh mac x-mac-roman dos-874 iso885911 tis-620 windows-874 x-cp1250 x-cp1251 ansi_x3.4-1968 iso-ir-100
    iso88591 us-ascii x-cp1252 windows-1253 l5 windows-1255 cp1256 windows-1257 x-cp1258 x-mac-cyrillic x-mac-ukrainian
    chinese csgb2312 csiso58gb231280 gb_2312-80 gb_2312 iso-ir-58 x-gbk big5-hkscs cn-big5 csbig5 x-x-big5
    cseucpkdfmtjapanese x-euc-jp csiso2022jp csshiftjis ms932 ms_kanji shift-jis windows-31j x-sjis cseuckr
    csksc56011987 iso-ir-149 korean ks_c_5601-1989 ksc5601 ksc_5601 windows-949 utf-16be""".split(),
)
def test_labels_of_the_web_are_known(label):
    assert browsing._known_charset(label) is not None


def test_the_charset_of_the_header_is_used():
    page = ARTICLE.replace("Vesk", "Вeск").encode("cp1251", "replace")
    assert browse(http(page, Content_Type="text/html; charset=windows-1251")).startswith("Вeск")


# --- addresses that are refused


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.255.0.1 10.1.2.3 172.16.0.1 172.31.255.255 192.168.0.1 169.254.169.254 169.254.0.1 100.64.0.1
    100.100.100.200 0.0.0.0 0.1.2.3 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 192.0.2.1 198.18.0.1 192.0.0.192
    168.63.129.16 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    ::ffff:a9fe:a9fe ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 2002:7f00:1:: 2001:0:7f00:1::1
    2001:db8::1 3fff::1 100::1 ::ffff:0:127.0.0.1 192.88.99.1 192.31.196.1 192.52.193.1 192.175.48.1 203.0.113.7
    198.51.100.7 2001:1::1 2001:10::1 2001:20::1 2001:30::1 2620:4f:8000::1 5f00::1 4000::1 ::8.8.8.8 100:0:0:1::1
    2606:4700::5efe:10.0.0.1 2606:4700::200:5efe:127.0.0.1 64:ff9b::c058:6301""".split(),
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    "8.8.8.8 93.184.216.34 172.32.0.1 192.0.1.1 192.88.98.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808".split(),
)
def test_addresses_that_are_public(address):
    assert is_public(address)


def test_a_public_address_of_this_machine_is_refused(monkeypatch):
    """Loopback in the part of an address that an interface has beside the private ones."""
    monkeypatch.setattr(fetching, "is_special", lambda ip: False)
    assert is_public("8.8.8.8") and not is_public("127.0.0.1")
    with Loopback({"*": html()}) as server:
        with pytest.raises(PermissionError, match="is this machine"):
            Browser().browse(server.url)
    assert server.connections == 0


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "①②⑦.0.0.1", "127。0。0。1"]
    + ["127.0.0.1.", "LOCALHOST", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "0.0.0.0"],
)
def test_every_spelling_of_this_machine_is_refused(host):
    with Loopback({"*": html()}) as server:
        # a spelling that the system does not understand at all leads nowhere, which is as good
        with pytest.raises((PermissionError, RuntimeError), match="private network|no host"):
            Browser().browse(f"http://{host}:{server.port}/")
    assert server.connections == 0


def test_loopback_of_ipv6_is_refused():
    try:
        server = Loopback({"*": html()}, host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with server:
        with pytest.raises(PermissionError, match="private network"):
            Browser().browse(server.url)
        assert server.connections == 0
        assert Browser(allow_private=True).browse(server.url).startswith("Vesk\n")
    assert server.requests[0].headers["host"] == f"[::1]:{server.port}"


@pytest.mark.parametrize(
    "url, complaint",
    [
        ("ftp://example.com/", "must start with http"),
        ("file:///etc/passwd", "must start with http"),
        ("gopher://example.com/", "must start with http"),
        ("javascript:alert(1)", "must start with http"),
        ("example.com/page", "must start with http"),
        ("//example.com/", "must start with http"),
        ("", "must start with http"),
        ("http://", "no host"),
        ("http:///path", "no host"),
        ("http://.example.com/", "malformed|no host"),
        ("http://example.com:99999/", "malformed"),
        ("http://example.com:abc/", "malformed"),
        ("http://[::1/", "malformed"),
        ("http://a..b/", "malformed"),
        ("http://example.com@127.0.0.1/", "user name"),
        ("http://user:password@example.com/", "user name"),
        ("http://@example.com/", "user name"),
        ("http://example.com\\@127.0.0.1/", "backslashes"),
        ("http://example.com/\r\nHost: 127.0.0.1", "control characters"),
        ("http://example.com\t.evil/", "control characters"),
    ],
)
def test_addresses_that_are_not_of_the_web_are_refused(url, complaint):
    with pytest.raises(ValueError, match=complaint):
        Browser(allow_private=True).browse(url)


def test_addresses_are_taken_apart():
    assert split_url("https://Example.COM") == ("https", "example.com", 443, "/", "example.com")
    host = "xn--bcher-kva.example"
    assert split_url("http://bücher.example:8080/a?b") == ("http", host, 8080, "/a?b", f"{host}:8080")
    assert split_url("http://[2606:4700::1]:81/") == ("http", "2606:4700::1", 81, "/", "[2606:4700::1]:81")
    with pytest.raises(TypeError, match="one string, not list"):
        split_url(["http://example.com"])


# --- names that lie


def _resolving(monkeypatch, *answers: list[str]) -> list[str]:
    """Let names resolve to `answers`, one for each look-up; returns the names that were looked up."""
    asked = []
    left = list(answers)

    def getaddrinfo(host, port, *args, **kwargs):
        asked.append(host)
        addresses = left.pop(0)
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_that_leads_to_a_private_address_is_refused(monkeypatch):
    _resolving(monkeypatch, ["169.254.169.254"])
    with pytest.raises(PermissionError, match="metadata.example is in a private network"):
        Browser().browse("http://metadata.example/latest/meta-data/")


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    _resolving(monkeypatch, ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(PermissionError):
        Browser().browse("http://mixed.example/")


def test_a_name_is_resolved_once_and_the_checked_address_is_connected(monkeypatch):
    """A name that leads elsewhere at the second look-up: there is no second look-up."""
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    with Loopback({"*": html()}) as server:
        asked = _resolving(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
        assert Browser().browse(f"http://rebind.example:{server.port}/").startswith("Vesk\n")
    assert asked == ["rebind.example"]
    assert server.requests[0].headers["host"] == f"rebind.example:{server.port}"


def test_a_second_address_is_tried_where_the_first_does_not_answer(monkeypatch):
    with Loopback({"*": html()}) as server:
        _resolving(monkeypatch, ["127.0.0.2", "127.0.0.1"])
        assert Browser(allow_private=True).browse(f"http://two.example:{server.port}/").startswith("Vesk\n")


def test_a_name_that_does_not_exist(monkeypatch):
    def getaddrinfo(*args, **kwargs):
        raise socket.gaierror(errno, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    errno = socket.EAI_NONAME
    with pytest.raises(RuntimeError, match="no host nowhere.example") as caught:
        Browser().browse("http://nowhere.example/")
    assert not isinstance(caught.value, TransientToolError)
    errno = socket.EAI_AGAIN
    with pytest.raises(TransientToolError, match="could not be looked up"):
        Browser().browse("http://nowhere.example/")


# --- redirects


def redirect(to: str, status: str = "302 Found") -> bytes:
    return http(status=status, Location=to)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(status):
    with Loopback({"/a/b": redirect("../c?x=1", status), "/c?x=1": html()}) as server:
        assert Browser(allow_private=True).browse(server.url + "/a/b").startswith("Vesk\n")


def test_a_redirect_in_utf8_is_followed():
    with Loopback({"/": redirect("/gr\u00fc\u00dfe"), "/gr%C3%BC%C3%9Fe": html()}) as server:
        assert Browser(allow_private=True).browse(server.url).startswith("Vesk\n")


@pytest.mark.parametrize("target", ["127.0.0.2", "169.254.169.254", "10.0.0.1", "[::1]", "localhost.example"])
def test_each_redirect_is_checked(monkeypatch, target):
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **options: resolve(host.replace("localhost.example", "127.0.0.3"), *args, **options),
    )
    with Loopback({"*": html("secret")}, host="127.0.0.2") as inside:
        with Loopback({"/": redirect(f"/next?{target}")}) as server:
            server.answers[f"/next?{target}"] = redirect(f"http://{target}:{inside.port}/")
            with pytest.raises(PermissionError, match="private network"):
                Browser().browse(server.url + "/")
        assert len(server.requests) == 2
    assert inside.connections == 0


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://example.com/", "http://a@127.0.0.1/", "data:text/html,x"]
)
def test_a_redirect_out_of_the_web_is_refused(target):
    with pytest.raises(ValueError, match="url must"):
        browse(redirect(target))


def test_a_circle_of_redirects_ends():
    with Loopback({"/": redirect("/")}) as server:
        with pytest.raises(RuntimeError, match="more than 5 times"):
            Browser(allow_private=True).browse(server.url)
    assert len(server.requests) == 6


# --- limits


def test_a_long_page_is_cut_visibly():
    text = browse(http("word " * 1000, Content_Type="text/plain"), max_chars=100)
    assert text == f"{('word ' * 20)}\n[The page is longer; the rest was left out.]"
    with Loopback({"*": http("x" * 5000, Content_Type="text/plain")}) as server:
        page = fetching.fetch(server.url, max_bytes=1000, allow_private=True)
    assert (len(page.body), page.cut) == (1000, True)
    with Loopback({"*": http("x" * 1000, Content_Type="text/plain")}) as server:
        page = fetching.fetch(server.url, max_bytes=1000, allow_private=True)
    assert (len(page.body), page.cut) == (1000, False)


def test_an_endless_page_is_cut():
    def flood(connection, request):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            connection.sendall(b"x" * 2**14)

    with Loopback({"*": flood}) as server:
        page = fetching.fetch(server.url, max_bytes=100_000, allow_private=True)
    assert (len(page.body), page.cut) == (100_000, True)


def test_gzip_is_unpacked():
    packed = gzip.compress(ARTICLE.encode())
    assert browse(http(packed, Content_Type="text/html", Content_Encoding="gzip")).startswith("Vesk\n")


def test_a_decompression_bomb_is_cut():
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < 60_000
    with Loopback({"*": http(bomb, Content_Type="text/plain", Content_Encoding="gzip")}) as server:
        tracemalloc.start()
        page = fetching.fetch(server.url, max_bytes=100_000, allow_private=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (len(page.body), page.cut) == (100_000, True)
    # 16 kB of it would unpack to 16 MB
    assert peak < 4_000_000
    # nor is one inside the page unpacked
    with Loopback({"*": http(bomb, Content_Type="text/html")}) as server:
        assert len(Browser(allow_private=True).browse(server.url)) <= 20_100


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
def test_a_compression_that_was_not_asked_for_is_refused(encoding):
    with pytest.raises(RuntimeError, match=encoding):
        browse(http(zlib.compress(b"x"), Content_Type="text/html", Content_Encoding=encoding))


# --- servers that misbehave


@pytest.mark.parametrize("stage", ["nothing", "status line", "headers", "body", "chunks"])
def test_a_slow_server_is_given_up_at_the_deadline(stage):
    """Each byte comes in time, the page does not."""
    answers = {
        "status line": b"HTTP/1.1 200 " + b"O" * 10**5,
        "headers": b"HTTP/1.1 200 OK\r\nX-Slow: " + b"o" * 10**5,
    }
    with Loopback({}) as server:

        def body(connection, request):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
            server.drip(b"")(connection, request)

        def chunks(connection, request):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
            server.drip(b"1\r\nx\r\n" * 1000)(connection, request)

        special = {"nothing": server.hang, "body": body, "chunks": chunks}
        server.answers["*"] = special.get(stage) or server.drip(answers[stage])
        with pytest.raises(TransientToolError, match="in time"):
            Browser(timeout=0.5, allow_private=True).browse(server.url)
    # the thread that cut it off is gone
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(10)
            assert not thread.is_alive()


def test_redirects_share_one_deadline():
    with Loopback({}) as server:

        def slow_redirect(connection, request):
            server.over.wait(0.3)
            connection.sendall(redirect("/" + request.path))

        server.answers["*"] = slow_redirect
        with pytest.raises(TransientToolError, match="in time"):
            Browser(timeout=0.8, allow_private=True).browse(server.url)
        assert len(server.requests) <= 4


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        html(Content_Length="99999"),
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        http(gzip.compress(b"x" * 10_000)[:-20], Content_Type="text/plain", Content_Encoding="gzip"),
    ],
    ids=["nothing", "half a header", "half a body", "half a chunk", "half a gzip"],
)
def test_half_an_answer_may_pass(answer):
    with pytest.raises(TransientToolError):
        browse(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 " + b"O" * 10**6,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        http(b"not gzip", Content_Type="text/plain", Content_Encoding="gzip"),
    ],
    ids=["not HTTP", "too many headers", "endless line", "bad chunk", "bad gzip"],
)
def test_garbage_is_an_error(answer):
    with pytest.raises(RuntimeError, match="127.0.0.1"):
        browse(answer)


def test_statuses():
    with pytest.raises(TransientToolError, match="answered 429 Slow down") as caught:
        browse(http(status="429 Slow down", Retry_After="3"))
    assert (caught.value.status, caught.value.retry_after) == (429, 3.0)
    with pytest.raises(TransientToolError, match="503") as caught:
        browse(http(status="503 Busy"))
    assert (caught.value.status, caught.value.retry_after) == (503, None)
    for status in ("404 Not Found", "403 Forbidden", "401 Who", "301 Nowhere"):
        with pytest.raises(RuntimeError, match=f"answered {status}") as caught:
            browse(http(status=status))
        assert not isinstance(caught.value, TransientToolError)


def test_nobody_listening_may_pass():
    with Loopback({}) as server:
        url = server.url
    with pytest.raises(TransientToolError, match="refused"):
        Browser(allow_private=True).browse(url)


@pytest.mark.parametrize(
    "markup",
    [
        "<div>" * 200_000 + "x",
        "<table><tr><td>ab" * 40_000,
        "<" * 10**6,
        "<!--" * 10**5,
        "<a href=x>y</a>" * 50_000,
        "\0<p>x",
    ],
    ids=["deep", "tables", "brackets", "comments", "links", "nul"],
)
def test_hostile_markup_ends(markup):
    assert isinstance(browse(html("<html><body>" + markup)), str)


def test_markup_with_too_many_tags_is_cut():
    text = browse(html("<html><body>first" + "<br>" * 499_000 + "last"))
    assert text == "first\n[The page is longer; the rest was left out.]"
    assert browse(html("<html><body>first" + "<br>" * 99_000 + "last")).endswith("last")


def test_a_long_page_is_read_in_a_process_with_limits(monkeypatch):
    long = html("<html><body>" + "<p>Vesk lies on the Orn.</p>" * 5000)
    with Loopback({"*": long}) as server:
        browser = Browser(allow_private=True, max_chars=100)
        assert browser.browse(server.url).startswith("Vesk lies on the Orn.")
        for disturbance, message in (
            (tool_samples.read_for_ever, "The page cannot be read: its text could not be found within 30 s."),
            (tool_samples.read_and_die, "the worker process died with exit status 3"),
            (tool_samples.read_and_exhaust_memory, "The page cannot be read: MemoryError."),
        ):
            monkeypatch.setattr(browsing, "_read_apart", tool(disturbance, process=True, timeout=2))
            with pytest.raises(RuntimeError) as caught:
                browser.browse(server.url)
            assert str(caught.value) == message


def test_threads_can_share_a_browser():
    pages = {f"/{i}": html(ARTICLE.replace("1204", str(1000 + i))) for i in range(40)}
    with Loopback(pages) as server, ThreadPoolExecutor(8) as pool:
        browser = Browser(allow_private=True)
        texts = list(pool.map(lambda path: browser.browse(server.url + path), pages))
    assert all(f"founded in {1000 + i}" in text for i, text in enumerate(texts))


@pytest.mark.parametrize("options", [{"timeout": 0}, {"max_bytes": 0}, {"max_chars": 0}])
def test_limits_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Browser(**options)


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for localhost, its server side and what a client must trust."""
    pytest.importorskip("cryptography")
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=str(folder / "cert.pem"))


def test_https_checks_the_certificate_against_the_name(certificate):
    server_side, trusting = certificate
    with Loopback({"*": html()}, tls=server_side) as server:
        named = f"https://localhost:{server.port}/"
        assert Browser(allow_private=True, ssl_context=trusting).browse(named).startswith("Vesk\n")
        for url, context in ((server.url, trusting), (named, None)):
            with pytest.raises(RuntimeError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                Browser(allow_private=True, ssl_context=context).browse(url)
            assert not isinstance(caught.value, TransientToolError)


def test_a_handshake_that_hangs_is_given_up(certificate):
    """The server takes the connection and never answers the handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://localhost:{listener.getsockname()[1]}/"
        with pytest.raises(TransientToolError, match="in time"):
            Browser(timeout=0.5, allow_private=True, ssl_context=certificate[1]).browse(url)


def test_a_slow_body_under_tls_is_given_up(certificate):
    with Loopback({}, tls=certificate[0]) as server:

        def body(connection, request):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
            server.drip(b"")(connection, request)

        server.answers["*"] = body
        with pytest.raises(TransientToolError, match="in time"):
            Browser(timeout=0.5, allow_private=True, ssl_context=certificate[1]).browse(
                f"https://localhost:{server.port}"
            )
