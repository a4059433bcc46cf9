"""Weights for a CPU server. TRL sends them over NCCL, which needs a GPU on both sides; here they go through a file.

The class is vLLM's side (`--worker-extension-cls`), the function below the trainer's. All else of TRL's server mode is
as it is: when weights are sent, under which names, and that the prefix cache is emptied.
"""

import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file


class LoadFromFile:
    def load_from_file(self, path: str):
        for name, parameter in load_file(path).items():
            self.model_runner.model.load_weights([(name, parameter)])


def send_through_file(setattr=setattr):
    """Make TRL's client hand weights over in a file."""
    from trl.generation.vllm_client import VLLMClient

    def update_named_params(client, metadata, named_params):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.safetensors"
            save_file({name: parameter.detach().contiguous() for name, parameter in named_params}, path)
            client._post(f"{client.base_url}/collective_rpc", json={"method": "load_from_file", "args": [str(path)]})

    setattr(VLLMClient, "init_communicator", lambda client, device: None)  # refuses a CPU
    setattr(VLLMClient, "update_named_params", update_named_params)
