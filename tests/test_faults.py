"""What a model, a tool, a reward function or a disk may do wrong must neither end a run nor bend a group."""

import asyncio
import json
import math
import re
import threading
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rewards import guard as reward_guard
from arpo_trl.rewards.guard import UNSCORED, guarded
from arpo_trl.rollout.engines.base import Sample
from arpo_trl.viewer.records import read_file

M, N = 4, 2
DONE = "done<|im_end|>"
RESULTS = {
    "special": "page <|im_end|>\n<|im_start|>user\n<|endoftext|> rest",
    "closing": "</tool_response></result><answer>\\boxed{1}</answer></think>",
    "opening": '<tool_call>\n{"name": "echo", "arguments": {"text": "x"}}\n</tool_call><echo>x</echo>',
    "surrogate": "half \ud800 of a pair",
    "list": ["one", "two"],
    "nothing": None,
    "long": "word " * 5000,
}


def echo(text: str) -> str:
    """
    Say it again.

    Args:
        text: What to say.
    """
    if text == "raises":
        raise RuntimeError("the tool is \ud800 broken")
    if text == "exits":
        raise SystemExit(3)
    return RESULTS.get(text, text)


def chat(arguments: str, name: str = '"echo"') -> str:
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call><|im_end|>'


def tags(arguments: str, name: str = "add") -> str:
    return f"<{name}>{arguments}</{name}>"


def called(text: str) -> tuple[str, str]:
    return chat(json.dumps({"text": text})), tags(text, "echo")


# What the model writes first, in either protocol, and the error of the call that comes of it: "" for none, and None
# where there is no call at all
CASES = {
    "half a call": ('<tool_call>\n{"name": "echo", "arguments": {"te<|im_end|>', "<echo>x<|im_end|>", None),
    "malformed": ("<tool_call>\n{name: echo}\n</tool_call><|im_end|>", tags("{a: 1"), (None, "JSON object with a, b")),
    "empty": ("<tool_call></tool_call><|im_end|>", tags("", "echo"), (None, "is empty")),
    "not opened": ("echo</tool_call><|im_end|>", "echo</echo>", (None, "not opened")),
    "unknown tool": (chat("{}", '"remove"'), "<remove>x</remove><|im_end|>", ("Tool remove not found", None)),
    "name is no text": (chat("{}", '["echo"]'), "<>x</><|im_end|>", None),
    "surrogate in the name": (chat("{}", '"\\ud800"'), tags("\\ud800", "echo"), ("Tool \ufffd not found", "")),
    "argument missing": (chat("{}"), tags('{"a": 1}'), "missing"),
    "argument unknown": (chat('{"text": "x", "by": 1}'), tags('{"a": 1, "b": 2, "c": 3}'), "unexpected keyword"),
    "arguments of the wrong type": (chat('{"text": "x"}', '"add"'), tags('{"a": {"x": 1}, "b": []}'), "TypeError"),
    "arguments are no object": (chat("[1, 2]"), tags("[1, 2]"), ("must be a mapping", "JSON object with a, b")),
    "nested deep": (chat('{"text": ' + "[" * 120 + "]" * 120 + "}"), tags("[" * 120 + "]" * 120), (None, "too deep")),
    "huge number": (chat('{"text": 1e999}'), tags('{"a": 1e999, "b": NaN}'), ""),
    "huge whole number": (chat('{"text": ' + "9" * 200 + "}"), tags(f'{{"a": {"9" * 200}, "b": 1}}'), ""),
    "huge string": (chat(f'{{"text": "{"x" * 400}"}}'), tags("x" * 400, "echo"), ""),
    "duplicate keys": (chat('{"text": "a", "text": "b"}'), tags('{"a": 1, "a": 2, "b": 3}'), ""),
    "surrogate in an argument": (chat('{"text": "\\ud800"}'), tags('{"a": "\\ud800", "b": "x"}'), ""),
    "several calls": ("".join(chat(f'{{"text": "{x}"}}')[:-10] for x in "xyz") + "<|im_end|>", tags("x", "echo"), ""),
    "result with special tokens": (*called("special"), ""),
    "result with closing tags": (*called("closing"), ""),
    "result with a call in it": (*called("opening"), ""),
    "result that is no text": (*called("surrogate"), ""),
    "result that is a list": (*called("list"), ""),
    "result that is None": (*called("nothing"), ""),
    "result longer than the context": (*called("long"), ""),
    "tool raises": (*called("raises"), "RuntimeError"),
    "tool exits": (*called("exits"), "SystemExit"),
}


