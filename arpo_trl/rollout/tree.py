"""Trajectories, segments and groups of a rollout: plain data, and how a fork is copied."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from ..execution.executor import ToolCall


def own_tokens(completion_ids: list[int], tool_mask: list[int]) -> list[int]:
    """The tokens of a completion whose mask is 1: the model's own, tool results left out."""
    return [token for token, own in zip(completion_ids, tool_mask, strict=True) if own]


@dataclass
class Segment:
    """
    A stretch of model tokens between tool results.

    Args:
        start, end (`int`): Indices into the trajectory's completion; `end` is exclusive.
        entropy (`float`, *optional*): Mean entropy over its first `entropy_window` tokens, in nats.
        entropy_gap (`float`, *optional*): ΔH; `None` for the first segment of a trajectory.
        branch_probability (`float`, *optional*): P; `None` where nothing was decided.
        forks (`int`, *optional*): Forks made here; `None` where nothing was decided.
        logprob (`float`, *optional*): Log-probability of the whole segment; `None` where the engine does not tell.
    """

    start: int
    end: int
    entropy: float | None = None
    entropy_gap: float | None = None
    branch_probability: float | None = None
    forks: int | None = None
    logprob: float | None = None

    @property
    def novelty(self) -> float | None:
        """Probability that a fork samples another segment in its place: 1 − p."""
        return None if self.logprob is None else -math.expm1(self.logprob)


@dataclass
class CallOfRow:
    """A tool call as one row sees it. `shared`: an ancestor made it before the fork."""

    call: ToolCall
    shared: bool = False


class Place(NamedTuple):
    """A tool result of a trajectory, or the prompt, as the number of what lies before it."""

    tokens: int
    segments: int
    turns: int
    calls: int
    tool_turns: int
    images: int = 0


@dataclass
class Trajectory:
    """
    What the model and its tools write after one prompt; it stands in one row of a group.

    Args:
        row (`int`): Place among the rows of this process.
        prompt_ids (`list[int]`): Tokens of the prompt.
        kind (`str`): Where it started: `"initial"` and `"supplement"` at the prompt, `"fork"` at a tool result.
            `"idle"` is no trajectory: it fills a row of a group that gets no more, and nothing is learnt from it.
        parent (`int`, *optional*): Row that a fork left.
        fork_token (`int`, *optional*): Index into `completion_ids` at which it left.
        completion_ids, tool_mask (`list[int]`): Tokens, and 1 for a token of the model, 0 for one of a tool result.
        logprobs (`list[float]`): Log-probabilities under which the tokens were sampled, 0 for tool results. Empty
            where the engine gives none.
        baseline (`float`, *optional*): H_0, the entropy of the first segment; a fork has its root's.
        segments (`list[Segment]`): Its model tokens, in order.
        starts (`list[Place]`): Where each segment starts. Empty for a row that did not come out of a rollout of waves.
        turns (`list`): What the protocol keeps to rebuild the conversation.
        calls (`list[CallOfRow]`): Tool calls, in order.
        tool_turns (`int`): Turns whose calls were answered.
        resamples (`bool`): Whether the next segment re-samples the one that a fork left.
        rejected_tokens (`int`): Tokens of segments that were sampled for the row and thrown away.
        images (`list`): Pictures of the prompt and of tool results, in the order of the tokens that stand for them.
        truncated (`bool`): Whether it ran into a length or call limit.
        out_of_turns (`bool`): Whether that was the call limit: its last calls were not made.
    """

    row: int
    prompt_ids: list[int]
    kind: Literal["initial", "fork", "supplement", "idle"] = "initial"
    parent: int | None = None
    fork_token: int | None = None
    completion_ids: list[int] = field(default_factory=list)
    tool_mask: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    baseline: float | None = None
    segments: list[Segment] = field(default_factory=list)
    starts: list[Place] = field(default_factory=list)
    turns: list[Any] = field(default_factory=list)
    calls: list[CallOfRow] = field(default_factory=list)
    tool_turns: int = 0
    resamples: bool = False
    rejected_tokens: int = 0
    images: list[Any] = field(default_factory=list)
    truncated: bool = False
    out_of_turns: bool = False

    @property
    def own_ids(self) -> list[int]:
        """The model's own tokens, tool results left out."""
        return own_tokens(self.completion_ids, self.tool_mask)

    @property
    def end(self) -> Place:
        """Where the next segment starts."""
        return Place(
            len(self.completion_ids),
            len(self.segments),
            len(self.turns),
            len(self.calls),
            self.tool_turns,
            len(self.images),
        )

    def fork(self, row: int, place: Place) -> "Trajectory":
        """
        A copy that leaves at `place`, which is [`end`] or one of `starts`, and samples the segment behind it anew.
        """
        return replace(
            self,
            row=row,
            kind="fork",
            parent=self.row,
            fork_token=place.tokens,
            completion_ids=self.completion_ids[: place.tokens],
            tool_mask=self.tool_mask[: place.tokens],
            logprobs=self.logprobs[: place.tokens],
            # The same segments, not copies: forks made later count for all rows that share one
            segments=self.segments[: place.segments],
            starts=self.starts[: place.segments],
            turns=self.turns[: place.turns],
            calls=[replace(call, shared=True) for call in self.calls[: place.calls]],
            tool_turns=place.tool_turns,
            images=self.images[: place.images],
            resamples=True,
            rejected_tokens=0,
            truncated=False,
            out_of_turns=False,
        )


