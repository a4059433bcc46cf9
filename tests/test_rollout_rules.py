"""Every rule of a rollout, driven by a model whose logits the test writes, through the real trainer."""

import math

import pytest
from scripted import END, VOCAB, plan, rollout

RESULT = "<result>found</result>"


class Search:
    """A tool that counts its calls."""

    def __init__(self):
        self.queries = []

    def s(self, query: str) -> str:
        """
        Search.

        Args:
            query: What to look for.
        """
        self.queries.append(query)
        return "found"


def test_a_fork_leaves_at_the_tool_result_before_the_unsure_segment(tmp_path):
    search = Search()
    records, trainer, _ = rollout(tmp_path, [plan("A<s>q</s>?c", (9, "xyzw"))], [search.s], 1, 2)
    root, fork = records
    end_of_result = len("A<s>q</s>" + RESULT)
    assert (root["kind"], fork["kind"], fork["parent"], fork["fork_token"]) == ("initial", "fork", 0, end_of_result)
    assert fork["completion_ids"][:end_of_result] == root["completion_ids"][:end_of_result]
    assert fork["tool_mask"] == [1] * 9 + [0] * len(RESULT) + [1] * 3
    assert search.queries == ["q"], "the call before the fork is shared, not repeated"
    assert [call["shared"] for call in fork["tool_calls"]] == [True]
    # First segment: 9 certain tokens, H_0 = 0. Second: ln 4 on the first of its 3 tokens
    entropy, gap = math.log(4) / 3, 20 * math.log(4) / 3 / math.log(len(VOCAB))
    first, second = root["segments"]
    assert first["entropy"] == pytest.approx(0, abs=1e-6) and first["entropy_gap"] is first["forks"] is None
    assert second["entropy"] == pytest.approx(entropy) and second["entropy_gap"] == pytest.approx(gap)
    assert second["branch_probability"] == pytest.approx(min(0.5 + 0.2 * gap, 1)) and second["forks"] == 1
    # The segment that the fork re-sampled is read but decides nothing
    assert fork["segments"][1]["entropy"] == pytest.approx(entropy)
    assert fork["segments"][1]["branch_probability"] is fork["segments"][1]["forks"] is None


def test_the_window_is_the_first_k_tokens(tmp_path):
    records, _, _ = rollout(
        tmp_path, [plan("A<s>q</s>ab?", (11, "xy"))], [Search().s], 1, 2, entropy_window=2, branch_threshold=0.9
    )
    assert records[0]["segments"][1]["entropy"] == pytest.approx(0, abs=1e-6)  # the choice is the third token
    assert [record["kind"] for record in records] == ["initial", "supplement"]


def test_entropy_is_that_of_the_tempered_distribution(tmp_path):
    choice = (9, {"x": 2.0, "y": 0.0})
    records, _, _ = rollout(
        tmp_path, [plan("A<s>q</s>?", choice)], [Search().s], 1, 2, temperature=2.0, top_k=1, entropy_window=1
    )
    # softmax([2, 0] / 2) = [0.7311, 0.2689]; top-k is not part of the reading
    assert records[0]["segments"][1]["entropy"] == pytest.approx(0.5822, abs=1e-4)


def test_the_largest_gap_gets_the_budget_and_not_the_lowest_index(tmp_path):
    plans = [
        plan("A<s>q</s>?", (9, "xy")),
        plan("B<s>q</s>?", (9, "abcdefgh")),
        plan("C<s>q</s>?", (9, "xyzw")),
    ]
    records, _, _ = rollout(tmp_path, plans, [Search().s], 3, 4)
    assert [record["kind"] for record in records] == ["initial"] * 3 + ["fork"]
    assert records[3]["parent"] == 1
    assert [record["segments"][1]["forks"] for record in records[:3]] == [0, 1, 0]


def test_branch_factor_forks_of_one_decision(tmp_path):
    records, _, _ = rollout(tmp_path, [plan("A<s>q</s>?", (9, "xyzw"))], [Search().s], 1, 4, branch_factor=3)
    assert [(record["kind"], record["parent"]) for record in records[1:]] == [("fork", 0)] * 3
    assert records[0]["segments"][1]["forks"] == 3


def test_missing_rows_are_sampled_from_the_prompt_all_at_once(tmp_path):
    records, _, model = rollout(tmp_path, [plan("Abc")], [Search().s], 1, 4)
    assert [record["kind"] for record in records] == ["initial"] + ["supplement"] * 3
    assert model.batches == [1, 3]


