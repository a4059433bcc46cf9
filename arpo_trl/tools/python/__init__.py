"""A Python interpreter as a tool: in a sandbox on this machine (`sandbox.py`) or on a server (`remote.py`)."""

from .sandbox import PythonError, PythonSandbox

__all__ = ["PythonError", "PythonSandbox"]
