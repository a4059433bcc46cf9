"""An MCP server on stdio that the tests start as a process of its own."""

import asyncio
import os
import sys
from typing import Annotated, Literal

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

server = MCPServer("test", log_level="CRITICAL")
waiting = []


class Place(BaseModel):
    city: str
    country: str = "France"


@server.tool()
def add(a: int, b: Annotated[int, Field(description="The second number.")] = 10) -> str:
    """Add two numbers.

    Args:
        a: The first number.
    """
    return f"{a} + {b} = {a + b}"


@server.tool(name="look-up")
def look_up(
    where: Place,
    unit: Literal["celsius", "kelvin"] = "celsius",
    days: list[int] | None = None,
) -> str:
    """Look up the weather."""
    return f"{where.city}, {where.country}: {unit} {days}"


@server.tool()
def fail(reason: str) -> str:
    """Fail."""
    raise ToolError(reason)


@server.tool()
async def meet(count: int) -> str:
    """Answer once `count` calls are here."""
    waiting.append(1)
    while len(waiting) < count:
        await asyncio.sleep(0.01)
    return "met"


@server.tool()
async def hang() -> str:
    """Never answer."""
    await asyncio.sleep(3600)
    return ""


@server.tool()
def draw() -> Image:
    """Draw one red pixel."""
    import io

    from PIL import Image as Pillow

    buffer = io.BytesIO()
    Pillow.new("RGB", (1, 1), "red").save(buffer, "png")
    return Image(data=buffer.getvalue(), format="png")


@server.tool()
def process_id() -> str:
    """Tell the process id."""
    return str(os.getpid())


@server.tool()
def die() -> str:
    """Die."""
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run(transport="streamable-http", port=int(sys.argv[1]))
    server.run(transport="stdio")
