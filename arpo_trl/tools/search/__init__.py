"""
Search as a tool: over passages of one's own by words (`bm25.py`) or by meaning (`dense.py`), on the web (`http.py`),
from recorded searches (`replay.py`), and as a server for many processes (`server.py`).

Each is imported from its own file, since each needs packages of its own; the first also from here.
"""

from .bm25 import BM25Search, PassageSearch, words

__all__ = ["BM25Search", "PassageSearch", "words"]
