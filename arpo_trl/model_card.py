"""What the model card of TRL does not say of a model that ARPO trained: a base model of this machine, tools, protocol,
M, N.

What is not here: the rest of the card, which is TRL's template filled in by [`~trl.GRPOTrainer.create_model_card`].
"""

from collections.abc import Sequence
from pathlib import Path

from trl.trainer.utils import get_config_model_id

from .config import ARPOConfig

_NO_BASE = "[None](https://huggingface.co/None)"
_NO_MODEL = 'model="None"'
_BEFORE = "### Framework versions"


def complete_card(card: str, base_model: str | None, args: ARPOConfig, tools: Sequence[str]) -> str:
    """
    Add to a card what its template leaves out.

    Args:
        card (`str`): Text of the card.
        base_model (`str`, *optional*): Path of the base model; only its last part is told.
        args ([`ARPOConfig`]): Config of the run.
        tools (`Sequence[str]`): Names of the tools.
    """
    name = Path(base_model).name if base_model else ""
    card = card.replace(_NO_BASE, f"the local model `{name}`" if name else "a local model")
    card = card.replace(
        _NO_MODEL, f'model="{Path(args.output_dir).name}"'
    )  # a run that is not pushed has no repository
    rows, initial = args.num_generations, args.num_initial_generations
    facts = [
        f"- Tools: {', '.join(f'`{tool}`' for tool in tools) or 'none'}",
        *([f"- Tool protocol: `{args.tool_protocol}`"] if tools else []),
        f"- Rows a group (M): {rows}, of which {initial} start at once (N)"
        + (": nothing branches, as in GRPO" if initial == rows else ""),
    ]
    if initial < rows:
        facts.append(f"- Branching rule: `{args.branch_rule}`; advantages: `{args.advantage_attribution}`")
    section = "\n".join(["### Rollouts", "", *facts, "", _BEFORE])
    return card.replace(_BEFORE, section, 1)


def complete_card_file(path: Path, config: object, args: ARPOConfig, tools: Sequence[str]) -> None:
    """Complete the card at `path` of a model with this `config`."""
    path.write_text(complete_card(path.read_text("utf-8"), get_config_model_id(config), args, tools), encoding="utf-8")