@dataclass
class Group:
    """
    The rows of one prompt that this process holds.

    Args:
        rows (`range`): Their places among the rows of this process; as many as the group's budget.
        num_initial (`int`): Trajectories that start at once.
        size (`int`): Rows of the whole group, M.
        first_row (`int`): Row of the whole group that `rows.start` is; above 0 where another process holds the rest.
        trajectories (`list[Trajectory]`): The rows made so far, in the order of `rows`.
        rounds (`int`): Times that it was expanded.
        rewards (`list[float | None]`): Of the trajectories, for a rule that `needs_rewards`; `None` for one without a
            score.
    """

    rows: range
    num_initial: int
    size: int
    first_row: int = 0
    trajectories: list[Trajectory] = field(default_factory=list)
    rounds: int = 0
    rewards: list[float | None] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Rows that can still be made."""
        return len(self.rows) - len(self.trajectories)

    @property
    def next_row(self) -> int:
        return self.rows.start + len(self.trajectories)

    def end(self) -> None:
        """Fill the missing rows with idle ones: one token that ended a row, and that carries no loss."""
        first = self.trajectories[0]
        ends = [row.completion_ids[-1] for row in self.trajectories if row.completion_ids and not row.truncated]
        token = (ends + first.completion_ids + first.prompt_ids)[0]
        while self.budget:
            idle = Trajectory(self.next_row, list(first.prompt_ids), "idle")
            idle.completion_ids, idle.tool_mask, idle.logprobs = [token], [0], [0.0]
            self.trajectories.append(idle)


def initial_share(start: int, stop: int, group_size: int, num_initial: int) -> int:
    """
    Initial trajectories of the part [start, stop) of a group that one process holds: its share of N, at least 1.

    The shares of all parts add up to N unless a part would be left without any.
    """
    return max(1, stop * num_initial // group_size - start * num_initial // group_size)


def group_parts(first: int, count: int, group_size: int, num_initial: int) -> list[Group]:
    """
    The groups, or parts of groups, that a process holds.

    Args:
        first (`int`): Place of the process's first row among the rows of all processes.
        count (`int`): Rows of the process.
        group_size (`int`): M.
        num_initial (`int`): N; each part gets its share, at least 1.
    """
    groups, row = [], first
    while row < first + count:
        start = row % group_size
        stop = min(group_size, start + first + count - row)
        share = min(initial_share(start, stop, group_size, num_initial), stop - start)
        groups.append(Group(range(row - first, row - first + stop - start), share, group_size, first_row=start))
        row += stop - start
    return groups
