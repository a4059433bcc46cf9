"""What the example scripts share: tools, reward functions and data sets by name."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from arpo_trl.data import load_rl
from arpo_trl.data.files import read_rows, to_dataset
from arpo_trl.evaluation import Agent


def cpu_settings() -> dict[str, bool]:
    """Training arguments without which a machine that has no accelerator cannot train; none where there is one."""
    if torch.accelerator.is_available():
        return {}
    return {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def make_parser(*arguments: type) -> TrlParser:
    """The parser of a training script. What a machine without an accelerator needs is the default there."""
    parser = TrlParser(arguments)
    parser.set_defaults(**cpu_settings())
    return parser


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU computes in bfloat16, rather than through float32."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


@dataclass
class ToolArguments:
    """Tools of the agent."""

    tools: list[str] = field(
        default_factory=lambda: ["search", "python"],
        metadata={"help": "'search', 'python', 'browse', or dotted paths of functions (e.g. 'my_tools.weather')."},
    )
    search_corpus: str | None = field(
        default=None,
        metadata={
            "help": "What 'search' looks in: a .jsonl or .parquet file of passages (column `contents`), a folder that "
            "BM25Search.save wrote, a .json file of recorded searches, the http(s) address of a /retrieve server, or "
            "'serper' for web search with the key in SERPER_API_KEY."
        },
    )
    search_top_k: int = field(default=3, metadata={"help": "Passages that a search returns."})
    python_sandbox: str = field(
        default="bwrap", metadata={"help": "How 'python' is contained.", "choices": ["bwrap", "rlimits"]}
    )


def build_tools(args: ToolArguments) -> list[Callable]:
    """The tools that `args` names."""
    return [_build_tool(name, args) for name in args.tools]


def _build_tool(name: str, args: ToolArguments) -> Callable:
    if name == "python":
        from arpo_trl.tools.python import PythonSandbox

        return PythonSandbox(sandbox=args.python_sandbox).python
    if name == "search":
        return _build_search(args.search_corpus, args.search_top_k)
    if name == "browse":
        from arpo_trl.tools.web.browse import Browser

        return Browser().browse
    return import_by_path(name, "tools")


def _build_search(corpus: str | None, top_k: int) -> Callable:
    if corpus is None:
        raise ValueError("`--tools search` needs `--search_corpus`: a file of passages, an index, or an address.")
    if corpus.startswith(("http://", "https://")):
        from arpo_trl.tools.search.http import RetrieveClient

        return RetrieveClient(corpus, top_k=top_k).search
    if corpus == "serper":
        from arpo_trl.tools.search.http import SerperSearch

        return SerperSearch(top_k=top_k).search
    if corpus.endswith(".json"):
        from arpo_trl.tools.search.replay import ReplaySearch

        return ReplaySearch.from_json(corpus).search
    from arpo_trl.tools.search import BM25Search

    if Path(corpus).is_dir():
        return BM25Search.load(corpus, top_k=top_k).search
    read = BM25Search.from_parquet if corpus.endswith(".parquet") else BM25Search.from_jsonl
    return read(corpus, top_k=top_k).search


@dataclass
class SamplingArguments(ToolArguments):
    """A checkpoint that answers questions with tools, outside of training."""

    model_name_or_path: str = field(
        default="", metadata={"help": "Checkpoint: a local folder or a hub id.", "aliases": ["--model"]}
    )
    dataset_name: str = field(default="", metadata={"help": "Questions: a local file or a hub id."})
    max_questions: int | None = field(default=None, metadata={"help": "Ask only the first so many questions."})
    max_completion_length: int = field(default=4096, metadata={"help": "Tokens, tool results included."})
    max_tool_calling_iterations: int | None = field(default=None, metadata={"help": "Turns whose calls are answered."})
    tool_timeout: float = field(default=120.0, metadata={"help": "Seconds after which a tool call is given up."})
    temperature: float = field(default=1.0, metadata={"help": "0 decodes greedily."})
    top_p: float = field(default=1.0)
    top_k: int = field(default=0, metadata={"help": "0 for the whole vocabulary."})
    min_p: float | None = field(default=None)
    repetition_penalty: float = field(default=1.0)
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "JSON for the chat template, e.g. '{\"enable_thinking\": false}'."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Completions sampled together: by default 32, and all with vLLM."}
    )
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    seed: int = field(default=0)
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM, in this process."})
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={"help": "Sample with a vLLM server that has loaded the model, e.g. 'http://127.0.0.1:8000'."},
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share the model."})
    vllm_gpu_memory_utilization: float = field(default=0.9)
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Context; by default the model's."})


def process_state() -> PartialState:
    """The processes that were launched; they wait for the slowest, however long that takes."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(weeks=4))


def load_agent(args: SamplingArguments, tool_protocol: str) -> Agent:
    """The agent that `args` describes; seeds torch."""
    torch.manual_seed(args.seed + process_state().process_index)
    return Agent(
        args.vllm_server_base_url or (_load_vllm(args) if args.use_vllm else _load_transformers(args)),
        AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="left"),
        build_tools(args),
        tool_protocol=tool_protocol,
        max_completion_length=args.max_completion_length,
        max_tool_calling_iterations=args.max_tool_calling_iterations,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        batch_size=args.batch_size,
        chat_template_kwargs=json.loads(args.chat_template_kwargs or "{}"),
        tool_timeout=args.tool_timeout,
    )


def _load_transformers(args: SamplingArguments) -> Any:
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    return model.to(process_state().device).eval()


def _load_vllm(args: SamplingArguments) -> Any:
    if process_state().num_processes > 1:
        raise ValueError(
            "`--use_vllm` makes an engine of its own for all GPUs: start one process, or give the address of a "
            "server as `--vllm_server_base_url`."
        )
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(f"`--use_vllm` needs vLLM: pip install 'arpo-trl[vllm]' ({error})") from error
    return LLM(
        args.model_name_or_path,
        dtype=args.dtype,
        seed=args.seed,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=args.vllm_max_model_length,
    )


def build_rewards(names: list[str]) -> list[Callable]:
    """Reward functions: names from `arpo_trl.rewards`, or dotted paths."""
    rewards = importlib.import_module("arpo_trl.rewards")
    return [getattr(rewards, name) if "." not in name else import_by_path(name, "reward_funcs") for name in names]


def import_by_path(path: str, argument: str) -> Callable:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"`--{argument} {path}` is neither a known name nor a dotted path such as `my_module.{path}`."
        )
    sys.path.insert(0, str(Path.cwd()))
    return getattr(importlib.import_module(module), name)


def load_questions(path: str, split: str, config: str | None = None, protocol: str = "chat_template") -> Dataset:
    """
    A data set of questions: a local .jsonl, .json or .parquet file, a folder that `save_to_disk` wrote, or a hub id.

    The published ARPO sets are recognised by their columns and converted.
    """
    if Path(path).is_dir() and (Path(path) / "dataset_info.json").exists():
        dataset = load_from_disk(path)
    elif Path(path).is_file():
        rows = read_rows(path)
        if any("reward_model" in row for row in rows):
            return load_rl(path, protocol=protocol, split=split)
        dataset = to_dataset(rows, path)
    else:
        dataset = load_dataset(path, name=config, split=split)
    if "reward_model" in dataset.column_names:
        return load_rl(path, protocol=protocol, split=split)
    if "prompt" not in dataset.column_names:
        raise ValueError(f"`--dataset_name {path}` has no column `prompt` (it has {', '.join(dataset.column_names)}).")
    return dataset
