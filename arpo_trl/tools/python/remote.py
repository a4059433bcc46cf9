"""The Python tool on another machine: a server that speaks
[SandboxFusion](https://github.com/bytedance/SandboxFusion)'s `/run_code`.

```python
from arpo_trl.tools.python.remote import RemoteSandbox

trainer = ARPOTrainer(..., tools=[RemoteSandbox("http://sandbox:8080").python])
```

What this module does NOT do: isolate anything, which is the server's part; or repeat a request, which is the
executor's (`tool(remote.python, retries=3)`). Failures of the server that may pass by themselves raise
[`~arpo_trl.execution.errors.TransientToolError`], those of the code [`~arpo_trl.tools.python.PythonError`].
"""

import inspect

from ...execution.errors import TransientToolError
from ...execution.options import tool
from ..search.http import _JSONClient
from . import worker as python_worker
from .sandbox import NO_OUTPUT, PythonError, code_to_run, cut_output

_QUEUE_SECONDS = 30  # that a call may wait for its turn on the server
_LEAST_MEMORY_MB = 64


def _bound_stacks() -> None:
    """Run on the server before the code: let threads start under the limits that SandboxFusion sets.

    For `memory_limit_MB` it sets the limit of the stack, too, and libc gives every thread a stack of that size, which
    the limit of the address space leaves no room for. Needs no privilege and leaves the limit of the memory as it is.
    """
    import contextlib
    import ctypes
    import os
    import resource

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # or numpy starts as many as the server has processors
        os.environ.setdefault(name, "1")
    size = 8 << 20
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a libc without a default of its own
        soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
        if soft == resource.RLIM_INFINITY or soft > size:
            resource.setrlimit(resource.RLIMIT_STACK, (size, hard))  # for the programs that the code starts
            libc = ctypes.CDLL(None)
            attributes = ctypes.create_string_buffer(128)
            libc.pthread_attr_init(attributes)
            libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(size))
            libc.pthread_setattr_default_np(attributes)  # for the threads of this one
            libc.mallopt(-8, 1)  # M_ARENA_MAX: else most threads reserve 64 MiB more


class RemoteSandbox:
    """Runs Python code on a SandboxFusion server; [`~RemoteSandbox.python`] is the tool.

    Args:
        url (`str`): Address of the server, without `/run_code`.
        timeout (`float`): Seconds that the code may run.
        memory_mb (`int`, *optional*): Memory in MiB that the code may use, sent as `memory_limit_MB`. A SandboxFusion
            server limits the address space of every process to it, interpreter and libraries included: numpy alone
            needs about 100. `None` sends -1, which leaves the limit to the server.
        max_output_chars (`int`): Characters of output that are shown; what is cut from the middle is replaced by a
            marker.
    """

    def __init__(self, url: str, timeout: float = 10.0, memory_mb: int | None = 1024, max_output_chars: int = 10_000):
        if memory_mb is not None and memory_mb != -1 and memory_mb < _LEAST_MEMORY_MB:
            raise ValueError(
                f"memory_mb must be at least {_LEAST_MEMORY_MB}, which the interpreter needs, or None for the "
                f"server's own limit, not {memory_mb!r}."
            )
        self.timeout = timeout
        self.memory_mb = -1 if memory_mb is None else memory_mb
        self.max_output_chars = max_output_chars
        self._http = _JSONClient(url.rstrip("/") + "/run_code", timeout + _QUEUE_SECONDS)

    @tool(deterministic=True)
    def python(self, code: str) -> str:
        """
        Runs Python code and returns what it prints and the value of its last expression.

        Args:
            code: The Python code. Every call starts afresh: nothing is kept from earlier calls.

        Returns:
            The output of the code.
        """
        # A bare interpreter would run the code but not show its last value, so it is sent the code as data.
        functions = inspect.getsource(_bound_stacks) + "\n\n" + inspect.getsource(python_worker.run_cell)
        cell = f"{functions}\n\nimport sys\n_bound_stacks()\nsys.exit(not run_cell({code_to_run(code)!r}))\n"
        answer = self._http.post(
            {"code": cell, "language": "python", "run_timeout": self.timeout, "memory_limit_MB": self.memory_mb}
        )
        try:
            status, message, run = answer["status"], answer["message"], answer.get("run_result")
            if status == "SandboxError":
                raise TransientToolError(f"The Python sandbox failed: {message}", 200)
            output = (run["stdout"] or "") + (run["stderr"] or "")
            ended, exit_code = run["status"], run["return_code"]
        except (AttributeError, KeyError, TypeError):
            raise RuntimeError(
                f"{self._http.url} does not speak SandboxFusion's protocol; it answered {str(answer)[:200]!r}"
            ) from None
        text = cut_output(output, self.max_output_chars)
        if status == "Success":
            return text or NO_OUTPUT
        if ended == "TimeLimitExceeded":
            text = f"{text}\nThe code ran longer than {self.timeout:g} s and was stopped.".lstrip()
        raise PythonError(text or f"The code ended the interpreter with exit code {exit_code}.")
