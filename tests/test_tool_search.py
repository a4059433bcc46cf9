"""Local search: BM25, dense, hybrid, and the replay of recorded searches."""

import json
import math
import multiprocessing
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from transformers.utils import get_json_schema

from arpo_trl.tools.search import BM25Search
from arpo_trl.tools.search.dense import DenseSearch, HybridSearch, reciprocal_rank_fusion
from arpo_trl.tools.search.passages import NO_RESULTS, format_passages, read_dataset, read_jsonl, to_array
from arpo_trl.tools.search.replay import ReplaySearch

PASSAGES = [
    "Mira Dolen was born in Vesk.",
    "Vesk lies on the river Orn.",
    "The river Orn flows through Vesk and Talmar.",
    "Talmar is known for its cheese.",
]
RECORDED = Path(__file__).parents[2] / "shared" / "data" / "arpo_search_cache.json"


def hashing_encoder(texts: list[str]) -> np.ndarray:
    """Counts letters: similar spelling, similar vector, even where no word is the same."""
    vectors = np.zeros((len(texts), 26))
    for row, text in zip(vectors, texts, strict=True):
        for letter in re.findall("[a-z]", text.lower()):
            row[ord(letter) - ord("a")] += 1
    return vectors


# --- BM25


def test_bm25_returns_the_passage_that_holds_the_words():
    assert BM25Search(PASSAGES, top_k=1).search("Where was Mira Dolen born?") == f"Page 1: {PASSAGES[0]}"


def test_bm25_score_is_that_of_the_formula():
    # two passages of 2 and 4 words, "b" in both, average length 3; Lucene's idf and k1 = 1.5, b = 0.75
    index = BM25Search(["b c", "b b d e"], k1=1.5, b=0.75)
    idf = math.log(1 + (2 - 2 + 0.5) / (2 + 0.5))
    expected = {
        1: idf * 2 / (2 + 1.5 * (0.25 + 0.75 * 4 / 3)),
        0: idf * 1 / (1 + 1.5 * (0.25 + 0.75 * 2 / 3)),
    }
    assert dict(index.rank("b", 2)) == pytest.approx(expected)


def test_passages_without_a_word_of_the_query_are_no_results():
    index = BM25Search(PASSAGES, top_k=4)
    assert [passage.position for passage in index.retrieve("cheese")] == [3]
    assert (
        index.search("zeppelin") == index.search("the of and") == index.search("?!") == index.search("") == NO_RESULTS
    )


def test_ties_are_broken_by_position_wherever_the_cut_falls():
    index = BM25Search(["same words"] * 50 + ["same words here"] * 50)
    for top_k in (1, 3, 7, 49):
        assert [position for position, _ in index.rank("same words", top_k)] == list(range(top_k))


def test_search_has_a_schema_and_refuses_what_is_not_one_query():
    index = BM25Search(PASSAGES)
    function = get_json_schema(index.search)["function"]
    assert function["name"] == "search"
    assert function["parameters"]["required"] == ["query"]
    with pytest.raises(TypeError, match="one string, not list"):
        index.search(["Mira", "Dolen"])


@pytest.mark.parametrize(
    "passages, complaint",
    [
        ([], "empty"),
        (["a", None], "1 nulls"),
        ([1, 2], "sequence of strings"),
        ("corpus.jsonl", "one string"),
        (["...", "!"], "no word"),
    ],
)
def test_passages_that_cannot_be_searched_are_refused(passages, complaint):
    with pytest.raises(ValueError, match=complaint):
        BM25Search(passages)


def test_top_k_below_one_is_refused():
    with pytest.raises(ValueError, match="top_k must be at least 1, not 0"):
        BM25Search(PASSAGES, top_k=0)


# --- reading


def test_the_readers_give_the_same_index(tmp_path):
    rows = [{"id": str(i), "contents": text} for i, text in enumerate(PASSAGES)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet", row_group_size=2)
    indices = [
        BM25Search(PASSAGES),
        BM25Search.from_jsonl(tmp_path / "corpus.jsonl"),
        BM25Search.from_parquet(tmp_path / "corpus.parquet"),
        BM25Search.from_dataset(Dataset.from_list(rows)),
        BM25Search(Dataset.from_list(rows)["contents"]),
    ]
    for query in ("Orn", "Vesk Talmar"):
        assert len({index.search(query) for index in indices}) == 1
        assert indices[0].search(query) != NO_RESULTS


def test_a_selection_of_a_dataset_is_honoured():
    dataset = Dataset.from_dict({"contents": ["a", "b", "c"]}).select([2, 0])
    assert read_dataset(dataset).to_pylist() == ["c", "a"]


def test_a_wrong_column_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"contents": "fine"}\n{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"line 2 has no string under text_column='contents'; it has \['text'\]"):
        read_jsonl(path)
    path.write_text('{"contents": "fine"}\n{"contents": "ha')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_jsonl(path)
    dataset = Dataset.from_dict({"body": ["a"], "n": [1]})
    with pytest.raises(ValueError, match=r"no column text_column='contents'; it has \['body', 'n'\]"):
        BM25Search.from_dataset(dataset)
    with pytest.raises(ValueError, match="int64"):
        BM25Search.from_dataset(dataset, text_column="n")


