"""Over a hundred ways to damage shards, index or manifest: all found, and none trained on."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from shoal.configs.errors import DataError
from shoal.data_pipeline import mds
from shoal.data_pipeline.derived import shard_facts
from shoal.data_pipeline.manifest import hash_file, hash_shards, read_manifest
from shoal.data_pipeline.mds import import_streaming, row_type, write_mds
from shoal.data_pipeline.proof import index_entry, make_index, verify
from shoal.data_pipeline.rows import Rows
from shoal.data_pipeline.shards import prepare

FORMS = ("raw", "zstd")
SIDE = ("index.json", "counts.npy", "dropped.jsonl")


@pytest.fixture(scope="module")
def sound(tmp_path_factory, make_config):
    """The same corpus in raw and in compressed shards."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        form: prepare(make_config(folder / form, compression=None if form == "raw" else form))
        for form in FORMS
    }


@pytest.fixture(scope="module")
def original(sound):
    rows = Rows.open(sound["raw"].train)
    return rows.gather(np.arange(len(rows)))


# Damage: what happens to files by accident


def flip(file, share):
    """Flip one bit, so far into the file."""
    data = bytearray(file.read_bytes())
    place = min(len(data) - 1, int(share * len(data)))
    data[place] ^= 1 << (place % 8)
    file.write_bytes(data)


def cut(file, share):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def extend(file, data):
    file.write_bytes(file.read_bytes() + data)


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def shard(folder, number):
    return sorted(folder.glob("shard.*"))[number]


def link(file):
    """Put a link to a copy outside in place of a file."""
    outside = file.parent.parent / f"outside-{file.name}"
    file.rename(outside)
    file.symlink_to(outside)


def empty_folder(file):
    file.unlink()
    file.mkdir()


# Forgery: whatever is changed, hashes are made to fit


def resign(folder, **change):
    manifest = read_manifest(folder)
    files = {name: hash_file(folder / name) for name in manifest.files}
    forged = manifest.model_copy(update={"files": files, **change})
    (folder / "manifest.json").write_text(forged.to_json())


def forge_index(folder, change):
    """Change the first entry of index.json."""
    tree = json.loads((folder / "index.json").read_text())
    change(tree["shards"][0])
    (folder / "index.json").write_text(json.dumps(tree))
    resign(folder)


def forge_name(folder, name):
    first, *others = read_manifest(folder).shards
    resign(folder, shards=(first.model_copy(update={"file": name}), *others))


def forge_side_name(folder, name):
    files = read_manifest(folder).files
    manifest = read_manifest(folder).model_copy(update={"files": {**files, name: "0" * 64}})
    (folder / "manifest.json").write_text(manifest.to_json())


def forge_shard(folder, entry):
    """State that the first shard is what an entry says, in manifest and index alike."""
    manifest = read_manifest(folder)
    shards = (shard_facts(entry), *manifest.shards[1:])
    hashes = hash_shards([s.raw_sha256 for s in shards])
    manifest = manifest.model_copy(update={"shards": shards, "shards_hash": hashes})
    entries = [index_entry(manifest, facts) for facts in shards]
    entries[0] = entry
    (folder / "index.json").write_text(make_index(entries))
    resign(folder, shards=shards, shards_hash=hashes)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def forge_pickled(folder, columns):
    """Replace the first shard by one of MDSWriter with a pickled column."""
    manifest = read_manifest(folder)
    first, aside = manifest.shards[0], folder.parent / "pickled"
    values = {
        "ends": np.zeros(3, np.uint8),
        "length": np.uint32(17),
        "tokens": np.zeros(17, np.uint16),
    }
    kinds = {"ends": "ndarray:uint8:3", "length": "uint32", "tokens": "ndarray:uint16:17"}
    with import_streaming().MDSWriter(
        out=str(aside),
        columns=kinds | dict.fromkeys(columns, "pkl"),
        hashes=["sha256"],
        compression=manifest.compression,
    ) as writer:
        for _ in range(first.rows):
            writer.write(values | dict.fromkeys(columns, Bomb(folder.parent / "exploded")))
    (entry,) = json.loads((aside / "index.json").read_text())["shards"]
    shutil.move(next(aside.glob("shard*")), folder / first.file)
    shutil.rmtree(aside)
    forge_shard(folder, entry)


