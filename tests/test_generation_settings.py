"""No setting of a checkpoint's own generation config changes a rollout without a word."""

import json
import logging

import pytest
import tiny
import torch
from datasets import Dataset
from test_prefix_cache import GREEDY, Rollout, build_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
)

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.evaluation import Agent
from arpo_trl.rollout.engines import generation_settings, prefix_cache
from arpo_trl.rollout.engines.generation_settings import (
    NO_LIMIT,
    context_length,
    followed_settings,
    refuse_unfit_settings,
    tell_settings,
    unfit_settings,
    without_unfit_settings,
)
from arpo_trl.rollout.engines.prefix_cache import cache_obstacle
from arpo_trl.viewer.records import read_file

# With these the cache steps aside
ANEW = {
    "use_cache": False,
    "cache_implementation": "static",
    "prefill_chunk_size": 4,
}
# These are left out of rollouts
UNFIT = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "stop_strings": ["x"],
    "token_healing": True,
}
# These are followed
FOLLOWED = {
    "repetition_penalty": 1.7,
    "encoder_repetition_penalty": 1.7,
    "min_length": 30,
    "min_new_tokens": 7,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [6, 7]],
    "suppress_tokens": list(range(2, 20)),
    "begin_suppress_tokens": list(range(2, 40)),
    "sequence_bias": [[[9], 5.0]],
    "forced_bos_token_id": 4,
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": (3, 2.0),
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 3.0},
    "remove_invalid_values": True,
    "max_time": 1000.0,
}
# And these are the handed config's, or change nothing
SILENT = {"max_length": 3, "renormalize_logits": True, "early_stopping": True, "length_penalty": 2.0}


def checkpoint(**settings):
    model = build_model("qwen3")
    sequences = settings.pop("num_return_sequences", None)  # a file may hold what the constructor refuses
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1, **settings)
    model.generation_config.num_return_sequences = sequences
    return model


def waves(model, config=GREEDY):
    """Three waves, each held to plain `generate`; what they sampled, and the tokens read for it."""
    rollout = Rollout(model, generation_config=config)
    contexts = [rollout.tokens(20 + extra) for extra in (0, 3, 9) for _ in range(2)]
    sampled, tokens = [], 0
    with without_unfit_settings(model):
        for _ in range(3):
            outputs, count, _ = rollout.wave(contexts)
            sampled.append(outputs)
            tokens += count
            contexts = rollout.next_contexts(contexts, outputs)
    return sampled, tokens


@pytest.mark.parametrize("name", {**ANEW, **UNFIT, **FOLLOWED, **SILENT})
@pytest.mark.parametrize("handed", [False, True], ids=["checkpoint", "handed"])
def test_a_rollout_with_the_cache_samples_what_generate_samples(name, handed):
    value = {**ANEW, **UNFIT, **FOLLOWED, **SILENT}[name]
    if handed and name in (*UNFIT, *SILENT):
        pytest.skip("refused at construction, or without effect")
    settings = {name: value}
    config = GenerationConfig(**{**GREEDY.to_diff_dict(), **settings}) if handed else GREEDY
    _, tokens = waves(checkpoint(**({} if handed else settings)), config)
    assert (tokens == 0) == (name in ANEW)


@pytest.mark.parametrize("name", [*UNFIT, *SILENT, *ANEW])
def test_what_no_rollout_can_have_is_left_out_and_comes_back(name):
    model = checkpoint(**{name: {**UNFIT, **SILENT, **ANEW}[name]})
    before = model.generation_config.to_dict()
    assert waves(model)[0] == waves(checkpoint())[0]
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("eos", [[1, 7], [30, 31, 32, 33, 34, 35]])
def test_several_ends(eos):
    model = build_model("qwen3")
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=eos)
    waves(model, GenerationConfig(do_sample=False, max_new_tokens=9))


def test_every_setting_of_generate_has_been_thought_of():
    known = {*generation_settings._UNFIT, *generation_settings._SILENT, *FOLLOWED}
    # What ARPOConfig and Agent always decide themselves, and kinds of sampling that greedy decoding does not see
    known |= {
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
    }
    assert {name for name in vars(GenerationConfig()) if name[0] != "_"} <= known


