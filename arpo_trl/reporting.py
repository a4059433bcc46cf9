"""What a trainer tells of its rollouts: metrics, records, pictures of trees and the table of completions.

A disk that is full or a backend that cannot be reached costs a warning, and not the run.

What it does not do: backends other than TensorBoard, trackio and Weights & Biases get no picture; the file is all
there is.
"""

import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging
from trl.extras.profiling import profiling_context

from .advantages import Span
from .execution.errors import error_repr
from .rollout.metrics import rollout_metrics, rollout_sums, slowest_calls, sum_names
from .rollout.observations import add_observations, observation_metrics, observe, useless_signs
from .rollout.outputs import row_rewards
from .rollout.record import rollout_records
from .rollout.record_files import write_records
from .rollout.table import completion_columns, table_row, table_text
from .rollout.tree import Group

logger = logging.get_logger(__name__)

USELESS_ROLLOUTS = 5
"""Training rollouts in a row that teach nothing before a warning says so."""

# Phases whose seconds are metrics. TRL profiles the last four itself, under the names of its methods.
PHASES = ("sample", "parse", "tools", "wait", "rewards", "old_logps", "ref_logps", "loss")


class Reporter:
    """
    Args:
        trainer ([`ARPOTrainer`]): Whose rollouts are told.
        tool_names (`Sequence[str]`): Names of its tools.
    """

    def __init__(self, trainer: Any, tool_names: Sequence[str]):
        self._trainer = trainer
        self._tool_names = tool_names
        self._rewards = torch.empty(0, 0)  # (all rows of all processes, functions), of the latest rollout
        self._rows = slice(0)  # those of this process
        self._examples: Sequence[Mapping[str, Any]] = ()  # columns of the data set, by row of this process
        self._useless: deque[dict[str, str]] = deque(maxlen=USELESS_ROLLOUTS)  # signs of the latest training rollouts
        self._told: set[str] = set()
        self._waves = 0  # of the latest rollout
        # The step whose record file may get more lines, and its groups so far
        self._recorded: tuple[int | None, int] = (None, 0)
        self._next_records = 0  # the step from which on the next rollouts are recorded
        self._records_failed = False
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of the latest rollout, by phase
        self._next_tree = 0  # the step from which on the next tree is drawn

    @contextmanager
    def timed(self, phase: str, often: bool = False) -> Iterator[None]:
        """
        Time a phase of the rollout: a metric, and, unless TRL profiles it itself, one of TRL's profiling names.

        Args:
            phase (`str`): One of `PHASES`.
            often (`bool`, *optional*, defaults to `False`): Whether it comes once a row rather than once a wave, and
                is not profiled each time.
        """
        started = time.perf_counter()
        with nullcontext() if often or phase == "rewards" else profiling_context(self._trainer, phase):
            yield
        self._waves += phase == "sample" and not often  # a wave samples once
        self._seconds[phase] += time.perf_counter() - started

    def rewards(
        self, rewards_per_func: torch.Tensor, examples: Sequence[Mapping[str, Any]], groups: Sequence[Group]
    ) -> None:
        """
        Take the rewards of all processes' rows, of shape (B × processes, functions), and the columns of the data set
        of this process's B rows, and show the rows in the table.
        """
        first = self._trainer.accelerator.process_index * len(examples)
        self._rewards, self._rows = rewards_per_func, slice(first, first + len(examples))
        self._examples = examples
        if self._trainer.log_completions:
            for column, values in completion_columns(groups).items():
                # A reward function's column of that name stays
                self._trainer._pending_extra_logs.setdefault(column, values)

    def metrics(self, groups: Sequence[Group], lookups: Mapping[str, int], advantages: Sequence[float]) -> None:
        """
        Add the metrics of a rollout, over all processes, to those that the trainer logs.

        Args:
            groups (`Sequence[Group]`): Groups of this process.
            lookups (`Mapping[str, int]`): Lookups of the engine's cache.
            advantages (`Sequence[float]`): Of each row of this process.
        """
        names = sum_names(self._tool_names)
        sums = rollout_sums(groups)
        sums.update(lookups)
        # As numbers of Python: sums of tokens need float64, which not every device has
        own = [float(sums[name]) for name in names], slowest_calls(groups, self._tool_names)
        observed = observe(groups, self.group_rewards(groups), advantages)
        all_sums, all_slowest, all_observed = zip(*gather_object([(*own, observed)]), strict=True)
        totals = {name: sum(values) for name, *values in zip(names, *all_sums, strict=True)}
        slowest = [max(seconds) for seconds in zip(*all_slowest, strict=True)]
        seen = add_observations(all_observed)
        mode = "train" if self._trainer.model.training else "eval"
        metrics = rollout_metrics(totals, slowest, self._tool_names) | observation_metrics(seen)
        if self._waves:
            metrics["arpo/waves"] = self._waves
        for name, value in metrics.items():
            self._trainer._metrics[mode][name].append(value)
        for phase, seconds in self._seconds.items():
            self._trainer._metrics[mode][f"arpo/seconds/{phase}"].append(seconds)
        self._seconds.clear()
        self._waves = 0
        if mode == "train":
            self._warn_if_useless(useless_signs(seen, self._tool_names))

    def group_rewards(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Rewards of all rows of each group, weighted and added as TRL does, those of other processes included."""
        rewards = row_rewards(self._rewards, self._trainer.reward_weights)
        starts = [self._rows.start + group.rows.start - group.first_row for group in groups]
        return [rewards[start : start + group.size] for start, group in zip(starts, groups, strict=True)]

    def _warn_if_useless(self, signs: dict[str, str]) -> None:
        """Warn once of each sign that every one of the latest training rollouts has had."""
        self._useless.append(signs)
        if len(self._useless) < USELESS_ROLLOUTS or not self._trainer.is_world_process_zero():
            return
        lasting = [name for name in signs if all(name in each for each in self._useless) and name not in self._told]
        self._told.update(lasting)
        if lasting:
            reasons = " ".join(signs[name] for name in lasting)
            logger.warning(
                f"The last {USELESS_ROLLOUTS} rollouts, step {self._trainer.state.global_step} the latest: {reasons}"
            )

    def rollout(
        self, groups: Sequence[Group], advantages: Sequence[float], spans: Sequence[Sequence[Span]] | None
    ) -> None:
        """Write the records of a training rollout, and draw a tree, where the config asks for it."""
        step = self._trainer.state.global_step
        if self._trainer.args.log_rollouts and (step >= self._next_records or step == self._recorded[0]):
            self._record(groups, advantages, spans)
        if self._trainer.args.log_tree_steps and step >= self._next_tree:
            self._draw_tree(groups, advantages, spans)

    def _rewards_by_name(self) -> dict[str, list[float | None]]:
        return {
            name: [None if math.isnan(value) else value for value in self._rewards[self._rows, index].tolist()]
            for index, name in enumerate(self._trainer.reward_func_names)
        }

    def _record(
        self, groups: Sequence[Group], advantages: Sequence[float], spans: Sequence[Sequence[Span]] | None
    ) -> None:
        trainer = self._trainer
        step, every = trainer.state.global_step, trainer.args.log_rollout_steps
        self._next_records = step - step % every + every
        groups_before = self._recorded[1] if self._recorded[0] == step else 0
        try:
            records = rollout_records(
                step, groups, self._rewards_by_name(), advantages, spans, groups_before, self._examples
            )
            sampled = self._sampled_groups(groups, groups_before)
            records = [record for record in records if record["prompt_index"] in sampled]
            if self._recorded[0] is None and trainer.is_world_process_zero():
                trainer._tokenizer.save_pretrained(trainer.args.output_dir)  # the viewer decodes with it
            write_records(
                trainer.args.output_dir,
                records,
                step,
                trainer.accelerator.process_index,
                trainer.accelerator.num_processes,
                append=groups_before > 0,
            )
            self._recorded = (step, groups_before + len(groups))
        except Exception as error:  # an OSError, what `tokenizers` raises in its place, or of a value that is no JSON
            if not self._records_failed:
                reason = error_repr(error)
                logger.warning(f"Rollout records could not be written ({reason}); training goes on without them.")
            self._records_failed = True

    def _sampled_groups(self, groups: Sequence[Group], groups_before: int) -> set[int]:
        """
        The groups of this process that are recorded, by their `prompt_index`. All processes draw the same sample of
        the groups of all, since a group may be spread over several.
        """
        args, first = self._trainer.args, self._rows.start
        numbers = [(first + group.rows.start) // group.size for group in groups]  # among those of all processes
        total = len(self._rewards) // groups[0].size
        wanted = total if args.log_rollout_groups is None else min(args.log_rollout_groups, total)
        rng = random.Random(f"{args.seed}/{self._trainer.state.global_step}/{groups_before}")
        sample = set(rng.sample(range(total), wanted))
        return {index for index, number in enumerate(numbers, start=groups_before) if number in sample}

    def _draw_tree(
        self, groups: Sequence[Group], advantages: Sequence[float], spans: Sequence[Sequence[Span]] | None
    ) -> None:
        """Draw the main process's first group, to a file and to where the metrics go."""
        trainer = self._trainer
        step, every = trainer.state.global_step, trainer.args.log_tree_steps
        self._next_tree = step - step % every + every
        if not trainer.is_world_process_zero():
            return
        path = Path(trainer.args.output_dir) / "trees" / f"step-{step:06d}.png"
        try:
            from .viewer.picture import draw_tree

            picture = draw_tree(rollout_records(step, groups[:1], self._rewards_by_name(), advantages, spans))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture)
            report_image("train/arpo/tree", path, step, trainer.args.report_to, trainer.callback_handler.callbacks)
        except Exception as error:  # of the disk, of matplotlib, or of a backend that cannot be reached
            reason = error_repr(error)
            logger.warning_once(f"A tree could not be written or logged ({reason}); training goes on without it.")

    def prepare_table(self) -> None:
        """Make the rows of the table of completions ones that every backend takes."""
        for column in ("prompt", "completion"):
            rows = self._trainer._logs[column]  # a deque
            # A table of Weights & Biases refuses messages with different fields, as a call and its result have
            shown = [table_text(row) if "wandb" in self._trainer.args.report_to else table_row(row) for row in rows]
            rows.clear()
            rows.extend(shown)


def report_image(
    name: str, path: Path, step: int, report_to: Sequence[str], callbacks: Sequence[TrainerCallback]
) -> None:
    """
    Log the image at `path` under `name`, as the callbacks of transformers log the metrics.

    Args:
        name (`str`): Name of the series, with the prefix `train/` that the callbacks put before metrics.
        path (`Path`): The image file.
        step (`int`): Global step.
        report_to (`Sequence[str]`): Backends in use, of [`~transformers.TrainingArguments`].
        callbacks (`Sequence[TrainerCallback]`): Callbacks of the trainer: TensorBoard's holds the writer.
    """
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({name: wandb.Image(str(path)), "train/global_step": step})
    if "trackio" in report_to:
        import trackio

        trackio.log({name: trackio.Image(path), "train/global_step": step}, step=step)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            import numpy as np
            from PIL import Image

            callback.tb_writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
