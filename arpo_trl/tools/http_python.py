"""The Python tool on another machine: a server that speaks [SandboxFusion](https://github.com/bytedance/SandboxFusion)'s
`/run_code`.

```python
from arpo_trl.tools.http_python import RemoteSandbox

trainer = ARPOTrainer(..., tools=[RemoteSandbox("http://sandbox:8080").python])
```

What this module does NOT do: isolate anything, which is the server's part; or repeat a request, which is the
executor's (`tool(remote.python, retries=3)`). Failures of the server that may pass by themselves raise
[`~arpo_trl.tools.errors.TransientToolError`], those of the code [`~arpo_trl.tools.python.PythonError`].
"""

import inspect

from . import python_worker
from .errors import TransientToolError
from .http_search import _JSONClient
from .python import NO_OUTPUT, PythonError, code_to_run, cut_output

_QUEUE_SECONDS = 30  # that a call may wait for its turn on the server


class RemoteSandbox:
    """Runs Python code on a SandboxFusion server; [`~RemoteSandbox.python`] is the tool.

    Args:
        url (`str`): Address of the server, without `/run_code`.
        timeout (`float`): Seconds that the code may run.
        memory_mb (`int`): Memory in MiB that the code may use.
        max_output_chars (`int`): Characters of output that are shown; what is cut from the middle is replaced by a
            marker.
    """

    def __init__(self, url: str, timeout: float = 10.0, memory_mb: int = 1024, max_output_chars: int = 10_000):
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.max_output_chars = max_output_chars
        self._http = _JSONClient(url.rstrip("/") + "/run_code", timeout + _QUEUE_SECONDS)

    def python(self, code: str) -> str:
        """
        Runs Python code and returns what it prints and the value of its last expression.

        Args:
            code: The Python code. Every call starts afresh: nothing is kept from earlier calls.

        Returns:
            The output of the code.
        """
        # A bare interpreter would run the code but not show its last value, so it is sent the code as data.
        cell = f"{inspect.getsource(python_worker.run_cell)}\n\nimport sys\nsys.exit(not run_cell({code_to_run(code)!r}))\n"
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