def test_passages_are_numbered_from_one():
    assert format_passages(["a", "b"]) == "Page 1: a\nPage 2: b"
    assert format_passages([]) == NO_RESULTS


# --- saving


def test_a_loaded_index_answers_as_the_one_that_was_saved(tmp_path):
    index = BM25Search(PASSAGES + ["Čeština, Ελληνικά, 数学 🙂"], top_k=2)
    index.save(tmp_path / "index")
    allocated = pa.total_allocated_bytes()
    loaded = BM25Search.load(tmp_path / "index", top_k=2)
    # mapped, not read
    assert isinstance(loaded._index.scores["data"], np.memmap)
    assert pa.total_allocated_bytes() == allocated
    for query in ("Orn", "Vesk river", "ελληνικά", "nothing"):
        assert loaded.retrieve(query) == index.retrieve(query)


def test_saving_over_an_index_and_loading_half_of_one_are_refused(tmp_path):
    index = BM25Search(PASSAGES)
    index.save(tmp_path / "index")
    with pytest.raises(FileExistsError, match="not empty"):
        index.save(tmp_path / "index")
    (tmp_path / "index" / "passages.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="no saved index"):
        BM25Search.load(tmp_path / "index")


def _search_saved(directory: str) -> str:
    return BM25Search.load(directory, top_k=1).search("Mira")


def test_processes_share_a_saved_index(tmp_path):
    BM25Search(PASSAGES).save(tmp_path / "index")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_search_saved, [str(tmp_path / "index")] * 4) == [f"Page 1: {PASSAGES[0]}"] * 4


@pytest.mark.parametrize("loaded", [False, True])
def test_threads_can_search_one_index(tmp_path, loaded):
    index = BM25Search([f"word{i} common" for i in range(500)], top_k=2)
    if loaded:
        index.save(tmp_path / "index")
        index = BM25Search.load(tmp_path / "index", top_k=2)
    queries = [f"word{i} common" for i in range(500)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(index.search, queries)) == [index.search(query) for query in queries]
    assert index.retrieve("word321 common")[0].position == 321


# --- dense and hybrid


def test_dense_search_orders_by_cosine():
    vectors = {"east": [2.0, 0.0], "north": [0.0, 5.0], "north-east": [1.0, 1.0], "mostly east": [3.0, 1.0]}
    index = DenseSearch(["east", "north", "north-east"], lambda texts: np.array([vectors[text] for text in texts]))
    found = index.rank("mostly east", 3)
    assert [position for position, _ in found] == [0, 2, 1]
    assert [score for _, score in found] == pytest.approx([3 / 10**0.5, 4 / 20**0.5, 1 / 10**0.5])


def test_a_query_can_have_an_encoder_of_its_own():
    index = DenseSearch(
        ["a", "b"],
        encoder=lambda texts: np.array([[1.0, 0.0] if text == "a" else [0.0, 1.0] for text in texts]),
        query_encoder=lambda texts: np.array([[0.0, 1.0]] * len(texts)),
    )
    assert index.retrieve("anything", 1)[0].text == "b"


def test_dense_search_finds_what_shares_no_word():
    assert BM25Search(PASSAGES).search("cheeses") == NO_RESULTS
    assert DenseSearch(["xyz", "cheese"], hashing_encoder, top_k=1).search("cheeses") == "Page 1: cheese"


def test_passages_are_encoded_in_batches_and_in_order():
    sizes = []

    def encoder(texts):
        sizes.append(len(texts))
        return np.array([[1.0, float(text)] for text in texts])

    index = DenseSearch([str(i) for i in range(2500)], encoder)
    assert sizes == [1024, 1024, 452]
    assert index._embeddings.shape == (2500, 2)
    np.testing.assert_allclose(index._embeddings[2000], np.array([1, 2000]) / math.hypot(1, 2000), rtol=1e-6)


def test_an_encoder_of_the_wrong_shape_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(4, d\), not \(26,\)"):
        DenseSearch(PASSAGES, lambda texts: hashing_encoder(texts)[0])
    DenseSearch(PASSAGES, hashing_encoder).save(tmp_path / "index")
    other = DenseSearch.load(tmp_path / "index", encoder=lambda texts: np.ones((len(texts), 3)))
    with pytest.raises(ValueError, match="3 dimensions and the index has 26"):
        other.search("Vesk")