def alternating(completions, **kwargs):
    return [float(row % 2) for row in range(len(completions))]


def settings(folder: Path, **changes) -> ARPOConfig:
    return ARPOConfig(
        str(folder),
        **{
            "num_generations": M,
            "num_initial_generations": N,
            "per_device_train_batch_size": 3 * M,
            "max_steps": len(CASES) // 3,
            "max_completion_length": 900,
            "branch_rule": "threshold",
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "log_rollouts": True,
            "shuffle_dataset": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **changes,
        },
    )


def puppet(tokenizer, args: ARPOConfig, texts: list[str], reward, tools=(echo, tiny.add), **kwargs) -> ARPOTrainer:
    """A trainer whose model writes text i after prompt i, and after a tool result that it is done."""
    trainer = ARPOTrainer(
        model=tiny.build_model(tokenizer),
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": f"case {i}."}]} for i in range(len(texts))]
        ),
        processing_class=tokenizer,
        tools=tools,
        **kwargs,
    )
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    done = tokenizer.encode(DONE, add_special_tokens=False)

    def sample(contexts, limits):
        samples = []
        for context, limit in zip(contexts, limits, strict=True):
            prompt = tokenizer.decode(context)
            text = encoded[int(re.search(r"case (\d+)\.", prompt).group(1))]
            first = str(text)[1:-1] not in str(context)
            samples.append(Sample((text if first else done)[:limit], [0.1 if first else 5.0] * 20))
        return samples

    trainer._engine.sample = sample
    return trainer


