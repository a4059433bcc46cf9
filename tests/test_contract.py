"""Every private name of TRL that ARPOTrainer overrides, calls or reads. A release that moves one fails here first."""

import importlib.metadata
import inspect
import runpy

import pytest
import trl
from trl import GRPOTrainer
from trl.generation.vllm_client import VLLMClient, parse_logprobs
from trl.generation.vllm_generation import VLLMGeneration, extract_logprobs
from trl.trainer import grpo_trainer

import arpo_trl

# Methods that we override, with the parameters that we rely on
OVERRIDDEN = {
    "_tokenize_prompts": ["self", "prompts"],
    "_generate": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_tool_call_loop": [
        *("self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images", "multimodal_fields"),
    ],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_tool_suffix_ids": ["self", "tool_messages"],
    "_prepare_inputs": ["self", "generation_batch"],
    "compute_loss": ["self", "model", "inputs"],
    "log": ["self", "logs", "start_time"],
    "train": ["self", "resume_from_checkpoint"],
    "evaluate": ["self"],
    "_get_per_token_logps_and_entropies": [
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"),
        "compute_aux_loss",
    ],
}
# Attributes that TRL sets and we read; and what the source must still say for our reading of it to hold
SAID = {
    "_generate": [
        "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images",
        "if self.tools:",
        "self._tool_call_loop(",
    ],
    "_tool_call_loop": [
        "return tool_mask, completions, completion_ids, logprobs, tool_call_count, tool_failure_count, tool_images",
        "self.max_tool_calling_iterations",
        "max_position_embeddings",
    ],
    "_generate_and_score_completions": [
        "self._sync_tool_dicts",
        "self._async_tool_dicts",
        "self.environments",
        '"advantages": advantages',
        '"completion_ids": completion_ids',
        'output["old_per_token_logps"] = old_per_token_logps',
        'output["ref_per_token_logps"] = ref_per_token_logps',
        "inp[key] = values[i]",
        '"completion_mask": completion_mask',
        '"num_items_in_batch": num_items_in_batch',
        'output["tool_mask"] = tool_mask',
        "for column in sorted(set(gather_object(list(self._pending_extra_logs)))):",
        # images: TRL's tensors, of the images that `_generate` returns, in the order of the rows
        "if self.tools and any(imgs for imgs in tool_images) and self._is_vlm:",
        'if images is not None and self.log_multimodal: self._logs["images"].extend(gather_object(images))',
        'self.processing_class.image_processor(images=flat_images, return_tensors="pt")',
        "num_images = [len(img_list) if img_list else 0 for img_list in images] if images is not None else None",
        "num_images=num_images, num_tiles=num_tiles, **forward_kwargs,",
        'output["num_images"] = num_images',
    ],
    "log": [
        'self._logs["prompt"]',
        'self._logs["completion"]',
        '**self._logs["extra"],',
        # what raises after that is of the table
        "super().log(logs, start_time) self._metrics[mode].clear() if self.accelerator.is_main_process",
    ],
    "_tokenize_prompts": ["return prompt_ids, images, multimodal_fields"],
    "_get_tool_suffix_ids": ["tok_id == self._tokenizer.eos_token_id", "self.processing_class.apply_chat_template("],
    "_generate_single_turn": ["unwrapped_model.generate(", "self.vllm_generation.generate("],
    "_calculate_rewards": ["zip(self.reward_funcs, self.reward_processing_classes, self.reward_func_names"],
    "_compute_loss": ["if advantages.dim() == 1:", "compute_aux_loss=self.aux_loss_enabled"],
    "_prepare_inputs": [
        "generation_batch = self._generate_and_score_completions(generation_batch)",
        "generation_batch = split_pixel_values_by_grid(generation_batch)",
        "split_tensor_dict(generation_batch, self.args.steps_per_generation)",
        "self._buffered_inputs = [unsplit_pixel_values_by_grid(batch) for batch in generation_batches]",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ],
    "_get_per_token_logps_and_entropies": [
        "fused_lm_head=True",
        "self.accelerator.autocast()",
        # tensors with one entry a row, where `num_images` does not add up to the number of rows
        'elif pixel_values is not None: model_inputs["pixel_values"] = pixel_values[start:end]',
        'model_inputs["pixel_attention_mask"] = pixel_attention_mask[start:end]',
    ],
    "__init__": [
        "self._standalone_tools",
        "self._env_tools",
        "self._environment_pool",
        "self._tokenizer",
        "self._is_vlm",
        "self.eos_token_ids",
        'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}',
        "self.reward_func_names",
        "self.num_generations_eval",
        "self.aux_loss_enabled = ",
        "self.loss_type = ",
        "self.top_entropy_quantile = ",
        "self._entropy_bonus_enabled = ",
    ],
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_signatures(name):
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"TRL {trl.__version__} has no GRPOTrainer.{name}, which arpo_trl overrides or calls"
    parameters = list(inspect.signature(inspect.unwrap(method)).parameters)
    assert parameters[: len(OVERRIDDEN[name])] == OVERRIDDEN[name], f"TRL {trl.__version__} changed GRPOTrainer.{name}"


@pytest.mark.parametrize("name, line", [(name, line) for name, lines in SAID.items() for line in lines])
def test_what_we_lean_on(name, line):
    source = " ".join(inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, name))).split())
    assert line in source, (
        f"GRPOTrainer.{name} of TRL {trl.__version__} no longer says {line!r}, on which arpo_trl leans"
    )


