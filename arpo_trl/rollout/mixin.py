"""Branching rollouts in the place of TRL's generation (ARPO, section 3.1, https://huggingface.co/papers/2507.19849)."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm
from trl.data_utils import is_conversational

from .continuous import Cut, run_continuous
from .engines.generation_settings import without_unfit_settings
from .loop import Limits, RolloutHooks, Wave, run_waves
from .outputs import reward_columns
from .stock import stock_trajectory
from .tree import Group, group_parts


class BranchingRolloutMixin:
    """
    Goes before [`~trl.GRPOTrainer`] among the bases of a trainer with tools. Its constructor makes what is typed here
    with a leading underscore; `_groups` holds the latest rollout.
    """

    args: Any
    model: Any
    state: Any
    accelerator: Any
    tools: Any
    rollout_func: Any
    log_multimodal: bool
    eos_token_ids: Any
    max_completion_length: int
    max_tool_calling_iterations: int
    num_generations: int
    num_generations_eval: int
    is_world_process_zero: Any
    _is_vlm: bool
    _tokenizer: Any
    _branches: bool
    _branching: Any
    _engine: Any
    _groups: list[Group]
    _image_reader: Any
    _protocol: Any
    _reporter: Any
    _rollouts: tuple[int | None, int]
    _row_tools: Any
    _schedule: str

    def _score_rollout(self, prompts: list) -> None:
        """Score the rows that there are, for a rule that asks for it in the midst of a rollout."""
        raise NotImplementedError

    def _tokenize_prompts(self, prompts):
        tools = self.tools
        if not self._protocol.schema_in_prompt:
            self.tools = []
        try:
            return super()._tokenize_prompts(prompts)  # type: ignore[misc]
        finally:
            self.tools = tools

    def _generate(self, prompts):
        outputs = super()._generate(prompts)  # type: ignore[misc]
        if self.rollout_func is not None:
            return outputs
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images = outputs
        if self._is_vlm:  # TRL gathers images for its table, and waits for ever for a process that has none
            self.log_multimodal = self.args.log_multimodal and not self._anyone(images is None)
        if images is not None:  # processors take no `None`, with which TRL says that a row has no image
            images = [row or [] for row in images]
        if not self.tools:
            self._groups = self._empty_groups(len(prompts))
            rows = list(zip(prompt_ids, completion_ids, images or [None] * len(prompts), strict=True))
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            for group in self._groups:
                group.trajectories = [stock_trajectory(row, *rows[row], ends) for row in group.rows]
            return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images
        trajectories = [trajectory for group in self._groups for trajectory in group.trajectories]
        for trajectory in trajectories:
            if trajectory.parent is not None:  # an environment may have told every row something else
                prompts[trajectory.row] = prompts[trajectory.parent]
        extra_fields = {**extra_fields, **reward_columns(trajectories, self._tokenizer)}
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        if self.tools and self.rollout_func is None:
            # `_tool_call_loop`, which is told next, generates all segments; the first one too, since not every row of
            # a group starts from the prompt. What stands here until then must be a parseable response.
            placeholder = [[self._tokenizer.eos_token_id] for _ in prompt_ids]
            return placeholder, [[0.0] for _ in prompt_ids] if self._engine.tells_logprobs else None
        with without_unfit_settings(self.model):
            return super()._generate_single_turn(  # type: ignore[misc]
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )

    def _sample_with_trl(self, contexts: list[list[int]], images: Sequence[Sequence[Any]]) -> list[list[int]]:
        """TRL's own call of `generate`, with its unwrapping, summoning and settings."""
        if any(images) and self.args.use_transformers_continuous_batching:
            raise ValueError(
                "`use_transformers_continuous_batching` reads no images, and a row has some: leave it out."
            )
        fields = self._image_reader.fields(contexts, images) if self._image_reader is not None else {}
        return super()._generate_single_turn(contexts, None, fields, num_generations=1)[0]  # type: ignore[misc]

    def _tool_call_loop(self, prompts, prompt_ids, completion_ids, completions, logprobs, images, multimodal_fields):
        self._groups = self._empty_groups(len(prompts))
        self._row_tools.begin(self._groups)
        if self.model.training:  # evaluation, which never branches, leaves the decisions of training as they are
            step = self.state.global_step
            self._rollouts = (step, self._rollouts[1] + 1 if self._rollouts[0] == step else 0)
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        continuous = self._schedule == "continuous"
        unit = " segments" if continuous else " waves"
        with self._engine.rollout(), tqdm(desc="Rollout", unit=unit, leave=False, disable=quiet) as bar:
            hooks = RolloutHooks(
                sample=self._engine.sample,
                tools_of=self._row_tools.of,
                submit=self._row_tools.submit,
                score=lambda: self._score_rollout(prompts),
                copy_state=self._row_tools.copy,
                keep=self._engine.keep,
                anyone=self._anyone,
                on_wave=lambda wave: self._waved(bar, wave),
                timed=partial(self._reporter.timed, often=continuous),
            )
            limits = Limits(
                completion=self.max_completion_length,
                context=self._engine.context_length,
                tool_turns=self.max_tool_calling_iterations,
                cut_afterwards=not self._branches,
            )
            # Of the seed, the step and the process alone, so that a resumed run decides as one that was not stopped
            rng = random.Random("/".join(map(str, (self.args.seed, *self._rollouts, self.accelerator.process_index))))
            own_images = [row or [] for row in images or []]
            settings = (hooks, self._branching, limits, rng, self.eos_token_ids.__contains__)
            if continuous:
                cut = Cut.of(self.args, self._tokenizer.eos_token_id) if self.model.training else None
                with self._engine.stream() as stream:
                    trajectories = run_continuous(
                        self._groups, prompt_ids, self._protocol, *settings, stream=stream, cut=cut, images=own_images
                    )
            else:
                eager = self._schedule == "eager"
                trajectories = run_waves(
                    self._groups, prompt_ids, self._protocol, *settings, eager=eager, images=own_images
                )
        self._row_tools.settle()
        asked = [len(row or []) for row in images] if images else [0] * len(prompts)  # images of the prompts
        for trajectory in trajectories:
            row, parent = trajectory.row, trajectory.parent
            prompt_ids[row] = trajectory.prompt_ids
            if images and parent is not None:
                images[row], asked[row] = images[parent], asked[parent]
        conversational = is_conversational({"prompt": prompts[0]})
        own_calls = [own.call for trajectory in trajectories for own in trajectory.calls if not own.shared]
        return (
            [trajectory.tool_mask for trajectory in trajectories],
            [self._protocol.completion(trajectory.turns, conversational) for trajectory in trajectories],
            [trajectory.completion_ids for trajectory in trajectories],
            [trajectory.logprobs for trajectory in trajectories] if logprobs is not None else None,
            len(own_calls),
            sum(call.error is not None for call in own_calls),
            [trajectory.images[asked[trajectory.row] :] for trajectory in trajectories],
        )

    def _waved(self, bar: tqdm, wave: Wave) -> None:
        self._row_tools.next_wave()
        bar.update(wave.index - bar.n)
        bar.set_postfix(rows=wave.active, calls=wave.calls, forks=wave.forks)

    def _empty_groups(self, num_rows: int) -> list[Group]:
        """The groups that this process fills; evaluation never branches."""
        first = self.accelerator.process_index * num_rows
        if self.model.training:
            return group_parts(first, num_rows, self.num_generations, self.args.num_initial_generations)
        return group_parts(first, num_rows, self.num_generations_eval, self.num_generations_eval)

    def _anyone(self, here: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)).item())
