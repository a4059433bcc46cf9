"""A window into the rollouts of a run: one HTML page, no server, no network.

    python -m arpo_trl.viewer outputs/run            # writes outputs/run/report.html

In a notebook:

    from arpo_trl.viewer import show
    show("outputs/run")

The page shows the tree of each group (trajectories as branches along a token axis, forks where they happened, entropy
as colour and thickness, rewards at the leaves), the text and the tool calls of every segment, metrics over the steps,
histograms of ΔH, P and the places of forks, the columns of the data set, and two trajectories side by side. Of an
evaluation (examples/evaluate.py) it shows the benchmarks as steps and the questions as groups, with the accepted
answers and what was answered.

What it does not do:

- It does not follow a running job: it shows the records (see [`arpo_trl.rollout.record`]) that are there when it is
  made.
- It does not run, render or link anything that a model or a tool wrote: every such text is shown as plain text.
- It does not carry token ids or per-token values. Text is decoded when the page is made, one piece per segment.
- It does not weigh rewards: where a run has several reward functions, their plain sum is offered beside each of them.

`records.py` reads the files, `page.py` turns them into what the page draws, `viewer.{html,css,js}`, `tree.js`
and `distributions.js` are the page.
"""

from .page import render, show

__all__ = ["render", "show"]
