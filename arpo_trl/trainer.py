from __future__ import annotations

import math
import random
import textwrap
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm
from transformers.utils import is_matplotlib_available, logging
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import (
    get_config_model_id,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from .advantages import Span, hard_advantages, tree_advantages
from .checkpoints import newest_whole_checkpoint
from .config import ARPOConfig
from .environments import close_environments, environment_tools, fork_environment
from .prefix_sharing import rows_may_change_micro_batch, shared_prefix_logps, shares_prefixes
from .prefix_tree import sibling_order
from .protocols import check_chat_template, mark_checkpoint, protocol_class, warn_of_another_protocol
from .random_state import kept_random_state
from .reporting import report_image
from .reward_guard import error_text, guarded
from .rollout.branching import EXPANSION_RULES
from .rollout.generation_settings import (
    context_length,
    refuse_unfit_settings,
    tell_settings,
    without_unfit_settings,
)
from .rollout.loop import (
    Branching,
    Limits,
    RolloutHooks,
    Sample,
    Wave,
    group_parts,
    refuse_calls_over_limit,
    run_waves,
)
from .rollout.metrics import (
    completion_columns,
    rollout_metrics,
    rollout_sums,
    slowest_calls,
    sum_names,
    table_row,
    table_text,
)
from .rollout.prefix_cache import PrefixCache
from .rollout.record import call_records, rollout_records, write_records
from .rollout.sampler import recorded_generation, recorded_samples, stop_string_criteria, top_k_samples, vllm_settings
from .rollout.stock import stock_trajectory
from .rollout.tree import Group, Trajectory
from .tools.executor import ToolCall, ToolExecutor
from .tools.names import distinct_tools

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
    from peft import PeftConfig, PeftModel
    from transformers import (
        BitsAndBytesConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc

logger = logging.get_logger(__name__)


# Log-probabilities of a generation batch that those of the loss are compared with
_COMPARED = ("old_per_token_logps", "ref_per_token_logps")


class ARPOTrainer(GRPOTrainer):
    r"""
    Trainer for Agentic Reinforced Policy Optimization (ARPO), proposed in [Agentic Reinforced Policy
    Optimization](https://huggingface.co/papers/2507.19849).

    After a tool result a model is unsure. ARPO measures that as the entropy of its next tokens and forks extra rollouts
    there, which share the tokens and tool calls before the fork. It takes the arguments of [`~trl.GRPOTrainer`] and
    changes two things: how a group of completions is generated, and, with `advantage_attribution="hard"`, which
    advantage a shared token gets. With `num_initial_generations == num_generations` and soft attribution it is GRPO.

    With tools, reward functions also receive, per row, `tool_calls` (a list of dicts with `name`, `arguments`, `result`,
    `error`, `seconds`, `cached`, `shared`) and `model_text` (the text of the model's own tokens, without tool results).
    A row on which one raises has no score, and the run goes on without it; one that raises on every row ends it. What one
    changes in place is its own.

    A vision-language model with tools is sampled by TRL's own loop, which does not branch.

    What it does not do: vision-language models with tools together with branching or the tags protocol, `rollout_func`
    together with branching, transformers' continuous batching together with branching, stateful environments with the
    tags protocol or a rule of expansion. Each is refused at construction.

    Example:

    ```python
    from arpo_trl import ARPOConfig, ARPOTrainer

    trainer = ARPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=ARPOConfig("Qwen3-0.6B-ARPO", num_generations=16, num_initial_generations=8),
        reward_funcs=correct,
        train_dataset=dataset,
        tools=[search, python],
    )
    trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): See [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*): See [`~trl.GRPOTrainer`].
        args ([`ARPOConfig`], *optional*): Configuration for this trainer. If `None`, a default configuration is used.
        tools (`list[Callable]`, *optional*): See [`~trl.GRPOTrainer`]; [`~arpo_trl.tools.tool`] adds options.
        environment_factory (`Callable`, *optional*): See [`~trl.GRPOTrainer`]. A fork copies the environment of the row
            it leaves: with its `fork()` method if it has one, else with `copy.deepcopy`. Once the rollout has been scored,
            the copy is closed with its `close()` method if it has one. Neither method is a tool.
        **kwargs: The other arguments of [`~trl.GRPOTrainer`].
    """

    # Narrower than TRL's own: what its `__init__` leaves here
    args: ARPOConfig
    max_completion_length: int
    num_generations: int
    num_generations_eval: int

    _tag_names = ["trl", "arpo"]
    _name = "ARPO"
    _paper = {
        "title": "Agentic Reinforced Policy Optimization",
        "id": "2507.19849",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{dong2025arpo,
                title        = {{Agentic Reinforced Policy Optimization}},
                author       = {Guanting Dong and Hangyu Mao and Kai Ma and Licheng Bao and Yifei Chen and Zhongyuan Wang and Zhongxia Chen and Jiazhen Du and Huiyang Wang and Fuzheng Zhang and Guorui Zhou and Yutao Zhu and Ji-Rong Wen and Zhicheng Dou},
                year         = 2025,
                eprint       = {arXiv:2507.19849},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: ARPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: EnvironmentFactory | dict[str, EnvironmentFactory] | None = None,
    ) -> None:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ARPOConfig(f"{model_name.split('/')[-1]}-ARPO")
        tools = distinct_tools(tools or [])
        _check_arguments(args, tools, rollout_func, environment_factory)
        uses_tools = bool(tools) or environment_factory is not None
        if uses_tools and rollout_func is None:
            _check_columns(train_dataset, "train_dataset")
            _check_columns(eval_dataset, "eval_dataset")
            if not args.use_vllm and isinstance(args.generation_kwargs, dict):
                refuse_unfit_settings(args.generation_kwargs)

        protocol = protocol_class(args.tool_protocol)
        try:
            super().__init__(
                model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                # Where calls are plain text the chat template need not know tools, so TRL's check of it is not for them
                tools=tools if protocol.structured else None,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        except ValueError:
            speaks = protocol.structured and (tools or environment_factory is not None)
            if speaks and hasattr(self, "_tokenizer") and not self._is_vlm:
                check_chat_template(self._tokenizer)  # says more than TRL does
            raise
        if not protocol.structured:
            self.tools = self._standalone_tools = tools
        # Tools of a vision-language model may return images, which TRL's own loop puts into the row
        self._delegates = self._is_vlm and bool(self.tools)
        if self._delegates and (not protocol.structured or self._branches):
            raise ValueError(
                f"`model` ({type(self.model).__name__}) is a vision-language model, whose rollouts with tools do not "
                f"branch: use a text model, or set `num_initial_generations={args.num_generations}` and "
                "`tool_protocol='chat_template'`, which is GRPO."
            )
        self._executor = ToolExecutor(
            max_workers=args.max_tool_concurrency,
            timeout=args.tool_timeout,
            count_tokens=lambda text: len(self._tokenizer.encode(text, add_special_tokens=False)),
        )
        self._forked_environments: list[Any] = []  # of the rollout that is going on
        if environment_factory is not None:
            self._prepare_environments()
        # Environments of different names may have methods of the same name
        self._tool_names = list(dict.fromkeys(tool.__name__ for tool in self.tools))

        if self.use_vllm and self.vllm_mode == "colocate":
            _check_engine(args, self.vllm_generation.llm.llm_engine.model_config.max_logprobs)

        self._protocol = protocol(self._tokenizer, self._tool_names, self._get_tool_suffix_ids)
        if self.tools:
            warn_of_another_protocol(self._tokenizer, args.tool_protocol)
            mark_checkpoint(self._tokenizer, args.tool_protocol)
        self._stop_strings = stop_string_criteria(self._tokenizer, self._protocol.stop_strings)
        if not self.use_vllm and rollout_func is None:
            tell_settings(self.model, self.generation_config)
        self._max_length = self._context_length()
        self._vocab_size = self.model.config.get_text_config().vocab_size
        self._groups: list[Group] = []  # of the latest rollout
        self._prefix_cache: PrefixCache | None = None  # of the rollout that is going on
        self._ordered_inputs = None  # the buffered inputs that have been put into order
        # The step of the latest training rollout, and the training rollouts of that step before it
        self._rollouts: tuple[int | None, int] = (None, 0)
        self._lookups: Counter[str] = Counter()  # tokens given to a prefix cache in the latest rollout, and found
        # The step whose record file may get more lines, and its groups so far
        self._recorded: tuple[int | None, int] = (None, 0)
        self._records_failed = False
        self._next_tree = 0  # the step from which on the next tree is drawn

    # Generation

    def _tokenize_prompts(self, prompts):
        tools = self.tools
        if not self._protocol.schema_in_prompt:
            self.tools = []
        try:
            return super()._tokenize_prompts(prompts)
        finally:
            self.tools = tools

    def _generate(self, prompts):
        outputs = super()._generate(prompts)
        if self.rollout_func is not None:
            return outputs
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = outputs
        if not self.tools or self._delegates:
            self._groups = self._empty_groups(len(prompts))
            masks = tool_mask if self._delegates else [None] * len(prompts)
            rows = list(zip(prompt_ids, completion_ids, masks, completions, strict=True))
            for group in self._groups:
                group.trajectories = [stock_trajectory(row, *rows[row]) for row in group.rows]
        if not self.tools:
            return outputs
        trajectories = [trajectory for group in self._groups for trajectory in group.trajectories]
        for trajectory in trajectories:
            if trajectory.parent is not None:  # an environment may have told every row something else
                prompts[trajectory.row] = prompts[trajectory.parent]
        extra_fields = {
            **extra_fields,
            "tool_calls": [call_records(trajectory) for trajectory in trajectories],
            "model_text": self._tokenizer.batch_decode(
                [trajectory.own_ids for trajectory in trajectories], skip_special_tokens=True
            ),
        }
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        if self.tools and self.rollout_func is None and not self._delegates:
            # `_tool_call_loop`, which is told next, generates all segments; the first one too, since not every row of a
            # group starts from the prompt. What stands here until then must be a parseable response.
            return [[self._tokenizer.eos_token_id] for _ in prompt_ids], [[0.0]] * len(
                prompt_ids
            ) if self.use_vllm else None
        with without_unfit_settings(self.model):
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields):
        if self._delegates:
            return super()._tool_call_loop(
                prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields
            )
        self._groups = self._empty_groups(len(prompts))
        self._lookups.clear()
        if self.model.training:  # evaluation, which never branches, leaves the decisions of training as they are
            step = self.state.global_step
            self._rollouts = (step, self._rollouts[1] + 1 if self._rollouts[0] == step else 0)
        if self._shares_rollout:
            self._prefix_cache = PrefixCache()
        with tqdm(
            desc="Rollout",
            unit=" waves",
            leave=False,
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
        ) as bar:
            trajectories = run_waves(
                self._groups,
                prompt_ids,
                self._protocol,
                RolloutHooks(
                    sample=self._sample,
                    tools_of=self._tools_of,
                    submit=self._submit,
                    copy_state=self._copy_environment,
                    keep=self._prefix_cache.keep if self._prefix_cache is not None else lambda contexts: None,
                    anyone=self._anyone,
                    on_wave=lambda wave: _show(bar, wave),
                ),
                Branching(
                    self._vocab_size,
                    branch_factor=self.args.branch_factor,
                    entropy_window=self.args.entropy_window,
                    branch_probability=self.args.branch_probability,
                    entropy_weight=self.args.entropy_weight,
                    branch_threshold=self.args.branch_threshold,
                    branch_rule=self.args.branch_rule,
                    expansion_rounds=self.args.expansion_rounds,
                ),
                Limits(
                    completion=self.max_completion_length,
                    context=self._max_length,
                    tool_turns=self.max_tool_calling_iterations,
                    cut_afterwards=not self._branches,
                ),
                # Of the seed, the step and the process alone, so that a resumed run decides as one that was not stopped
                random.Random("/".join(map(str, (self.args.seed, *self._rollouts, self.accelerator.process_index)))),
                self.eos_token_ids.__contains__,
                eager=self.args.rollout_schedule == "eager",
            )
        if self._prefix_cache is not None:
            self._lookups.update(self._prefix_cache.lookups)
            self._prefix_cache = None  # its memory is the training step's now
        for trajectory in trajectories:
            prompt_ids[trajectory.row] = trajectory.prompt_ids
        conversational = is_conversational({"prompt": prompts[0]})
        executed = [own.call for trajectory in trajectories for own in trajectory.calls if not own.shared]
        return (
            [trajectory.tool_mask for trajectory in trajectories],
            [self._protocol.completion(trajectory.turns, conversational) for trajectory in trajectories],
            [trajectory.completion_ids for trajectory in trajectories],
            [trajectory.logprobs for trajectory in trajectories] if logprobs is not None else None,
            len(executed),
            sum(call.error is not None for call in executed),
            [[] for _ in trajectories],
        )

    @property
    def _shares_rollout(self) -> bool:
        """Whether rollouts keep keys and values; not where a forward is collective, since processes read in turns."""
        collective = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return self.args.prefix_sharing and not self.use_vllm and not collective

    @property
    def _branches(self) -> bool:
        return self.args.num_initial_generations < self.args.num_generations

    def _empty_groups(self, num_rows: int) -> list[Group]:
        """The groups that this process fills; evaluation never branches."""
        first = self.accelerator.process_index * num_rows
        if self.model.training:
            return group_parts(first, num_rows, self.num_generations, self.args.num_initial_generations)
        return group_parts(first, num_rows, self.num_generations_eval, self.num_generations_eval)

    def _context_length(self) -> int:
        """Tokens that the engine can read, prompt included."""
        length = context_length(self.model.config)
        if not self.use_vllm:
            return length
        if self.vllm_mode == "colocate":
            return self.vllm_generation.llm.llm_engine.model_config.max_model_len
        served = 0
        if self.accelerator.is_main_process:  # the one process that has a client
            client = self.vllm_generation.vllm_client
            served = client.session.get(f"{client.base_url}/v1/models").json()["data"][0].get("max_model_len")
        return self._largest(served or 0)[0] or length

    def _anyone(self, here: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)).item())

    def _sample(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        if self.use_vllm:
            return self._sample_vllm(contexts, limits)
        # A process without work takes part with a row of its own, since generation may be collective
        idle = not contexts
        if idle:
            contexts, limits = [[self._tokenizer.eos_token_id]], [1]
        recorded = recorded_generation(
            self.accelerator.unwrap_model(self.model_wrapped),
            limits,
            self._stop_strings,
            self.args.entropy_window,
            self.temperature,
            self._prefix_cache,
        )
        with without_unfit_settings(self.model), recorded as (recorder, stops):
            ids, _ = super()._generate_single_turn(contexts, None, {}, num_generations=1)
        return [] if idle else recorded_samples(ids, recorder, stops)

    def _sample_vllm(self, contexts: list[list[int]], limits: list[int]) -> list[Sample]:
        engine = self.vllm_generation
        if self.state.global_step != self._last_loaded_step:
            engine.sync_weights()
            self._last_loaded_step = self.state.global_step
        limits = [max(min(limit, self._max_length - len(ids)), 1) for ids, limit in zip(contexts, limits, strict=True)]
        # TRL cuts the answers by the number of prompts of *this* process, so all bring the same number
        (rows,) = self._largest(len(contexts))
        padding = rows - len(contexts)
        padded = contexts + [[self._tokenizer.eos_token_id]] * padding
        everyone = self.accelerator.gather(
            torch.tensor(limits + [1] * padding, dtype=torch.long, device=self.accelerator.device)
        ).tolist()
        sharing = self.accelerator.num_processes if engine.mode == "server" else engine.tensor_parallel_size
        first = self.accelerator.process_index // sharing * sharing * rows
        settings = {name: value for name, value in engine.generation_kwargs.items() if name != "max_tokens"}
        if self._protocol.stop_strings:
            settings |= {"stop": self._protocol.stop_strings, "include_stop_str_in_output": True}
            settings["skip_special_tokens"] = False  # a stop string may be a special token
        top_k = self.args.vllm_entropy_top_k
        with vllm_settings(engine, top_k, settings, everyone[first : first + sharing * rows]) as cache:
            _, ids, logprobs, tokens = engine.generate(prompts=padded, images=None, num_generations=1)
        self._lookups.update(cache)
        samples = top_k_samples(ids, logprobs, tokens, top_k, self.args.entropy_window, self._vocab_size)
        return samples[: len(contexts)]

    def _largest(self, *values: int) -> list[int]:
        """The largest of each value over all processes."""
        if self.accelerator.num_processes == 1:
            return list(values)
        return self.accelerator.gather(torch.tensor([values], device=self.accelerator.device)).amax(dim=0).tolist()

    # Tools

    def _tools_of(self, trajectory: Trajectory) -> dict[str, Any]:
        tools = {**self._sync_tool_dicts[trajectory.row], **self._async_tool_dicts[trajectory.row]}
        return {name: tool for name, tool in tools.items() if name in self._tool_names}

    def _submit(self, trajectory: Trajectory, calls: list[ToolCall]) -> list[Future]:
        tools = self._tools_of(trajectory)
        refuse_calls_over_limit(calls, trajectory, tools)
        pairs = [(call, tools.get(call.name)) for call in calls]
        if self.environments is not None:  # a stateful environment is called in the order of the model's text
            return self._executor.submit_in_order(pairs)
        return [self._executor.submit(call, tool) for call, tool in pairs]

    def _prepare_environments(self) -> None:
        for name, tools in self._env_tools.items():
            environment = self._environment_pool[name][0]
            self._env_tools[name] = environment_tools(tools, environment)
            if self._branches:  # one that cannot be copied is told now
                close_environments([fork_environment(environment)], self._executor)
        everything = [tool for tools in self._env_tools.values() for tool in tools]
        self.tools = list(dict.fromkeys(everything))

    def _copy_environment(self, parent: Trajectory, fork: Trajectory) -> bool:
        if self.environments is None:
            return True
        environment = self.environments[parent.row]
        try:
            self.environments[fork.row] = copied = fork_environment(environment)
        except Exception as error:
            name = type(environment).__name__
            logger.warning_once(f"A `{name}` could not be copied for a fork, which is not made ({error_text(error)}).")
            return False
        self._forked_environments.append(copied)
        for tools in (self._sync_tool_dicts, self._async_tool_dicts):
            tools[fork.row] = {
                name: getattr(copied, name) if getattr(tool, "__self__", None) is environment else tool
                for name, tool in tools[parent.row].items()
            }
        return True

    # Training step

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if not self.model.training or batches is self._ordered_inputs:
            return inputs
        steps, accumulation = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if math.gcd(steps, accumulation) == 1 or not self._shares_scoring:  # no other micro-batch to go to, or no use
            return inputs
        if not rows_may_change_micro_batch(self.loss_type, self.top_entropy_quantile, self._entropy_bonus_enabled):
            return inputs
        # TRL has shuffled the rows of this generation batch; siblings come together again within each optimiser step
        rows = [
            torch.cat([prompt[prompt_mask.bool()], completion[completion_mask.bool()]]).cpu().numpy()
            for batch in batches
            for prompt, prompt_mask, completion, completion_mask in zip(
                *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
                strict=True,
            )
        ]
        order = sibling_order(rows, steps, accumulation)
        self._buffered_inputs = self._ordered_inputs = _reorder(batches, order)
        return self._buffered_inputs[self._step % steps]

    @property
    def _shares_scoring(self) -> bool:
        """
        Whether the training step shares prefixes. The wrapped model decides: TRL asks the model without its wrappers
        for old log-probabilities, and these have to come from the path of the new ones.
        """
        return self.args.prefix_sharing and shares_prefixes(
            self.model_wrapped, self.accelerator.device, self.aux_loss_enabled
        )

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        stock = super()._get_per_token_logps_and_entropies
        if any(value is not None for value in images.values()) or not self._shares_scoring:
            return stock(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
        # The same rows stand in other chunks when their old, reference and new log-probabilities are scored, and these
        # are compared. So all are packed, whatever the cost. Those without gradients are old ones, the reference's, or
        # those of an evaluation.
        buffered: dict[str, Any] = (self._buffered_inputs or [{}])[0]
        compared = not torch.is_grad_enabled() or not buffered.keys().isdisjoint(_COMPARED)
        scored = []
        for ids, mask in zip(
            *(x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask)), strict=True
        ):
            with self.accelerator.autocast():
                shared = shared_prefix_logps(
                    model, ids, mask, logits_to_keep, compute_entropy, only_if_cheaper=not compared
                )
            scored.append(shared or stock(model, ids, mask, logits_to_keep, compute_entropy=compute_entropy)[:2])
        logps, entropies = zip(*scored, strict=True)
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None

    # Rewards, advantages and records

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        functions = self.reward_funcs
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else guarded(function, name)
            for function, name in zip(functions, self.reward_func_names, strict=True)
        ]
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        # What a function could not score has no score at all: the others' alone would be another reward
        rewards_per_func[rewards_per_func.isinf().any(dim=1)] = torch.nan
        first = self.accelerator.process_index * len(prompts)
        self._rewards = rewards_per_func[first : first + len(prompts)]
        if self.log_completions and self.rollout_func is None:
            for column, values in completion_columns(self._groups).items():
                self._pending_extra_logs.setdefault(column, values)  # a reward function's column of that name stays
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            close_environments(self._forked_environments, self._executor)
            self._forked_environments.clear()
        if self.rollout_func is not None:
            return output
        if self.mask_truncated_completions:
            self._mask_truncated(output)
        mode = "train" if self.model.training else "eval"
        self._log_rollout_metrics(mode)
        if mode == "train":
            advantages = output["advantages"].tolist()
            spans = None
            if self.args.advantage_attribution != "soft":
                attribute = {"hard": hard_advantages, "tree": tree_advantages}[self.args.advantage_attribution]
                spans = [spans for group in self._groups for spans in _group_spans(attribute, group, advantages)]
                output["advantages"] = _spread(output["advantages"], spans, output["completion_ids"].size(1))
            if self.args.log_rollouts:
                self._record(advantages, spans)
            if self.args.log_tree_steps and self.state.global_step >= self._next_tree:
                self._log_tree(advantages, spans)
        return output

    def _mask_truncated(self, output: dict[str, Any]) -> None:
        """
        Take rows that ran into a limit out of the loss. TRL looks for them by their last token, and a row whose last call
        was not answered may end with the token that ends a turn.
        """
        rows = [trajectory.truncated for group in self._groups for trajectory in group.trajectories]
        whole = ~torch.tensor(rows, device=output["completion_mask"].device).unsqueeze(1)
        for name in ("completion_mask", "tool_mask"):
            if name in output:
                output[name] = output[name] * whole
        loss_mask = output["completion_mask"] * output.get("tool_mask", 1)
        output["num_items_in_batch"] = self.accelerator.gather(loss_mask.sum()).sum()

    def _log_rollout_metrics(self, mode: str) -> None:
        names = sum_names(self._tool_names)
        sums = rollout_sums(self._groups)
        sums.update(self._lookups)
        # As Python's numbers: sums of tokens need float64, which not every device has
        own = [float(sums[name]) for name in names], slowest_calls(self._groups, self._tool_names)
        all_sums, all_slowest = zip(*gather_object([own]), strict=True)
        totals = {name: sum(values) for name, *values in zip(names, *all_sums, strict=True)}
        slowest = [max(seconds) for seconds in zip(*all_slowest, strict=True)]
        metrics = rollout_metrics(totals, slowest, self._tool_names)
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _rewards_by_name(self) -> dict[str, list[float | None]]:
        return {
            name: [None if math.isnan(value) else value for value in self._rewards[:, index].tolist()]
            for index, name in enumerate(self.reward_func_names)
        }

    def _record(self, advantages: list[float], spans: list[list[Span]] | None) -> None:
        step = self.state.global_step
        groups_before = self._recorded[1] if self._recorded[0] == step else 0
        try:
            records = rollout_records(
                step, self._groups, self._rewards_by_name(), advantages, spans, first_group=groups_before
            )
            if self._recorded[0] is None and self.is_world_process_zero():
                self._tokenizer.save_pretrained(self.args.output_dir)  # the viewer decodes with it
            write_records(
                self.args.output_dir,
                records,
                step,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                append=groups_before > 0,
            )
            self._recorded = (step, groups_before + len(self._groups))
        except Exception as error:  # an OSError, what `tokenizers` raises in its place, or of a value that is no JSON
            if not self._records_failed:
                reason = error_text(error)
                logger.warning(f"Rollout records could not be written ({reason}); training goes on without them.")
            self._records_failed = True

    def _log_tree(self, advantages: list[float], spans: list[list[Span]] | None) -> None:
        """Draw the main process's first group, to a file and to where the metrics go."""
        step, every = self.state.global_step, self.args.log_tree_steps
        self._next_tree = step - step % every + every
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "trees" / f"step-{step:06d}.png"
        try:
            from .viewer.picture import draw_tree

            picture = draw_tree(rollout_records(step, self._groups[:1], self._rewards_by_name(), advantages, spans))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
            report_image("train/arpo/tree", path, step, self.args.report_to, self.callback_handler.callbacks)
        except Exception as error:  # of the disk, of matplotlib, or of a backend that cannot be reached
            reason = error_text(error)
            logger.warning_once(f"A tree could not be written or logged ({reason}); training goes on without it.")

    def log(self, logs, start_time=None):
        if not self.log_completions:
            super().log(logs, start_time)
            return
        for column in ("prompt", "completion"):
            rows: Any = self._logs[column]  # a deque
            # A table of Weights & Biases refuses messages with different fields, as a call and its result have
            shown = [table_text(row) if "wandb" in self.args.report_to else table_row(row) for row in rows]
            rows.clear()
            rows.extend(shown)
        metrics = self._metrics["train" if self.model.training else "eval"]
        try:
            super().log(logs, start_time)
        except Exception as error:
            if metrics:  # TRL clears them when they are logged; the table comes after that
                raise
            reason = error_text(error)
            logger.warning_once(
                f"A table of completions could not be written ({reason}); training goes on without it."
            )

    # What surrounds training steps

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_whole_checkpoint() or True  # transformers says that there is none
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_whole_checkpoint(self) -> str | None:
        """The main process looks, so that all resume from the same one."""
        answer: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                answer[0] = newest_whole_checkpoint(self.args.output_dir, self.args.save_only_model)
            except ValueError as error:
                answer[0] = error
        broadcast_object_list(answer)
        if isinstance(answer[0], ValueError):
            raise answer[0]
        return answer[0] and str(answer[0])

    def evaluate(self, *args, **kwargs):
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)
        with kept_random_state(parameter.device for parameter in self.model.parameters()):
            return super().evaluate(*args, **kwargs)

    # The Hub

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            if self.hub_model_id is None:  # refused before anything was saved; the other processes are saving now
                self.save_model(_internal_call=True)
            error.add_note(
                f"The model is kept in {self.args.output_dir!r}. If the token was refused, log in with one that may "
                "write (`hf auth login`) and call `trainer.push_to_hub()` again."
            )
            raise