def test_certain_segments_do_not_fork_and_the_group_is_filled_up(tmp_path):
    # First segment unsure, second certain: the gap is negative, P < 0.5
    records, _, _ = rollout(tmp_path, [plan("A?<s>q</s>yes", (1, "abcd"))], [Search().s], 2, 4)
    assert [record["kind"] for record in records] == ["initial"] * 2 + ["supplement"] * 2
    assert records[0]["segments"][1]["entropy_gap"] < 0
    assert records[0]["segments"][1]["branch_probability"] < 0.5


def test_a_fork_forks_at_its_own_next_tool_result(tmp_path):
    # Two calls, an unsure token after each result
    text = plan("A<s>q</s>?<s>r</s>?", (9, "xy"), (18, "xy"))
    search = Search()
    records, _, _ = rollout(tmp_path, [text], [search.s], 1, 4)
    kinds = [(record["kind"], record["parent"]) for record in records]
    # Wave 2: the root forks (row 1). Wave 3: root and fork pass their second result; both ask, 2 rows are left
    assert kinds[:2] == [("initial", None), ("fork", 0)]
    assert sorted(kinds[2:]) == [("fork", 0), ("fork", 1)]
    deep = next(record for record in records if record["parent"] == 1)
    assert [call["shared"] for call in deep["tool_calls"]] == [True, True]
    assert (
        deep["segments"][0]["forks"] is None and deep["segments"][1]["forks"] is None
    )  # the copy of a re-sampled one
    assert search.queries.count("q") == 1


def test_what_a_fork_shares_keeps_the_parents_count_of_forks(tmp_path):
    text = plan("A<s>q</s>?<s>r</s>?", (9, "xy"), (18, "xyzwabcd"))
    records, _, _ = rollout(tmp_path, [text], [Search().s], 1, 3)
    late = next(record for record in records if record["fork_token"] and record["fork_token"] > 40)
    parent = records[late["parent"]]
    assert late["segments"][:2] == parent["segments"][:2]


def test_each_row_stops_at_its_own_limit(tmp_path):
    plans = [plan("A" + "b" * 100), plan("B<s>q</s>" + "c" * 100)]
    records, _, _ = rollout(tmp_path, plans, [Search().s], 2, 3, max_completion_length=50)
    assert [len(record["completion_ids"]) for record in records] == [50, 50, 50]
    assert all(record["truncated"] for record in records)
    assert sum(records[1]["tool_mask"]) == 50 - len(RESULT)


def test_a_result_that_does_not_fit_is_left_out_and_nothing_unsampled_carries_loss(tmp_path):
    records, _, _ = rollout(tmp_path, [plan("A<s>q</s>done")], [Search().s], 1, 2, max_completion_length=20)
    assert [record["text"] for record in records] == ["A<s>q</s>"] * 2
    assert all(record["truncated"] and set(record["tool_mask"]) == {1} for record in records)
    assert [call["result"] for call in records[0]["tool_calls"]] == ["found"]


def test_rows_that_never_call_and_a_row_whose_first_token_ends_the_turn(tmp_path):
    records, trainer, _ = rollout(tmp_path, [plan("Abc"), [END]], [Search().s], 2, 4)
    assert [record["text"] for record in records[:2]] == ["Abc" + END, END]
    assert len(records) == 4 and not any(record["tool_calls"] for record in records)
    assert trainer.state.log_history[0]["tools/calls_executed"] == 0


def test_a_tool_that_always_fails_is_read_by_the_model(tmp_path):
    def s(query: str) -> str:
        """
        Search.

        Args:
            query: What to look for.
        """
        raise RuntimeError("no network")

    records, trainer, _ = rollout(tmp_path, [plan("A<s>q</s>sorry")], [s], 1, 2, branch_probability=1.0)
    assert "no network" in records[0]["text"] and records[0]["text"].endswith("sorry" + END)
    assert "no network" in records[0]["tool_calls"][0]["error"]
    log = trainer.state.log_history[0]
    assert log["tools/s/calls"] == log["tools/s/failures"] == 1
    assert log["tools/calls_shared"] == 1


def test_the_call_limit_holds_per_row_and_counts_shared_calls(tmp_path):
    search = Search()
    text = plan("A<s>q</s>?<s>r</s>!<s>t</s>!", (9, "xy"))
    records, _, _ = rollout(tmp_path, [text], [search.s], 1, 2, max_tool_calling_iterations=2)
    for record in records:
        assert len(record["tool_calls"]) == 2 and record["truncated"]
        assert record["text"].endswith("<s>t</s>"), "the row ends with the call that was not answered"
    assert records[1]["kind"] == "fork" and search.queries == ["q", "r", "r"]


