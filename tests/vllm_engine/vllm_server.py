"""A vLLM server for tests, a process of its own."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


@contextmanager
def serving(checkpoint, environment, log, *flags):
    """
    The address of a `vllm serve` process, with the command line that `trl vllm-serve` builds.

    Args:
        checkpoint (`str`): Folder of the model.
        environment (`dict[str, str]`): Of the process.
        log (`Path`): Where the process writes.
        *flags (`str`): Further flags of `vllm serve`.
    """
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ScriptArguments(
        model=checkpoint,
        host="127.0.0.1",
        port=port,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,  # the model's own context is longer
    )
    command = build_command(arguments, ["--worker-extension-cls", "server_weights.LoadFromFile", *flags])
    module = command.index("-m")
    command[module : module + 2] = [str(HERE / "serve.py")]
    paths = os.pathsep.join(map(str, (HERE, *HERE.parents[:2])))
    environment = environment | {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": paths}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while not answers(f"{address}/health"):
            said = f"{process.poll()}: {log.read_text()[-6000:]}"
            assert process.poll() is None, f"the server has ended with {said}"
            assert time.monotonic() < deadline, f"the server does not answer; {said}"
            time.sleep(1)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its engine is a process of its own
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
