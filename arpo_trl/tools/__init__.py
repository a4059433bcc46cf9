"""Tools of an agent and what runs them.

`options.py` says how a tool is run (`tool`), `executor.py` runs it, `cache.py` remembers its answers, `adapters.py` takes
tools from elsewhere (MCP, smolagents). The tools themselves live in modules of their own, imported by their full names.
"""

from .executor import ToolCall, ToolExecutor
from .options import ToolOptions, tool, tool_options

__all__ = ["ToolCall", "ToolExecutor", "ToolOptions", "tool", "tool_options"]