def test_malformed_calls_are_answered_with_an_error(tmp_path):
    search = Search()
    plans = [plan("A<s></s>ok"), plan("Bq</s>ok")]
    records, _, _ = rollout(tmp_path, plans, [search.s], 2, 4, branch_rule="random", branch_probability=0.0)
    assert "is empty" in records[0]["text"] and "not opened" in records[1]["text"]
    assert all(record["text"].endswith("ok" + END) for record in records)
    assert search.queries == [] and all(record["tool_calls"][0]["error"] for record in records)


def test_random_branching_ignores_entropy(tmp_path):
    certain = plan("A<s>q</s>yes")
    always, _, _ = rollout(tmp_path / "a", [certain], [Search().s], 1, 2, branch_rule="random", branch_probability=1.0)
    never, _, _ = rollout(
        tmp_path / "b",
        [plan("A<s>q</s>?", (9, "xyzw"))],
        [Search().s],
        1,
        2,
        branch_rule="random",
        branch_probability=0.0,
    )
    assert always[1]["kind"] == "fork" and always[0]["segments"][1]["branch_probability"] == 1.0
    assert never[1]["kind"] == "supplement"


# one root, whose own tokens have the mean of the group, which is 0: tree and hard agree
@pytest.mark.parametrize("attribution", ["hard", "tree"])
def test_attribution_reaches_the_loss_and_the_record(tmp_path, attribution):
    text = plan("A<s>q</s>?", (9, "xyzwabcdefghijklmnop"))
    advantages = []

    def reward(completions, **kwargs):
        return [float(index) for index, _ in enumerate(completions)]

    import arpo_trl

    original = arpo_trl.ARPOTrainer._compute_loss

    def spy(self, model, inputs):
        advantages.append(inputs["advantages"].clone())
        return original(self, model, inputs)

    arpo_trl.ARPOTrainer._compute_loss = spy
    try:
        records, _, _ = rollout(
            tmp_path,
            [text],
            [Search().s],
            1,
            2,
            reward=reward,
            advantage_attribution=attribution,
            scale_rewards="none",
        )
    finally:
        arpo_trl.ARPOTrainer._compute_loss = original
    shared = records[1]["fork_token"]
    assert [record["advantage"] for record in records] == [-0.5, 0.5]
    for record in records:
        spans = [(span["start"], span["end"], span["advantage"]) for span in record["shared_advantages"]]
        assert spans == [(0, shared, 0.0), (shared, len(record["completion_ids"]), record["advantage"])]
    (per_token,) = advantages
    assert per_token.shape == (2, len(records[0]["completion_ids"]))
    assert per_token[:, :shared].abs().sum() == 0 and sorted(per_token[:, -1].tolist()) == [-0.5, 0.5]


def test_records_are_complete(tmp_path):
    records, trainer, _ = rollout(tmp_path, [plan("A<s>q</s>?c", (9, "xyzw"))], [Search().s], 1, 2)
    assert set(records[0]) - {"text"} == {
        *("step", "prompt_index", "row", "kind", "parent", "fork_token", "prompt_ids", "completion_ids", "tool_mask"),
        *("segments", "tool_calls", "truncated", "out_of_turns", "rewards", "advantage", "shared_advantages"),
        *("example", "images"),
    }
    assert set(records[0]["segments"][0]) == {
        *("start", "end", "entropy", "entropy_gap", "branch_probability", "forks", "logprob"),
    }
    assert set(records[0]["tool_calls"][0]) == {
        *("name", "arguments", "result", "error", "seconds", "shared", "merged", "cached", "refused"),
    }
    assert list(records[0]["rewards"].values()) == [float(len("A<s>q</s>" + RESULT + "xc"))]
    log = trainer.state.log_history[0]
    expected = {"arpo/initial": 1, "arpo/forks": 1, "arpo/supplements": 0, "arpo/fork_rate": 1.0}
    expected |= {"tools/calls_made": 2, "tools/calls_executed": 1, "tools/calls_shared": 1, "tools/calls_merged": 0}
    expected |= {"tools/calls_cached": 0, "tools/calls_refused": 0, "tools/s/executed": 1, "tools/s/cached": 0}
    assert {name: log[name] for name in expected} == expected
    tokens = len(records[0]["completion_ids"])
    assert log["arpo/shared_token_fraction"] == pytest.approx(records[1]["fork_token"] / (2 * tokens))
    assert {"arpo/entropy_initial", "arpo/entropy_after_tool", "arpo/entropy_gap", "tools/s/seconds_max"} <= set(log)


