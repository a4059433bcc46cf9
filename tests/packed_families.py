"""
Tiny configs of every family whose rows may share prefixes, by model type. `tests/test_prefix_families.py` holds each
to row by row, and `docs/models.md` lists them from here.
"""

import copy

import torch
import transformers as tf
from trl.trainer.utils import add_fused_lm_head

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**SHAPE, "head_dim": 8}
FOUR = {**HEADS, "num_hidden_layers": 4}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
WINDOWS = {"sliding_window": 6, "layer_types": [SLIDING, FULL]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED_EXPERT = {"shared_expert_intermediate_size": 16}
DELTA_NET = {
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONVOLUTIONS = {**SHAPE, "num_hidden_layers": 4, "layer_types": ["conv", "conv", FULL, "conv"]}
MAMBA = {
    **{"mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16},
    **{"mamba_d_head": 16, "mamba_expand": 2},
}
NEMOTRON = {
    **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"moe_shared_expert_intermediate_size": 16, "layers_block_type": [LINEAR, "mlp", FULL, LINEAR, "moe", LINEAR]},
}
GEMMA4 = {
    **{"layer_types": [SLIDING, FULL, SLIDING, FULL], "num_kv_shared_layers": 2, "sliding_window": 6},
    **{"global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40},
}

# The vision towers, which rows of text do not use
TOWER = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
ONE_LAYER = {**TOWER, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_TOWER = {**TOWER, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
IMAGES = {"image_token_id": 38, "video_token_id": 39}


def with_sections(text: tf.PreTrainedConfig | dict, sections: list[int]) -> dict:
    """A text config whose rotary embedding has sections for time, height and width."""
    text = text if isinstance(text, dict) else text.to_dict()
    rope = {"rope_type": "default", "rope_theta": 1e4, **(text.get("rope_parameters") or {})}
    return {**text, "rope_parameters": {**rope, "mrope_section": sections}}


FAMILIES = {
    "cohere2": tf.Cohere2Config(**SHAPE, **WINDOWS),
    "gemma": tf.GemmaConfig(**HEADS),
    "gemma2": tf.Gemma2Config(
        **HEADS, **WINDOWS, attn_logit_softcapping=3.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8
    ),
    "gemma3_text": tf.Gemma3TextConfig(**HEADS, **WINDOWS),
    "gemma4_text": tf.Gemma4TextConfig(**FOUR, **GEMMA4),
    "glm4": tf.Glm4Config(**HEADS),
    "glm4_moe": tf.Glm4MoeConfig(
        **HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1
    ),
    "gpt_oss": tf.GptOssConfig(**HEADS, **WINDOWS, **LOCAL_EXPERTS),
    "granite": tf.GraniteConfig(**SHAPE),
    "llama": tf.LlamaConfig(**SHAPE),
    "ministral": tf.MinistralConfig(**HEADS, **WINDOWS),
    "ministral3": tf.Ministral3Config(**HEADS, sliding_window=6),
    "mistral": tf.MistralConfig(**HEADS, sliding_window=6),
    "mixtral": tf.MixtralConfig(**SHAPE, **LOCAL_EXPERTS),
    "olmo2": tf.Olmo2Config(**SHAPE),
    "olmo3": tf.Olmo3Config(**SHAPE, **WINDOWS),
    "olmoe": tf.OlmoeConfig(**SHAPE, **LOCAL_EXPERTS | {"num_experts": 4}),
    "phi3": tf.Phi3Config(**SHAPE, sliding_window=6),
    "qwen2": tf.Qwen2Config(**SHAPE),
    "qwen2_moe": tf.Qwen2MoeConfig(**SHAPE, **EXPERTS, **SHARED_EXPERT),
    "qwen3": tf.Qwen3Config(**HEADS),
    "qwen3_moe": tf.Qwen3MoeConfig(**HEADS, **EXPERTS, decoder_sparse_step=1),
    "smollm3": tf.SmolLM3Config(**SHAPE),
    # With states
    "bamba": tf.BambaConfig(**SHAPE, **MAMBA, attn_layer_indices=[1]),
    "falcon_h1": tf.FalconH1Config(**HEADS, **MAMBA | {"mamba_d_head": 8}, mamba_d_ssm=32),
    "granitemoehybrid": tf.GraniteMoeHybridConfig(
        **SHAPE, **MAMBA, **LOCAL_EXPERTS, layer_types=["mamba", "attention"], shared_intermediate_size=24
    ),
    "lfm2": tf.Lfm2Config(**CONVOLUTIONS, block_auto_adjust_ff_dim=False),
    "lfm2_moe": tf.Lfm2MoeConfig(**CONVOLUTIONS, **EXPERTS, num_dense_layers=1),
    "nemotron_h": tf.NemotronHConfig(**{**HEADS, "num_hidden_layers": None}, **NEMOTRON),
    "olmo_hybrid": tf.OlmoHybridConfig(**SHAPE, **DELTA_NET | {"layer_types": [LINEAR, FULL]}),
    "qwen3_5_moe_text": tf.Qwen3_5MoeTextConfig(**FOUR, **DELTA_NET, **EXPERTS, **SHARED_EXPERT),
    "qwen3_5_text": tf.Qwen3_5TextConfig(**FOUR, **DELTA_NET),
    "qwen3_next": tf.Qwen3NextConfig(**FOUR, **DELTA_NET, **EXPERTS, **SHARED_EXPERT),
}
FAMILIES |= {
    "gemma3": tf.Gemma3Config(
        text_config=FAMILIES["gemma3_text"].to_dict(),
        vision_config={**ONE_LAYER, "image_size": 16},
        mm_tokens_per_image=4,
        **{"image_token_index": 39, "boi_token_index": 38, "eoi_token_index": 37},
    ),
    "gemma4": tf.Gemma4Config(
        text_config=FAMILIES["gemma4_text"].to_dict(),
        vision_config={**ONE_LAYER, "num_key_value_heads": 2, "head_dim": 8},
        audio_config=None,
        audio_token_id=37,
        **IMAGES,
    ),
    "mistral3": tf.Mistral3Config(
        text_config=FAMILIES["mistral"].to_dict(),
        vision_config={"model_type": "pixtral", **ONE_LAYER, "image_size": 16, "head_dim": 8},
        image_token_index=39,
    ),
    "qwen2_5_vl": tf.Qwen2_5_VLConfig(text_config=with_sections(SHAPE, [2, 1, 1]), vision_config=QWEN_TOWER, **IMAGES),
    "qwen3_5": tf.Qwen3_5Config(
        text_config=with_sections(FAMILIES["qwen3_5_text"], [1, 1, 0]), vision_config=QWEN_TOWER, **IMAGES
    ),
    "qwen3_5_moe": tf.Qwen3_5MoeConfig(
        text_config=with_sections(FAMILIES["qwen3_5_moe_text"], [1, 1, 0]), vision_config=QWEN_TOWER, **IMAGES
    ),
    "qwen3_vl": tf.Qwen3VLConfig(
        text_config=with_sections(HEADS, [2, 1, 1]),
        vision_config={**QWEN_TOWER, "deepstack_visual_indexes": []},
        **IMAGES,
    ),
    "qwen3_vl_moe": tf.Qwen3VLMoeConfig(
        text_config=with_sections({**HEADS, **EXPERTS}, [2, 1, 1]),
        vision_config={**QWEN_TOWER, "deepstack_visual_indexes": []},
        **IMAGES,
    ),
}

EAGER = frozenset({"gemma2", "gpt_oss"})
"""Families that have no other attention on a CPU: their scores are soft-capped, or have sinks."""

LOAD_BALANCED = sorted(
    family
    for family, config in FAMILIES.items()
    if hasattr(config.get_text_config(), "output_router_logits") and hasattr(config.get_text_config(), "num_experts")
)
"""Families whose load-balancing loss TRL computes."""


def config_of(family: str, **settings):
    """A copy of a family's config; `settings` are of its text part."""
    config = copy.deepcopy(FAMILIES[family])
    for name, value in settings.items():
        setattr(config.get_text_config(), name, value)
    if "tie_word_embeddings" in settings:
        config.tie_word_embeddings = settings["tie_word_embeddings"]
    return config


def build(config, attention: str = "sdpa", dtype: torch.dtype = torch.float32, temperature: float = 0.7, std=None):
    """
    A model with TRL's fused head.

    Args:
        std (`float`, *optional*): Of its weights; by default that of the family's own initialisation.
    """
    torch.manual_seed(0)
    multimodal = config.get_text_config() is not config
    auto = tf.AutoModelForImageTextToText if multimodal else tf.AutoModelForCausalLM
    # Experts one by one: the grouped kernel has no float64
    model = auto.from_config(
        copy.deepcopy(config), attn_implementation=attention, experts_implementation="eager", dtype=dtype
    )
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
        elif std is not None and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    return model


def build_family(family: str, std: float | None = None, **settings):
    return build(config_of(family, **settings), "eager" if family in EAGER else "sdpa", std=std)
