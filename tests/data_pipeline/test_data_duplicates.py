"""Exact and near duplicates: what goes and in favour of which, for any order and after kills."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.configs.corpus import CleanConfig, NearDuplicatesConfig
from shoal.configs.errors import DataError
from shoal.data_pipeline import candidates, matching
from shoal.data_pipeline.documents import Document
from shoal.data_pipeline.duplicates import find_duplicates
from shoal.data_pipeline.minhash import Shingler, save_keys, sign_piece
from shoal.data_pipeline.stages import Stage
from shoal.data_pipeline.store import write_documents

NEAR = CleanConfig()
EXACT_ONLY = CleanConfig(near_duplicates=None)
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in "lmnrst"]


def draw_words(count: int, seed: object) -> list[str]:
    """Words of which some are frequent, as in a language."""
    chooser = random.Random(f"words {seed}")
    return [VOCABULARY[min(299, int(chooser.paretovariate(0.4)))] for _ in range(count)]


def edit(text: str, share: float, seed: object) -> str:
    """Change a share of the words: another one, none, or one more."""
    chooser = random.Random(f"edit {seed}")
    words = text.split()
    for place in chooser.sample(range(len(words)), max(1, round(share * len(words)))):
        other = chooser.choice(VOCABULARY)
        words[place] = chooser.choice([other, "", f"{words[place]} {other}"])
    return " ".join(" ".join(words).split())


def count_jaccard(one: str, other: str, ngram: int = 2) -> float:
    """Similarity by Python's own sets of words, as an independent measure."""
    sets = []
    for text in (one, other):
        words = [word.strip(".,") for word in text.lower().split()]
        sets.append({tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def name_texts(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", text, f"domain{i % 2}", "made") for i, text in enumerate(texts)]


@dataclass
class Search:
    """A corpus in pieces, searched for duplicates."""

    folder: Path
    documents: list[Document]
    config: CleanConfig = NEAR
    piece: int = 40
    ran: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.pieces, self.keys = [], []
        for first in range(0, len(self.documents), self.piece):
            here = self.documents[first : first + self.piece]
            self.pieces.append(self.folder / f"piece-{first:06d}.arrow")
            self.keys.append(self.folder / f"keys-{first:06d}.npy")
            write_documents(self.pieces[-1], here)
            texts = [document.text for document in here]
            save_keys(self.keys[-1], sign_piece(texts, self.config.near_duplicates))

    def run_stage(self, stage: Stage) -> None:
        for task in range(stage.tasks):
            if not stage.is_done(task):
                self.ran.append((stage.name, task))
                stage.run(task)
                assert stage.is_done(task)

    def search(self, run: Callable[[Stage], None] | None = None) -> list[Path]:
        work = self.folder / "work"
        return find_duplicates(self.pieces, self.keys, self.config, work, run or self.run_stage)

    def find(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Ids of what stays, and the removals."""
        masks = self.search()
        keep = [bool(kept) for mask in masks for kept in np.load(mask)]
        lines = [line for mask in masks for line in mask.with_suffix(".jsonl").open()]
        kept = [d.id for d, stays in zip(self.documents, keep, strict=True) if stays]
        return kept, [json.loads(line) for line in lines]


def test_first_of_exact_copies_stays(tmp_path: Path) -> None:
    texts = ["alpha beta", "gamma delta", "alpha beta", "Alpha beta", "alpha beta"]
    kept, removed = Search(tmp_path, name_texts(texts), EXACT_ONLY, piece=2).find()
    assert kept == ["d0", "d1", "d3"]
    assert removed == [
        {
            "id": name,
            "source": "made",
            "domain": "domain0",
            "reason": "exact_duplicate",
            "match": "d0",
            "similarity": None,
        }
        for name in ("d2", "d4")
    ]


def test_copies_are_near_duplicates_where_exact_is_off(tmp_path: Path) -> None:
    config = CleanConfig(exact_duplicates=False)
    kept, removed = Search(tmp_path, name_texts(["a b c", "a b c", "x y z"]), config).find()
    assert kept == ["d0", "d2"]
    assert [(r["reason"], r["match"], r["similarity"]) for r in removed] == [
        ("near_duplicate", "d0", 1.0)
    ]


def test_nothing_asked_nothing_removed(tmp_path: Path) -> None:
    config = CleanConfig(exact_duplicates=False, near_duplicates=None)
    assert Search(tmp_path, name_texts(["a"] * 3), config).find() == (["d0", "d1", "d2"], [])


def test_planted_near_duplicates_are_found_and_their_similarity_is_true(tmp_path: Path) -> None:
    """Recall of at least 95 % where 5 to 10 % of the words are changed; nothing else goes."""
    originals = [
        Document(f"o{i}", " ".join(draw_words(80 + i, i)), "bio", "made") for i in range(120)
    ]
    chooser = random.Random(0)
    copies = [
        Document(f"c{d.id}", edit(d.text, chooser.uniform(0.05, 0.1), d.id), "law", "other")
        for d in originals
    ]
    documents = originals + copies
    chooser.shuffle(documents)
    kept, removed = Search(tmp_path, documents).find()
    place = {document.id: number for number, document in enumerate(documents)}
    assert len(removed) >= 0.95 * len(copies)
    for removal in removed:
        one, other = documents[place[removal["id"]]], documents[place[removal["match"]]]
        assert one.id.lstrip("c") == other.id.lstrip("c")
        assert place[other.id] < place[one.id] and other.id in kept
        assert removal["similarity"] == count_jaccard(one.text, other.text) >= 0.6
        assert (removal["source"], removal["domain"]) == (one.source, one.domain)
    assert len(kept) + len(removed) == len(documents)


def test_pages_of_one_template_are_kept(tmp_path: Path) -> None:
    """The same sentences about something else each time, far above the threshold."""
    frame = "{n} is rare. " + " ".join(draw_words(60, "frame")) + " cure {n}. doctors ask {n}."
    texts = [frame.format(n=f"name{i}") for i in range(60)]
    assert count_jaccard(texts[0], texts[1]) > 0.75
    documents = name_texts(texts)
    documents.append(Document("copy", edit(texts[30], 0.05, 1), "bio", "made"))
    kept, removed = Search(tmp_path / "kept", documents).find()
    assert [(r["id"], r["match"]) for r in removed] == [("copy", "d30")]
    near = NearDuplicatesConfig(keep_renamed=False)
    kept, _ = Search(tmp_path / "gone", documents, CleanConfig(near_duplicates=near)).find()
    assert kept == ["d0"]


def make_chain() -> list[Document]:
    """A ~ B ~ C, but A and C are not similar enough."""
    words = draw_words(200, "chain")
    other = [f"x{i}" for i in range(60)]
    texts = [words, other[:28] + words[28:], other[:56] + words[56:]]
    return [Document(name, " ".join(t), "", "") for name, t in zip("ABC", texts, strict=True)]


@pytest.mark.parametrize(
    ("order", "stays", "matches"),
    [
        ("ABC", "AC", {"B": "A"}),  # B goes, so that C has nothing to match
        ("BAC", "B", {"A": "B", "C": "B"}),
        ("ACB", "AC", {"B": "A"}),  # both are similar: the first is named
        ("CAB", "CA", {"B": "C"}),
    ],
)
def test_chains_go_by_document_order(
    tmp_path: Path, order: str, stays: str, matches: dict[str, str]
) -> None:
    chain = {document.id: document for document in make_chain()}
    assert count_jaccard(chain["A"].text, chain["C"].text) < 0.6
    assert count_jaccard(chain["A"].text, chain["B"].text) > 0.65
    kept, removed = Search(tmp_path, [chain[name] for name in order], piece=1).find()
    assert "".join(kept) == stays
    assert {r["id"]: r["match"] for r in removed} == matches


def test_copies_of_a_near_duplicate_go_with_it(tmp_path: Path) -> None:
    """What a removal names always stays."""
    first, second, _ = make_chain()
    documents = [first, second, Document("copy", second.text, "", "")]
    kept, removed = Search(tmp_path, documents).find()
    assert kept == ["A"]
    assert [(r["id"], r["reason"], r["match"]) for r in removed] == [
        ("B", "near_duplicate", "A"),
        ("copy", "near_duplicate", "A"),
    ]
    assert removed[0]["similarity"] == removed[1]["similarity"]


def test_an_id_may_stand_twice(tmp_path: Path) -> None:
    texts = [" ".join(draw_words(50, 1)), " ".join(draw_words(50, 2)), " ".join(draw_words(50, 1))]
    documents = [Document("same", text, "", "") for text in texts]
    kept, removed = Search(tmp_path, documents, piece=2).find()
    assert kept == ["same", "same"] and [r["match"] for r in removed] == ["same"]


@pytest.mark.parametrize("config", [NEAR, EXACT_ONLY])
@pytest.mark.parametrize("texts", [[], ["one text alone"], ["", "..."], ["..", "--", "!"]])
def test_corpora_of_next_to_nothing(tmp_path: Path, config: CleanConfig, texts: list[str]) -> None:
    kept, removed = Search(tmp_path, name_texts(texts), config).find()
    assert len(kept) == len(texts) and removed == []


def test_an_empty_piece_has_an_empty_mask(tmp_path: Path) -> None:
    search = Search(tmp_path, name_texts(["a b", "a b"]), piece=1)
    write_documents(tmp_path / "none.arrow", [])
    save_keys(tmp_path / "none.npy", sign_piece([], NEAR.near_duplicates))
    search.pieces.insert(1, tmp_path / "none.arrow")
    search.keys.insert(1, tmp_path / "none.npy")
    assert [np.load(mask).tolist() for mask in search.search()] == [[True], [], [False]]


def make_mixed() -> list[Document]:
    """A hundred documents, some of them copies, exact or edited."""
    texts = [" ".join(draw_words(60, i)) for i in range(70)]
    texts += [edit(texts[i], 0.06, i) for i in range(20)] + texts[10:25]
    random.Random(1).shuffle(texts)
    return name_texts(texts)


def read_outcome(search: Search) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((search.folder / "work").iterdir())}


def test_order_of_tasks_does_not_show(tmp_path: Path) -> None:
    """Any number of processes run tasks in any order, each having its own copy of the stage."""

    def run_shuffled(stage: Stage) -> None:
        tasks = list(range(stage.tasks))
        random.Random(3).shuffle(tasks)
        for task in tasks:
            pickle.loads(pickle.dumps(stage)).run(task)

    plain, shuffled = (Search(tmp_path / n, make_mixed(), piece=7) for n in ("plain", "shuffled"))
    plain.search()
    shuffled.search(run_shuffled)
    assert read_outcome(plain) == read_outcome(shuffled)


def test_pieces_do_not_show(tmp_path: Path) -> None:
    found = [Search(tmp_path / str(n), make_mixed(), piece=n).find() for n in (6, 25, 200)]
    assert found[0] == found[1] == found[2]
    assert len(found[0][1]) >= 30


def test_small_tasks_of_verifying_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Search(tmp_path / "whole", make_mixed()).find()
    monkeypatch.setattr(candidates, "_TASK_PAIRS", 3)
    monkeypatch.setattr(candidates, "_OPEN_FILES", 1)
    cut = Search(tmp_path / "cut", make_mixed(), piece=5)
    assert cut.find() == whole
    assert max(task for name, task in cut.ran if name == "verify candidates") > 5


class Killed(Exception):
    """Stands for the end of a process."""


FEW_BANDS = CleanConfig(near_duplicates=NearDuplicatesConfig(bands=6))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search that nothing disturbed."""
    search = Search(tmp_path_factory.mktemp("whole"), make_mixed(), FEW_BANDS, piece=36)
    search.search()
    return search


@pytest.mark.parametrize("after", [0, 1, 4, 7, 9, 11, 12, 14])
def test_killed_anywhere_it_goes_on(tmp_path: Path, whole: Search, after: int) -> None:
    """What was done is not done again, and the outcome is the same."""
    killed = Search(tmp_path, make_mixed(), FEW_BANDS, piece=36)

    def run_some(stage: Stage) -> None:
        for task in range(stage.tasks):
            if len(killed.ran) == after:
                raise Killed
            stage.run(task)
            killed.ran.append((stage.name, task))

    with pytest.raises(Killed):
        killed.search(run_some)
    assert len(whole.ran) > after
    killed.search()
    assert killed.ran == whole.ran
    assert read_outcome(killed) == read_outcome(whole)


def test_small_groups_give_all_pairs() -> None:
    keys = np.array([5, 9, 5, 1, 5, 9], np.uint64)
    band = matching.pair_band(keys, np.array([0, 1, 2, 3, 4, 7]))
    later, earlier = matching.split_pairs(band[0])
    assert list(zip(later.tolist(), earlier.tolist(), strict=True)) == [
        (2, 0), (4, 0), (4, 2), (7, 1),
    ]  # fmt: skip
    assert band[1][3] > band[1][0]  # the smaller group weighs more


def test_a_document_keeps_the_pairs_that_few_share() -> None:
    """Document 99 shares keys with all others, one of them (50) alone in a band."""
    crowd = np.array([[(99 << 32) | other for other in range(40)], [5] * 40], np.uint64)
    alone = np.array([[(7 << 32) | 2, (99 << 32) | 50], [800, 900]], np.uint64)
    later, earlier = matching.split_pairs(matching.merge_pairs([crowd, alone, crowd]))
    limit = matching.DOCUMENT_PAIRS
    assert later.tolist() == [7] + [99] * limit
    assert earlier.tolist() == [2, *range(limit - 1), 50]


def test_similarity_is_that_of_sets() -> None:
    chooser = random.Random(2)
    shingler = Shingler(2)
    for _ in range(50):
        texts = [" ".join(chooser.choices("abcdef", k=chooser.randint(2, 30))) for _ in range(2)]
        one, other = (
            matching.Profile(np.unique(shingler.hash_shingles(text)), *[np.empty(0)] * 2)
            for text in texts
        )
        assert matching.measure_similarity(one, other) == count_jaccard(*texts)


def test_keys_of_another_config_are_an_error(tmp_path: Path) -> None:
    search = Search(tmp_path, name_texts(["a", "b"]), EXACT_ONLY)
    search.config = NEAR
    with pytest.raises(DataError, match="keys of 0 bands where the corpus has 32") as caught:
        search.find()
    assert caught.value.fix == f"delete {tmp_path} and prepare again"
