"""What a checkpoint's own settings mean for a rollout that transformers' `generate` samples.

`generate` takes from the checkpoint's generation config whatever the config that it is handed leaves open. Three kinds
of settings come in this way. Some no rollout can have, such as beams: they are left out. Some change what is sampled,
such as suppressed tokens: they are followed, as in TRL's `GRPOTrainer`. Both are told once. The others, such as
`use_cache`, change nothing that is sampled, and [`PrefixCache`] sees to them.

What is not here: vLLM, which TRL tells every setting itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A context window that no row reaches
NO_LIMIT = 2**31

# A rollout is a tensor with one sequence a row, whose logits processors see every step once; no tokenizer is handed
# over
_UNFIT = (
    *("num_beams", "num_beam_groups", "constraints", "force_words_ids", "num_return_sequences"),
    *("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("prompt_lookup_num_tokens", "use_mtp", "assistant_early_exit", "penalty_alpha", "dola_layers"),
    *("stop_strings", "token_healing"),
)
# What does not change the tokens of a row, or only together with an unfit setting, or what the handed config decides
_SILENT = (
    *("max_length", "max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config"),
    *("disable_compile", "low_memory", "continuous_batching_config", "transformers_version", "early_stopping"),
    *("length_penalty", "diversity_penalty", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "speculation_type", "renormalize_logits"),
)
_NEUTRAL = {
    "min_p": 0.0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    **GenerationConfig._get_default_generation_params(),
}


def _says(name: str, value: Any) -> bool:
    """Whether a setting does anything."""
    return value is not None and value is not False and value != [] and value != _NEUTRAL.get(name)


def unfit_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `settings` of `generate` that no rollout can have, with their values."""
    return {name: settings[name] for name in _UNFIT if _says(name, settings.get(name))}


def followed_settings(model: PreTrainedModel, generation_config: GenerationConfig) -> dict[str, Any]:
    """
    What `generate` takes from the model's own generation config that changes what it samples.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        generation_config ([`~transformers.GenerationConfig`]): The config that `generate` is handed.
    """
    settings = vars(model.generation_config)
    return {
        name: settings[name]
        for name, handed in vars(generation_config).items()
        if handed is None and name[0] != "_" and name not in (*_UNFIT, *_SILENT) and _says(name, settings.get(name))
    }


def tell_settings(model: PreTrainedModel, generation_config: GenerationConfig) -> None:
    """Warn once of what the model's own generation config means for its rollouts."""
    unfit = unfit_settings(vars(model.generation_config))
    if unfit:
        logger.warning_once(
            f"The model's generation config sets {_listed(unfit)}. Rollouts leave that out: a row is one sequence, "
            "sampled token by token."
        )
    followed = followed_settings(model, generation_config)
    if followed:
        logger.warning_once(
            f"The model's generation config sets {_listed(followed)}. Rollouts follow that, as `generate` does, so "
            "they are not samples of the model's own distribution. To sample without, set `model.generation_config = "
            "GenerationConfig(eos_token_id=...)` before you pass the model."
        )


def never_sample(tokens: Iterable[int], generation_config: GenerationConfig, model: PreTrainedModel) -> None:
    """
    Have `generate` sample none of some tokens, beside those that it would not sample anyway.

    Only the sampler leaves them out. Training scores a row with the policy itself, which gives each of its tokens
    1 − p of what the sampler gives it, where p is the probability of the tokens left out: next to nothing in a
    checkpoint that has never been taught to write them. Ratios of the loss do not see it, since the old
    log-probabilities are the policy's own too.

    Args:
        tokens (`Iterable[int]`): The tokens.
        generation_config ([`~transformers.GenerationConfig`]): The config that `generate` is handed; changed.
        model ([`~transformers.PreTrainedModel`]): The model, whose own config counts where the handed one is silent.
    """
    suppressed = generation_config.suppress_tokens
    if suppressed is None:
        suppressed = model.generation_config.suppress_tokens
    generation_config.suppress_tokens = sorted({*tokens, *(suppressed or ())})


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_shortened(repr(value))}" for name, value in settings.items())


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"


@contextmanager
def without_unfit_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model's own generation config sets nothing that no rollout can have."""
    config = model.generation_config
    unfit = unfit_settings(vars(config))
    for name in unfit:
        setattr(config, name, None)
    try:
        yield
    finally:
        for name, value in unfit.items():
            setattr(config, name, value)


def refuse_unfit_settings(generation_kwargs: Mapping[str, Any]) -> None:
    """
    Refuse a user's own settings that no rollout can have.

    Raises:
        ValueError: `generation_kwargs` holds one.
    """
    unfit = unfit_settings(generation_kwargs)
    if unfit:
        raise ValueError(
            f"`generation_kwargs` holds {_listed(unfit)}, but a row of a rollout with tools is one sequence, sampled "
            "token by token. Leave that out."
        )


def context_length(config: PreTrainedConfig) -> int:
    """
    Tokens that a model can read, by whatever name its config has for them; `NO_LIMIT` where it names none, as the
    configs of models without learnt positions do.
    """
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"):
        length = getattr(text_config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return NO_LIMIT
