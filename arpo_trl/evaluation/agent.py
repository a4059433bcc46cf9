"""An agent: a model that answers with tools, outside of training.

The rollout is the trainer's own, with branching off: same protocol, same tool executor, same limits, same engines.

What is not here: entropies on vLLM, and images on a vLLM server.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from ..execution.executor import ToolCall, ToolExecutor
from ..execution.images import images_of
from ..execution.names import distinct_tools
from ..protocols import protocol_class, tool_chat_template, warn_of_another_protocol
from ..protocols.images import ImageReader
from ..protocols.suffix import suffix_renderer, warn_of_endless_calls
from ..rollout.engines import NO_LIMIT, Sample, ServedModel, end_tokens, find_served_model, model_engine
from ..rollout.loop import Branching, Limits, RolloutHooks, refuse_calls_over_limit, run_waves
from ..rollout.rules import BranchRule
from ..rollout.tree import Trajectory, group_parts


class Agent:
    """
    A model that calls tools.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `vllm.LLM` or `str`): The model, or the address
            of a vLLM server that has loaded it, such as `"http://127.0.0.1:8000"`. A server that wants a key gets that
            of the environment variable `VLLM_API_KEY`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): Its tokenizer, or
            the processor of a multimodal checkpoint, which reads images in prompts and in tool results.
        tools (`Sequence[Callable]`): Tools, as for [`ARPOTrainer`].
        tool_protocol (`str`): As in [`ARPOConfig`]; the one that the model was trained with.
        max_completion_length (`int`): Tokens of a completion, tool results included.
        max_tool_calling_iterations (`int`, *optional*): Turns whose calls are answered; `None` for no limit.
        temperature, top_p, top_k, min_p, repetition_penalty: Sampling, as in [`ARPOConfig`]. A temperature of 0
            decodes greedily.
        batch_size (`int`, *optional*): Completions sampled together: by default 32 with transformers, and all of them
            with vLLM, which decides itself what it samples at the same time.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Passed to the chat template.
        tool_timeout (`float`, *optional*): Seconds after which a tool call is given up.
        entropy_window (`int`): Tokens over which the entropy of a segment is read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        tools: Sequence[Callable] = (),
        tool_protocol: str = "chat_template",
        max_completion_length: int = 1024,
        max_tool_calling_iterations: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        batch_size: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tool_timeout: float | None = 120.0,
        entropy_window: int = 20,
    ):
        self.model = model = find_served_model(model) if isinstance(model, str) else model
        self.processing_class = tokenizer
        # A multimodal checkpoint's tokenizer is in its processor, which renders messages
        self._multimodal = isinstance(tokenizer, ProcessorMixin)
        tokenizer = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
        self.tokenizer = tokenizer
        self.tools = {tool.__name__: tool for tool in distinct_tools(tools)}
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.chat_template: str | None = None
        protocol = protocol_class(tool_protocol)
        if self.tools:
            warn_of_another_protocol(tokenizer, tool_protocol)
        if self.tools and protocol.structured:
            self.chat_template = tool_chat_template(self.processing_class)
        template = (self.processing_class, self.chat_template, self.chat_template_kwargs)
        reads_images = self._multimodal and not isinstance(model, ServedModel)
        reader = ImageReader(*template) if reads_images else None
        self.executor = ToolExecutor(
            timeout=tool_timeout,
            count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
            image_tokens=reader.tokens if reader is not None else None,
        )
        self.protocol = protocol(tokenizer, list(self.tools), suffix_renderer(*template))
        self.protocol.image_reader = reader
        self.sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p or 0.0,
            "repetition_penalty": repetition_penalty,
        }
        ends = end_tokens(model, tokenizer)
        self.eos_token_ids = set(ends)
        self.generation_config = GenerationConfig(
            max_new_tokens=max_completion_length,
            do_sample=temperature > 0,
            **(self.sampling if temperature > 0 else {"repetition_penalty": repetition_penalty}),
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        self.engine = model_engine(
            model, tokenizer, self.protocol.stop_strings, self.generation_config, entropy_window, reader
        )
        self.batch_size = batch_size or (NO_LIMIT if self.engine.schedules_rows else 32)
        if self.tools and protocol.structured:
            warn_of_endless_calls(*template, ends)
        self.limits = Limits(
            completion=max_completion_length,
            context=self.engine.context_length,
            tool_turns=NO_LIMIT if max_tool_calling_iterations is None else max_tool_calling_iterations,
        )
        never = BranchRule()
        self._branching = Branching(never, entropy_window, self.engine.vocab_size)

    def rollout(
        self,
        prompts: Sequence[str | list[dict]],
        on_end: Callable[[list[Trajectory]], None] = lambda trajectories: None,
    ) -> list[Trajectory]:
        """
        One trajectory for each prompt, in their order. Prompts that the model's context cannot hold end at once.

        Args:
            prompts (`Sequence[str | list[dict]]`): The prompts.
            on_end (`Callable[[list[Trajectory]], None]`, *optional*): Told of trajectories as soon as they have ended,
                while others go on; their `row` is the place of their prompt.
        """
        contexts = [self.tokenize(prompt) for prompt in prompts]
        images = [self.images(prompt) for prompt in prompts]
        trajectories: list[Trajectory] = []
        for start in range(0, len(contexts), self.batch_size):
            batch = contexts[start : start + self.batch_size]
            with self.engine.rollout():
                rows = run_waves(
                    group_parts(0, len(batch), group_size=1, num_initial=1),
                    batch,
                    self.protocol,
                    RolloutHooks(
                        sample=self._sample,
                        tools_of=lambda trajectory: self.tools,
                        submit=self._submit,
                        on_end=partial(_moved, on_end, start),
                    ),
                    self._branching,
                    self.limits,
                    random.Random(0),
                    self.eos_token_ids.__contains__,
                    images=images[start : start + self.batch_size],
                )
            for trajectory in rows:
                trajectory.row += start
            trajectories += rows
        return trajectories

    def completion(self, trajectory: Trajectory, prompt: str | list[dict]) -> Any:
        """What reward functions see of a trajectory."""
        return self.protocol.completion(trajectory.turns, is_conversational({"prompt": prompt}))

    def close(self) -> None:
        self.executor.close()

    def tokenize(self, prompt: str | list[dict]) -> list[int]:
        """The tokens that a prompt becomes."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        ids: Any = self.processing_class.apply_chat_template(
            prepare_multimodal_messages(prompt) if self._multimodal else prompt,
            tools=list(self.tools.values()) if self.protocol.schema_in_prompt and self.tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )
        return ids[0] if self._multimodal else ids

    def with_images(self, row: dict[str, Any]) -> dict[str, Any]:
        """A question whose images, which may be a column of their own, stand in the messages of its prompt."""
        images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
        if not self._multimodal or not images or isinstance(row["prompt"], str):
            return row
        return {**row, "prompt": prepare_multimodal_messages(row["prompt"], images=images)}

    def images(self, prompt: str | list[dict]) -> list[Any]:
        """The images in the content blocks of a prompt, in order."""
        messages = prompt if self._multimodal and not isinstance(prompt, str) else []
        images = [image for message in messages for image in images_of(message.get("content"))]
        if images and self.protocol.image_reader is None:
            raise ValueError(
                "A prompt holds an image, and a vLLM server is asked in text alone: pass the model itself."
            )
        return images

    def _submit(self, trajectory: Trajectory, calls: list[ToolCall]) -> list[Future]:
        refuse_calls_over_limit(calls, trajectory, self.tools)
        return [self.executor.submit(call, self.tools.get(call.name)) for call in calls]

    def _sample(
        self, contexts: list[list[int]], limits: list[int], images: Sequence[Sequence[Any]] = ()
    ) -> list[Sample]:
        """A segment after each context; an empty one where there is no room left."""
        fitting = [index for index, limit in enumerate(limits) if limit > 0]
        samples = [Sample([], []) for _ in contexts]
        if fitting:
            seen = [images[index] for index in fitting] if images else []
            sampled = self.engine.sample(
                [contexts[index] for index in fitting], [limits[index] for index in fitting], seen
            )
            for index, sample in zip(fitting, sampled, strict=True):
                samples[index] = sample
        return samples


def _moved(on_end: Callable[[list[Trajectory]], None], start: int, ended: list[Trajectory]) -> None:
    """Tell of trajectories of a batch whose first row is `start`."""
    on_end([replace(trajectory, row=trajectory.row + start) for trajectory in ended])