def test_names_we_import():
    from trl.chat_template_utils import (  # noqa: F401
        add_response_schema,
        get_training_chat_template,
        is_chat_template_prefix_preserving,
        parse_response,
        supports_tool_calling,
    )
    from trl.data_utils import is_conversational  # noqa: F401
    from trl.trainer.utils import (  # noqa: F401
        add_fused_lm_head,
        get_config_model_id,
        is_async_callable,
        split_pixel_values_by_grid,
        split_tensor_dict,
        unsplit_pixel_values_by_grid,
    )

    assert "shift_labels" in inspect.getsource(add_fused_lm_head)
    # Without `num_images`, tensors with one entry a row are left whole
    assert split_pixel_values_by_grid({"pixel_values": "as it is"}) == {"pixel_values": "as it is"}

    assert grpo_trainer.GRPOTrainer is GRPOTrainer
    assert {"_tag_names", "_name", "_paper"} <= set(vars(GRPOTrainer))


def test_how_generate_merges_its_configs():
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

    assert list(inspect.signature(GenerationMixin._prepare_generation_config).parameters)[1] == "generation_config"
    assert GenerationConfig._get_default_generation_params()["num_beams"] == 1
    assert PreTrainedModel._is_stateful is False
    assert callable(GenerationMixin._supports_default_dynamic_cache)


@pytest.mark.parametrize(
    "line",
    [
        "self.llm.generate(vllm_prompts, sampling_params=sampling_params, use_tqdm=False)",
        "self.vllm_client.generate( prompts=ordered_set_of_prompt_ids, features=features, **sampling_params )",
        '"max_tokens": max_completion_length',
        '"logprobs": self.logprobs',
        '"generation_kwargs": self.generation_kwargs',
        'row["multi_modal_data"] = {"image": img_list if len(img_list) > 1 else img_list[0]}',
        "generation_kwargs.update(self.generation_kwargs)",
        "accelerator.process_index * len(prompts)",
        "return prompt_ids, completion_ids, logprobs, logprob_token_ids",
    ],
)
def test_how_vllm_is_called(line):
    source = " ".join(inspect.getsource(VLLMGeneration.generate).split())
    assert line in source, f"VLLMGeneration.generate of TRL {trl.__version__} no longer says {line!r}"


def test_how_single_segments_ask_vllm():
    """Our requests for single segments say what TRL's for batches say."""
    asked = inspect.getsource(VLLMGeneration.generate)
    for name in ("repetition_penalty", "temperature", "top_p", "top_k"):
        assert f'"{name}": {name},' in asked and f"{name} = self.{name}" in asked
    for line in (
        '"min_p": 0.0 if min_p is None else min_p',
        "StructuredOutputsParams(regex=self.structured_outputs_regex)",
        'if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:',
        'self.llm.wake_up(tags=["kv_cache"])',
        "self.llm.sleep(level=2)",
        "self._llm_weights_sleeping = True",
    ):
        assert line in asked, f"VLLMGeneration.generate of TRL {trl.__version__} no longer says {line!r}"
    sent = inspect.getsource(VLLMClient.generate)
    for line in (
        '"model": self.model,',
        '"prompt": prompts,',
        '"return_token_ids": True,',
        '"return_tokens_as_token_ids": True,',
        '"structured_outputs"] = {"regex": structured_outputs_regex}',
        'f"{self.base_url}/v1/completions"',
        'choice["token_ids"]',
        'parse_logprobs([choice["logprobs"] for choice in choices])',
    ):
        assert line in sent, f"VLLMClient.generate of TRL {trl.__version__} no longer says {line!r}"
    assert list(inspect.signature(parse_logprobs).parameters) == ["choices_logprobs"]
    assert list(inspect.signature(extract_logprobs).parameters) == ["all_outputs"]


def test_names_of_the_vllm_client():
    assert {"self.session", "self.base_url"} <= set(inspect.getsource(VLLMClient.__init__).split())
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert {"max_tokens", "logprobs"} <= set(inspect.signature(VLLMClient.generate).parameters)
    # What decides whether a segment may come in parts
    init = inspect.getsource(VLLMGeneration.__init__)
    for name in ("structured_outputs_regex", "enable_sleep_mode", "generation_kwargs"):
        assert f"self.{name} = " in init, name


def test_constructor_arguments_are_the_same():
    from arpo_trl import ARPOTrainer

    own = [*inspect.signature(GRPOTrainer).parameters, "branch_rule"]
    assert list(inspect.signature(ARPOTrainer).parameters) == own


@pytest.mark.parametrize("installed", ["0.29.0", "1.14.2", "1.17.0", "2.0.0.dev0", None])
def test_another_trl_is_refused_in_one_sentence_that_says_what_is_supported(monkeypatch, installed):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError) as error:
        runpy.run_path(arpo_trl.__file__)
    has = "none is" if installed is None else f"{installed} is"
    need = "needs TRL 1.15 or 1.16" if installed is None else "supports TRL 1.15 and 1.16"
    assert str(error.value) == f"arpo_trl {need}, and {has} installed: pip install 'trl>=1.15,<1.17'"


@pytest.mark.parametrize("installed", ["1.15.0", "1.16.3", "1.16.0.dev0"])
def test_supported_versions_are_taken(monkeypatch, installed):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    assert runpy.run_path(arpo_trl.__file__)["__version__"] == arpo_trl.__version__
