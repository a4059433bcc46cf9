"""Which failures of a tool are worth another try, and when.

Only what may pass by itself: a time-out, a lost or refused connection, half an answer, HTTP 408, 425, 429 and 5xx.
HTTP libraries are recognised by the shape of their exceptions (requests, httpx, aiohttp, urllib, openai), so none is
needed; a tool can say it itself with [`TransientToolError`].
"""

import email.utils
import math
import time
from typing import Any

import tenacity

from .errors import ToolFailure, TransientToolError
from .function_worker import error_text

_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}

# Base classes of requests, httpx, aiohttp, http.client and openai that do not derive from the built-in ones
_TRANSIENT_NAMES = {
    "APIConnectionError",
    "ChunkedEncodingError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "IncompleteRead",
    "NetworkError",
    "RemoteProtocolError",
    "Timeout",
    "TimeoutException",
}


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an exception carries, whichever library raised it."""
    for owner in (getattr(error, "response", None), error):
        for name in ("status_code", "status", "code"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a little later."""
    if isinstance(error, ToolFailure):
        return error.transient
    if isinstance(error, TransientToolError):
        return True
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    reason = getattr(error, "reason", None)  # urllib wraps the cause
    if isinstance(reason, BaseException):
        return is_transient(reason)
    return any(cls.__name__ in _TRANSIENT_NAMES for cls in type(error).__mro__)


def retry_after(error: BaseException) -> float:
    """Return the seconds that the server asks to wait, 0 if it asks nothing. Both forms of the header are read."""
    if isinstance(error, ToolFailure):
        return error.retry_after
    if isinstance(error, TransientToolError):
        return _seconds(error.retry_after)
    for owner in (getattr(error, "response", None), error):
        get = getattr(getattr(owner, "headers", None), "get", None)
        if get is None:
            continue
        value = get("Retry-After") or get("retry-after")
        if value:
            return _seconds(value)
    return 0.0


def _seconds(value: Any) -> float:
    """Return seconds from now that a number or a date asks for; 0 for what is neither, or has passed."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (AttributeError, TypeError, ValueError, OverflowError):  # such as a year beyond 9999
            return 0.0
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)


def failure_of(error: BaseException) -> ToolFailure:
    """Return what there is to know of an exception; never raises, whatever the exception's own methods do."""
    if isinstance(error, ToolFailure):
        return error
    name, text = error_text(error)
    try:
        return ToolFailure(name, text, isinstance(error, Exception) and is_transient(error), retry_after(error))
    except BaseException:
        return ToolFailure(name, text)


def retrying(retries: int, longest_wait: float = 60.0) -> tenacity.AsyncRetrying:
    """Return the policy of [`tool`]'s `retries`: 0.5 s, 1 s, 2 s … with jitter, never sooner than `Retry-After`.

    A server that asks for more than `longest_wait` seconds is not asked again: coming back sooner would not honour its
    wish, and a row cannot wait that long.
    """
    backoff = tenacity.wait_exponential_jitter(initial=0.5, max=longest_wait, jitter=0.25)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        return max(backoff(state), retry_after(error) if error is not None else 0.0)

    def again(error: BaseException) -> bool:
        return is_transient(error) and retry_after(error) <= longest_wait

    return tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=wait,
        retry=tenacity.retry_if_exception(again),
        reraise=True,
    )
