"""What cannot work is refused here, with the argument's name, its value and the remedy, before a model loads if
possible.
"""

import math
from typing import Any

from transformers.utils import is_matplotlib_available

from .config import ARPOConfig
from .execution.options import tool_options
from .protocols import ToolProtocol, check_chat_template, protocol_class
from .rollout.engines.generation_settings import refuse_unfit_settings
from .rollout.rules import BranchRule
from .rollout.tree import group_parts


def check_config(args: object) -> None:
    """Refuse a config of another class."""
    if not isinstance(args, ARPOConfig):
        raise TypeError(
            f"`args` must be an `ARPOConfig`, got a `{type(args).__name__}`. Construct ARPOConfig(...) instead."
        )


def check_arguments(
    args: ARPOConfig, tools: list, rollout_func: object, environment_factory: object, rule: BranchRule
) -> None:
    """Refuse what cannot work, before a model is loaded."""
    check_timeouts(args, tools)
    if args.log_tree_steps and not is_matplotlib_available():
        raise ImportError("`log_tree_steps` draws with matplotlib: `pip install 'arpo-trl[viewer]'`, or set it to 0.")
    protocol = protocol_class(args.tool_protocol)
    if environment_factory is not None and not protocol.structured:
        raise ValueError(
            f"`environment_factory` needs `tool_protocol='chat_template'`: {args.tool_protocol!r} has no place for "
            "the tools of an environment. Set it, or pass the tools as `tools`."
        )
    reserved = protocol.reserved_names & {tool.__name__ for tool in tools}
    if reserved:
        raise ValueError(
            f"`tools` holds a tool named {sorted(reserved)[0]!r}, which is a tag of the protocol itself. Rename it."
        )
    if args.num_initial_generations == args.num_generations:
        return
    off = f"or set `num_initial_generations={args.num_generations}`, which turns branching off"
    if rollout_func is not None:
        raise ValueError(
            f"`rollout_func` generates all completions itself, so that nothing can branch: leave it out, {off}."
        )
    if not tools and environment_factory is None:
        raise ValueError(f"Rollouts branch after tool results, but there are no tools: pass `tools`, {off}.")
    if args.use_transformers_continuous_batching:
        raise ValueError(
            "`use_transformers_continuous_batching` returns no entropies, which branching reads: leave it out (or use "
            f"`use_vllm`), {off}."
        )
    if environment_factory is not None and rule.needs_rewards:
        raise ValueError(
            f"`branch_rule={args.branch_rule!r}` scores rows before their group is full, and what "
            f"`environment_factory` makes may be scored once: choose another rule, {off}."
        )
    rows = args.per_device_train_batch_size * (args.steps_per_generation or 1)
    for process in range(args.world_size):
        for part in group_parts(process * rows, rows, args.num_generations, args.num_initial_generations):
            if len(part.rows) == part.num_initial:
                raise ValueError(
                    f"`per_device_train_batch_size` × `steps_per_generation` is {rows} rows a process, which leaves "
                    f"process {process} with {len(part.rows)} row(s) of a group of {args.num_generations} and no room "
                    f"for a fork: raise either, {off}."
                )


def check_timeouts(args: ARPOConfig, tools: list) -> None:
    """
    Refuse times that a process may take for its rollout and that the others, which wait for it, do not.

    Raises:
        ValueError: A tool's time-out, or the deadline of a rollout, is not below `ddp_timeout`.
    """
    if args.world_size == 1:
        return
    times = {"`rollout_deadline`": args.rollout_deadline or 0.0}
    for tool in tools:
        options = tool_options(tool)
        timeout = args.tool_timeout if options.timeout is None else options.timeout
        source = "`tool_timeout`" if options.timeout is None else "The time-out"
        attempts = options.retries + 1
        times[f"{source} of the tool `{tool.__name__}`, for {attempts} attempt(s),"] = attempts * (timeout or math.inf)
    for what, seconds in times.items():
        if seconds >= args.ddp_timeout:
            raise ValueError(
                f"{what} is {seconds:g} s, but a process waits for the others no longer than `ddp_timeout` "
                f"({args.ddp_timeout} s), and then the run ends. Lower the former or raise the latter."
            )


