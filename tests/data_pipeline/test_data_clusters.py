"""Rows of real shards in clusters: found, the same by any way, provable, refused where wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.configs.errors import ConfigError, DataError
from shoal.data_pipeline.centroids import Centroids, fit_centroids, share_out
from shoal.data_pipeline.clustering import make_clusters
from shoal.data_pipeline.clusters import load_clusters
from shoal.data_pipeline.row_texts import open_rows, open_split, read_row_texts, sample_rows

sys.path.insert(0, str(Path(__file__).parent))
from topics import TOPICS, find_topics, make_config, prepare_topics


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return prepare_topics(tmp_path_factory.mktemp("topics"))


@pytest.fixture(scope="module")
def clusters(corpora, tmp_path_factory):
    return make_clusters(make_config(corpora, tmp_path_factory.mktemp("clusters") / "out"))


def test_planted_topics_are_found(corpora, clusters):
    path = str(corpora / "generic" / "train")
    assigned = clusters.assignments("generic")
    topics = find_topics(read_row_texts(open_split(path), np.arange(len(assigned))))
    pure = sum(np.bincount(topics[assigned == c]).max() for c in np.unique(assigned))
    assert pure / len(topics) > 0.9  # a row at the border of two documents has both topics
    assert len(np.unique(assigned)) == TOPICS
    counts = np.bincount(assigned, minlength=TOPICS)
    assert np.array_equal(clusters.histogram("generic"), counts)


def test_facts_are_those_of_the_rows(clusters):
    generic, domain = clusters.manifest.corpora
    assert generic.total_variation == 0
    assert 2.7 < generic.entropy_bits <= 3
    assert domain.entropy_bits < 1.3  # 3 to 1 of two topics: 0.81 bits, and rows at borders
    assert domain.top_share == clusters.histogram("domain").max() / domain.rows
    assert 0.6 < domain.total_variation < 0.8  # six of eight topics are absent
    words = clusters.manifest.words[domain.top_cluster]
    assert {word[0] for word in words} == {"b"}


def test_sampled_rows_are_of_the_domains_topics(corpora, clusters):
    order = clusters.order("domain", (0, 0), shards_hash=clusters.generic.shards_hash)
    drawn = order.rows(np.arange(2000))
    topics = find_topics(read_row_texts(open_split(str(corpora / "generic" / "train")), drawn))
    assert (topics < 2).mean() > 0.95
    assert 0.65 < (topics == 0).mean() < 0.85


@pytest.mark.slow
def test_same_bytes_for_any_processes(corpora, clusters, tree, tmp_path):
    config = make_config(corpora, tmp_path / "two", processes=2)
    assert tree(make_clusters(config).folder) == tree(clusters.folder)


def test_what_is_fitted_does_not_grow_with_the_corpus(corpora, tmp_path):
    embedding = {"sample_rows": 40, "dimensions": 8, "buckets": 512}
    config = make_config(corpora, tmp_path / "out", embedding=embedding, sample_rows=64)
    made = make_clusters(config)
    assert json.loads((made.folder / "embedder" / "embedder.json").read_text())["rows"] == 40
    assert made.manifest.sampled_rows == 64
    assert made.histogram("generic").sum() == made.generic.rows > 500


def test_another_seed_samples_other_rows(corpora):
    split = open_split(str(corpora / "generic" / "train"))
    few, more, other = (sample_rows(split, n, seed) for n, seed in ((50, 0), (100, 0), (50, 1)))
    assert len(few) == 50
    assert set(few) <= set(more)
    assert set(few) != set(other)


@pytest.mark.slow
def test_killed_at_any_moment(corpora, clusters, tree, tmp_path):
    script = Path(__file__).with_name("kill_clusters.py")
    command = [sys.executable, str(script), str(corpora), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    folders = [Path(line) for line in done.stdout.splitlines()]
    assert len(folders) > 3  # or the kills came to nothing
    for folder in folders:
        assert tree(folder) == tree(clusters.folder)
        assert not list(folder.parent.glob(".partial-*"))


def test_done_is_not_done_again(corpora, clusters):
    said = []
    config = make_config(corpora, clusters.folder)
    make_clusters(config, lambda *words: said.append(words))
    assert said == []


def test_other_clusters_are_not_overwritten(corpora, clusters):
    with pytest.raises(ConfigError, match="clusters changed since"):
        make_clusters(make_config(corpora, clusters.folder, clusters=5))
    with pytest.raises(ConfigError, match="holds no clusters"):
        make_clusters(make_config(corpora, corpora))


@pytest.mark.parametrize("name", ["assignments-domain.npy", "centroids.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_tampering_is_found(clusters, tmp_path, name, harm):
    folder = tmp_path / "copy"
    shutil.copytree(clusters.folder, folder)
    data = bytearray((folder / name).read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data if harm == "flip" else data[:-3])
    if harm == "remove":
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"altered|missing|not a manifest"):
        load_clusters(folder)


def test_a_file_more_is_found(clusters, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(clusters.folder, folder)
    (folder / "embedder" / "more.npy").write_bytes(b"x")
    with pytest.raises(DataError, match="not in its manifest"):
        load_clusters(folder)


def test_other_shards_cannot_be_sampled(clusters):
    with pytest.raises(DataError, match="other shards"):
        clusters.order("domain", (0, 0), shards_hash=clusters.facts("domain").shards_hash)
    with pytest.raises(ConfigError, match="one of generic, domain"):
        clusters.histogram("law")


def test_more_clusters_than_rows(corpora, tmp_path):
    with pytest.raises(ConfigError, match="clusters of"):
        make_clusters(make_config(corpora, tmp_path / "out", clusters=5000))


@pytest.mark.parametrize("method", ["auto", "minibatch"])
def test_two_levels(corpora, tmp_path, monkeypatch, method):
    monkeypatch.setattr("shoal.data_pipeline.centroids.FLAT_CLUSTERS", 8)
    made = make_clusters(make_config(corpora, tmp_path / "out", clusters=30, method=method))
    assert made.manifest.method == ("lloyd" if method == "auto" else method)
    centroids = Centroids.load(made.folder)
    assert len(centroids) == 30
    assert len(centroids.coarse) == 5
    assert centroids.starts[-1] == 30
    assert made.histogram("generic").sum() == made.generic.rows
    assigned = made.assignments("generic")
    path = str(corpora / "generic" / "train")
    topics = find_topics(read_row_texts(open_split(path), np.arange(len(assigned))))
    pure = sum(np.bincount(topics[assigned == c]).max() for c in np.unique(assigned))
    assert pure / len(topics) > 0.85


def test_equal_vectors_leave_clusters_empty():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 10, axis=0)
    config = make_config(Path("a"), Path("b"))
    found = fit_centroids(vectors, config).assign(vectors)
    assert len(np.unique(found)) == 3


def test_assignment_does_not_depend_on_neighbours():
    chooser = np.random.default_rng(0)
    vectors = chooser.normal(size=(1300, 24)).astype(np.float32)
    config = make_config(Path("a"), Path("b"), clusters=50, method="minibatch")
    centroids = fit_centroids(vectors, config)
    whole = centroids.assign(vectors)
    parts = [centroids.assign(part) for part in np.split(vectors, [1, 7, 900])]
    assert np.array_equal(np.concatenate(parts), whole)
    nearest = ((vectors[:, None] - centroids.points) ** 2).sum(axis=2).argmin(axis=1)
    assert np.array_equal(whole, nearest)


def test_centroids_are_read_as_written(tmp_path):
    points = np.arange(12, dtype=np.float32).reshape(4, 3)
    written = Centroids(points, points[:2], np.asarray([0, 3, 4]))
    written.save(tmp_path)
    read = Centroids.load(tmp_path)
    assert np.array_equal(read.points, points)
    assert np.array_equal(read.starts, written.starts)
    (tmp_path / "coarse.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Centroids.load(tmp_path)


@pytest.mark.parametrize(("total", "sizes"), [(5, [1, 1, 90]), (40, [3, 3, 50]), (6, [2, 2, 2])])
def test_clusters_are_shared_out(total, sizes):
    shares = share_out(total, np.asarray(sizes))
    assert shares.sum() == total
    assert np.all((shares >= 1) & (shares <= sizes))


def test_a_loader_reads_the_resampled_stream(corpora, clusters):
    from shoal.data_pipeline.loader import Loader
    from shoal.data_pipeline.rows import Rows

    streams = [(Rows.open(corpora / name / "train"), 1.0) for name in ("generic", "domain")]
    order = clusters.order("domain", (0, 0), shards_hash=streams[0][0].manifest.shards_hash)
    steps = [0, 1, 2, 30]

    def read(ranks):
        """Row numbers of some steps, all ranks together."""
        options = {"seed": 0, "batch_rows": 32, "micro_batch_rows": 8, "num_ranks": ranks}
        loaders = [Loader(streams, rank=r, orders={0: order}, **options) for r in range(ranks)]
        return [
            np.concatenate([b.row_ids.numpy() for one in loaders for b in one.microbatches(step)])
            for step in steps
        ]

    read_by_one, read_by_four = read(1), read(4)
    for left, right in zip(read_by_one, read_by_four, strict=True):
        assert np.array_equal(left, right)
    generic = np.concatenate(read_by_one)
    generic = generic[generic < len(streams[0][0])]
    assert 40 < len(generic) < 90
    expected = set(order.rows(np.arange(31 * 32)).tolist())
    assert set(generic.tolist()) <= expected
    histogram = clusters.histogram("domain")
    assert np.all(histogram[clusters.assignments("generic")[generic]] > 0)


def test_shards_by_url_go_where_the_config_says_and_give_the_same(corpora, clusters, tmp_path):
    urls = {
        name: {"name": name, "path": (corpora / name / "train").as_uri()}
        for name in ("generic", "domain")
    }
    config = make_config(
        corpora,
        tmp_path / "out",
        generic=urls["generic"],
        domains=[urls["domain"]],
        cache=str(tmp_path / "cache"),
        cache_bytes=10**9,
        download_seconds=30,
    )
    made = make_clusters(config)
    assert made.manifest.cluster_key == clusters.manifest.cluster_key
    assert made.manifest.clusters_hash == clusters.manifest.clusters_hash
    assert len(list((tmp_path / "cache").glob("*/split/shard.*"))) >= 2
    with pytest.raises(ConfigError, match="may hold 1 bytes"):
        make_clusters(
            config.model_copy(
                update={"output": str(tmp_path / "b"), "cache": str(tmp_path / "c"),
                        "cache_bytes": 1, "clusters": 5}
            )
        )  # fmt: skip


def test_shards_that_were_prepared_anew_are_read_anew(corpora, tmp_path):
    """In one process: what is held open must not outlive what it was opened from."""
    folder = tmp_path / "corpora"
    shutil.copytree(corpora, folder)
    path = str(folder / "generic" / "train")
    old = open_split(path)
    texts = read_row_texts(old, np.arange(3))
    shutil.rmtree(folder / "generic" / "train")
    shutil.copytree(corpora / "domain" / "train", folder / "generic" / "train")
    assert read_row_texts(open_split(path), np.arange(3)) != texts
    open_rows.cache_clear()  # as in a worker that starts late
    with pytest.raises(DataError, match="prepared anew while it was read"):
        read_row_texts(old, np.arange(3))
