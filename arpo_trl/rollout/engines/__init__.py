"""
What samples segments: transformers' `generate` (`transformers.py`, with its prefix cache in `prefix_cache.py` and
`cache_layers.py`) or vLLM (`vllm.py`). An engine is one class (`base.py`); which one a trainer or a model has is
decided here and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...protocols.images import ImageReader
from .base import Engine, Sample
from .generation_settings import NO_LIMIT, context_length, tell_settings
from .transformers import TransformersEngine, generate_ids, stop_string_criteria
from .vllm import VLLMEngine, ask_llm, ask_trl, check_top_k, served_context_length

__all__ = [
    "NO_LIMIT",
    "Engine",
    "Sample",
    "TransformersEngine",
    "VLLMEngine",
    "end_tokens",
    "model_engine",
    "trainer_engine",
]


def trainer_engine(
    trainer: Any,
    generate: Callable[[list[list[int]], Sequence[Sequence[Any]]], list[list[int]]],
    forks_anywhere: bool = False,
) -> Engine:
    """
    The engine of a trainer.

    Args:
        trainer ([`ARPOTrainer`]): Constructed as far as its protocol.
        generate (`Callable[[list[list[int]], Sequence[Sequence[Any]]], list[list[int]]]`): TRL's call of `generate`,
            for transformers; takes contexts and the images of each.
        forks_anywhere (`bool`, *optional*, defaults to `False`): Whether forks may leave at any tool result of a row.

    Raises:
        ValueError: vLLM's engine tells fewer log-probabilities than the config asks for.
    """
    args = trainer.args
    vocab_size = trainer.model.config.get_text_config().vocab_size
    if trainer.use_vllm:
        check_top_k(trainer)
        length = served_context_length(trainer) or context_length(trainer.model.config)
        return VLLMEngine(ask_trl(trainer), length, vocab_size, args.vllm_entropy_top_k, args.entropy_window)
    if trainer.rollout_func is None:
        tell_settings(trainer.model, trainer.generation_config)
    return TransformersEngine(
        lambda: trainer.accelerator.unwrap_model(trainer.model_wrapped),
        generate,
        stop_string_criteria(trainer._tokenizer, trainer._protocol.stop_strings),
        args.entropy_window,
        trainer.temperature,
        keeps=args.prefix_sharing and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled),
        idle_token=trainer._tokenizer.eos_token_id,
        forks_anywhere=forks_anywhere,
    )


def model_engine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    stop_strings: Sequence[str],
    generation_config: GenerationConfig,
    entropy_window: int,
    image_reader: ImageReader | None = None,
) -> Engine:
    """
    The engine of a model outside of training.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or `vllm.LLM`): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        stop_strings (`Sequence[str]`): Text at which a segment ends.
        generation_config ([`~transformers.GenerationConfig`]): How to sample, with a list of `eos_token_id`; vLLM
            takes its `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`.
        entropy_window (`int`): Tokens to read the entropy of, k.
        image_reader ([`ImageReader`], *optional*): How a multimodal model reads images.
    """
    if hasattr(model, "llm_engine"):
        config = model.llm_engine.model_config
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        told = {name: getattr(generation_config, name) for name in names}
        sampling = {name: value for name, value in told.items() if value is not None}
        if not generation_config.do_sample:
            sampling["temperature"] = 0.0
        ask = ask_llm(model, sampling, stop_strings, generation_config.eos_token_id, image_reader)
        return VLLMEngine(ask, config.max_model_len, config.get_vocab_size(), 0, entropy_window)
    tell_settings(model, generation_config)
    return TransformersEngine(
        lambda: model,
        lambda contexts, images: generate_ids(
            model,
            contexts,
            generation_config,
            image_reader.fields(contexts, images) if image_reader is not None else None,
        ),
        stop_string_criteria(tokenizer, stop_strings),
        entropy_window,
        generation_config.temperature or 1.0,
        keeps=True,
        idle_token=tokenizer.eos_token_id,
    )


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a turn: the tokenizer's, and those of the model's own generation config."""
    if hasattr(model, "llm_engine"):
        eos = model.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    else:
        eos = model.generation_config.eos_token_id
    model_ends = eos if isinstance(eos, list) else [eos] if eos is not None else []
    return sorted({tokenizer.eos_token_id, *model_ends})
