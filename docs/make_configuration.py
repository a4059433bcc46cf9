"""Write docs/configuration.md from the docstring and the fields of `ARPOConfig`.

    python docs/make_configuration.py

A test fails where the page is older than the class. Does NOT describe what is inherited from TRL.
"""

import dataclasses
import inspect
import re
from pathlib import Path

from trl import GRPOConfig

from arpo_trl import ARPOConfig

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """\
# Configuration

<!-- Made by docs/make_configuration.py from the docstring of ARPOConfig: change that, and run the script. -->

`ARPOConfig` has every parameter of TRL's [`GRPOConfig`](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig)
and the ones below. On the command line of `examples/arpo.py` each is a flag of the same name; in a YAML file given
with `--config`, a key. Symbols in parentheses are those of the [paper](https://huggingface.co/papers/2507.19849). A
value that cannot work is refused when the object is made: see [troubleshooting](troubleshooting.md).
"""

ENTRY = re.compile(r"(\w+) \(`(.+?)`(?:, \*optional\*)?(?:, defaults to `(.+?)`)?\):\n((?: {4}.*\n?)+)")


def page() -> str:
    """The page as it should be."""
    docstring = inspect.getdoc(ARPOConfig) or ""
    parameters = inspect.cleandoc(docstring.split("Parameters:\n")[1].split("\n> [!NOTE]")[0])
    fields = {field.name: field for field in dataclasses.fields(ARPOConfig)}
    stock = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    parts, described = [HEAD], set()
    for group in re.split(r"^> ", parameters, flags=re.MULTILINE)[1:]:
        title, _, entries = group.partition("\n")
        parts.append(f"## {title.strip()}\n\n| parameter | type | default | |\n|---|---|---|---|")
        for name, kind, default, text in ENTRY.findall(inspect.cleandoc(entries) + "\n"):
            if default != _shown(fields[name].default):
                raise ValueError(f"The docstring of `{name}` gives the default {default}, the field {fields[name]}.")
            described.add(name)
            parts.append(f"| `{name}` | `{_cell(kind)}` | `{default}` | {_cell(text)} |")
        parts.append("")
    if missing := set(fields) - set(stock) - described:
        raise ValueError(f"The docstring of ARPOConfig lacks {', '.join(sorted(missing))}.")
    parts.append("## Defaults that differ from TRL's\n\n| parameter | here | TRL |\n|---|---|---|")
    for name, default in stock.items():
        if fields[name].default != default:
            parts.append(f"| `{name}` | `{_shown(fields[name].default)}` | `{_shown(default)}` |")
    return "\n".join(parts) + "\n"


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _cell(text: str) -> str:
    # Links of the docstrings' own kind, [`~package.name`], are plain names on the page
    text = re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", " ".join(text.split()))
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
