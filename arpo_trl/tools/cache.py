"""Answers of tools, remembered in SQLite."""

import os


class ToolCache:
    def __init__(self, path: str | os.PathLike, namespace: str = ""):
        self.path = os.fspath(path)
        self.namespace = namespace