def test_what_changes_the_samples_is_told_once(caplog):
    model = checkpoint(suppress_tokens=[3, 4], num_beams=4, min_p=0.05, max_length=99)
    assert unfit_settings(vars(model.generation_config)) == {"num_beams": 4}
    assert followed_settings(model, GREEDY) == {"suppress_tokens": [3, 4], "min_p": 0.05}
    assert followed_settings(model, GenerationConfig(min_p=0.0, suppress_tokens=[])) == {}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tell_settings(model, GREEDY)
    first, second = [record.message for record in caplog.records if record.name == generation_settings.__name__]
    assert "num_beams=4. Rollouts leave that out" in first
    assert "suppress_tokens=[3, 4]" in second and "Rollouts follow that" in second
    caplog.clear()
    neutral = checkpoint(num_beams=1, min_length=0, typical_p=1.0, guidance_scale=1.0)
    assert unfit_settings(vars(neutral.generation_config)) == followed_settings(neutral, GREEDY) == {}


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "stop_strings"])
def test_a_users_own_setting_that_no_rollout_can_have_is_refused(name):
    with pytest.raises(ValueError, match=f"`generation_kwargs` holds {name}="):
        refuse_unfit_settings({name: UNFIT[name], "max_new_tokens": 5})
    refuse_unfit_settings({"num_beams": 1, "use_cache": False, "suppress_tokens": [1]})


def test_the_trainer_refuses_it_before_a_model_is_loaded(tmp_path):
    args = ARPOConfig(str(tmp_path), generation_kwargs={"num_beams": 4}, use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="`generation_kwargs` holds num_beams=4"):
        ARPOTrainer("no-such/model", lambda completions, **kwargs: [0.0], args, tools=[tiny.add])


@pytest.fixture
def use_cache_false(agent_dirs, tmp_path):
    """A checkpoint without a generation config, whose config says what many fine-tuned ones say."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    (folder / "generation_config.json").unlink()
    return str(folder)


def train(model, tokenizer, folder, **settings):
    args = ARPOConfig(
        str(folder),
        **{
            "num_generations": 4,
            "num_initial_generations": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 60,
            "max_steps": 1,
            "learning_rate": 0.0,
            "generation_kwargs": {"do_sample": False},
            "log_rollouts": True,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    trainer = ARPOTrainer(
        model,
        lambda completions, **kwargs: [0.0] * len(completions),
        args,
        Dataset.from_list([{"prompt": tiny.question(1, 3)}] * 4),
        processing_class=tokenizer,
        tools=[tiny.add],
    )
    trainer.train()
    rows, _ = read_file(folder / "rollouts" / "step-000000.jsonl.gz")
    return [row["completion_ids"] for row in rows]


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_a_checkpoints_settings_do_not_change_a_training_rollout(
    settings, agent_dirs, use_cache_false, tokenizer, tmp_path
):
    right = train(agent_dirs["chat_template"], tokenizer, tmp_path / "right", prefix_sharing=False)
    if settings:
        model = AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"])
        model.generation_config.update(**settings)
    else:
        model = AutoModelForCausalLM.from_pretrained(use_cache_false)
        assert model.generation_config.use_cache is False
    assert train(model, tokenizer, tmp_path / "out") == right


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_nor_an_evaluation(settings, agent_dirs, use_cache_false, tokenizer):
    def answers(model):
        agent = Agent(model, tokenizer, [tiny.add], max_completion_length=60, temperature=0)
        try:
            return [row.completion_ids for row in agent.rollout([tiny.question(a, 3) for a in range(3)])]
        finally:
            agent.close()

    model = AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"] if settings else use_cache_false)
    model.generation_config.update(**settings)
    assert answers(model) == answers(AutoModelForCausalLM.from_pretrained(agent_dirs["chat_template"]))


SMALL = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@pytest.mark.parametrize(
    "config, length",
    [
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=78), 78),
        (LlamaConfig(max_position_embeddings=79), 79),
        (BloomConfig(), NO_LIMIT),
        (BloomConfig(seq_length=80), 80),
        (MambaConfig(), NO_LIMIT),
    ],
)
def test_the_context_window_by_the_configs_own_name(config, length):
    assert context_length(config) == length


def test_models_without_learnt_positions():
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL)).eval()
    assert waves(bloom)[1] > 0, "their keys and values are kept as others are"
    mamba = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, **SMALL)).eval()
    assert waves(mamba)[1] == 0, "a state has no prefixes"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_rotated_by_the_length_are_read_anew(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_parameters=rope,
        **SMALL,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    assert "rotates" in cache_obstacle(model, GREEDY)
    waves(model)


def test_the_reason_why_contexts_are_read_anew_is_told_once(caplog):
    prefix_cache.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        waves(checkpoint(use_cache=False))
    assert caplog.messages == [
        "Rollouts read every context anew, because the generation config sets `use_cache=False`."
    ]
