"""How long the rollout viewer takes to open a large run.

    python benchmarks/viewer.py

Prints, for 5,000 trajectories in many steps and in a single one, and for 50 to compare with: seconds to make the page,
its size, and in headless Chromium (the system's, of which there must be one) milliseconds from the address to the
drawn tree and from one step to another.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from viewer_samples import WORDS, open_browser, save_tokenizer, write_run  # noqa: E402

from arpo_trl.viewer import render  # noqa: E402

RUNS = {"50 in 1 step": (1, 5, 10), "5,000 in 50 steps": (50, 10, 10), "5,000 in 1 step": (1, 312, 16)}


def main() -> None:
    print(f"{'trajectories':<20}{'make, s':>10}{'MB':>8}{'open, ms':>10}{'next step, ms':>15}")
    opened = {}
    with open_browser() as browser, tempfile.TemporaryDirectory() as folder:
        for name, (steps, groups, rows) in RUNS.items():
            run_dir = Path(folder) / name
            write_run(run_dir, steps, groups, rows, segment_tokens=250)
            save_tokenizer(run_dir, list(dict.fromkeys(WORDS)))
            start = time.perf_counter()
            text = render(run_dir)
            made = time.perf_counter() - start
            (run_dir / "report.html").write_text(text, encoding="utf-8")

            page = browser.new_page(viewport={"width": 1440, "height": 900})
            start = time.perf_counter()
            page.goto((run_dir / "report.html").as_uri())
            page.wait_for_selector("body[data-ready]", state="attached")
            opened[name] = 1000 * (time.perf_counter() - start)
            switched = "–"
            if steps > 1:
                start = time.perf_counter()
                page.locator("#next-step").click()
                page.locator("#step-name", has_text="step 1 (").wait_for()
                switched = f"{1000 * (time.perf_counter() - start):.0f}"
            page.close()
            print(f"{name:<20}{made:>10.1f}{len(text) / 1e6:>8.1f}{opened[name]:>10.0f}{switched:>15}", flush=True)
    small, *large = opened.values()
    print(f"5,000 trajectories take {', '.join(f'{each / small:.1f}' for each in large)} times as long to open as 50.")


if __name__ == "__main__":
    main()
