"""Shared-prefix scoring as a mixin of any `GRPOTrainer`, for long shared prompts, with or without forks.

```python
from arpo_trl.scoring import SharedPrefixMixin

class Trainer(SharedPrefixMixin, GRPOTrainer):
    pass
```

Beside TRL's metrics it logs what sharing saved (`tally.py`), and the seconds of what it scores.

What it does not do: images; what `shared_prefix.py` names. Those rows are scored by TRL's own method; the log says
once why, and the metrics say how many.
"""

import inspect
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import gather_object
from trl.extras.profiling import profiling_context
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from .prefix_tree import group_order, sibling_order, token_sizes
from .shared_prefix import rows_may_change_micro_batch, shared_prefix_logps, why_not_packed
from .tally import NotPacked, chunk_counts, scoring_metrics

# Log-probabilities of a generation batch that those of the loss are compared with, in the order in which TRL scores
# them, and the phase under which their seconds are logged
_COMPARED = {"old_per_token_logps": "old_logps", "ref_per_token_logps": "ref_logps"}

# Losses that average over the rows of a micro-batch; the others divide by the tokens of the whole optimiser step
_ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")


class SharedPrefixMixin:
    """
    Scores the rows of a micro-batch with every token that they share computed once: the same log-probabilities,
    entropies and gradients as row by row, up to rounding.

    It stands before [`~trl.GRPOTrainer`] among the bases of a class.

    Attributes:
        share_prefixes (`bool`): Whether to share at all; `False` is TRL's own method to the bit.
        keep_groups_together (`bool`): Whether the shuffle of a generation batch deals whole groups, rather than rows,
            to optimiser steps and micro-batches, whether prefixes are shared or not. `False` leaves each row in the
            optimiser step that TRL's shuffle has put it into.
        micro_batches_by_tokens (`bool`): Whether the rows of an optimiser step are cut into its micro-batches by the
            tokens to compute rather than into as many rows each. Where prefixes are not shared, rows are padded to
            one length, and every micro-batch has as many.
    """

    share_prefixes: bool = True
    keep_groups_together: bool = False
    micro_batches_by_tokens: bool = False
    _ordered_inputs: list | None = None  # the buffered inputs that have been put into order
    _loss_seconds: float = 0.0  # of the optimiser step so far

    # What GRPOTrainer has
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    _metrics: Any
    _buffered_inputs: Any
    _step: int
    num_generations: int
    loss_type: str
    top_entropy_quantile: float
    _entropy_bonus_enabled: bool
    aux_loss_enabled: bool

    @cached_property
    def _token_counts(self) -> dict[str, Counter[str]]:
        """What this process has scored since the last report, of training and of evaluation."""
        return {"train": Counter(), "eval": Counter()}

    @cached_property
    def _logged_counts(self) -> dict[str, Counter[str]]:
        """What all processes have scored since metrics were last logged."""
        return {"train": Counter(), "eval": Counter()}

    @cached_property
    def _scoring_seconds(self) -> list[float]:
        """Of each call without gradients that is part of the present rollout."""
        return []

    def _why_not_packed(self, images: bool = False) -> NotPacked | None:
        """
        Why the training step does not share prefixes. The wrapped model decides: TRL asks the model without its
        wrappers for old log-probabilities, and these have to come from the path of the new ones.
        """
        return why_not_packed(self.model_wrapped, self.accelerator.device, self.aux_loss_enabled, images)

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        batches = self._buffered_inputs
        if not self.model.training or batches is self._ordered_inputs:
            return inputs
        steps, accumulation = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        together = math.gcd(steps, accumulation)  # micro-batches between which rows may move
        wanted = self.micro_batches_by_tokens or not self.keep_groups_together
        may_move = wanted and together > 1 and self._may_reorder()
        if not self.keep_groups_together and not may_move:
            return inputs  # there is no other micro-batch to go to, or no use, or it would be another loss
        rows = [
            torch.cat([prompt[prompt_mask.bool()], completion[completion_mask.bool()]]).cpu().numpy()
            for batch in batches
            for prompt, prompt_mask, completion, completion_mask in zip(
                *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
                strict=True,
            )
        ]
        # TRL has shuffled the rows of this generation batch
        order = list(range(len(rows)))
        if self.keep_groups_together:
            order = group_order(rows, torch.cat([batch["group"] for batch in batches]).tolist())
        # Siblings come together within each optimiser step
        order = [order[place] for place in sibling_order([rows[row] for row in order], steps, accumulation)]
        size = len(rows) // steps
        sizes = [size] * steps
        if self.micro_batches_by_tokens and may_move:
            ordered = [rows[row] for row in order]
            windows = range(0, len(rows), together * size)
            sizes = [n for first in windows for n in token_sizes(ordered[first : first + together * size], together)]
        self._buffered_inputs = self._ordered_inputs = reordered(batches, order, sizes)
        return self._buffered_inputs[self._step % steps]

    def _may_reorder(self) -> bool:
        """Whether siblings gain from standing in one micro-batch, and the loss does not depend on it."""
        if not self.share_prefixes or self._why_not_packed() is not None:
            return False
        return rows_may_change_micro_batch(
            self.loss_type, self.top_entropy_quantile, self._entropy_bonus_enabled, self.aux_loss_enabled
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
        started = time.perf_counter()
        stock = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        counts = self._token_counts["train" if self.model.training else "eval"]
        reason = None
        if self.share_prefixes:
            reason = self._why_not_packed(any(value is not None for value in images.values()))
        if not self.share_prefixes or reason is not None:
            if reason is not None:
                scored = int(attention_mask[:, -logits_to_keep:].sum())
                counts.update(chunk_counts(scored, input_ids.numel(), reason))
            scores = stock(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **images,
            )
        else:
            with profiling_context(self, "_get_per_token_logps_and_entropies"):  # as TRL's own method is
                scores = self._packed_logps_and_entropies(
                    # one measurement a call, however many of its chunks are scored row by row
                    inspect.unwrap(stock.__func__).__get__(self),
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    batch_size,
                    compute_entropy,
                    compute_aux_loss,
                    counts,
                )
        if not torch.is_grad_enabled():
            self._scoring_seconds.append(time.perf_counter() - started)
        return scores

    def _packed_logps_and_entropies(
        self,
        stock,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size,
        compute_entropy,
        compute_aux_loss,
        counts,
    ):
        # The same rows stand in other chunks when their old, reference and new log-probabilities are scored, and these
        # are compared. So all are packed, whatever the cost. Those without gradients are old ones, the reference's, or
        # those of an evaluation.
        buffered: dict[str, Any] = (self._buffered_inputs or [{}])[0]
        compared = not torch.is_grad_enabled() or not buffered.keys().isdisjoint(_COMPARED)
        # Rows that were counted without their padding are not padded either
        packed = compared or self.micro_batches_by_tokens
        chunks = []
        for ids, mask in zip(
            *(x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask)), strict=True
        ):
            options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            with self.accelerator.autocast():
                shared = shared_prefix_logps(
                    model, ids, mask, logits_to_keep, **options, only_if_cheaper=not packed, counts=counts
                )
            chunks.append(shared or stock(model, ids, mask, logits_to_keep, **options))
        logps, entropies, aux_losses = zip(*chunks, strict=True)
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _generate_and_score_completions(self, inputs):
        self._scoring_seconds.clear()
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training and self.keep_groups_together:  # a column that TRL shuffles and splits with the others
            first = self.accelerator.process_index * len(inputs)
            output["group"] = torch.arange(first, first + len(inputs)) // self.num_generations
        metrics = self._metrics["train" if self.model.training else "eval"]
        scored = [phase for name, phase in _COMPARED.items() if name in output]
        for phase, seconds in zip(scored, self._scoring_seconds, strict=False):
            metrics[f"arpo/seconds/{phase}"].append(seconds)
        return output

    # Metrics

    def compute_loss(self, model, inputs, *args, **kwargs):
        started = time.perf_counter()
        loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.model.training and self.micro_batches_by_tokens and self.loss_type in _ROW_MEANS:
            # A mean over all rows of the step: a micro-batch counts as often as it has rows
            loss = loss * (len(inputs["completion_ids"]) / self.args.per_device_train_batch_size)
        self._loss_seconds += time.perf_counter() - started
        if not self.model.training or self.accelerator.sync_gradients:  # the last micro-batch of a step
            self._report_scoring("train" if self.model.training else "eval")
        return loss

    def _report_scoring(self, mode: str) -> None:
        """Put the metrics of what was scored since the last time that metrics were logged beside TRL's own."""
        metrics, total, own = self._metrics[mode], self._logged_counts[mode], self._token_counts[mode]
        metrics["arpo/seconds/loss"].append(self._loss_seconds)
        self._loss_seconds = 0.0
        if not self.share_prefixes:
            return
        if "arpo/packed_token_fraction" not in metrics:  # TRL clears them when it has logged them
            total.clear()
        for counts in gather_object([dict(own)]):
            total.update(counts)
        own.clear()
        for name, value in scoring_metrics(total).items():
            metrics[name] = [value]  # a ratio of sums, so that fractions add up whatever the micro-batches hold


def reordered(batches: Sequence[dict[str, Any]], order: Sequence[int], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """
    The micro-batches of a generation batch with their rows in another order, `sizes` of them in each. What belongs to
    the images of a row follows it, as in TRL's own shuffle; what has no rows stays as it is.
    """

    def joined(values: list) -> Any:
        if isinstance(values[0], list):
            return [row for value in values for row in value]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) and values[0].dim() > 0 else values[0]

    def picked(value: Any, rows: Sequence[int]) -> Any:
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value[rows] if isinstance(value, torch.Tensor) and value.dim() > 0 else value

    whole = split_pixel_values_by_grid({name: joined([batch[name] for batch in batches]) for name in batches[0]})
    ends = list(itertools.accumulate(sizes))
    parts = [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return [
        unsplit_pixel_values_by_grid({name: picked(value, rows) for name, value in whole.items()}) for rows in parts
    ]