def _check_arguments(args: ARPOConfig, tools: list, rollout_func: object, environment_factory: object) -> None:
    """Refuse what cannot work, before a model is loaded."""
    if not isinstance(args, ARPOConfig):
        raise TypeError(
            f"`args` must be an `ARPOConfig`, got a `{type(args).__name__}`. Construct ARPOConfig(...) instead."
        )
    if args.log_tree_steps and not is_matplotlib_available():
        raise ImportError("`log_tree_steps` draws with matplotlib: `pip install 'arpo-trl[viewer]'`, or set it to 0.")
    protocol = protocol_class(args.tool_protocol)
    if environment_factory is not None and not protocol.structured:
        raise ValueError(
            f"`environment_factory` needs `tool_protocol='chat_template'`: {args.tool_protocol!r} has no place for the "
            "tools of an environment. Set it, or pass the tools as `tools`."
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
    if environment_factory is not None and args.branch_rule in EXPANSION_RULES:
        raise ValueError(
            f"`branch_rule={args.branch_rule!r}` forks from rows that have ended, and what `environment_factory` makes "
            f"cannot be taken back to an earlier tool result: choose another rule, {off}."
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


def _check_columns(dataset: Any, argument: str) -> None:
    """Refuse columns whose names are those of what reward functions are told of a rollout."""
    if isinstance(dataset, dict):
        for part in dataset.values():
            _check_columns(part, argument)
    elif dataset is not None:
        taken = {"tool_calls", "model_text"} & set(dataset.column_names or next(iter(dataset), ()))
        if taken:
            name = min(taken)
            raise ValueError(
                f"`{argument}` has a column {name!r}, the name under which reward functions get what the rollout did. "
                f"Rename it: `dataset.rename_column({name!r}, 'expected_{name}')`."
            )


def _check_engine(args: ARPOConfig, max_logprobs: int) -> None:
    """Refuse a K that the engine refuses, whose own message comes with the first rollout."""
    if max_logprobs != -1 and args.vllm_entropy_top_k > max_logprobs:
        raise ValueError(
            f"`vllm_entropy_top_k` is {args.vllm_entropy_top_k}, but a colocated vLLM engine tells no more than "
            f"{max_logprobs} tokens a position: set it to {max_logprobs} or less, or use `vllm_mode='server'` with "
            "`--max-logprobs -1`."
        )


def _reorder(batches: list[dict[str, Any]], order: list[int]) -> list[dict[str, Any]]:
    """
    The micro-batches of a generation batch with their rows in another order. What belongs to the images of a row
    follows it, as in TRL's own shuffle; what has no rows stays as it is.
    """

    def joined(values: list) -> Any:
        if isinstance(values[0], list):
            return [row for value in values for row in value]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) and values[0].dim() > 0 else values[0]

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in order]
        return value[order] if isinstance(value, torch.Tensor) and value.dim() > 0 else value

    whole = split_pixel_values_by_grid({name: joined([batch[name] for batch in batches]) for name in batches[0]})
    reordered: list[Any] = split_tensor_dict({name: ordered(value) for name, value in whole.items()}, len(batches))
    return [unsplit_pixel_values_by_grid(batch) for batch in reordered]


def _group_spans(attribute: Callable, group: Group, advantages: list[float]) -> list[list[Span]]:
    first = group.rows.start
    return attribute(
        [advantages[row] for row in group.rows],
        [None if trajectory.parent is None else trajectory.parent - first for trajectory in group.trajectories],
        [trajectory.fork_token for trajectory in group.trajectories],
        [len(trajectory.completion_ids) for trajectory in group.trajectories],
    )


def _spread(advantages: torch.Tensor, spans: list[list[Span]], length: int) -> torch.Tensor:
    """Per-row advantages (B,) and the spans of each row → per-token advantages (B, T)."""
    spread = advantages.unsqueeze(1).repeat(1, length)
    for row, row_spans in enumerate(spans):
        for span in row_spans:
            spread[row, span.start : span.end] = span.advantage
    return spread


def _show(bar: tqdm, wave: Wave) -> None:
    bar.update(wave.index - bar.n)
    bar.set_postfix(rows=wave.active, calls=wave.calls, forks=wave.forks)
