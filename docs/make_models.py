"""
Make the tables of docs/models.md from what the tests run, and from what the package says of each model:

    python docs/make_models.py
"""

import sys
from pathlib import Path

import torch
from transformers import GenerationConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import multimodal  # noqa: E402
import packed_families  # noqa: E402
import test_images  # noqa: E402
import test_models  # noqa: E402

from arpo_trl.rollout.engines.prefix_cache import cache_obstacle  # noqa: E402
from arpo_trl.scoring.shared_prefix import unsupported_reason  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by docs/make_models.py -->\n", "<!-- end -->"
PACKED = "<!-- packed families, made by docs/make_models.py -->\n"
IMAGES = "<!-- images, made by docs/make_models.py -->\n"
HEAD = "| family | model | tested with forks | rollouts keep what they have read | scoring shares prefixes |\n"


def tested(family: str) -> str:
    """What `tests/test_models.py` runs of a family."""
    kinds = {
        "chat template": family in multimodal.MODELS,
        "tags": family in test_models.TAGS or family in multimodal.TEXT_MODELS,
        "LoRA": family in test_models.LORA,
        "equal to GRPO": family in test_models.EQUAL,
    }
    return ", ".join(kind for kind, runs in kinds.items() if runs)


def shared(reason: str | None) -> str:
    if reason is None:
        return "yes"
    return "no: the model type is not among those tested" if reason.startswith("model type") else f"no: {reason}"


def row(family: str) -> str:
    build = multimodal.build if family in multimodal.MODELS else multimodal.build_text
    model, _ = build(family)
    cells = [
        family,
        f"`{type(model).__name__}`",
        tested(family),
        shared(cache_obstacle(model, GenerationConfig(do_sample=True))),
        shared(reason.text if (reason := unsupported_reason(model, torch.device("cpu"))) else None),
    ]
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    return HEAD + "|---|---|---|---|---|\n" + "".join(map(row, [*multimodal.MODELS, *multimodal.TEXT_MODELS]))


def mixture(family: str) -> str:
    """How the tokens of a family mix, in words."""
    config = packed_families.FAMILIES[family].get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    mamba = hasattr(config, "mamba_n_heads") or hasattr(config, "mamba_num_heads")
    words = {
        "full attention": kinds & {"full_attention", "hybrid"},
        "sliding windows": "sliding_attention" in kinds,
        "attention sinks": family == "gpt_oss",
        "soft-capped scores": getattr(config, "attn_logit_softcapping", None),
        "Mamba2": mamba,
        "gated delta net": hasattr(config, "linear_num_value_heads"),
        "short convolutions": "conv" in kinds,
    }
    return ", ".join(word for word, holds in words.items() if holds)


def packed_table() -> str:
    """What `tests/test_prefix_families.py` holds to row by row: families by how their tokens mix."""
    families: dict[str, list[str]] = {}
    for family in sorted(packed_families.FAMILIES):
        balanced = "*" if family in packed_families.LOAD_BALANCED else ""
        families.setdefault(mixture(family), []).append(f"`{family}`{balanced}")
    lines = [f"| {mixed} | {', '.join(names)} |\n" for mixed, names in sorted(families.items())]
    return "| layers | model types |\n|---|---|\n" + "".join(lines)


def images_row(family: str) -> str:
    """What `tests/test_images.py` runs of a family."""
    places = {"prompt": "prompts", "tool": "results", "both": "prompts and results"}
    protocols = [name.replace("_", " ") for forked, name in test_images.FORKED if forked == family]
    equal = [places[place] for forked, place in test_images.EQUAL if forked == family]
    compared = f"with tools: {', '.join(equal)}" if equal else "without tools: prompts"
    fails = [f"{places[place]}: {how}" for (failing, place), how in test_images.TRL_FAILS.items() if failing == family]
    taken = "trains" if "chat template" in protocols else "refuses tools: the chat template knows none"
    return f"| {family} | {', '.join(protocols)} | {compared} | {'; '.join(fails) or taken} |\n"


def images_table() -> str:
    families = dict.fromkeys(family for family, _ in test_images.FORKED)
    head = (
        "| family | images in prompts and results, with forks | equal to GRPO to the bit | TRL alone, with tools |\n"
    )
    return head + "|---|---|---|---|\n" + "".join(map(images_row, families))


def page() -> str:
    text = PAGE.read_text("utf-8")
    for begin, made in ((BEGIN, table()), (PACKED, packed_table()), (IMAGES, images_table())):
        before, _, rest = text.partition(begin)
        text = before + begin + "\n" + made + "\n" + END + rest.partition(END)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
