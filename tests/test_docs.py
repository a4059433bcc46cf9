"""The documentation is true: generated pages are fresh, links lead somewhere, names exist, messages are those of the
source, every Python block runs on a small model, and every command is understood by the program that it names.

Blocks that continue the one before say `<!-- continues -->` above them.
"""

import argparse
import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import random
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import tiny
import torch
import transformers
import trl
import viewer_samples
import yaml
from datasets import Dataset

import arpo_trl
from arpo_trl import ARPOConfig
from arpo_trl.advantages import ATTRIBUTIONS
from arpo_trl.rollout.record_files import write_records
from arpo_trl.rollout.rules import BRANCH_RULES

ROOT = Path(__file__).parent.parent
OTHERS = ["CONTRIBUTING.md", "README.md", "benchmarks/README.md", "examples/configs/README.md"]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in OTHERS)]

# Blocks that cannot run as they stand, with the reason. They are compiled, and what they import is imported.
NOT_RUN = {
    ("data.md", 0): "loads published data sets",
    ("tools.md", "my_server.py"): "starts a server that the page does not hold; see test_tool_adapters.py",
}


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """`(line above, text)` of the fenced blocks of a page."""
    found = re.findall(rf"^([^\n]*)\n```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(above.strip(), text) for above, text in found]


def maker(name: str) -> ModuleType:
    """The script that makes a page or a figure."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"make_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Fenced blocks that are neither Python nor commands, by the page and a piece of the block, with what they are
NEITHER = {
    ("data.md", "python -m arpo_trl.data"): "reads published data sets; see test_real_data.py",
    ("evaluation.md", "load_rl"): "reads a published data set; see test_data.py",
    ("README.md", "└── <think>"): "words of a run, printed by docs/make_fork.py",
    ("vllm.md", "vllm serve"): "vLLM's own command, which needs a GPU; the server is started in tests/vllm_engine/",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_tested_or_told_apart(page):
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for language, text in fences:
        excused = [reason for (name, piece), reason in NEITHER.items() if name == page.name and piece in text]
        assert language in ("python", "bash") or excused, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_named_in_a_sentence_exist(page):
    for script in re.findall(r"`(?:\S*/)?python ([\w/.]+\.py)", page.read_text("utf-8")):
        assert (ROOT / script).exists(), script


def named(cases):
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


# ------------------------------------------------------------------------------------------------- pages and files


@pytest.mark.parametrize(
    "script, made, product",
    [
        ("configuration", "page", "configuration.md"),
        ("figure", "figure", "rollout.svg"),
        ("scaling", "page", "scaling.md"),
        ("models", "page", "models.md"),
    ],
)
def test_generated_files_are_fresh(script, made, product):
    assert (ROOT / "docs" / product).read_text("utf-8") == getattr(maker(script), made)(), f"run docs/make_{script}.py"


CONFIGS = {"Qwen2.5": transformers.Qwen2Config, "Llama": transformers.LlamaConfig, "Qwen3": transformers.Qwen3Config}


@pytest.mark.parametrize("name", ["Qwen2.5-3B", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen3-8B", "Qwen3-14B"])
def test_parameters_of_the_scaling_guide_are_those_of_transformers(name):
    scaling = maker("scaling")
    shape = scaling.MODELS[name]
    config = CONFIGS[name.split("-")[0]](
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = [layer for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear)]

    assert scaling.parameters(shape) == model.num_parameters()
    assert scaling.linear_parameters(shape) == sum(layer.weight.numel() for layer in linear)
    assert scaling.lora_parameters(shape, 16) == sum(16 * (x.in_features + x.out_features) for x in linear)


def test_formulas_of_the_scaling_guide():
    scaling = maker("scaling")
    # One block of one linear layer's worth by hand: hidden 2, one head of 1, so q, k, v, o are 2 × 1;
    # feed-forward 2 × 3
    shape = scaling.Shape(layers=1, hidden=2, intermediate=3, heads=1, kv_heads=1, vocab=10, head_dim=1)
    linear, whole, adapter = 4 * 2 + 3 * 6, 26 + 2 * 2 + 2 + 2 * 20, 1 * (4 * 3 + 3 * 5)

    assert (scaling.linear_parameters(shape), scaling.parameters(shape)) == (linear, whole) == (26, 72)
    assert scaling.lora_parameters(shape, 1) == adapter == 27
    assert scaling.training_bytes(shape, "mixed precision") == 1152
    assert scaling.training_bytes(shape, "bfloat16") == 576
    assert scaling.training_bytes(shape, "ZeRO-2", 4) == 144 + 252
    assert scaling.training_bytes(shape, "ZeRO-3", 4) == 288
    assert scaling.training_bytes(shape, "LoRA") == 144 + 16 * 16 * adapter
    assert scaling.training_bytes(shape, "QLoRA") == pytest.approx(26 * 0.515875 + 2 * 46 + 16 * 16 * adapter)
    # Keys and values, 36 layers × 8 heads × 128, 2 bytes each: 147,456 bytes
    assert scaling.kv_bytes(scaling.MODELS["Qwen3-8B"]) == 144 * 1024
    assert scaling.checkpoint_bytes(shape, 5) == 20 and scaling.block_bytes(shape, 5) == 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for path in re.findall(r"`((?:docs|examples|tests|benchmarks|arpo_trl)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_exist(page):
    for name in set(re.findall(r"\barpo_trl(?:\.\w+)+", page.read_text("utf-8"))):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
                break
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("arpo_trl"):
                    pytest.skip(f"{name} needs {error.name}")
        functools.reduce(getattr, parts[length:], found)


SOURCES = [
    *sorted((ROOT / "arpo_trl").rglob("*.py")),
    *(path for folder in ("examples", "benchmarks", "tests") for path in sorted((ROOT / folder).glob("*.py"))),
    *sorted((ROOT / "examples" / "environments").glob("*.py")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_source_refers_to_exists(path):
    text = path.read_text("utf-8")
    for name in set(re.findall(r"\[`~(arpo_trl(?:\.\w+)+)`\]", text)):
        parts = name.split(".")
        paths = [ROOT.joinpath(*parts[:n]) for n in range(len(parts), 0, -1)]
        module = next(path for path in paths if path.is_dir() or path.with_suffix(".py").exists())
        source = (module / "__init__.py" if module.is_dir() else module.with_suffix(".py")).read_text("utf-8")
        below = parts[len(module.relative_to(ROOT).parts) :]
        assert not below or re.search(rf"\b{below[0]}\b", source), name
    files = {file.name for folder in ("arpo_trl", "examples", "tests") for file in (ROOT / folder).rglob("*.py")}
    for name in re.findall(r"`(\w+\.py)`", text) if path.is_relative_to(ROOT / "arpo_trl") else []:
        assert name in files, name
    for name in re.findall(r"`((?:docs|examples|benchmarks|arpo_trl)/[\w./]*\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_settings_on_the_right_of_the_migration_table_exist():
    text = (ROOT / "docs" / "migration.md").read_text("utf-8")
    fields = ARPOConfig.__dataclass_fields__
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `") and " | " in line]
    settings = [name for row in rows for name in re.findall(r"`(\w+)(?:=[^`()]*)?`", row)]

    assert len(settings) > 30
    others = {"top_k", "make_arpo_reward"}  # an argument of a search, a function
    assert [name for name in settings if name not in fields and name not in others] == []


@pytest.mark.parametrize("setting, table", [("branch_rule", BRANCH_RULES), ("advantage_attribution", ATTRIBUTIONS)])
def test_the_table_of_methods_is_that_of_the_code(setting, table):
    rows = re.findall(
        rf"^\| `{setting}=\"(\w+)\"` \| `([\w.]+)` \| .+ "
        r"\| \[([\d.]+)\]\(https://huggingface.co/papers/([\d.]+)\) \|$",
        (ROOT / "docs" / "concepts.md").read_text("utf-8"),
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == list(table)
    for name, path, shown, linked in rows:
        module, _, attribute = path.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is table[name]
        assert shown == linked == getattr(table[name], "paper", linked)
        # The docstring of the function, or of the class or its module, names the same paper
        told = f"{table[name].__doc__} {importlib.import_module(module).__doc__}"
        assert linked in told or linked in told.replace("papers/", "")


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == arpo_trl.__version__
    assert citation["authors"] == [{"name": "The arpo-trl authors"}]
    paper = citation["references"][0]
    assert "2507.19849" in paper["url"] and len(paper["authors"]) == 14


def test_changelog_tells_of_this_version():
    assert f"## {arpo_trl.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


# -------------------------------------------------------------------------------------------------------- messages


def templates(path: Path) -> list[str]:
    """Every string of a source file, with `…` where a value is put in."""
    found = []
    for item in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(item, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in item.values))
        elif isinstance(item, ast.Constant) and isinstance(item.value, str):
            found.append(re.sub(r"%[sdr]", "…", item.value))
    return found


def raised(path: Path) -> list[str]:
    """The messages that a source file raises."""
    calls = [item.exc for item in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(item, ast.Raise)]
    arguments = [call.args[0] for call in calls if isinstance(call, ast.Call) and call.args]
    return [
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in message.values)
        if isinstance(message, ast.JoinedStr)
        else message.value
        for message in arguments
        if isinstance(message, ast.JoinedStr) or isinstance(message, ast.Constant)
    ]


def quoted_messages() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    return [" ".join(message.split()) for message in re.findall(r"^- ``(.+?)``(?!`)", text, re.MULTILINE | re.DOTALL)]


def holds(template: str, message: str) -> bool:
    """Whether the fixed parts of a quoted message occur in the template, in order."""
    position = 0
    for part in message.split("…"):
        part = part.strip()
        position = template.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_every_quoted_message_is_in_the_source():
    sources = [*(ROOT / "arpo_trl").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    known = [template for path in sources for template in templates(path)]
    messages = quoted_messages()

    assert len(messages) > 60
    assert [message for message in messages if not any(holds(template, message) for template in known)] == []


def test_every_message_has_a_remedy():
    messages = quoted_messages()
    missing = [
        f"{path.relative_to(ROOT)}: {template}"
        for path in sorted((ROOT / "arpo_trl").rglob("*.py"))
        for template in raised(path)
        # three words at least: what is shorter passes on the message of something else
        if len(re.findall(r"[a-z]{2,}", template)) > 2
        and "has no attribute" not in template
        and not any(holds(template, message) for message in messages)
    ]
    assert missing == [], "docs/troubleshooting.md lacks them"


# -------------------------------------------------------------------------------------------------------- snippets


def python_cases():
    for page in PAGES:
        found = blocks(page, "python")
        for number, (above, text) in enumerate(found):
            before = found[number - 1][1] if above == "<!-- continues -->" else ""
            excused = [
                reason
                for (name, mark), reason in NOT_RUN.items()
                if name == page.name and (mark == number or isinstance(mark, str) and mark in text)
            ]
            yield f"{page.stem}-{number}", before, text, not excused


@pytest.fixture(scope="module")
def model_dir(tokenizer, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    tiny.build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def small(model_dir, tmp_path, monkeypatch):
    """Where snippets run: settings of the smallest run, the small model for every name of a model, an empty folder."""
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    run = {"max_steps": 1, "max_completion_length": 60, "save_strategy": "no", "disable_tqdm": True}

    def shrunk(config):
        return lambda *args, **settings: config(*args, **settings | cpu | run)

    monkeypatch.setattr(arpo_trl, "ARPOConfig", shrunk(ARPOConfig), raising=False)
    monkeypatch.setattr(trl, "GRPOConfig", shrunk(trl.GRPOConfig))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "run"
    write_records(folder, viewer_samples.make_group(random.Random(0), 0, 0, 8, 60), 0, 0, 1, append=False)
    return lambda text: text.replace('"Qwen/Qwen3-0.6B"', repr(model_dir))


def what_the_reader_brings() -> dict:
    """What README.md's first block leaves to its reader."""

    def correct(completions, answer, **kwargs):
        return [float(answer in str(completion)) for completion, answer in zip(completions, answer, strict=True)]

    def search(query: str) -> str:
        """
        Search.

        Args:
            query: What for.
        """
        return query

    def python(code: str) -> str:
        """
        Run code.

        Args:
            code: The code.
        """
        return code

    rows = [{"prompt": tiny.question(a, 2), "answer": str(a + 2)} for a in range(8)]
    return {"correct": correct, "search": search, "python": python, "dataset": Dataset.from_list(rows)}


@pytest.mark.parametrize("before, text, runs", named(python_cases()))
def test_python_block(before, text, runs, small, request):
    tree = ast.parse(text)
    if not runs:
        imports = [item for item in tree.body if isinstance(item, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "imports", "exec"), {})
        return
    variables = {"__name__": "snippet"}
    if request.node.callspec.id.startswith("README"):
        variables |= what_the_reader_brings()
    if before:
        exec(small(before.replace("trainer.train()", "")), variables)
    exec(compile(small(text), "snippet", "exec"), variables)


def test_the_metrics_of_the_page_are_those_that_are_logged():
    from collections import defaultdict

    from arpo_trl.reporting import PHASES
    from arpo_trl.rollout.metrics import rollout_metrics, sum_names
    from arpo_trl.rollout.observations import KINDS, PLACES, Observations, observation_metrics
    from arpo_trl.scoring.tally import NotPacked, chunk_counts, scoring_metrics

    page = (ROOT / "docs" / "records.md").read_text("utf-8")
    sums = dict.fromkeys(sum_names(["<name>"]), 1.0)
    logged = set(rollout_metrics(sums, [1.0], ["<name>"]))
    logged |= set(scoring_metrics(chunk_counts(1, 1, NotPacked("<reason>", ""))))
    logged |= {f"arpo/seconds/{phase}" for phase in PHASES}
    everything = Observations(defaultdict(lambda: 1.0), [1.0], [1.0], [1], [1.0])
    logged |= {"arpo/waves", *observation_metrics(everything)}
    prefixes = ("| `arpo/", "| `tools/", "| `completions/")
    told = set()
    for line in page.splitlines():
        if line.startswith(prefixes):
            names = re.findall(r"`(.+?)`", line.split(" | ")[0])
            stem = next((name.rpartition("_")[0] for name in names if name.endswith("_std")), "")
            told |= {name.replace("…_", f"{stem}_").replace("…", "tools/<name>") for name in names}
    for variable, values in (("<kind>", KINDS), ("<place>", PLACES)):
        told = {name.replace(variable, value) for name in told for value in values}
    assert told == logged


def test_the_keys_of_the_page_are_those_of_a_record():
    from arpo_trl.advantages import Span
    from arpo_trl.rollout.record import rollout_records
    from arpo_trl.rollout.tree import CallOfRow, Group, Segment, Trajectory
    from arpo_trl.tools import ToolCall

    row = Trajectory(0, [1], completion_ids=[2], tool_mask=[1], segments=[Segment(0, 1)])
    row.calls = [CallOfRow(ToolCall("t"))]
    (record,) = rollout_records(0, [Group(range(1), 1, 1, 0, [row])], {}, [0.0], [[Span(0, 1, 0.0)]])
    page = (ROOT / "docs" / "records.md").read_text("utf-8")

    rows = [line.split(" | ")[0] for line in page.split("## Metrics")[0].splitlines() if line.startswith("| `")]
    assert {name for line in rows for name in re.findall(r"`(\w+)`", line)} == set(record)
    for part in (record["segments"][0], record["tool_calls"][0], record["shared_advantages"][0]):
        assert f"`{{{', '.join(part)}}}`" in page


# -------------------------------------------------------------------------------------------------------- commands


def command_cases():
    for page in PAGES:
        lines = [line for _, text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
        for number, line in enumerate(line for line in lines if line.strip()):
            yield f"{page.stem}-{number}", line


class Parsed(Exception):
    pass


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """Programs end once they have understood their arguments. `my_module` is what docs/extending.md says."""
    code = "".join(text for _, text in blocks(ROOT / "docs" / "extending.md", "python"))
    (tmp_path / "my_module.py").write_text(code, "utf-8")
    monkeypatch.delitem(sys.modules, "my_module", raising=False)

    def stop_after(parse, extra=()):
        def parse_and_stop(self, args=None, *rest, **options):
            parse(self, [*(sys.argv[1:] if args is None else args), *extra], *rest, **options)
            raise Parsed

        return parse_and_stop

    cpu = ["--bf16", "False", "--use_cpu", "True"]
    real = trl.TrlParser.parse_args_and_config

    def parse_config(self, args=None, **options):
        extra = cpu if any(hasattr(kind, "use_cpu") for kind in self.dataclass_types) else []
        real(self, [*sys.argv[1:], *extra], **options)
        raise Parsed

    monkeypatch.setattr(trl.TrlParser, "parse_args_and_config", parse_config)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    folders = [*(str(ROOT / name) for name in ("examples", "examples/environments", "benchmarks")), str(tmp_path)]
    monkeypatch.setattr(sys, "path", [*folders, *sys.path])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import")
@pytest.mark.parametrize("line", named(command_cases()))
def test_command_is_understood(line, parse_only, monkeypatch):
    program, *arguments = shlex.split(line, comments=True)
    if program == "pip":
        assert arguments[0] == "install"
        return
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if program == "accelerate":
        arguments = arguments[arguments.index(next(a for a in arguments if a.endswith(".py"))) :]
    elif program not in ("tensorboard", "trackio"):
        assert Path(program).name == "python", line
    if arguments[:2] == ["-m", "pytest"]:
        assert (ROOT / arguments[2]).exists()
        return
    if program in ("tensorboard", "trackio"):
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=program)
        start, arguments = lambda **_: script.load()(), [program, *arguments]
        if program == "trackio":  # its arguments are parsed in two steps
            monkeypatch.setattr("trackio.cli.show", Mock(side_effect=Parsed))
    elif arguments[0] == "-m":
        start, arguments = functools.partial(runpy.run_module, arguments[1]), arguments[1:]
    else:
        script = ROOT / arguments[0]
        if len(arguments) == 1 and "parse_args" not in script.read_text():  # it would run from beginning to end
            return
        start = functools.partial(runpy.run_path, str(script))
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(Parsed):
        try:
            start(run_name="__main__")
        except ModuleNotFoundError as error:
            if "examples/environments/" not in line:
                raise
            pytest.skip(f"`make environments` installs {error.name}")


def test_extras_that_the_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for name in re.findall(r"arpo-trl\[(\w+)\]", page.read_text("utf-8"))}
    assert named and named <= set(extras)


def test_the_readme_shows_the_results_as_measured():
    numbers = json.loads((ROOT / "docs" / "results" / "numbers.json").read_text())
    table = runpy.run_path(str(ROOT / "examples" / "reproduce_report.py"))["readme_table"](numbers)
    assert table in (ROOT / "README.md").read_text()


def test_a_fork_is_printed_with_its_words_beside_the_row_that_it_left():
    shared, other, own = "<search>a</search><result>b\nc</result>", "<answer>1</answer>", "so <answer>2</answer>"
    parent = {"completion_ids": [*(shared + other)], "rewards": {"r": 0.0}, "advantage": -0.5}
    fork = {"completion_ids": [*(shared + own)], "rewards": {"r": 1.0}, "advantage": 0.5, "fork_token": len(shared)}
    assert maker("fork").draw(fork, parent, "Which?", "".join).splitlines() == [
        "Which?",
        "│ <search>a</search>",
        "│ <result>b ⏎ c</result>",
        "├── <answer>1</answer>",
        "│   reward 0, advantage -0.50",
        "└── so",
        "    <answer>2</answer>",
        "    reward 1, advantage +0.50",
    ]