def resolved_schedule(args: ARPOConfig, rule: BranchRule, shared: str | None, reads_images: bool = False) -> str:
    """
    The schedule of rollouts, which may depend on the engine.

    Args:
        args ([`ARPOConfig`]): The config.
        rule ([`BranchRule`]): The branching rule.
        shared (`str`, *optional*): What makes several processes share an engine, if they do.
        reads_images (`bool`, *optional*, defaults to `False`): Whether rows may have images.

    Raises:
        ValueError: The schedule cannot be had, or a cut is set that it has not.
    """
    why_waves = None
    if shared is not None:
        why_waves = (
            f"with {shared} all of them sample together: set 'waves' or 'eager', or let each process have its own "
            "engine (vLLM with `vllm_tensor_parallel_size=1`, or a server)"
        )
    elif args.use_vllm and reads_images:
        why_waves = "vLLM is given images with whole waves: set 'waves' or 'eager'"
    elif args.num_initial_generations < args.num_generations and rule.needs_rewards:
        why_waves = "the branching rule scores the rows of all processes together: set 'waves' or 'eager'"
    elif args.num_initial_generations < args.num_generations and args.fork_sampling != "independent":
        why_waves = f"`fork_sampling={args.fork_sampling!r}` samples the forks of a wave anew: set 'waves' or 'eager'"
    schedule = args.rollout_schedule or ("continuous" if args.use_vllm and why_waves is None else "waves")
    if schedule == "continuous" and why_waves is not None:
        raise ValueError(
            f"`rollout_schedule='continuous'` lets each row and each process sample when it wants, but {why_waves}."
        )
    cuts = {"rollout_deadline": None, "rollout_finished_fraction": 1.0}
    for name, off in cuts.items():
        if schedule != "continuous" and getattr(args, name) != off:
            raise ValueError(
                f"`{name}` is {getattr(args, name)}, but `rollout_schedule={schedule!r}` cannot end a row that is "
                "being sampled: set `rollout_schedule='continuous'`, or leave it out."
            )
    return schedule


def check_columns(dataset: Any, argument: str) -> None:
    """Refuse columns whose names are those of what reward functions are told of a rollout."""
    taken = {"tool_calls", "model_text"} & _columns(dataset)
    if taken:
        name = min(taken)
        raise ValueError(
            f"`{argument}` has a column {name!r}, the name under which reward functions get what the rollout did. "
            f"Rename it: `dataset.rename_column({name!r}, 'expected_{name}')`."
        )


def _columns(dataset: Any) -> set[str]:
    """Names of a data set's columns; of all of them, where it is a dict of several."""
    if dataset is None:
        return set()
    if isinstance(dataset, dict):
        return set().union(*map(_columns, dataset.values()))
    return set(dataset.column_names or next(iter(dataset), ()))


def check_generation(args: ARPOConfig) -> None:
    """Refuse settings of `generate` that no rollout can have."""
    if not args.use_vllm and isinstance(args.generation_kwargs, dict):
        refuse_unfit_settings(args.generation_kwargs)


def explain_template_error(
    trainer: Any, protocol: type[ToolProtocol], tools: list, environment_factory: object, processing_class: Any
) -> None:
    """Say what to do where TRL has refused a chat template that knows no tools; otherwise nothing."""
    speaks = protocol.structured and (tools or environment_factory is not None)
    if speaks and hasattr(trainer, "_tokenizer"):
        # TRL does not keep the processor of a multimodal checkpoint before it has looked at the template
        speaker = processing_class if trainer._is_vlm else trainer._tokenizer
        if speaker is not None:
            check_chat_template(speaker)