def forge_header(folder, old, new):
    """Change the description within a raw shard, its length kept, and all hashes."""
    first = read_manifest(folder).shards[0]
    data = (folder / first.file).read_bytes()
    assert old in data
    (folder / first.file).write_bytes(data.replace(old, new, 1))
    entry = index_entry(read_manifest(folder), first)
    sha = hashlib.sha256(data.replace(old, new, 1)).hexdigest()
    entry["raw_data"]["hashes"] = {"sha256": sha}
    forge_shard(folder, entry)


def forge_rows(folder, change):
    """Write the first shard anew with rows that no packing gives."""
    manifest = read_manifest(folder)
    first, dtype = manifest.shards[0], np.dtype(manifest.dtype)
    matrix = mds.open_mds(
        folder / first.file, first.rows, first.raw_bytes, 16, dtype, manifest.compression
    )
    rows = matrix.view(row_type(16, dtype))[:, 0].copy()
    change(rows)
    forge_shard(folder, write_mds(folder, 0, rows, manifest.compression))


def set_field(name, value):
    def change(rows):
        rows[name][0] = value

    return change


def list_damages():
    """Name, form and what is done to a folder; the first two words of a name are its kind."""
    accidents = {}
    for number in (0, 2, -1):
        for share in (0.0, 0.0005, 0.02, 0.1, 0.5, 0.999):
            accidents[f"flip shard {number} {share}"] = lambda f, n=number, s=share: flip(
                shard(f, n), s
            )
        for share in (0.0, 0.5, 0.9999):
            accidents[f"cut shard {number} {share}"] = lambda f, n=number, s=share: cut(
                shard(f, n), s
            )
        accidents[f"delete shard {number}"] = lambda f, n=number: shard(f, n).unlink()
        accidents[f"extend shard {number}"] = lambda f, n=number: extend(shard(f, n), b"\0")
    for share in (0.01, 0.2, 0.4, 0.6, 0.8, 0.95):
        accidents[f"flip manifest {share}"] = lambda f, s=share: flip(f / "manifest.json", s)
    for name in ("manifest.json", *SIDE):
        accidents[f"delete {name}"] = lambda f, n=name: (f / n).unlink()
        accidents[f"extend {name}"] = lambda f, n=name: extend(f / n, b" x")
        accidents[f"link {name}"] = lambda f, n=name: link(f / n)
    for name in ("index.json", "counts.npy", "manifest.json"):
        accidents[f"cut {name}"] = lambda f, n=name: cut(f / n, 0.7)
        accidents[f"other split's {name}"] = lambda f, n=name: swap(
            f / n, f.parent / "validation" / n
        )
    for share in (0.1, 0.5, 0.9):
        accidents[f"flip index {share}"] = lambda f, s=share: flip(f / "index.json", s)
        accidents[f"flip counts {share}"] = lambda f, s=share: flip(f / "counts.npy", s)
    accidents |= {
        "swap shards": lambda f: swap(shard(f, 0), shard(f, 1)),
        "other split's shard": lambda f: shutil.copy(
            shard(f.parent / "validation", 0), shard(f, 0)
        ),
        "link shard": lambda f: link(shard(f, 1)),
        "folder shard": lambda f: empty_folder(shard(f, 1)),
        "stray shard": lambda f: shutil.copy(shard(f, 0), f / "shard.99999.mds"),
    }
    forgeries = {
        f"forge path {name!r}": lambda f, n=name: forge_name(f, n)
        for name in ("../x.mds", "/etc/passwd", "a/b.mds", ".hidden", "..", "", "shard.00001.mds\0")
    }
    forgeries |= {
        f"forge side path {name!r}": lambda f, n=name: forge_side_name(f, n)
        for name in ("../manifest.json", "/etc/passwd", "manifest.json")
    }
    forgeries |= {
        "forge index path": lambda f: forge_index(
            f, lambda entry: entry["raw_data"].update(basename="../../x")
        ),
        "forge index samples": lambda f: forge_index(f, lambda e: e.update(samples=1)),
        "forge index pickled": lambda f: forge_index(
            f, lambda e: e.update(column_encodings=["pkl", "uint32", "pkl"])
        ),
        "forge index hash": lambda f: forge_index(
            f, lambda entry: entry["raw_data"].update(hashes={})
        ),
        "forge pickled tokens": lambda f: forge_pickled(f, ["tokens"]),
        "forge pickled row": lambda f: forge_pickled(f, ["ends", "length", "tokens"]),
        "forge pickled extra": lambda f: forge_pickled(f, ["zz"]),
    }
    return [(name, form, do) for form in FORMS for name, do in (accidents | forgeries).items()] + [
        ("forge header pickled", "raw", lambda f: forge_header(f, b'"uint32"', b'"pkl"   ')),
        ("forge header size", "raw", lambda f: forge_header(f, b"[3, 4, 34]", b"[3, 4, 35]")),
    ]


