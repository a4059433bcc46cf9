"""Tiny models with every kind of cache layer, built on the spot: the shapes of today's hybrid checkpoints."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FalconH1Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
)

TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def configs(hidden: int = 32, vocab: int = 50, window: int = 8, **settings):
    """
    A config of each shape.

    Args:
        hidden (`int`): Hidden size, a multiple of 32.
        vocab (`int`): Tokens.
        window (`int`): Tokens of a sliding window.
    """
    heads, kv_heads, head_dim = 4, 2, max(hidden // 8, 8)
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **TOKENS,
        **settings,
    }
    without_head_dim = {name: value for name, value in shape.items() if name != "head_dim"}
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mamba = {
        "mamba_num_heads": 4,
        "mamba_head_dim": hidden // 4,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
    }
    linear, full, sliding = "linear_attention", "full_attention", "sliding_attention"
    return {
        "qwen3_5": Qwen3_5TextConfig(
            **shape,
            num_hidden_layers=4,
            layer_types=[linear, linear, linear, full],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=head_dim,
            linear_value_head_dim=head_dim,
        ),
        "gemma4": Gemma4TextConfig(
            **shape,
            num_hidden_layers=4,
            layer_types=[sliding, full, sliding, full],
            num_kv_shared_layers=2,
            sliding_window=window,
            global_head_dim=head_dim,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=vocab,
        ),
        "gpt_oss": GptOssConfig(
            **shape, num_hidden_layers=4, layer_types=[sliding, full] * 2, sliding_window=window, **mixture
        ),
        "lfm2": Lfm2Config(
            **without_head_dim,
            num_hidden_layers=4,
            layer_types=["conv", "conv", full, "conv"],
            block_auto_adjust_ff_dim=False,
        ),
        "nemotron_h": NemotronHConfig(
            **shape, layers_block_type=[linear, "mlp", full, linear, "moe", linear], n_routed_experts=4,
            moe_intermediate_size=hidden, moe_shared_expert_intermediate_size=hidden, **mamba,
        ),
        "falcon_h1": FalconH1Config(
            **shape, num_hidden_layers=2, mamba_d_ssm=hidden, mamba_n_heads=4, mamba_d_head=hidden // 4,
            mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=16,
        ),
        "llama4": Llama4TextConfig(
            **shape,
            num_hidden_layers=4,
            intermediate_size_mlp=hidden,
            attention_chunk_size=window,
            num_local_experts=2,
        ),
        "gemma3": Gemma3TextConfig(
            **shape, num_hidden_layers=2, layer_types=[sliding, full], sliding_window=window
        ),
        "mistral": MistralConfig(**shape, num_hidden_layers=2, sliding_window=window),
    }  # fmt: skip


def multimodal_configs(**settings):
    """The checkpoints that ship with a vision tower; their rows are text here."""
    texts = configs(**settings)
    tower = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 4}
    qwen = texts["qwen3_5"].to_dict()
    qwen["rope_parameters"]["mrope_section"] = [1, 1, 0]
    return {
        "qwen3_5_vision": Qwen3_5Config(
            text_config=qwen,
            vision_config={**tower, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16},
            image_token_id=48,
            video_token_id=49,
        ),
        "gemma4_vision": Gemma4Config(
            text_config=texts["gemma4"].to_dict(),
            vision_config={
                **tower,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
            },
            audio_config=None,
            image_token_id=48,
            video_token_id=47,
            audio_token_id=49,
        ),
    }


def build(family: str, **settings):
    """A model of one shape, with weights large enough that every layer changes what is sampled."""
    torch.manual_seed(0)
    if family.endswith("_vision"):
        model = AutoModelForImageTextToText.from_config(multimodal_configs(**settings)[family]).eval()
    else:
        model = AutoModelForCausalLM.from_config(configs(**settings)[family]).eval()
    if "initializer_range" not in settings:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model
