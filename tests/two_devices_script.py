"""
Each family, split over two devices, samples and scores as it does on one; prints a line for each as JSON. A process of
its own, since PyTorch learns of the devices for good.

    python tests/two_devices_script.py sample/gemma3 score/qwen3
"""

import copy
import json
import sys
import traceback

import hybrid_models
import packed_families
import torch
import two_devices
from packed_rows import tools_tree
from transformers import GenerationConfig

from arpo_trl.rollout.engines import TransformersEngine
from arpo_trl.rollout.engines.transformers import generate_ids
from arpo_trl.scoring.shared_prefix import shared_prefix_logps

PROMPT = list(range(3, 25))
CONTEXTS = [[*PROMPT, 30, 31, 32], [*PROMPT, 40], [*PROMPT, 30, 31]]


def segments(model, split):
    """Two waves: the rows go on, and one is left."""
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=[1])
    model = two_devices.split(model) if split else model
    engine = TransformersEngine(lambda: model, lambda c, images: generate_ids(model, c, config), None, 4, 1.0, True, 1)
    with two_devices.devices(), engine.rollout():
        first = engine.sample(CONTEXTS, [6, 3, 5])
        later = [context + sample.ids + [7, 8] for context, sample in zip(CONTEXTS, first, strict=True)]
        engine.keep([later[1]])
        second = engine.sample([later[0], CONTEXTS[0]], [4, 4])
        third = engine.sample([later[1]], [4])
        found = dict(engine.lookups)
    samples = [*first, *second, *third]
    entropies = torch.tensor([entropy for sample in samples for entropy in sample.entropies])
    return [sample.ids for sample in samples], found, entropies


def scores(model, split):
    """Log-probabilities, entropies and gradients of a packed batch."""
    ids, mask, length = tools_tree()
    model = two_devices.split(model) if split else model
    with two_devices.devices():
        if split:
            ids, mask = ids.to(two_devices.FIRST), mask.to(two_devices.FIRST)
        packed = shared_prefix_logps(model, ids, mask, length, compute_entropy=True, only_if_cheaper=False)
        assert packed is not None, "rows were not packed"
        with torch.autograd.set_multithreading_enabled(False):  # there are no queues for devices that are not there
            (packed[0].sum() + packed[1].sum()).backward()
        gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
        return [packed[0].detach().cpu(), packed[1].detach().cpu(), *gradients]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return bool((one - other).norm() <= 1e-4 * other.norm() + 1e-6)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def main(families):
    for what, family in (family.split("/") for family in families):
        build = {"sample": hybrid_models.build, "score": packed_families.build_family}[what]
        run = {"sample": segments, "score": scores}[what]
        try:
            torch.manual_seed(0)
            model = build(family)
            expected = run(copy.deepcopy(model), False)
            outcome = "" if same(run(model, True), expected) else "differs"
        except Exception:
            outcome = traceback.format_exc()
        print(json.dumps({"family": f"{what}/{family}", "fault": outcome}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
