"""Print a fork of a real run with its words, beside the row that it left: what README shows.

    make real
    python docs/make_fork.py outputs/real --step 0 --group 2 --row 7

Long results are cut. Reads runs in the tags protocol, whose words are all in one text.
"""

import argparse
import re
import textwrap
from pathlib import Path

from transformers import AutoTokenizer

from arpo_trl.viewer.records import Row, group_rows, read_file

WIDTH = 112  # characters of a line
STEP = re.compile(r"<(\w+)>.*?</\1>|[^<]+|<", re.DOTALL)


def lines(text: str, before: str, first: str | None = None) -> list[str]:
    """Thoughts, calls, results and answer of a text, one a line."""
    steps = [" ".join(step[0].replace("\n", " ⏎ ").split()) for step in STEP.finditer(text) if step[0].strip()]
    short = [textwrap.shorten(step, WIDTH - len(before), placeholder=" …") for step in steps]
    return [(first if first and index == 0 else before) + step for index, step in enumerate(short)]


def draw(fork: Row, parent: Row, question: str, decode) -> str:
    at = fork["fork_token"]
    told = [question]
    told += lines(decode(fork["completion_ids"][:at]), "│ ")
    for row, first, before in ((parent, "├── ", "│   "), (fork, "└── ", "    ")):
        told += lines(decode(row["completion_ids"][at:]), before, first)
        told.append(f"{before}reward {sum(row['rewards'].values()):g}, advantage {row['advantage']:+.2f}")
    return "\n".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a run with `log_rollouts`, the tokenizer in it.")
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--row", type=int, required=True, help="Row of the fork in its group.")
    args = parser.parse_args()
    (file,) = (args.run / "rollouts").glob(f"step-{args.step:06d}*.jsonl*")
    rows = {row["row"]: row for row in group_rows([read_file(file)[0]])[args.group]}
    fork, tokenizer = rows[args.row], AutoTokenizer.from_pretrained(args.run)

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    question = decode(fork["prompt_ids"]).split("\n")[-3]
    print(draw(fork, rows[fork["parent"]], question, decode))


if __name__ == "__main__":
    main()
