"""
What samples segments: transformers' `generate` (`transformers.py`, with its prefix cache in `prefix_cache.py`,
`cache_layers.py` and `growing_layers.py`) or vLLM (`vllm.py`, segments in parts in `parts.py`, one request at a time
in `vllm_stream.py`, images in `vllm_images.py`; a server outside of training in `server.py`). An engine is one class
(`base.py`); which one a trainer or a model has is decided here and nowhere else.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...protocols.images import ImageReader
from .base import BatchStream, Engine, Sample, Stream
from .generation_settings import NO_LIMIT, context_length, never_sample, refuse_unfit_settings, tell_settings
from .parts import StopStrings
from .server import ServedModel, ask_server, find_served_model
from .transformers import TransformersEngine, generate_ids, stop_string_criteria
from .vllm import VLLMEngine, ask_llm, ask_trl, check_top_k, served_context_length, stops_of
from .vllm_images import server_reads_images
from .vllm_stream import stream_trl

__all__ = [
    "NO_LIMIT",
    "BatchStream",
    "Engine",
    "Sample",
    "ServedModel",
    "Stream",
    "TransformersEngine",
    "VLLMEngine",
    "best_schedule",
    "end_tokens",
    "find_served_model",
    "model_engine",
    "reads_images",
    "refuse_unfit_generation",
    "shared_engine",
    "trainer_engine",
    "why_waves",
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
        ValueError: vLLM's engine tells fewer log-probabilities than the config asks for, or `rollout_dtype` is set
            where weights are spread over processes.
    """
    args = trainer.args
    vocab_size = trainer.model.config.get_text_config().vocab_size
    if trainer.use_vllm:
        check_top_k(trainer)
        length = served_context_length(trainer) or context_length(trainer.model.config)
        return VLLMEngine(
            ask_trl(trainer),
            length,
            vocab_size,
            args.vllm_entropy_top_k,
            args.entropy_window,
            stops_of(trainer),
            few_limits=trainer.vllm_mode == "server" and trainer._branches and trainer._schedule != "continuous",
            stream=stream_trl(trainer),
        )
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if args.rollout_dtype is not None and sharded:
        raise ValueError(
            f"`rollout_dtype` is {args.rollout_dtype!r}, but FSDP and DeepSpeed may spread the weights over "
            "processes, of which no copy can be made: leave it out."
        )
    if trainer.rollout_func is None:
        tell_settings(trainer.model, trainer.generation_config)
        if trainer._image_reader is not None:
            never_sample(trainer._image_reader.never_sampled, trainer.generation_config, trainer.model)
    return TransformersEngine(
        lambda: trainer.accelerator.unwrap_model(trainer.model_wrapped),
        generate,
        stop_string_criteria(trainer._tokenizer, trainer._protocol.stop_strings),
        args.entropy_window,
        trainer.temperature,
        keeps=args.prefix_sharing and not sharded,
        idle_token=trainer._tokenizer.eos_token_id,
        forks_anywhere=forks_anywhere,
        reads_logprobs=args.branch_measure == "novelty" or args.fork_sampling == "weighted",
        dtype=getattr(torch, args.rollout_dtype) if args.rollout_dtype is not None else None,
        guest=trainer._image_guest,
    )


def reads_images(trainer: Any) -> bool:
    """
    Whether a trainer's engine is given images. Where it is not, the model reads an error in the place of an image that
    a tool returns, which is not known before one does.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Constructed.

    Raises:
        ValueError: The data have images, and the engine takes none.
    """
    return trainer._is_vlm and (not trainer.use_vllm or server_reads_images(trainer))


def shared_engine(trainer: Any) -> str | None:
    """
    What makes several processes sample with one engine, all of them together, as an argument and its value; `None`
    where each samples alone.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Constructed.
    """
    if trainer.accelerator.num_processes == 1:
        return None
    if trainer.use_vllm:
        size = trainer.args.vllm_tensor_parallel_size
        alone = trainer.vllm_mode == "server" or size == 1
        return None if alone else f"`vllm_tensor_parallel_size={size}`"
    if trainer.is_fsdp_enabled:
        return "generation with transformers under FSDP"
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "generation with transformers under ZeRO-3"
    return None


def why_waves(trainer: Any) -> str | None:
    """
    Why rows cannot be sampled one by one, as the end of a sentence that says what to do; `None` where they can.

    Args:
        trainer ([`~trl.GRPOTrainer`]): Constructed.
    """
    shared = shared_engine(trainer)
    if shared is not None:
        return (
            f"with {shared} all of them sample together: set 'waves' or 'eager', or let each process have its own "
            "engine (vLLM with `vllm_tensor_parallel_size=1`, or a server)"
        )
    if trainer.use_vllm and trainer._is_vlm:
        return "vLLM is given images with whole waves: set 'waves' or 'eager'"
    return None


def best_schedule(trainer: Any) -> str:
    """The schedule that measures best with the engine of a trainer, where it can be had."""
    return "continuous" if trainer.use_vllm else "waves"


def refuse_unfit_generation(args: Any) -> None:
    """Refuse settings of transformers' `generate` that no rollout can have."""
    if not args.use_vllm and isinstance(args.generation_kwargs, dict):
        refuse_unfit_settings(args.generation_kwargs)


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
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `vllm.LLM` or [`ServedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        stop_strings (`Sequence[str]`): Text at which a segment ends.
        generation_config ([`~transformers.GenerationConfig`]): How to sample, with a list of `eos_token_id`; vLLM
            takes its `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`.
        entropy_window (`int`): Tokens to read the entropy of, k.
        image_reader ([`ImageReader`], *optional*): How a multimodal model reads images.
    """
    if isinstance(model, ServedModel):
        ask = ask_server(model, _sampling(generation_config), stop_strings, generation_config.eos_token_id)
        stops = StopStrings(stop_strings, partial(tokenizer.decode, skip_special_tokens=False))
        vocab_size = len(tokenizer)  # of no use, since no entropies are read
        return VLLMEngine(
            ask, model.context_length, vocab_size, 0, entropy_window, stops=lambda: stops, few_limits=True
        )
    if hasattr(model, "llm_engine"):
        config = model.llm_engine.model_config
        ask = ask_llm(model, _sampling(generation_config), stop_strings, generation_config.eos_token_id, image_reader)
        return VLLMEngine(ask, config.max_model_len, config.get_vocab_size(), 0, entropy_window)
    tell_settings(model, generation_config)
    if image_reader is not None:
        never_sample(image_reader.never_sampled, generation_config, model)
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


def _sampling(generation_config: GenerationConfig) -> dict[str, Any]:
    """How to sample, as fields of `vllm.SamplingParams`."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    told = {name: getattr(generation_config, name) for name in names}
    sampling = {name: value for name, value in told.items() if value is not None}
    return sampling if generation_config.do_sample else sampling | {"temperature": 0.0}


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    The tokens that end a turn: the tokenizer's, and those of the model's own generation config. Of a model on a server
    it is the config that lies beside the tokenizer.
    """
    if isinstance(model, ServedModel):
        eos = None
        with contextlib.suppress(OSError, ValueError):  # a tokenizer that was built here has none beside it
            eos = GenerationConfig.from_pretrained(tokenizer.name_or_path).eos_token_id
    elif hasattr(model, "llm_engine"):
        eos = model.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    else:
        eos = model.generation_config.eos_token_id
    model_ends = eos if isinstance(eos, list) else [eos] if eos is not None else []
    return sorted({tokenizer.eos_token_id, *model_ends})