def test_reciprocal_rank_fusion_by_hand():
    fused = dict(reciprocal_rank_fusion([[(7, 9.0), (3, 1.0)], [(3, 0.5), (4, 0.4)]]))
    assert fused == pytest.approx({3: 1 / 62 + 1 / 61, 7: 1 / 61, 4: 1 / 62})
    assert [position for position, _ in reciprocal_rank_fusion([[(9, 1.0)], [(2, 1.0)]])] == [2, 9]


def test_hybrid_search_prefers_what_both_lists_hold():
    passages = ["zzz talmar", "cheese talmra", "talmar cheese", "qqq"]
    index = HybridSearch(passages, hashing_encoder, top_k=2)
    assert [position for position, _ in BM25Search(passages).rank("talmar cheeze", 2)][0] == 0
    assert index.retrieve("talmar cheese")[0].position == 2
    # and still finds what only one of them does
    assert index.retrieve("cheeses", 1)[0].text in ("cheese talmra", "talmar cheese")


@pytest.mark.parametrize("search", [DenseSearch, HybridSearch])
def test_dense_and_hybrid_indices_can_be_saved(tmp_path, search):
    index = search(PASSAGES, hashing_encoder, top_k=2)
    index.save(tmp_path / "index")
    loaded = search.load(tmp_path / "index", hashing_encoder, top_k=2)
    for query in ("river Orn", "cheezy", "Mira"):
        assert loaded.retrieve(query) == index.retrieve(query)
    assert get_json_schema(loaded.search)["function"]["name"] == "search"


# --- replay


def test_replay_answers_what_was_recorded():
    replay = ReplaySearch({"capital of France": "Page 1: Paris", "capital of Peru": "Page 1: Lima"})
    assert replay.search("capital of Peru") == replay.search(" capital of Peru\n") == "Page 1: Lima"
    assert replay.search("Peru: CAPITAL?") == 'Results for "capital of Peru":\nPage 1: Lima'


def test_replay_misses_with_a_text():
    replay = ReplaySearch({"capital of France": "Page 1: Paris", "capital of Peru": "Page 1: Lima"})
    for query in ("capital of Chile", "zeppelin", "", "the"):
        assert replay.search(query) == NO_RESULTS


def test_similarity_by_hand():
    replay = ReplaySearch({"capital France": "a", "capital Peru": "b"})
    # of 2 queries "capital" is in 2, "peru" in 1, and "chile" in none
    weight = [math.log(1 + (2 - n + 0.5) / (n + 0.5)) for n in (2, 1, 0)]
    assert replay.similarity("capital Chile", "capital Peru") == pytest.approx(weight[0] / sum(weight))
    assert replay.similarity("peru", "capital Peru") == pytest.approx(weight[1] / (weight[0] + weight[1]))
    assert replay.nearest("Peru capital") == ("capital Peru", pytest.approx(1))


def test_the_threshold_decides():
    recorded = {"capital France": "a", "capital Peru": "b"}
    similarity = ReplaySearch(recorded).similarity("Peru", "capital Peru")
    assert ReplaySearch(recorded, min_similarity=similarity - 0.01).search("Peru") != NO_RESULTS
    assert ReplaySearch(recorded, min_similarity=similarity + 0.01).search("Peru") == NO_RESULTS


def test_recordings_that_cannot_be_replayed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="entry of 'q' does not"):
        ReplaySearch({"q": ["a"]})
    with pytest.raises(ValueError, match="min_similarity must be above 0 and at most 1, not 0"):
        ReplaySearch({"q": "a"}, min_similarity=0)
    (tmp_path / "cache.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        ReplaySearch.from_json(tmp_path / "cache.json")


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded searches are not part of the repository")
def test_the_published_recordings_replay():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    replay = ReplaySearch.from_json(RECORDED)
    assert all(replay.search(query) == text for query, text in recorded.items())
    # a model that leaves out the prefix some queries were recorded with still gets their results
    prefix = "search query: "
    stripped = [query for query in recorded if query.startswith(prefix)]
    nearest = [replay.nearest(query.removeprefix(prefix)) for query in stripped]
    assert sum(
        near == query and score >= 0.7 for (near, score), query in zip(nearest, stripped, strict=True)
    ) > 0.9 * len(stripped)
    # the same question about somebody else is not answered
    assert replay.search("search query: When did Zorblatt Quuxley die?") == NO_RESULTS


def test_one_array_serves_several_indices():
    array = to_array(PASSAGES)
    assert to_array(array) is array
    assert BM25Search(array).passages is array
