"""What `test_evaluation_scale.py` launches on two processes: `… evaluation_script.py <folder> <dies or lives>`."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import PartialState
from scripted import ScriptedModel, character_tokenizer, plan

from arpo_trl.evaluation import Agent, evaluate

QUESTIONS = [{"prompt": f"{number}Q?", "answer": "yes" if number % 2 else "no"} for number in range(7)]


def agent(**settings) -> Agent:
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    made = Agent(ScriptedModel(tokenizer, [plan("Ayes")]).eval(), tokenizer, tool_protocol="tags", **settings)
    made.generation_config.use_cache = False
    return made


def score(completions, answer, **columns):
    return [float(right in completion) for completion, right in zip(completions, answer, strict=True)]


def main(folder: Path, dies: bool) -> None:
    state = PartialState(cpu=True)
    asked, dying = [], [dies]  # a list, so that both runs score with the same function

    def counted(completions, prompts, **columns):
        if dying[0] and state.process_index == 1 and len(asked) == 2:
            os.kill(os.getpid(), 9)
        asked.extend(prompts)
        return score(completions, **columns)

    sampling = agent(batch_size=2)
    returned = evaluate(sampling, QUESTIONS, counted, 2, folder / "records.jsonl", score, state=state)
    facts = {"asked": asked, "returned": returned}
    (folder / f"process-{state.process_index}.json").write_text(json.dumps(facts))
    sampling.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "dies")
