"""Shards, their index, and the split by source picture."""

import dataclasses
import io
import json
import tarfile

import pytest
from PIL import Image

from rewards.editreward.data.index import (
    Corpus,
    label_statistics,
    load_corpus,
    picture_hash,
    read_entry,
    split_of,
    whole_groups,
)
from rewards.editreward.data.shards import DataError, EditSample, SampleError, read_shard, write_shard
from tests.rewards.editreward.editreward_data import make_recipe, make_samples, square, write_shards


@pytest.fixture
def recipe(tmp_path):
    base = tmp_path / "config-alone"  # all that the index wants of a model is how much a token sees
    base.mkdir()
    (base / "config.json").write_text('{"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}')

    def make(shards, **data):
        return make_recipe(tmp_path / "runs", base, shards, data=data)

    return make


def rewrite(path, change):
    """The shard again, with `change(name, content)` in place of each member (None leaves it out)."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            content = change(name, content)
            if content is not None:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_a_shard_gives_back_what_was_written_and_is_readable_by_any_tar(tmp_path):
    samples = make_samples(2)
    assert write_shard(tmp_path / "a.tar", samples) == 8
    for before, after in zip(samples, read_shard(tmp_path / "a.tar"), strict=True):
        for field in dataclasses.fields(EditSample):
            old, new = getattr(before, field.name), getattr(after, field.name)
            assert old.tobytes() == new.tobytes() if isinstance(old, Image.Image) else old == new
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[:3] == ["s0000-0.source.png", "s0000-0.result.png", "s0000-0.json"]
    write_shard(tmp_path / "b.tar", samples)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield make_samples(1)[0]
        raise RuntimeError("the pipeline died")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", broken())
    assert list(tmp_path.iterdir()) == []
    sample = make_samples(1)[0]
    for bad, message in (
        (dataclasses.replace(sample, key="a.b"), "dot"),
        (dataclasses.replace(sample, scores={"overall": float("nan")}), "write None"),
    ):
        with pytest.raises(DataError, match=message):
            write_shard(tmp_path / "a.tar", [bad])
    with pytest.raises(DataError, match="twice"):
        write_shard(tmp_path / "a.tar", [sample, sample])


def test_all_edits_of_a_source_are_in_one_split_however_its_file_was_written(tmp_path, recipe):
    samples = make_samples(30)
    glob = write_shards(tmp_path / "data", samples)
    # The same sources once more, in another shard and as other PNG bytes, with other instructions.
    again = [
        dataclasses.replace(s, key=f"again-{s.key}", instruction=f"now {s.instruction}") for s in samples[::4]
    ]
    write_shard(tmp_path / "data" / "edits-009.tar", again)

    def recode(name, content):
        if not name.endswith("source.png"):
            return content
        buffer = io.BytesIO()
        Image.open(io.BytesIO(content)).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    rewrite(tmp_path / "data" / "edits-009.tar", recode)
    corpus = load_corpus(recipe(glob), tmp_path / "index")
    sources = {name: {e.source for e in entries} for name, entries in corpus.splits.items()}
    assert sum(map(len, corpus.splits.values())) == 150 and len(set.union(*sources.values())) == 30
    assert not sources["train"] & sources["test"] and not sources["train"] & sources["validation"]
    assert not sources["test"] & sources["validation"]
    assert all(split_of(s, recipe(glob).data) == name for name, found in sources.items() for s in found)
    by_key = {e.key: e for entries in corpus.splits.values() for e in entries}
    twin, original = by_key["again-s0000-0"], by_key["s0000-0"]
    assert twin.source == original.source and twin.group != original.group


def test_picture_hash_is_of_what_is_seen():
    red = square((255, 0, 0), 100)
    assert picture_hash(red) == picture_hash(red.convert("RGBA"))
    assert picture_hash(red) != picture_hash(red.resize((28, 112)))


def test_corrupt_samples_are_named_left_out_and_limited(tmp_path, recipe):
    glob = write_shards(tmp_path / "data", make_samples(30))

    def damage(name, content):
        if name == "s0000-1.result.png":
            return content[: len(content) // 2]
        if name == "s0001-2.source.png":
            return None
        if name in ("s0002-0.json", "s0003-0.json", "s0004-0.json"):
            record = json.loads(content)
            if name.startswith("s0002"):
                record["scores"]["overall"] = 11
            elif name.startswith("s0003"):
                record["instruction"] = "see <|image_pad|>"
            else:
                record["scores"]["overall"] = "good"
            return json.dumps(record).encode()
        return content

    for shard in (tmp_path / "data").iterdir():
        rewrite(shard, damage)
    corpus = load_corpus(recipe(glob, max_corrupt_share=0.05), tmp_path / "index")
    reasons = {key: reason for _, key, reason in corpus.corrupt}
    assert set(reasons) == {"s0000-1", "s0001-2", "s0002-0", "s0003-0", "s0004-0"}
    assert (
        "result.png cannot be decoded" in reasons["s0000-1"] and "no s0001-2.source.png" in reasons["s0001-2"]
    )
    assert "outside" in reasons["s0002-0"] and "'<|'" in reasons["s0003-0"] and "'good'" in reasons["s0004-0"]
    assert sum(map(len, corpus.splits.values())) == 115
    assert any("s0001-2" in line for line in corpus.lines())
    with pytest.raises(DataError, match="5 of 120 samples are corrupt, above data.max_corrupt_share=0.04"):
        load_corpus(recipe(glob, max_corrupt_share=0.04), tmp_path / "index")


def test_a_missing_label_is_left_out_and_never_filled_in(tmp_path, recipe):
    samples = make_samples(30)
    samples[0] = dataclasses.replace(samples[0], scores={"overall": None})
    samples[1] = dataclasses.replace(samples[1], scores={})
    glob = write_shards(tmp_path / "data", samples)
    corpus = load_corpus(recipe(glob), tmp_path / "index")
    assert corpus.unlabelled == 2 and sum(map(len, corpus.splits.values())) == 118


def test_the_index_is_kept_until_the_shard_changes(tmp_path, recipe):
    glob = write_shards(tmp_path / "data", make_samples(30))
    first = load_corpus(recipe(glob, index_workers=2), tmp_path / "index")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    assert load_corpus(recipe(glob), tmp_path / "index") == first
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    entry = first.splits["train"][0]
    changed = (tmp_path / "data").glob("edits-*.tar")
    write_shard(next(iter(sorted(changed))), make_samples(10, seed=5))
    with pytest.raises(DataError, match="the shard changed"):
        read_entry(dataclasses.replace(entry, shard=str(tmp_path / "data" / "gone.tar")))
    assert load_corpus(recipe(glob), tmp_path / "index") != first


def test_a_cut_off_shard_and_one_that_is_no_tar_are_refused(tmp_path, recipe):
    glob = write_shards(tmp_path / "data", make_samples(30))
    shard = tmp_path / "data" / "edits-001.tar"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b"x" * 2000):
        shard.write_bytes(content)
        with pytest.raises(DataError, match="edits-001.tar.*copy or make it again"):
            load_corpus(recipe(glob), tmp_path / "index")
    with pytest.raises(DataError, match="no file matches"):
        load_corpus(recipe(str(tmp_path / "nothing-*.tar")), tmp_path / "index")


def test_a_split_without_samples_is_refused(tmp_path, recipe):
    glob = write_shards(tmp_path / "data", make_samples(3))
    with pytest.raises(DataError, match="too few samples for the split"):
        load_corpus(recipe(glob, test_share=0.0001), tmp_path / "index")


def test_statistics_and_whole_groups(tmp_path, recipe):
    glob = write_shards(tmp_path / "data", make_samples(30))
    corpus: Corpus = load_corpus(recipe(glob, dimensions=["overall", "quality"]), tmp_path / "index")
    means, stds = label_statistics(corpus.splits["train"])
    # Every group holds 0, 10/3, 20/3, 10 and 5, 20/3, 25/3, 10.
    assert means == pytest.approx((5, 7.5)) and stds == pytest.approx((3.7268, 1.8634), abs=1e-4)
    chosen = whole_groups(corpus.splits["train"], 10)
    assert len(chosen) == 12 and len({e.group for e in chosen}) == 3
    assert whole_groups(corpus.splits["train"], 0) == corpus.splits["train"]
    constant = [dataclasses.replace(e, scores=(1.0, 2.0)) for e in chosen]
    with pytest.raises(DataError, match="nothing to learn"):
        label_statistics(constant)


def test_a_broken_sample_says_so_when_read_directly(tmp_path):
    write_shard(tmp_path / "a.tar", make_samples(1))
    rewrite(tmp_path / "a.tar", lambda name, content: b"{}" if name.endswith("-2.json") else content)
    reader = read_shard(tmp_path / "a.tar")
    assert [next(reader).key for _ in range(2)] == ["s0000-0", "s0000-1"]
    with pytest.raises(SampleError, match="no instruction"):
        next(reader)
