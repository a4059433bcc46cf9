from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from .checks import (
    check_arguments,
    check_columns,
    check_config,
    check_timeouts,
    explain_template_error,
    resolved_schedule,
)
from .config import ARPOConfig
from .execution.executor import ToolExecutor
from .execution.names import distinct_tools
from .model_card import complete_card_file
from .protocols import mark_checkpoint, protocol_class, warn_of_another_protocol
from .protocols.images import ImageReader
from .protocols.suffix import suffix_renderer, warn_of_endless_calls
from .reporting import Reporter
from .resilience import ResilienceMixin
from .rewards.guard import guarded
from .rewards.memory import RewardMemory
from .rollout.engines import best_schedule, reads_images, refuse_unfit_generation, trainer_engine, why_waves
from .rollout.environments import RowTools
from .rollout.mixin import BranchingRolloutMixin
from .rollout.outputs import (
    attribute,
    mask_truncated,
    mask_uniform,
    reward_columns,
    row_rewards,
    weigh,
    with_stand_ins,
    working_rows,
)
from .rollout.rules import BranchRule
from .rollout.rules import branch_rule as rule_of
from .rollout.steps import Branching
from .rollout.tree import Group
from .scoring import SharedPrefixMixin
from .scoring.images import ImageScoringMixin

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


