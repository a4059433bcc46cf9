"""
What keeps a run going and its result whole: it resumes from a checkpoint that is whole, an evaluation in its midst
leaves the random numbers of training alone, a table that cannot be written costs a warning, and a model that the Hub
refuses is kept.
"""

from typing import Any

from transformers.utils import logging

from .checkpoints import shared_choice
from .execution.errors import error_repr
from .random_state import kept_random_state

logger = logging.get_logger(__name__)


class ResilienceMixin:
    """Goes before [`~trl.GRPOTrainer`] among the bases of a trainer that reports through a [`Reporter`]."""

    args: Any
    model: Any
    log_completions: bool
    is_in_train: bool
    hub_model_id: str | None
    save_model: Any
    _metrics: Any
    _reporter: Any

    def log(self, logs, start_time=None):
        if not self.log_completions:
            super().log(logs, start_time)  # type: ignore[misc]
            return
        self._reporter.prepare_table()
        metrics = self._metrics["train" if self.model.training else "eval"]
        try:
            super().log(logs, start_time)  # type: ignore[misc]
        except Exception as error:
            if metrics:  # TRL clears them when they are logged; the table comes after that
                raise
            reason = error_repr(error)
            logger.warning_once(
                f"A table of completions could not be written ({reason}); training goes on without it."
            )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = shared_choice(self) or True  # transformers says that there is none
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args, **kwargs):
        if not self.is_in_train:
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]
        with kept_random_state(parameter.device for parameter in self.model.parameters()):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args, **kwargs):
        try:
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if self.hub_model_id is None:  # refused before anything was saved; the other processes are saving now
                self.save_model(_internal_call=True)
            error.add_note(
                f"The model is kept in {self.args.output_dir!r}. If the token was refused, log in with one that may "
                "write (`hf auth login`) and call `trainer.push_to_hub()` again."
            )
            raise
