"""Errors that tools and their executor share, and any error as text."""


class TransientToolError(RuntimeError):
    """A tool call failed in a way that may pass: rate limit, server error, lost connection, time-out.

    Raise it from a tool to say that the same call is worth repeating. Every other exception is final: repeating a call
    with a wrong key or a malformed URL only costs time.

    Args:
        message (`str`): What failed, in a sentence that a model can read.
        status (`int`, *optional*): HTTP status, where there was one.
        retry_after (`float`, *optional*): Seconds to wait before the next attempt, where the server named them.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class ToolFailure(Exception):
    """What the executor knows of an exception of a tool, as plain data.

    The exception itself stays where the tool ran: its methods are the tool's code, which may raise or hang.

    Args:
        name (`str`): Name of its class.
        text (`str`): Its message; empty if there is none.
        transient (`bool`): Whether the same call may succeed a little later.
        retry_after (`float`): Seconds that the server asks to wait, 0 if it asks nothing.
    """

    def __init__(self, name: str, text: str, transient: bool = False, retry_after: float = 0.0):
        super().__init__(text or name)
        self.name = name
        self.text = text
        self.transient = transient
        self.retry_after = retry_after

    def __str__(self) -> str:
        return self.text or self.name

    @property
    def line(self) -> str:
        """Name and message, as the last line of a traceback shows them."""
        return f"{self.name}: {self.text}" if self.text else self.name


def error_repr(error: BaseException) -> str:
    """The error as Python writes it, or its class alone where its own text raises."""
    try:
        return repr(error)
    except Exception:
        return type(error).__name__
