"""TRL's colocated engine: training steps with forks, what the engine tells of its samples, its prefix cache."""

import pytest
import tiny
import torch
import world
from peft import LoraConfig

from arpo_trl.evaluation import Agent

ADAPTER = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module", params=["chat_template", "tags", "tags with an adapter"])
def trained(request, agents, colocated, tmp_path_factory):
    """A trainer after two steps, and the checkpoint it began with."""
    protocol, _, adapter = request.param.partition(" ")
    folder = tmp_path_factory.mktemp(protocol)
    settings = {"rollout_schedule": "waves"} if adapter else {}
    trainer = world.trainer(folder, agents[protocol], protocol, ADAPTER if adapter else None, **settings)
    assert trainer._schedule == settings.get("rollout_schedule", "continuous")
    trainer.train()
    return trainer, agents[protocol]


def test_steps_with_forks_sample_from_the_present_policy(trained):
    trainer, _ = trained
    steps = [world.records(trainer.args.output_dir, step) for step in range(2)]
    world.check_two_steps(trainer.state.log_history, steps)


def test_logprobs_and_limits_of_rows_that_share_prefixes(trained):
    trainer, checkpoint = trained
    row = world.records(trainer.args.output_dir, 0)[0]
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    contexts = [prompt, prompt, prompt + completion[:12], prompt + completion[:25], prompt[:-4], *world.STRANGE]
    samples = world.check_samples(trainer, checkpoint, contexts, [3, 40, 7, 60, 1] + [20] * 8)
    assert [len(samples[index].ids) for index in (0, 4)] == [3, 1], "each row has a limit of its own"


def test_segments_that_come_one_by_one(trained):
    trainer, checkpoint = trained
    row = world.records(trainer.args.output_dir, 0)[0]
    contexts = [row["prompt_ids"], row["prompt_ids"], row["prompt_ids"] + row["completion_ids"][:12], *world.STRANGE]
    samples = world.check_samples(trainer, checkpoint, contexts, [3, 40, 7] + [20] * 8, by_stream=True)
    assert len(samples[0].ids) == 3
    assert not trainer.vllm_generation.llm.llm_engine.has_unfinished_requests(), "the one given up is not sampled"


def test_an_engine_that_sleeps_is_woken_once_a_rollout(trained, monkeypatch):
    """Sleep mode needs a GPU; here the engine is told, and stays awake."""
    trainer, _ = trained
    generation, told = trainer.vllm_generation, []
    monkeypatch.setattr(generation, "enable_sleep_mode", True)
    monkeypatch.setattr(generation, "_llm_weights_sleeping", True)
    monkeypatch.setattr(generation.llm, "wake_up", lambda tags: told.append(tags))
    monkeypatch.setattr(generation.llm, "sleep", lambda level: told.append(level))
    with trainer._engine.rollout(), trainer._engine.stream() as stream:
        for _ in range(2):
            future = stream.start(world.STRANGE[0], 3)
            while stream.step(list):
                pass
            assert future.done()
    assert told == [["weights"], ["kv_cache"], 2] and generation._llm_weights_sleeping


def test_a_stop_string_ends_a_row_and_belongs_to_it(trained):
    trainer, checkpoint = trained
    if trainer.args.tool_protocol != "tags":
        pytest.skip("the chat template has no stop strings")
    prompts = [
        trainer.processing_class.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        for row in world.ROWS
    ]
    contexts = prompts + world.STRANGE
    samples = world.check_samples(trainer, checkpoint, contexts, [60] * len(contexts))
    texts = [trainer.processing_class.decode(sample.ids) for sample in samples]
    stopped = [sample for sample, text in zip(samples, texts, strict=True) if "</add>" in text]
    assert len(stopped) > 5, texts
    for sample in stopped:
        assert "</add>" not in trainer.processing_class.decode(sample.ids[:-1]), "nothing was sampled after it"


def test_a_stop_string_may_be_a_special_token(trained, monkeypatch):
    trainer, _ = trained
    start = trainer.processing_class.convert_tokens_to_ids("<|im_start|>")
    monkeypatch.setattr(trainer._protocol, "stop_strings", ["<|im_start|>"])
    monkeypatch.setattr(trainer.vllm_generation, "generation_kwargs", {"logit_bias": {start: 100.0}})
    assert [sample.ids for sample in trainer._engine.sample(world.STRANGE, [20] * 8)] == [[start]] * 8


