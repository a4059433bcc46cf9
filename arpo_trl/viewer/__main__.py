"""Make the page: `python -m arpo_trl.viewer <run dir> [-o report.html]`."""

import argparse
import sys
from pathlib import Path

from .page import MAX_TRAJECTORIES, render


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m arpo_trl.viewer", description="Make one self-contained HTML page from a run's rollout records."
    )
    parser.add_argument(
        "run_dir", type=Path, help="output_dir of a run with log_rollouts=True, or of examples/evaluate.py"
    )
    parser.add_argument("-o", "--output", type=Path, help="page to write (default: <run dir>/report.html)")
    parser.add_argument("--tokenizer", help="tokenizer to decode with (default: the one saved in the run dir)")
    parser.add_argument(
        "--max-trajectories",
        type=int,
        default=MAX_TRAJECTORIES,
        help="trees are kept for evenly spaced steps, up to this many trajectories; metrics for every step "
        "(default: %(default)s)",
    )
    arguments = parser.parse_args()
    output = arguments.output or arguments.run_dir / "report.html"
    try:
        page = render(arguments.run_dir, arguments.tokenizer, arguments.max_trajectories)
        output.write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"arpo_trl.viewer: {error}", file=sys.stderr)
        return 1
    print(f"{output} ({len(page) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