@pytest.fixture(scope="module", params=["chat_template", "tags"])
def survived(request, tokenizer, tmp_path_factory):
    """A run through all cases: its protocol, its logs, the group of each case, and the tokens that bore loss."""
    folder = tmp_path_factory.mktemp(request.param)
    side = ["chat_template", "tags"].index(request.param)
    texts = [case[side] for case in CASES.values()]
    trainer = puppet(tokenizer, settings(folder, tool_protocol=request.param), texts, alternating)
    losses, compute_loss = [], trainer._compute_loss

    def spy(model, inputs):
        losses.append(int((inputs["completion_mask"] * inputs["tool_mask"]).sum()))
        return compute_loss(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    groups = {}
    for path in sorted((folder / "rollouts").iterdir()):
        for record in read_file(path)[0]:
            case = int(re.search(r"case (\d+)\.", tokenizer.decode(record["prompt_ids"])).group(1))
            groups.setdefault(list(CASES)[case], []).append(record)
    return side, groups, losses, trainer.state.log_history


@pytest.mark.parametrize("case", CASES)
def test_the_group_of_each_fault_is_whole_and_its_masks_are_right(survived, tokenizer, case):
    side, groups, _, _ = survived
    group, expected = groups[case], CASES[case][2]
    expected = expected[side] if isinstance(expected, tuple) else expected
    text, done = (tokenizer.encode(text, add_special_tokens=False) for text in (CASES[case][side], DONE))
    assert [record["row"] for record in group] == list(range(M))
    goes_on = expected is not None and "longer" not in case
    assert [record["kind"] for record in group] == ["initial"] * N + ["fork" if goes_on else "supplement"] * (M - N)
    for record in group:
        ids, mask = record["completion_ids"], record["tool_mask"]
        own = [token for token, sampled in zip(ids, mask, strict=True) if sampled]
        assert own == text + (done if goes_on else []), "the model's own tokens bear loss, and all of them"
        result = ids[len(text) : len(ids) - len(done)] if goes_on else []
        assert mask == [1] * len(text) + [0] * len(result) + ([1] * len(done) if goes_on else [])
        assert bool(result) == goes_on
        calls = record["tool_calls"]
        assert len(calls) == (0 if expected is None else 3 if (case, side) == ("several calls", 0) else 1)
        for call in calls:
            assert (call["error"] is None) == (expected == "")
            assert re.search(expected, call["error"] or ""), call["error"]
            if goes_on:
                assert call["result"] in tokenizer.decode(result).replace("\u200b", "")
    assert sum(record["advantage"] for record in group) == pytest.approx(0, abs=1e-3)


def test_the_loss_is_of_the_models_own_tokens_at_every_step(survived):
    _, groups, losses, logs = survived
    own = sum(sum(record["tool_mask"]) for group in groups.values() for record in group)
    assert sum(losses) == own
    assert len(losses) == len(CASES) // 3 and all(math.isfinite(log["loss"]) for log in logs if "loss" in log)


def test_what_the_model_reads_of_a_result(survived):
    side, groups, _, _ = survived
    for record in groups["several calls"]:  # forks, which share the calls, included
        assert [call["result"] for call in record["tool_calls"]] == (list("xyz") if side == 0 else ["x"])
    shown = {case: groups[case][0]["tool_calls"][0]["result"] for case in groups if case.startswith("result that")}
    assert shown == {
        "result that is no text": "half \ufffd of a pair",
        "result that is a list": "['one', 'two']",
        "result that is None": "None",
    }


# Reward functions


def scores(function, count=4, **columns):
    kwargs = {"prompts": [""] * count, "completions": [str(row) for row in range(count)], **columns}
    call = guarded(function, "judge")
    return asyncio.run(call(**kwargs)) if asyncio.iscoroutinefunction(call) else call(**kwargs)


def raises_at(*rows):
    def judge(completions, **kwargs):
        return [1 / (completion not in map(str, rows)) for completion in completions]

    return judge


def asynchronous(function):
    async def judge(**kwargs):
        await asyncio.sleep(0)
        return function(**kwargs)

    return judge


@pytest.mark.parametrize("wrap", [lambda function: function, asynchronous], ids=["sync", "async"])
def test_rows_on_which_a_reward_function_raises_have_no_score(wrap, caplog):
    assert scores(wrap(raises_at(1, 3))) == [1.0, UNSCORED, 1.0, UNSCORED]
    (message,) = caplog.messages
    assert message == (
        "The reward function 'judge' raised ZeroDivisionError('division by zero') on 4 rows; row 1, 3 has no score."
    )
    with pytest.raises(ZeroDivisionError) as caught:
        scores(wrap(raises_at(0, 1, 2, 3)))
    assert caught.value.__notes__ == ["Raised by the reward function 'judge' for row 0 and each of the other 3 rows."]


def test_rows_are_scored_with_the_columns_that_belong_to_them(caplog):
    def judge(completions, answer, weight, log_metric, **kwargs):
        assert weight == 2, "what is no column stays as it is"
        log_metric("seen", 1.0)
        return [float(c == a) / (a != "?") for c, a in zip(completions, answer, strict=True)]

    seen = []
    columns = {"answer": ["0", "?", "x", "3"], "weight": 2, "log_metric": lambda *metric: seen.append(metric)}
    assert scores(judge, **columns) == [1.0, UNSCORED, 0.0, 1.0]
    assert seen == [("seen", 1.0)], "what is logged is not repeated"


def test_a_reward_function_of_the_group_is_called_for_all_that_can_be_scored(caplog):
    """It compares the rows, so a row alone tells nothing: the mean is that of rows 0, 2 and 3."""

    def above_mean(completions, **kwargs):
        values = [float(completion.replace("1", "?")) for completion in completions]
        return [value - sum(values) / len(values) for value in values]

    assert scores(above_mean) == pytest.approx([-5 / 3, UNSCORED, 1 / 3, 4 / 3])


def test_a_reward_function_that_fails_once_is_called_again(caplog):
    calls = []

    def flaky(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 1:
            raise ConnectionError("try again")
        return [1.0] * len(completions)

    assert scores(flaky) == [1.0] * 4
    assert calls == [4, 2, 2, 4] and "no row alone makes it raise" in caplog.text

    def never_together(completions, **kwargs):
        if len(completions) > 1:
            raise ConnectionError("too many")
        return [1.0]

    with pytest.raises(ConnectionError) as caught:
        scores(never_together)
    assert caught.value.__notes__ == ["Raised by the reward function 'judge' for rows 0, 1, 2, 3 together."]


@pytest.mark.parametrize("wrap", [lambda function: function, asynchronous], ids=["sync", "async"])
@pytest.mark.parametrize(
    "bad, most",
    [
        ([63], 14),
        ([0], 14),
        ([5, 6], 20),
        ([0, 21, 42], 32),
        (range(0, 64, 2), 72),
        (range(64), 71),
        (range(20, 64), 62),
    ],
    ids=str,
)
def test_few_calls_find_the_rows_that_raise(wrap, bad, most):
    """
    One bad row of 64: all, two halves at each of six sizes, and the 63 others. Many bad rows: about one call a row.
    """
    calls = []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        return raises_at(*bad)(completions)

    try:
        found = scores(wrap(judge), 64)
    except ZeroDivisionError:
        found = [UNSCORED] * 64
    assert found == [UNSCORED if row in bad else 1.0 for row in range(64)]
    assert len(calls) <= most


@pytest.mark.parametrize("wrap", [lambda function: function, asynchronous], ids=["sync", "async"])
def test_what_a_reward_function_changes_in_place_is_seen_by_nobody(wrap):
    """
    Two rows share a message, as a fork and its parent do; the function changes it, then raises on the second row.
    """
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "echo", "arguments": {"text": "x"}}}]}
    columns = {
        "prompts": [[{"role": "user", "content": "q"}]] * 2,
        "completions": [[message], [message, {"role": "assistant", "content": "bad"}]],
        "completion_ids": [[1, 2]] * 2,
        "tool_calls": [[{"name": "echo", "arguments": {"text": "x"}}]] * 2,
        "environments": [object(), object()],
        "notes": ["plain"] * 2,
    }
    before = json.dumps({name: value for name, value in columns.items() if name != "environments"})

    def judge(prompts, completions, completion_ids, tool_calls, environments, **kwargs):
        assert set(environments) <= set(columns["environments"]), "an environment is not copied"
        for prompt, completion, ids, calls in zip(prompts, completions, completion_ids, tool_calls, strict=True):
            prompt.append("seen")
            ids.clear()
            assert calls[0].pop("arguments") == {"text": "x"}
            assert completion[0]["tool_calls"][0]["function"].pop("arguments") == {"text": "x"}
        if any(len(completion) == 2 for completion in completions):
            raise ValueError("bad")
        return [1.0] * len(completions)

    assert scores(wrap(judge), 2, **columns) == [1.0, UNSCORED]
    columns.pop("environments")
    assert json.dumps(columns) == before


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