def test_the_error_of_the_entropy_falls_with_k(trained, monkeypatch):
    trainer, _ = trained
    trainer.model.eval()
    # One token after each context, whose distribution does not depend on what is sampled
    contexts = [context[:length] for context in world.STRANGE for length in range(1, 21)]
    errors = {}
    for top_k in (1, 5, 20):
        monkeypatch.setattr(trainer._engine, "top_k", top_k)
        samples = trainer._engine.sample(contexts, [1] * len(contexts))
        errors[top_k] = torch.cat(
            [
                world.entropy_errors(world.exact(trainer.model, context, sample.ids), sample.entropies, top_k)
                for context, sample in zip(contexts, samples, strict=True)
            ]
        ).mean()
    print({top_k: f"{error:.5f}" for top_k, error in errors.items()})
    assert errors[20] < 0.05 and errors[20] < errors[5] < errors[1]


def test_the_prefix_cache_is_counted_and_logged(trained):
    trainer, _ = trained
    if trainer.args.tool_protocol == "chat_template":  # prompts of the other are shorter than a block of the cache
        rates = [log["arpo/prefix_cache_hit_rate"] for log in trainer.state.log_history if "loss" in log]
        assert all(0.3 < rate < 1 for rate in rates), rates
    trainer.vllm_generation.llm.reset_prefix_cache()
    trainer._engine.lookups.clear()
    trainer._engine.sample([list(range(10, 310))] * 4, [1] * 4)
    # The first row fills two blocks of 128 tokens, which the other three find
    assert trainer._engine.lookups == {"prefix_cache_queries": 4 * 300, "prefix_cache_hits": 3 * 256}


def test_evaluation_on_the_engine_is_that_on_transformers(trained):
    trainer, _ = trained
    trainer.model.eval()
    trainer._engine.sample([[5]], [1])  # brings the engine up to date
    rollouts = []
    for model in (trainer.vllm_generation.llm, trainer.model):
        agent = Agent(
            model,
            trainer.processing_class,
            [tiny.add],
            tool_protocol=trainer.args.tool_protocol,
            max_completion_length=world.LONGEST,
            temperature=0.0,
        )
        rollouts.append(agent.rollout([row["prompt"] for row in world.ROWS]))
        agent.close()
    engine, transformers = ([row.completion_ids for row in rows] for rows in rollouts)
    assert engine == transformers
    assert any(row.calls for row in rollouts[0])


def test_likely_tokens_are_told_where_entropy_is_read(trained, monkeypatch):
    trainer, checkpoint = trained
    llm, asked = trainer.vllm_generation.llm, []
    generate = type(llm).generate

    def counted(self, prompts, sampling_params, **settings):
        asked.append([(each.max_tokens, each.logprobs) for each in sampling_params])
        return generate(self, prompts, sampling_params=sampling_params, **settings)

    monkeypatch.setattr(type(llm), "generate", counted)
    samples = world.check_samples(trainer, checkpoint, world.STRANGE, [60] * 8)
    assert asked[0] == [(21, 20)] * 8 and all(top_k == 0 for part in asked[1:] for _, top_k in part)
    assert len(asked[1]) == len([sample for sample in samples if len(sample.ids) > 20]) > 0
    # GRPO is asked as TRL asks, in one part
    monkeypatch.setattr(trainer, "_branches", False)
    asked.clear()
    world.check_samples(trainer, checkpoint, world.STRANGE, [60] * 8)
    assert asked == [[(60, 20)] * 8]


def test_an_evaluation_gives_the_engine_everything_at_once(trained, monkeypatch):
    trainer, _ = trained
    llm, asked = trainer.vllm_generation.llm, []
    generate = type(llm).generate
    monkeypatch.setattr(
        type(llm), "generate", lambda self, prompts, **kw: asked.append(len(prompts)) or generate(self, prompts, **kw)
    )
    agent = Agent(llm, trainer.processing_class, tool_protocol=trainer.args.tool_protocol, max_completion_length=5)
    assert len(agent.rollout(["one"] * 70)) == 70 and asked == [70]
    agent.close()


def test_more_tokens_a_position_than_the_engine_tells_are_refused(agents, colocated, tmp_path):
    with pytest.raises(
        ValueError, match="`vllm_entropy_top_k` is 21, but a colocated vLLM engine tells no more than 20"
    ):
        world.trainer(tmp_path, agents["tags"], "tags", vllm_entropy_top_k=21)