class ARPOTrainer(ResilienceMixin, BranchingRolloutMixin, ImageScoringMixin, SharedPrefixMixin, GRPOTrainer):
    r"""
    Trainer for Agentic Reinforced Policy Optimization (ARPO), proposed in [Agentic Reinforced Policy
    Optimization](https://huggingface.co/papers/2507.19849).

    After a tool result a model is unsure. ARPO measures that as the entropy of its next tokens and forks extra
    trajectories there, which share the tokens and tool calls before the fork. It takes the arguments of
    [`~trl.GRPOTrainer`] and changes two things: how a group of completions is generated, and, with
    `advantage_attribution="hard"`, which advantage a shared token gets. With `num_initial_generations ==
    num_generations` and soft attribution it is GRPO.

    With tools, reward functions also receive, per row, `tool_calls` (a list of dicts with `name`, `arguments`,
    `result`, `error`, `seconds`, `shared`, `merged`, `cached`, `refused`) and `model_text` (the text of the model's
    own tokens, without tool results). A row on which one raises has no score, and the run goes on without it; one that
    raises on every row ends it. What one changes in place is its own.

    A multimodal checkpoint with its processor is trained as a text model is, with images in prompts and in what tools
    return, as content blocks (docs/models.md). A fork has the images up to its fork token.

    What it does not do: `rollout_func` together with branching, transformers' continuous batching together with
    branching, stateful environments with the tags protocol. Each is refused at construction. Videos and audio are not
    read.

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
        environment_factory (`Callable`, *optional*): See [`~trl.GRPOTrainer`]. A fork copies the environment of the
            row it leaves: with its `fork()` method if it has one, else with `copy.deepcopy`. Once the rollout has been
            scored, the copy is closed with its `close()` method if it has one. Neither method is a tool. A class with
            `deterministic = True` says that what an environment answers, and becomes, depends on what `reset` was
            given and on the calls before alone: rows of a group with equal calls so far then share one execution.
        branch_rule ([`~arpo_trl.rollout.rules.BranchRule`], *optional*): A branching rule of your own, in place of the
            one that `args.branch_rule` names. The config does not know of it: give a resumed run the same one.
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
            }"""),  # noqa: E501
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
        branch_rule: BranchRule | None = None,
    ) -> None:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ARPOConfig(f"{model_name.split('/')[-1]}-ARPO")
        check_config(args)
        tools = distinct_tools(tools or [])
        rule = rule_of(branch_rule if branch_rule is not None else args.branch_rule, args)
        check_arguments(args, tools, rollout_func, environment_factory, rule)
        if (tools or environment_factory is not None) and rollout_func is None:
            check_columns(train_dataset, "train_dataset")
            check_columns(eval_dataset, "eval_dataset")
            refuse_unfit_generation(args)
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
                # Where calls are plain text the chat template need not know tools, so TRL's check of it is not for
                # them
                tools=tools if protocol.structured else None,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        except ValueError:
            # Says more than TRL does
            explain_template_error(self, protocol, tools, environment_factory, processing_class)
            raise
        if not protocol.structured:
            self.tools = self._standalone_tools = tools
        self._branches = args.num_initial_generations < args.num_generations
        self.share_prefixes = args.prefix_sharing
        self.keep_groups_together = args.keep_groups_together
        self.micro_batches_by_tokens = args.micro_batches_by_tokens
        template: tuple[Any, Any, Any] = (self.processing_class, self.chat_template, self.chat_template_kwargs)
        self._image_reader = ImageReader(*template) if self._is_vlm else None
        shown = self._image_reader if reads_images(self) else None  # what a tool returns; scoring knows of images
        self._executor = ToolExecutor(
            max_workers=args.max_tool_concurrency,
            timeout=args.tool_timeout,
            count_tokens=lambda text: len(self._tokenizer.encode(text, add_special_tokens=False)),
            image_tokens=shown.tokens if shown is not None else None,
        )
        kept_states = args.max_environment_states if rule.expands else 0
        self._row_tools = RowTools(self, self._executor, self._branches, kept_states)
        check_timeouts(args, self.tools)  # those of environments too
        self._schedule = resolved_schedule(args, rule, best_schedule(self), why_waves(self))
        self._reporter = Reporter(self, self._row_tools.names)
        self._protocol = protocol(self._tokenizer, self._row_tools.names, suffix_renderer(*template))
        self._protocol.image_reader = shown
        if self.tools:
            warn_of_another_protocol(self._tokenizer, args.tool_protocol)
            mark_checkpoint(self._tokenizer, args.tool_protocol)
            if protocol.structured:
                warn_of_endless_calls(*template, self.eos_token_ids)
        self._engine = trainer_engine(self, self._sample_with_trl, rule.expands)
        tries = 1 if args.fork_sampling == "independent" else args.fork_tries
        self._branching = Branching(rule, args.entropy_window, self._engine.vocab_size, tries)
        self._groups: list[Group] = []  # of the latest rollout
        self._examples: list[dict[str, Any]] = []  # columns of the data set, by row of the latest rollout
        self._memory = RewardMemory() if rule.needs_rewards and self._branches else None
        # The step of the latest training rollout, and the training rollouts of that step before it
        self._rollouts: tuple[int | None, int] = (None, 0)

    # Rewards and advantages

    def _guarded_rewards(self, inputs, prompts, completions, completion_ids_list, quiet=False):
        """What TRL makes of the reward functions; with a memory, of those rows that they have not scored before."""
        functions = self.reward_funcs
        memory = self._memory if self.model.training else None
        self.reward_funcs = []
        for index, (function, name) in enumerate(zip(functions, self.reward_func_names, strict=True)):
            guard = function if isinstance(function, torch.nn.Module) else guarded(function, name)
            if memory is not None and guard is not function:
                guard = memory.of(index, guard, quiet)
            self.reward_funcs.append(guard)
        try:
            with self._reporter.timed("rewards"):
                rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        # What a function could not score has no score at all: the others' alone would be another reward
        rewards_per_func[rewards_per_func.isinf().any(dim=1)] = torch.nan
        return rewards_per_func

    def _score_rollout(self, prompts: list) -> None:
        """Score the rows that there are, for a rule that asks for it in the midst of a rollout."""
        assert self._memory is not None
        self._memory.rows = working_rows(self._groups).keys()
        trajectories = with_stand_ins(self._groups, len(prompts))
        columns = reward_columns(trajectories, self._tokenizer)
        conversational = is_conversational({"prompt": prompts[0]})
        inputs = [
            example | {name: values[row] for name, values in columns.items()}
            for row, example in enumerate(self._examples)
        ]
        completions = [self._protocol.completion(row.turns, conversational) for row in trajectories]
        completion_ids = [row.completion_ids for row in trajectories]
        rewards_per_func = self._guarded_rewards(inputs, prompts, completions, completion_ids, quiet=True)
        first = self.accelerator.process_index * len(prompts)
        rewards = row_rewards(rewards_per_func[first : first + len(prompts)], self.reward_weights)
        for group in self._groups:
            group.rewards = [None if row.kind == "idle" else rewards[row.row] for row in group.trajectories]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        working = working_rows(self._groups)
        if self._memory is not None:
            self._memory.rows = working.keys()
        rewards_per_func = self._guarded_rewards(inputs, prompts, completions, completion_ids_list)
        if self._memory is not None and self.model.training:
            idle = torch.tensor([row not in working for row in range(len(prompts))], device=rewards_per_func.device)
            rewards_per_func[self.accelerator.gather(idle)] = torch.nan  # a group is normalised by its other rows
        if self.rollout_func is None:
            self._reporter.rewards(rewards_per_func, inputs, self._groups)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        self._examples = inputs
        if self._memory is not None:
            self._memory.clear()
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._row_tools.end()
        if self.rollout_func is not None:
            return output
        if self.mask_truncated_completions:
            mask_truncated(output, self._groups, self.accelerator)
        if self.model.training and self.args.dynamic_sampling:
            mask_uniform(output, self._groups, self._reporter.group_rewards(self._groups), self.accelerator)
        if self.model.training and self.args.fork_sampling == "weighted":
            weigh(output, self._groups)
        advantages = output["advantages"].tolist()
        self._reporter.metrics(self._groups, self._engine.lookups, advantages)
        if self.model.training:
            spans = attribute(output, self._groups, self.args.advantage_attribution)
            self._reporter.rollout(self._groups, advantages, spans)
        return output

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            complete_card_file(card, self.model.config, self.args, self._row_tools.names)