def test_reward_functions_receive_calls_and_the_models_own_text(tmp_path):
    seen = {}

    def reward(completions, tool_calls, model_text, **kwargs):
        seen.update(completions=completions, tool_calls=tool_calls, model_text=model_text)
        return [0.0] * len(completions)

    rollout(tmp_path, [plan("A<s>q</s>ok")], [Search().s], 1, 2, reward=reward, branch_probability=1.0)
    assert seen["completions"] == ["A<s>q</s>" + RESULT + "ok"] * 2
    assert seen["model_text"] == ["A<s>q</s>ok"] * 2
    assert [[call["shared"] for call in calls] for calls in seen["tool_calls"]] == [[False], [True]]
    assert seen["tool_calls"][0][0]["arguments"] == {"query": "q"}


def test_progress_shows_rows_calls_and_forks(tmp_path, capfd):
    rollout(tmp_path, [plan("A<s>q</s>?", (9, "xyzw"))], [Search().s], 1, 2, disable_tqdm=False)
    shown = capfd.readouterr().err
    assert "Rollout" in shown and "calls=1, forks=0, rows=1" in shown and "calls=0, forks=1, rows=1" in shown


def test_a_tool_named_in_no_list_is_an_error_that_the_model_reads(tmp_path):
    search = Search()
    search_only = plan("A<t>q</t>ok")
    records, _, _ = rollout(tmp_path, [search_only], [search.s], 1, 2, branch_rule="random", branch_probability=0.0)
    # `<t>` is no tag of a tool: it is text, and nothing is called
    assert records[0]["text"] == "A<t>q</t>ok" + END and not records[0]["tool_calls"]


def test_a_result_longer_than_the_context_ends_the_row(tmp_path):
    def s(query: str) -> str:
        """
        Search.

        Args:
            query: What to look for.
        """
        return "x" * 5000

    records, _, _ = rollout(tmp_path, [plan("A<s>q</s>ok")], [s], 1, 2, max_completion_length=10_000)
    assert [record["text"] for record in records] == ["A<s>q</s>"] * 2
    assert all(record["truncated"] for record in records)


def test_expansion_forks_from_rows_that_have_ended_where_they_were_unsure(tmp_path):
    search = Search()
    text = plan("A<s>q</s>a<s>r</s>?c", (18, "xyzw"))  # unsure after the second result alone
    records, trainer, model = rollout(tmp_path, [text], [search.s], 1, 4, branch_rule="expansion")
    assert model.batches == [1, 1, 1, 2, 1], "the root's three segments, and two rounds"
    root, *forks = records
    after_second = len("A<s>q</s>" + RESULT + "a<s>r</s>" + RESULT)
    assert [(row["kind"], row["parent"], row["fork_token"]) for row in forks] == [("fork", 0, after_second)] * 3
    assert search.queries == ["q", "r"], "no call is repeated"
    for row in forks:
        assert row["text"][:after_second] == root["text"][:after_second] and row["text"].endswith("c" + END)
        assert [call["shared"] for call in row["tool_calls"]] == [True, True]
        assert row["segments"][:2] == root["segments"][:2]
        assert row["tool_mask"] == root["tool_mask"] and not row["truncated"]
    assert [segment["forks"] for segment in root["segments"]] == [None, 0, 3]
    log = trainer.state.log_history[0]
    assert (log["tools/calls_made"], log["tools/calls_executed"], log["tools/calls_shared"]) == (8, 2, 6)
    assert (log["arpo/forks"], log["arpo/supplements"]) == (3, 0)


def test_expansion_starts_from_the_prompt_where_that_is_unsure(tmp_path):
    text = plan("A?<s>q</s>yes", (1, "abcd"))
    records, _, _ = rollout(tmp_path, [text], [Search().s], 1, 4, branch_rule="expansion")
    assert [record["kind"] for record in records] == ["initial"] + ["supplement"] * 3


def test_a_fork_from_a_row_that_was_cut_is_not_cut(tmp_path):
    # The root calls a third time, which the limit of two turns refuses; a fork may end instead
    text = plan("A<s>q</s>a<s>r</s>?s>t</s>", (18, {"<": 3.0, END: 3.0}))
    search = Search()
    records, _, _ = rollout(
        tmp_path, [text], [search.s], 1, 8, branch_rule="expansion", max_tool_calling_iterations=2, seed=1
    )
    assert {record["truncated"] for record in records} == {True, False}
    for record in records:
        assert record["truncated"] == (not record["text"].endswith(END))
        assert len(record["tool_calls"]) == 2
    assert search.queries == ["q", "r"]
