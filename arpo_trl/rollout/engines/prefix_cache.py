"""Keys and values of the contexts that a rollout has already read, so that `generate` reads no token twice.

Within one call, what several contexts share (a system prompt, the prompt of a group) is read once. Between the calls of
a rollout, a row goes on from the keys and values that it left, and a fork or a supplement from those of the row whose
tokens it repeats. What is cached is found from the tokens alone, so the rollout loop knows nothing of it.

What it does not do: layers whose cache forgets or summarises (sliding windows, recurrent states), positions that are
rotated by another angle in a longer context, quantised, offloaded or static caches, any search but sampling and greedy
decoding, prompt-learning adapters, models whose forward is collective (FSDP, ZeRO-3: the number of forwards would
differ between processes). For those `cache_obstacle` names the reason, which is told once, and `generate` starts anew.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMode
from transformers.generation import utils as generation
from transformers.utils import logging

from ...scoring.prefix_tree import shared_prefixes

logger = logging.get_logger(__name__)

# The argument of `generate` and of a forward that takes a cache; transformers deprecated the name that it had before
CACHE = "cache" if "cache" in getattr(generation, "ALL_CACHE_NAMES", ()) else "past_key_values"

_FREED = (torch.empty(0), torch.empty(0))

# A forward of its own for what contexts share has to save more than it costs to launch
_MIN_STEM = 16


class Found(NamedTuple):
    """The longest known prefix of a context: in which block and row of it, and how many tokens."""

    block: int
    row: int
    length: int


class Block(NamedTuple):
    """
    Keys and values of some rows.

    Args:
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`): Keys and values of each layer, of shape
            `(rows, heads, positions, head_dim)`.
        starts (`list[int]`): Position of each row's first token.
        rows (`list[np.ndarray]`): Tokens of each row, which stand at consecutive positions.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    starts: list[int]
    rows: list[np.ndarray]


def cache_obstacle(model: PreTrainedModel, generation_config: GenerationConfig) -> str | None:
    """
    Why `generate` has to start anew; `None` if each position of the model's cache depends on the tokens up to it alone,
    is kept, and is used.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        generation_config ([`~transformers.GenerationConfig`]): The config that `generate` is handed, which it completes
            with the model's own.
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
    if model._is_stateful:
        return f"a `{config.model_type}` model keeps a state in place of keys and values"
    rope = getattr(config, "rope_parameters", None) or {}
    if {"dynamic", "longrope"} & {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}:
        return "the model rotates positions by an angle that depends on the length of the context"
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return "the model has layers whose cache forgets or summarises"
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

    Its memory is that of the cache of one `generate`, kept while the tools run, and of what [`keep`] names. `lookups`
    counts the tokens that it was given (`prefix_cache_queries`), and those of them that were not read for it
    (`prefix_cache_hits`).
    """

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._later: list[np.ndarray] = []
        self.lookups: Counter[str] = Counter()

    def keep(self, contexts: Sequence[Sequence[int]]) -> None:
        """Name the contexts that are not in the next `generate` but in a later one."""
        self._later = [np.asarray(context) for context in contexts]

    def generate(
        self,
        model: PreTrainedModel,
        generate: Callable[..., torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Call `generate` with the keys and values of all but the last token of each row.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model that reads what is not known yet.
            generate (`Callable`): Its `generate`.
            input_ids (`torch.Tensor` of shape `(B, T)`): Contexts, padded on the left.
            attention_mask (`torch.Tensor` of shape `(B, T)`): 0 for padding.
            generation_config ([`~transformers.GenerationConfig`]): How to sample.

        Returns:
            `torch.Tensor`: what `generate` returns.
        """
        arguments = {"attention_mask": attention_mask, "generation_config": generation_config, **kwargs}
        obstacle = cache_obstacle(model, generation_config)
        if obstacle is not None:
            logger.warning_once(f"Rollouts read every context anew, because {obstacle}.")
        if obstacle is not None or input_ids.size(1) == 1:
            return generate(input_ids=input_ids, **arguments)
        lengths = attention_mask.sum(1).tolist()
        width = input_ids.size(1)
        contexts = [ids[width - length :] for ids, length in zip(input_ids.cpu().numpy(), lengths, strict=True)]

        found = self._find(contexts)
        while stems := shared_stems(contexts, [place.length for place in found]):
            self._read(model, stems)
            found = self._find(contexts)
        unread = [row for row, place in enumerate(found) if place.length < len(contexts[row]) - 1]
        if unread:
            self._read(model, [contexts[row][:-1] for row in unread])
            found = self._find(contexts)
        self.lookups["prefix_cache_queries"] += sum(lengths)
        self.lookups["prefix_cache_hits"] += sum(lengths) - len(lengths)  # `generate` reads the last tokens

        kept = self._kept(model)
        cache = self._gather(model, found, width - 1, release=True)
        self._blocks = kept
        output = generate(input_ids=input_ids, **arguments, **{CACHE: cache})
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        end = cache.get_seq_length()  # the last token has been sampled but not read
        rows = [ids[width - length : end] for ids, length in zip(output.cpu().numpy(), lengths, strict=True)]
        self._blocks.append(Block(layers, [width - length for length in lengths], rows))
        return output

    def _find(self, contexts: Sequence[np.ndarray]) -> list[Found]:
        places = [(index, row) for index, block in enumerate(self._blocks) for row in range(len(block.rows))]
        known = [self._blocks[index].rows[row] for index, row in places]
        return [
            Found(*places[nearest], min(length, len(context) - 1)) if length else Found(-1, -1, 0)
            for context, (nearest, length) in zip(contexts, longest_prefixes(contexts, known), strict=True)
        ]

    def _kept(self, model: PreTrainedModel) -> list[Block]:
        """A block of what the contexts named by `keep` will need."""
        # Of a context whose last token `generate` has not read yet, one token less is known
        found = [place for place in self._find(self._later) if place.length]
        rows = [self._blocks[place.block].rows[place.row][: place.length] for place in found]
        self._later = []
        if not found:
            return []
        width = max(place.length for place in found)
        cache = self._gather(model, found, width)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return [Block(layers, [width - place.length for place in found], rows)]

    def _read(self, model: PreTrainedModel, rows: list[np.ndarray]) -> None:
        """Read the unknown rest of each row in one forward, and remember it."""
        found = self._find([np.append(row, -1) for row in rows])  # the whole row may be known, the last token included
        past = max(place.length for place in found)
        rest = [row[place.length :] for row, place in zip(rows, found, strict=True)]
        device = model.device
        new = max(map(len, rest))
        input_ids = torch.zeros(len(rows), new, dtype=torch.long)
        mask = torch.zeros(len(rows), past + new, dtype=torch.long)
        for index, (ids, place) in enumerate(zip(rest, found, strict=True)):
            input_ids[index, : len(ids)] = torch.from_numpy(ids)
            mask[index, past - place.length : past + len(ids)] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        cache = self._gather(model, found, past)
        model(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            **{CACHE: cache},
            use_cache=True,
            logits_to_keep=1,
        )
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._blocks.append(Block(layers, [past - place.length for place in found], rows))
        self.lookups["prefix_cache_hits"] -= sum(map(len, rest))

    def _gather(
        self, model: PreTrainedModel, found: Sequence[Found], width: int, release: bool = False
    ) -> DynamicCache:
        """
        A cache of `width` positions in which the known prefix of each row ends at the last position. With `release` each
        layer of the blocks is freed once it is copied, so that memory never holds two caches.
        """
        cache = DynamicCache(config=model.config.get_text_config())
        places = torch.arange(width, device=model.device)
        picks = []
        for index, block in enumerate(self._blocks):
            rows = [row for row, place in enumerate(found) if place.block == index]
            if rows:
                sources = torch.tensor([found[row].row for row in rows], device=model.device)
                ends = [block.starts[found[row].row] + found[row].length for row in rows]
                # What stands before a row's start is padding, so any position does
                positions = (torch.tensor(ends, device=model.device).unsqueeze(1) - width + places).clamp(min=0)
                picks.append((block, torch.tensor(rows, device=model.device), sources.unsqueeze(1), positions))
        if not picks or not width:
            return cache
        for layer in range(len(picks[0][0].layers)):
            states = []
            for kind in range(2):
                first = picks[0][0].layers[layer][kind]
                state = first.new_zeros(len(found), first.size(1), width, first.size(3))
                for block, targets, sources, positions in picks:
                    state[targets] = block.layers[layer][kind][sources, :, positions].transpose(1, 2)
                states.append(state)
            cache.update(*states, layer)
            if release:
                for block in self._blocks:
                    block.layers[layer] = _FREED
        return cache
