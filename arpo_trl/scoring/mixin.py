"""Shared-prefix scoring as a mixin of any `GRPOTrainer`: whoever has long shared prompts gets it, with or without forks.

```python
from arpo_trl.scoring import SharedPrefixMixin

class Trainer(SharedPrefixMixin, GRPOTrainer):
    pass
```

What it does not do: images; the load-balancing loss of mixtures of experts; what `shared_prefix.py` names. Those rows are
scored by TRL's own method, and the log says once why.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from .prefix_tree import sibling_order
from .shared_prefix import rows_may_change_micro_batch, shared_prefix_logps, shares_prefixes

# Log-probabilities of a generation batch that those of the loss are compared with
_COMPARED = ("old_per_token_logps", "ref_per_token_logps")


class SharedPrefixMixin:
    """
    Scores the rows of a micro-batch with every token that they share computed once: the same log-probabilities, entropies
    and gradients as row by row, up to rounding.

    It stands before [`~trl.GRPOTrainer`] among the bases of a class.

    Attributes:
        share_prefixes (`bool`): Whether to share at all; `False` is TRL's own method to the bit.
    """

    share_prefixes: bool = True
    _ordered_inputs: list | None = None  # the buffered inputs that have been put into order

    # What GRPOTrainer has
    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    _buffered_inputs: Any
    _step: int
    loss_type: str
    top_entropy_quantile: float
    _entropy_bonus_enabled: bool
    aux_loss_enabled: bool

    @property
    def _shares_scoring(self) -> bool:
        """
        Whether the training step shares prefixes. The wrapped model decides: TRL asks the model without its wrappers
        for old log-probabilities, and these have to come from the path of the new ones.
        """
        return self.share_prefixes and shares_prefixes(
            self.model_wrapped, self.accelerator.device, self.aux_loss_enabled
        )

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
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
        self._buffered_inputs = self._ordered_inputs = reordered(batches, order)
        return self._buffered_inputs[self._step % steps]

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
        stock = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
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


def reordered(batches: Sequence[dict[str, Any]], order: Sequence[int]) -> list[dict[str, Any]]:
    """
    The micro-batches of a generation batch with their rows in another order. What belongs to the images of a row follows
    it, as in TRL's own shuffle; what has no rows stays as it is.
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