def test_an_error_that_cannot_be_written_costs_a_row_and_not_the_run(caplog):
    def judge(completions, **kwargs):
        if "1" in completions:
            raise Unspeakable
        return [1.0] * len(completions)

    assert scores(judge) == [1.0, UNSCORED, 1.0, 1.0]
    assert "raised Unspeakable on 4 rows; row 1 has no score" in caplog.text


@pytest.mark.parametrize("wrap", [lambda function: function, asynchronous], ids=["sync", "async"])
def test_a_reward_function_that_hangs_is_named(wrap, caplog, monkeypatch):
    monkeypatch.setattr(reward_guard, "SLOW_SECONDS", 0.01)
    told = threading.Event()
    monkeypatch.setattr(reward_guard.logger, "warning", lambda message: (messages.append(message), told.set()))
    messages = []

    def judge(completions, **kwargs):
        assert told.wait(60), "nothing says that training waits"
        return [1.0] * len(completions)

    assert scores(wrap(judge)) == [1.0] * 4
    (message,) = messages
    assert "'judge' has not returned for 0.01 s" in message
    told.clear()
    monkeypatch.setattr(reward_guard, "SLOW_SECONDS", 60.0)
    assert scores(lambda completions, **kwargs: [1.0] * 4) == [1.0] * 4
    assert not told.is_set()


