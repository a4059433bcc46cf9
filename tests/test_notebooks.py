"""The notebooks run from the first cell to the last on a small model, and show what they say they show.

A notebook is run as it stands but for its cell tagged `parameters`, where a reader puts the name of a model.
"""

import ast
import json
import math
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from hub_standin import HubStandIn
from huggingface_hub import ModelCard
from nbclient import NotebookClient

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from vision_world import build_model, build_processor  # noqa: E402

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def run(name: str, folder: Path, environment: dict[str, str] | None = None, **parameters) -> nbformat.NotebookNode:
    """The notebook after its run in `folder`."""
    if environment is None:
        environment = dict(os.environ)
    environment.pop("PYTEST_CURRENT_TEST", None)  # a kernel that sees it gives processes no stderr to write to
    notebook = read(name)
    cell = parameters_cell(notebook)
    assert {line.targets[0].id for line in ast.parse(cell.source).body} == set(parameters)
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return notebook


def output_of(notebook: nbformat.NotebookNode, line: str) -> str:
    """All that the cell which holds `line` put out."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and line in cell.source)
    return json.dumps(cell.outputs)


def texts(notebook: nbformat.NotebookNode, line: str) -> str:
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and line in cell.source)
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs)


@pytest.fixture
def small(agent_dirs):
    """Parameters of the smallest run that still forks."""
    return {"MODEL": agent_dirs["chat_template"], "STEPS": 2, "MAX_TOKENS": 120}


@pytest.fixture
def vision_dir(tmp_path):
    """A small vision-language model with random weights, and its processor."""
    processor = build_processor()
    torch.manual_seed(0)
    build_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_there_are_six():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stripped(name):
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_changes_the_model_in_one_place_and_is_told_how(name):
    notebook = read(name)
    first = name == "01_quickstart"  # trains the pretrained model of a wheel, the others one of the Hub
    assert parameters_cell(notebook).source.startswith('MODEL = "SmolLM2"' if first else 'MODEL = "Qwen/')
    assert sum(cell.source.count("Qwen/") for cell in notebook.cells if cell.cell_type == "code") == (not first)
    model = "your own" if first else "a real"
    assert any(f"## What to change for {model} model" in cell.source for cell in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for cell in read(name).cells:
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_quickstart_starts_cold_and_shows_metrics_a_tree_and_the_viewer(small, agent_dirs, tmp_path):
    small |= {"MODEL": agent_dirs["tags"], "COLD_STEPS": 2}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the examples, from another folder
    notebook = run("01_quickstart", tmp_path, environment, **small)
    assert "'answer': " in texts(notebook, 'world.rows("rl")')
    found = texts(notebook, "population of Lagos")
    assert "Lagos" in found and "11739000" in found
    assert (tmp_path / "outputs/quickstart-cold-start/model.safetensors").exists()
    assert "arpo/entropy_gap" in texts(notebook, "log_history")
    assert "image/png" in output_of(notebook, "Image(")
    page = output_of(notebook, "show(")
    assert "<iframe" in page and "srcdoc" in page and "rollouts of outputs/quickstart" in page
    assert len(list((tmp_path / "outputs/quickstart/rollouts").iterdir())) == small["STEPS"]


def test_each_kind_of_tool_answers(small, tmp_path):
    notebook = run("02_your_own_tools", tmp_path, **small)
    assert '"description": "Name of the town."' in texts(notebook, "get_json_schema")
    lines = texts(notebook, '"Atlantis"').splitlines()
    assert lines[0].startswith("2,103,000")
    assert "No town is called Atlantis" in lines[1] and lines[1].endswith("| failed")
    assert "100 answers" in texts(notebook, "weather(town") and "Sunny in town 99" in texts(notebook, "weather(town")
    assert texts(notebook, "exchange_rate").splitlines() == [
        "1.08 USD | attempts so far: 2 | from the cache: False",
        "1.08 USD | attempts so far: 2 | from the cache: True",
    ]
    assert texts(notebook, "mcp_tools(").splitlines() == ["tools: ['count_letters']", "letters: 7"]
    assert "tools/add/calls" in texts(notebook, "log_history")
    assert "image/png" in output_of(notebook, "Image(")


def test_qlora_saves_an_adapter_that_loads(small, tmp_path):
    small |= {"STEPS": 1, "MAX_TOKENS": 90}  # 4 bits are slow on a CPU
    notebook = run("03_qlora_on_one_gpu", tmp_path, **small)
    saved = {path.name for path in (tmp_path / "outputs/qlora").glob("adapter_*")}
    assert saved == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(name in texts(notebook, "save_model") for name in saved)
    assert not (tmp_path / "outputs/qlora/model.safetensors").exists()
    assert "image/png" in output_of(notebook, "plt.show") and "image/png" in output_of(notebook, "Image(")
    assert "<tool_call>" in texts(notebook, "AutoPeftModelForCausalLM")


def test_three_names_lead_from_grpo_to_arpo(small, tmp_path):
    notebook = run("04_from_grpo_to_arpo", tmp_path, **{**small, "STEPS": 1})
    lines = texts(notebook, "difflib").splitlines()
    assert [line for line in lines if line[0] == "-"][1:] == [
        "-from trl import GRPOConfig, GRPOTrainer",
        "-trainer = GRPOTrainer(",
        "-    args=GRPOConfig(",
    ]
    assert [line for line in lines if line[0] == "+"][1:] == [
        "+from arpo_trl import ARPOConfig, ARPOTrainer",
        "+trainer = ARPOTrainer(",
        "+    args=ARPOConfig(",
        "+        log_tree_steps=10,",
    ]
    assert "image/png" in output_of(notebook, "plt.show") and "image/png" in output_of(notebook, "Image(")


def test_push_shows_the_card_and_loads_the_model_again(small, tmp_path):
    with HubStandIn({"good": math.inf}) as hub:
        environment = {
            key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"
        }  # refuses loopback too
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        notebook = run("05_push_to_hub", tmp_path, environment, REPO="tester/agent", **small)
    repo = hub.repos["tester/agent"]
    assert repo.private and "model.safetensors" in repo.large
    card = ModelCard(repo.files["README.md"].decode())
    assert {"arpo", "sums"} <= set(card.data.tags)
    assert "This model was trained with ARPO" in output_of(notebook, "ModelCard.load")
    assert "image/png" in output_of(notebook, "hf_hub_download(")
    assert any(asked.startswith("GET /tester/agent/resolve/") and "model.safetensors" in asked for asked in hub.asked)
    assert "<tool_call>" in texts(notebook, "from_pretrained(REPO)")


def test_a_tool_that_returns_images(vision_dir, tmp_path):
    notebook = run("06_vision", tmp_path, MODEL=vision_dir, STEPS=1, MAX_TOKENS=60)
    assert "image/png" in output_of(notebook, "Image.new")
    assert "image/png" in output_of(notebook, "magnifier.zoom(")
    assert "tools/call_frequency" in texts(notebook, "log_history")
    page = output_of(notebook, "show(")
    assert "<iframe" in page and "rollouts of outputs/vision" in page
    assert list((tmp_path / "outputs/vision/rollouts").rglob("*.png"))
