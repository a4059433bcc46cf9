"""Errors that tools and their executor share."""


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
