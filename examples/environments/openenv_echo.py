"""
ARPO in an OpenEnv environment, as TRL takes one: a client of a server, in a class whose methods are tools.

```bash
pip install fastapi 'fastmcp>=4' tomli tomli_w && pip install --no-deps openenv
python examples/environments/openenv_echo.py             # `--small` for a model built on the spot
python examples/environments/openenv_echo.py --url https://my-echo-env.hf.space    # a server that runs elsewhere
```

The environment is the one that `openenv init` makes: it gives a message back, and a reward that grows with its length.
Without `--url` it is made and served here. Each row holds a session of its own on the server, which a deep copy cannot
reach: `fork()` opens another session and repeats the actions, and `close()` ends it. A server needs room for a session
of every row and every open fork (`max_concurrent_envs`).
"""

import contextlib
import importlib
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator

import uvicorn
from openenv.core import GenericEnvClient
from openenv.core.env_server import create_fastapi_app
from training import Player, ask, demonstrate, parse, train

TASK = "Send a message with the tool, as long as you like.\n\n"
WORDS = ("hello", "good morning", "hi", "how are you today", "yes", "a long message for you")


class Echo:
    """One session."""

    deterministic = True  # what a message earns depends on the message alone
    url = ""

    def __init__(self):
        self._client = None
        self._messages: list[str] = []
        self._reward = 0.0

    def reset(self, **kwargs) -> str:
        if self._client is None:
            self._client = GenericEnvClient(base_url=self.url).sync()
        self._messages, self._reward = [], 0.0
        return self._client.reset().observation["echoed_message"]

    def echo(self, message: str) -> str:
        """
        Send a message.

        Args:
            message: The message.

        Returns:
            The message that comes back.
        """
        self._messages.append(message)
        result = self._client.step({"message": message})
        self._reward = result.reward
        return result.observation["echoed_message"]

    def fork(self) -> "Echo":
        """Another session that stands where this one does."""
        twin = type(self)()
        if self._client is not None:
            twin.reset()
            for message in self._messages:
                twin.echo(message)
        return twin

    def close(self) -> None:
        """End the session."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def get_reward(self) -> float:
        """The environment's own, of the last message."""
        return self._reward


@contextlib.contextmanager
def served(sessions: int) -> Iterator[str]:
    """The address of a server that runs here, until the block ends, with room for as many sessions."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "openenv.cli", "init", "echo_env", "--output-dir", folder]
        subprocess.run(command, check=True, capture_output=True)
        sys.path.insert(0, folder)
        try:
            models = importlib.import_module("echo_env.models")
            environment = importlib.import_module("echo_env.server.echo_env_environment")
        finally:
            sys.path.remove(folder)
        app = create_fastapi_app(
            environment.EchoEnvironment, models.EchoAction, models.EchoObservation, max_concurrent_envs=sessions
        )
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def rows(number: int) -> list[dict]:
    return [{"prompt": ask(TASK)} for _ in range(number)]


def player(message: str) -> Player:
    answer = yield "echo", {"message": message}
    return f"It said: {answer}"


def demonstration(message: str) -> dict:
    session = Echo()
    made = demonstrate(ask(TASK + session.reset()), [session.echo], player(message))
    session.close()
    return made


def main(arguments: Namespace, **settings):
    with contextlib.nullcontext(arguments.url) if arguments.url else served(sessions=256) as Echo.url:
        return train(
            arguments,
            rows(64),
            [demonstration(message) for message in 10 * WORDS],
            environment_factory=Echo,
            **{"max_completion_length": 300, **settings},
        )


if __name__ == "__main__":
    main(parse(__doc__, url="of a server that runs elsewhere"))
