"""
What a model can call: a Python interpreter (`python/`), search (`search/`), web pages (`web/`), and tools from
elsewhere (`adapters.py`: MCP, smolagents). What runs a call lives in `arpo_trl.execution`; how a tool of one's own is
run is said with [`tool`].
"""

from ..execution.executor import ToolCall, ToolExecutor
from ..execution.options import ToolOptions, tool, tool_options

__all__ = ["ToolCall", "ToolExecutor", "ToolOptions", "tool", "tool_options"]
