"""Keys, values and states of the contexts that a rollout has already read, so that `generate` reads no token twice.

Within one call, what several contexts share (a system prompt, the prompt of a group) is read once. Between the calls
of a rollout, a row goes on from what it left, and a fork or a supplement from what the row has whose tokens it
repeats. What is cached is found from the tokens alone, so the rollout loop knows nothing of it.

Keys and values are known at every token. Recurrent and convolution states are known at the places where a row may go
on or be left: where its prompt ends, where its latest segment began (every segment, if forks may leave anywhere) and
where that ended. From anywhere else the row is read again from the place before. What each kind of layer takes is in
`cache_layers.py`.

What it does not do: positions that are rotated by another angle in a longer context, quantised, offloaded or static
caches, any search but sampling and greedy decoding, prompt-learning adapters, images, models whose forward is
collective (FSDP, ZeRO-3: the number of forwards would differ between processes). For those `cache_obstacle` names the
reason, which is told once, and `generate` starts anew.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.utils import logging

from ...scoring.prefix_tree import shared_prefixes
from .cache_layers import (
    CACHE,
    Block,
    EndStates,
    Found,
    KeysValues,
    State,
    Target,
    forget_positions,
    gathered,
    generation_cache,
    is_recurrent,
    joined,
    keys_values_of,
    layers_obstacle,
    read_into,
    rows_apart,
    states_taken,
)

logger = logging.get_logger(__name__)

# A forward of its own for what contexts share has to save more than it costs to launch
_MIN_STEM = 16


class Place(NamedTuple):
    """
    A place of a row at which its state is known.

    Args:
        tokens (`np.ndarray`): The tokens up to there.
        state (`State`): Of one row.
        begins (`bool`): Whether a segment begins there, after the one token that `generate` reads.
    """

    tokens: np.ndarray
    state: State
    begins: bool


def cache_obstacle(model: PreTrainedModel, generation_config: GenerationConfig) -> str | None:
    """
    Why `generate` has to start anew; `None` if what the model's cache holds depends on the tokens up to there alone,
    is kept, and is used.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        generation_config ([`~transformers.GenerationConfig`]): The config that `generate` is handed, which it
            completes with the model's own.
    """
    merged, _ = model._prepare_generation_config(generation_config)
    for name in ("cache_implementation", "prefill_chunk_size"):
        if getattr(merged, name) is not None:
            return f"the generation config sets `{name}={getattr(merged, name)!r}`"
    if merged.use_cache is False:
        return "the generation config sets `use_cache=False`"
    if merged.get_generation_mode() not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        return f"the generation config asks for {merged.get_generation_mode().value}"
    if merged.num_return_sequences > 1 or merged.token_healing:
        return "the generation config sets `num_return_sequences` or `token_healing`"
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return "the adapter puts virtual tokens before the context"
    config = model.config.get_text_config()
    if not model._supports_default_dynamic_cache():
        return f"a `{config.model_type}` model has a cache of its own kind"
    rope = getattr(config, "rope_parameters", None) or {}
    if {"dynamic", "longrope"} & {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}:
        return "the model rotates positions by an angle that depends on the length of the context"
    return layers_obstacle(model)


def inputs_obstacle(inputs: dict[str, Any]) -> str | None:
    """Why rows with these `inputs` of `generate` are not told by their tokens alone; `None` if they are."""
    for name, value in inputs.items():
        text = name.endswith("token_type_ids") and not torch.any(value)
        if isinstance(value, torch.Tensor) and name != "attention_mask" and not text:
            return f"its rows have `{name}` beside their tokens"
    return None


def longest_prefixes(contexts: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """
    For each context, the index of a known row that begins like it for longest, and for how many tokens (`(-1, 0)` if
    none does). Time is that of sorting the rows.
    """
    rows = [*contexts, *known]
    order, shared = shared_prefixes(rows)
    best = [(-1, 0)] * len(contexts)
    # In sorted order the best known row is the nearest one before or after
    for places, common in ((range(len(order)), shared), (range(len(order) - 1, -1, -1), [*shared[1:], 0])):
        nearest, length = -1, 0
        for place in places:
            length = min(length, common[place])
            row = order[place]
            if row >= len(contexts):
                nearest, length = row - len(contexts), len(rows[row])
            elif length > best[row][1]:
                best[row] = (nearest, length)
    return best


def known_prefixes(contexts: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> list[list[int]]:
    """For each context, the indices of the known rows that are prefixes of it, shortest first."""
    rows = [*known, *contexts]  # of equal rows the known one comes first
    order, shared = shared_prefixes(rows)
    found: list[list[int]] = [[] for _ in contexts]
    prefixes: list[int] = []
    for row, common in zip(order, shared, strict=True):
        while prefixes and len(rows[prefixes[-1]]) > common:
            prefixes.pop()
        if row < len(known):
            prefixes.append(row)
        else:
            found[row - len(known)] = list(prefixes)
    return found


def shared_stems(contexts: Sequence[np.ndarray], known: Sequence[int]) -> list[np.ndarray]:
    """
    Prefixes that several contexts share beyond what is known of them, outermost first: none lies within another.

    Args:
        contexts (`Sequence[np.ndarray]`): Tokens of each context.
        known (`Sequence[int]`): Leading tokens of each that need not be read.
    """
    order, shared = shared_prefixes(contexts)
    stems: list[np.ndarray] = []
    length = 0  # of the stem that the row before belongs to; 0 for none
    for before, row, common in zip(order, order[1:], shared[1:], strict=False):
        common = min(common, len(contexts[before]) - 1, len(contexts[row]) - 1)  # `generate` reads the last token
        if common - known[row] < _MIN_STEM:
            length = 0
        elif length:
            length = min(length, common)
            stems[-1] = contexts[row][:length]
        else:
            length = common
            stems.append(contexts[row][:length])
    return stems


class PrefixCache:
    """
    What the latest `generate` of a rollout has read and written. Use one for each rollout: it knows no weights.

    Keys and values take the memory of the cache of one `generate`, with room for at most 32 tokens more a row, kept
    while the tools run, and of what [`keep`] names. At the peak one layer stands twice, and what contexts share stands
    once beside the rows that share it. The keys and values of sliding windows are kept whole, as those of full
    attention. States stand up to four times: while a segment is sampled, as in one `generate`, where it began, where
    it ended, and where the prompt ended; equal places stand once.

    `lookups` counts the tokens that it was given (`prefix_cache_queries`), and those of them that were not read for it
    (`prefix_cache_hits`).

    Args:
        every_start (`bool`, *optional*, defaults to `False`): Keep the state at the start of every segment of a row,
            not of the first and the latest alone, since forks may leave at any.
    """

    def __init__(self, every_start: bool = False) -> None:
        self._every_start = every_start
        self._blocks: list[Block] = []
        self._places: dict[bytes, Place] = {}  # by their tokens
        self._recurrent = False
        self._later: list[np.ndarray] = []
        self.lookups: Counter[str] = Counter()

    def keep(self, contexts: Sequence[Sequence[int]]) -> None:
        """Name the contexts that are not in the next `generate` but in a later one."""
        self._later = [np.asarray(context) for context in contexts]

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        generate: Callable[..., torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Call `generate` with what is known of all but the last token of each row.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model that reads what is not known yet.
            generate (`Callable`): Its `generate`.
            input_ids (`torch.Tensor` of shape `(B, T)`): Contexts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, T)`): 0 for padding.
            generation_config ([`~transformers.GenerationConfig`]): How to sample.
            stopping_criteria ([`~transformers.StoppingCriteriaList`], *optional*): What ends a row beside its
                end-of-turn tokens.

        Returns:
            `torch.Tensor`: what `generate` returns.
        """
        stopping_criteria = stopping_criteria or StoppingCriteriaList()
        arguments = {"attention_mask": attention_mask, "generation_config": generation_config, **kwargs}
        obstacle = cache_obstacle(model, generation_config) or inputs_obstacle(kwargs)
        if obstacle is not None:
            logger.warning_once(f"Rollouts read every context anew, because {obstacle}.")
        if obstacle is not None or input_ids.size(1) == 1:
            return generate(input_ids=input_ids, stopping_criteria=stopping_criteria, **arguments)
        lengths = attention_mask.sum(1).tolist()
        width = input_ids.size(1)
        contexts = [ids[width - length :] for ids, length in zip(input_ids.cpu().numpy(), lengths, strict=True)]

        self.lookups["prefix_cache_queries"] += sum(lengths)
        self.lookups["prefix_cache_hits"] += sum(lengths) - len(lengths)  # `generate` reads the last tokens
        self._recurrent = is_recurrent(model.config)
        while stems := shared_stems(contexts, [place.length for place in self._find(contexts, 1)]):
            longest = max(map(len, stems))
            layers, state = self._read(model, stems, longest)
            self._blocks.append(Block(layers, [longest - len(stem) for stem in stems], stems))
            self._remember(stems, rows_apart(state, range(len(stems))), begins=False)
        known = [context[:-1] for context in contexts]
        layers, state = self._read(model, known, width - 1, last=True)
        first = list({row.tobytes(): index for index, row in reversed(list(enumerate(known)))}.values())
        self._remember([known[row] for row in first], rows_apart(state, first), begins=True)

        cache = generation_cache(model.config, layers, state, generation_config.max_new_tokens)
        del layers, state
        forget_positions(model)
        ending = EndStates(stopping_criteria, _ends(model, generation_config), cache)
        criteria = StoppingCriteriaList([ending]) if self._recurrent else stopping_criteria
        output = generate(input_ids=input_ids, stopping_criteria=criteria, **{CACHE: cache}, **arguments)
        end = cache.get_seq_length()  # the last token has been sampled but not read
        starts = [width - length for length in lengths]
        rows = [ids[start:end] for ids, start in zip(output.cpu().numpy(), starts, strict=True)]
        for row, (columns, own) in ending.states.items():
            self._remember([rows[row][: columns - starts[row]]], [own], begins=False)
        going = [row for row in range(len(rows)) if row not in ending.states]
        self._remember([rows[row] for row in going], states_taken(cache, going), begins=False)
        self._blocks.append(Block(keys_values_of(cache), starts, rows))
        return output

    def _find(self, contexts: Sequence[np.ndarray], unread: int = 0) -> list[Found]:
        """What is known of each context, its last `unread` tokens left aside."""
        sources = [(index, row) for index, block in enumerate(self._blocks) for row in range(len(block.rows))]
        known = longest_prefixes(contexts, [self._blocks[index].rows[row] for index, row in sources])
        limits = [min(length, len(row) - unread) for row, (_, length) in zip(contexts, known, strict=True)]
        if self._recurrent:
            places = [place.tokens for place in self._places.values()]
            limits = [
                max((len(places[index]) for index in prefixes if len(places[index]) <= limit), default=0)
                for limit, prefixes in zip(limits, known_prefixes(contexts, places), strict=True)
            ]
        return [
            Found(*sources[nearest], limit) if limit > 0 else Found(-1, -1, 0)
            for limit, (nearest, _) in zip(limits, known, strict=True)
        ]

    def _read(
        self, model: PreTrainedModel, rows: Sequence[np.ndarray], width: int, last: bool = False
    ) -> tuple[list[KeysValues | None], State]:
        """
        Keys and values, and states, of rows that end before column `width`; what is not known is read. With `last`,
        what these rows and the contexts named by `keep` do not need is forgotten, and memory is free before it is
        taken.
        """
        found = self._find(rows)
        known = [place.length for place in found]
        ends = [width - len(row) + length for row, length in zip(rows, known, strict=True)]
        state: State = []
        if self._recurrent:
            going = {
                row: self._places[rows[row][:length].tobytes()].state for row, length in enumerate(known) if length
            }
            state = joined(going, len(rows))
            del going
        targets = [Target(found, ends, width)]
        later: list[np.ndarray] = []
        if last:
            # Of a context whose last token `generate` has not read yet, one token less is known
            kept = [
                (place, row[: place.length])
                for place, row in zip(self._find(self._later, 1), self._later, strict=True)
            ]
            kept = [(place, row) for place, row in kept if len(row)]
            later = [row for _, row in kept]
            lengths = [len(row) for row in later]
            targets.append(Target([place for place, _ in kept], lengths, max(lengths, default=0)))
        layers, *others = gathered(self._blocks, targets, release=last)
        if last:
            self._blocks = [Block(others[0], [0] * len(later), later)] if later else []
            self._forget(rows, later)
        state = read_into(model, rows, known, layers, state, width)
        self.lookups["prefix_cache_hits"] -= sum(map(len, rows)) - sum(known)
        return layers, state

    def _remember(self, rows: Sequence[np.ndarray], states: Sequence[State], begins: bool) -> None:
        for row, state in zip(rows, states, strict=True):
            if row.size:
                self._places[row.tobytes()] = Place(row, state, begins)

    def _forget(self, rows: Sequence[np.ndarray], later: Sequence[np.ndarray]) -> None:
        """Forget the states that are not needed any more, once `rows` have been read: where they end is known anew."""
        places = list(self._places.values())
        needed: dict[bytes, Place] = {}
        for row, prefixes in enumerate(known_prefixes([*rows, *later], [place.tokens for place in places])):
            starts = [index for index in prefixes if places[index].begins]
            for index in (
                *(starts if self._every_start else starts[:1]),
                *(prefixes[-1:] if row >= len(rows) else ()),
            ):
                needed[places[index].tokens.tobytes()] = places[index]
        self._places = needed


def _ends(model: PreTrainedModel, generation_config: GenerationConfig) -> list[int]:
    """The tokens at which `generate` ends a row."""
    ends = model._prepare_generation_config(generation_config)[0].eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]