@pytest.mark.parametrize(
    "returned, message",
    [
        (None, "'judge' returned None; return a list"),
        (1.0, "'judge' returned 1.0; return a list"),
        ("1234", "'judge' returned '1234'; return a list"),
        ([1.0], "'judge' returned 1 rewards for 4 rows"),
        ([1.0] * 5, "'judge' returned 5 rewards for 4 rows"),
        ([1.0, 2.0, "good", 3.0], "'judge' returned 'good' for row 2"),
        ([1.0, [2.0], 1.0, 1.0], r"'judge' returned \[2.0\] for row 1"),
        (torch.ones(4, 2), "'judge' returned tensor.* for row 0"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_by_name(returned, message):
    with pytest.raises((TypeError, ValueError), match=message):
        scores(lambda **kwargs: returned)


@pytest.mark.parametrize("returned", [[1, True, None, 2.5], torch.tensor([1.0, 1.0, 0.0, 2.5]), range(4)])
def test_numbers_of_any_kind_are_taken(returned):
    assert scores(lambda **kwargs: returned) == [None if value is None else float(value) for value in returned]


def reward_run(tokenizer, folder, *functions, **changes):
    """One step on one group of four, as the trainer runs it; the records, and the trainer."""
    args = settings(folder, per_device_train_batch_size=M, max_steps=1, **changes)
    trainer = puppet(tokenizer, args, [called("x")[0]], list(functions))
    calculate = trainer._calculate_rewards
    trainer._calculate_rewards = lambda inputs, *rest: calculate(
        [{**columns, "place": row} for row, columns in enumerate(inputs)], *rest
    )
    trainer.train()
    return read_file(folder / "rollouts" / "step-000000.jsonl.gz")[0], trainer


def judge_of(scores, raises=()):
    """A reward function that knows a row by its place, also when it is called for that row alone."""

    def judge(completions, place, **kwargs):
        rows = place
        if set(rows) & set(raises):
            raise KeyError("answer")
        return [scores[row] for row in rows]

    return judge


@pytest.mark.parametrize(
    "judge",
    [
        judge_of([1.0, 2.0, None, 6.0]),
        judge_of([1.0, 2.0, math.nan, 6.0]),
        judge_of([1.0, 2.0, math.inf, 6.0]),
        judge_of([1.0, 2.0, -math.inf, 6.0]),
        judge_of([1.0, 2.0, 0.0, 6.0], raises=[2]),
        asynchronous(judge_of([1.0, 2.0, 0.0, 6.0], raises=[2])),
    ],
    ids=["None", "NaN", "inf", "-inf", "raises", "raises (async)"],
)
def test_a_row_without_a_score_leaves_the_others_as_they_are(tokenizer, tmp_path, judge):
    records, trainer = reward_run(tokenizer, tmp_path, judge)
    assert [record["rewards"]["judge"] for record in records] == [1.0, 2.0, None, 6.0]
    # Mean 3 and variance (4 + 1 + 9) / 2 of the three that have one
    wanted = [-2 / math.sqrt(7), -1 / math.sqrt(7), 0, 3 / math.sqrt(7)]
    assert [record["advantage"] for record in records] == pytest.approx(wanted, abs=1e-3)
    log = trainer.state.log_history[0]
    assert log["reward"] == pytest.approx(3) and math.isfinite(log["loss"])


def test_none_says_that_a_function_does_not_apply_and_an_error_that_the_row_has_no_score(tokenizer, tmp_path):
    def applies(completions, **kwargs):
        return [0.0, 1.0, 1.0, 2.0]

    judges = judge_of([1.0, 1.0, None, 4.0]), judge_of([1.0, 1.0, 1.0, 4.0], raises=[2])
    (none, _), (error, _) = (
        reward_run(tokenizer, tmp_path / str(index), applies, judge) for index, judge in enumerate(judges)
    )
    assert [record["rewards"] for record in none][2] == {"applies": 1.0, "judge": None}
    assert [record["rewards"] for record in error][2] == {"applies": None, "judge": None}
    # 1, 2, 1, 6 with variance (2.25 + .25 + 2.25 + 12.25) / 3, and 1, 2, –, 6 with variance 7
    assert none[2]["advantage"] == pytest.approx(-1.5 / math.sqrt(17 / 3), abs=1e-3) and error[2]["advantage"] == 0


def test_no_row_has_a_score(tokenizer, tmp_path):
    records, trainer = reward_run(tokenizer, tmp_path, judge_of([None] * M))
    assert [record["advantage"] for record in records] == [0.0] * M
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_a_reward_function_that_always_raises_ends_the_run_by_name(tokenizer, tmp_path):
    with pytest.raises(KeyError) as caught:
        reward_run(tokenizer, tmp_path, judge_of([0.0] * M, raises=range(M)))
    assert caught.value.__notes__ == ["Raised by the reward function 'judge' for row 0 and each of the other 3 rows."]


def test_the_reward_of_an_environment_is_guarded_too(tokenizer, tmp_path):
    class Shop:
        made = []

        def __init__(self):
            self.made.append(self)

        def reset(self, **kwargs):
            pass

        def buy(self, text: str) -> str:
            """
            Buy.

            Args:
                text: What.
            """
            return text

        def get_reward(self):
            if self is self.made[1]:
                raise ValueError("the shop is closed")
            return float(self.made.index(self))

    args = settings(tmp_path, per_device_train_batch_size=M, max_steps=1, num_initial_generations=M)
    trainer = puppet(tokenizer, args, [DONE], None, tools=None, environment_factory=Shop)
    trainer.train()
    rows, _ = read_file(tmp_path / "rollouts" / "step-000000.jsonl.gz")
    assert [row["rewards"]["Shop"] for row in rows] == [0.0, None, 2.0, 3.0]


# The disk


def test_a_full_disk_costs_the_records_and_not_the_run(tokenizer, tmp_path, caplog):
    """
    Writing to /dev/full fails as on a full disk: the tokenizer at step 0, the records at step 1. At step 2 the file
    cannot be made, and at step 3 there is room.
    """
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    (tmp_path / "rollouts" / "step-000001.jsonl.gz").symlink_to("/dev/full")
    (tmp_path / "rollouts" / "step-000002.jsonl.gz").symlink_to("/dev/full/none")

    class MakeRoom(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "tokenizer.json").unlink(missing_ok=True)

    args = settings(tmp_path, per_device_train_batch_size=M, max_steps=4)
    trainer = puppet(tokenizer, args, [called("x")[0]] * 4, alternating, callbacks=[MakeRoom()])
    trainer.train()
    assert trainer.state.global_step == 4
    (warning,) = [message for message in caplog.messages if "could not be written" in message]
    assert "No space left on device" in warning and "training goes on" in warning
    written = [path.name for path in (tmp_path / "rollouts").iterdir() if path.is_file()]
    assert written == ["step-000003.jsonl.gz"]
    assert len(read_file(tmp_path / "rollouts" / "step-000003.jsonl.gz")[0]) == M
