"""Answers of tools, remembered in an SQLite file that threads, processes and runs share.

What it does not do: forget (an answer stays until its file or namespace is given up; delete the file to start afresh),
work across machines on a network file system (SQLite's write-ahead log needs shared memory), or survive a power cut to
the last answer (it does survive a killed process).
"""

import json
import logging
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from .arguments import canonical_json

logger = logging.getLogger(__name__)

# Seconds that a look-up and a store wait for the file. A call waits for its look-up; nobody waits for a store
_LOOK_UP_PATIENCE = 1.0
_STORE_PATIENCE = 10.0
# Seconds that a file which failed is passed over
_PAUSE = 60.0

_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    namespace TEXT NOT NULL, tool TEXT NOT NULL, arguments TEXT NOT NULL, result TEXT NOT NULL, created REAL NOT NULL,
    PRIMARY KEY (namespace, tool, arguments)
)
"""


class ToolCache:
    """Answers of tools by name and arguments.

    Safe under threads, several writing processes and a kill in mid-write: SQLite in WAL mode, one transaction an
    answer. A cache that fails while in use (a full disk, a damaged page, a lock that somebody holds) is an answer not
    remembered, never an error of the tool. It is then passed over for a minute.

    Args:
        path (`str` or `os.PathLike`):
            The file; made, with its folder, when first used.
        namespace (`str`, defaults to `""`):
            What the answers depend on besides tool name and arguments: the index, the model, a version. Tools of the
            same name that share a file need a namespace each.
    """

    def __init__(self, path: str | os.PathLike, namespace: str = ""):
        self.path = Path(path).absolute()
        self.namespace = namespace
        self._connection: sqlite3.Connection | None = None
        self._pid: int | None = None
        self._lock = threading.Lock()
        self._warned = False
        self._passed_over_until = float("-inf")
        if self.path.is_dir():
            raise ValueError(f"`cache` must be a file, but {os.fspath(path)!r} is a folder. Name a file inside it.")
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open("rb") as file:
                if file.read(16) != b"SQLite format 3\0":
                    raise ValueError(f"`cache` is not an SQLite file: {os.fspath(path)!r}. Name another or delete it.")

    def __reduce__(self) -> tuple:
        return ToolCache, (self.path, self.namespace)

    def get(self, tool: str, arguments: dict[str, Any]) -> str | list | None:
        """Return the remembered answer (text or content blocks), or `None`."""
        key = canonical_json(arguments)
        if key is None:
            return None
        row = self._execute(
            _LOOK_UP_PATIENCE,
            "SELECT result FROM answers WHERE namespace = ? AND tool = ? AND arguments = ?",
            self.namespace,
            tool,
            key,
        )
        return None if row is None else _loads(row[0])

    def set(self, tool: str, arguments: dict[str, Any], result: str | list) -> None:
        """Remember an answer. What JSON cannot hold, such as an image, is left out."""
        key, text = canonical_json(arguments), canonical_json(result)
        if key is not None and text is not None:
            self._execute(
                _STORE_PATIENCE,
                "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)",
                self.namespace,
                tool,
                key,
                text,
                time.time(),
            )

    def __len__(self) -> int:
        row = self._execute(_STORE_PATIENCE, "SELECT COUNT(*) FROM answers WHERE namespace = ?", self.namespace)
        return 0 if row is None else row[0]

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _execute(self, patience: float, statement: str, *parameters: Any) -> tuple | None:
        """Run one statement in a transaction of its own and return its first row; `None` also where the file fails."""
        if not self._lock.acquire(timeout=patience):
            return None
        try:
            if time.monotonic() < self._passed_over_until:
                return None
            # A connection must not be carried over a fork, so each process opens its own
            if self._connection is None or self._pid != os.getpid():
                self._connection, self._pid = _connect(self.path, patience), os.getpid()
            self._connection.execute(f"PRAGMA busy_timeout = {1000 * patience:.0f}")
            with self._connection:
                return self._connection.execute(statement, parameters).fetchone()
        except (sqlite3.Error, OSError) as e:
            self._passed_over_until = time.monotonic() + _PAUSE
            if not self._warned:
                logger.warning("The tool cache %s fails and is passed over for %g s: %s", self.path, _PAUSE, e)
                self._warned = True
            return None
        finally:
            self._lock.release()


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=patience, check_same_thread=False)
    deadline = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(_TABLE)
            return connection
        except sqlite3.OperationalError as e:
            # The switch to WAL does not wait for a lock as statements do: processes that start together meet here
            if "locked" not in str(e) or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # not written by this class
        return None