DAMAGES = list_damages()


def test_there_are_a_hundred():
    assert len(DAMAGES) == len({(name, form) for name, form, _ in DAMAGES}) >= 100


@pytest.fixture
def folder(request, sound, tmp_path):
    """A training split that may be damaged."""
    shutil.copytree(sound[request.getfixturevalue("form")].output, tmp_path / "c")
    return tmp_path / "c" / "train"


@pytest.mark.parametrize(
    ("form", "do"), [pytest.param(form, do, id=f"{form} {n}") for n, form, do in DAMAGES]
)
def test_damage_is_found_and_not_trained_on(form, do, folder, original):
    do(folder)
    with pytest.raises(DataError) as caught:
        verify(folder)
    assert caught.value.where
    try:
        rows = Rows.open(folder)
        found = rows.gather(np.arange(len(rows)))
    except DataError:
        pass
    else:  # what was damaged are no rows: these are as they were
        assert np.array_equal(found.tokens, original.tokens)
        assert np.array_equal(found.targets, original.targets)
        assert np.array_equal(found.segments, original.segments)
    assert not (folder.parent / "exploded").exists(), "something was unpickled"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "change",
    [
        set_field("length", 0), set_field("length", 18), set_field("tokens", 320),
        lambda rows: (set_field("length", 3)(rows), set_field("tokens", 5)(rows)),
        set_field("length", 3), set_field("tokens", 5),
    ],
    ids=["no token", "too long", "unknown token", "padded with text", "shorter", "other tokens"],
)  # fmt: skip
def test_forged_rows_are_found(change, form, folder):
    """Every hash fits: what the rows say is what gives them away, or what they add up to."""
    forge_rows(folder, change)
    with pytest.raises(DataError, match=r"no packing gives|other counts"):
        verify(folder)


@pytest.mark.parametrize("form", FORMS)
def test_forging_without_change_passes(form, folder):
    """What the forgeries change is why they are refused, not that they were made."""
    forge_rows(folder, lambda rows: None)
    forge_index(folder, lambda entry: None)
    verify(folder)


def test_a_bomb_goes_off(tmp_path):
    """The test above would see a pickle that is loaded."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").is_dir()


def test_unpacking_stops_at_the_size_stated(sound, tmp_path):
    """A small file that unpacks to gigabytes fills no disk."""
    import zstandard

    shutil.copytree(sound["zstd"].output, tmp_path / "c")
    folder = tmp_path / "c" / "train"
    first = read_manifest(folder).shards[0]
    (folder / first.file).write_bytes(zstandard.ZstdCompressor().compress(bytes(2**28)))
    with pytest.raises(DataError, match="another size"):
        mds.open_mds(
            Path(folder / first.file), first.rows, first.raw_bytes, 16, np.dtype("<u2"), "zstd"
        )
