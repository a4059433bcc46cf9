"""Draw docs/tree.png: one group of a real run, as `log_tree_steps` draws it.

    make demo
    python docs/make_tree.py outputs/demo

Takes, of the step asked for, the group that has rows of the most kinds and calls tools most.
"""

import argparse
from pathlib import Path

from arpo_trl.viewer.picture import draw_tree
from arpo_trl.viewer.records import Row, group_rows, read_file

PICTURE = Path(__file__).parent / "tree.png"


def telling(groups: list[list[Row]]) -> list[Row]:
    """The group that shows most."""
    return max(
        groups, key=lambda rows: (len({row["kind"] for row in rows}), sum(len(row["tool_calls"]) for row in rows))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="Folder of a run with `log_rollouts`.")
    parser.add_argument("--step", type=int, default=0)
    args = parser.parse_args()
    files = sorted((args.run / "rollouts").glob(f"step-{args.step:06d}*.jsonl*"))
    PICTURE.write_bytes(draw_tree(telling(group_rows(read_file(file)[0] for file in files))))


if __name__ == "__main__":
    main()
