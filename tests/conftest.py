import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a forgotten download fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models here are too small to gain from a second thread, and on a busy machine threads that wait for one another
# cost minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest  # noqa: E402
import tiny  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture(scope="session")
def agent_dirs(tokenizer, tmp_path_factory):
    """Checkpoints of a small tool-calling model, one for each protocol."""
    folders = {}
    for protocol in ("chat_template", "tags"):
        folder = tmp_path_factory.mktemp("agents") / protocol
        tiny.train_agent(tokenizer, protocol).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[protocol] = str(folder)
    return folders


@pytest.fixture
def always_share():
    import packed_rows  # needs hypothesis, which the environment of vLLM has not

    with packed_rows.sharing_always():
        yield
