"""Tar shards and tables: what is read, what is left out, and who says so."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from core.failures import DataError, SampleError
from pretrain.data import index as index_module
from pretrain.data.config import SourceConfig
from pretrain.data.index import index_one, open_index
from pretrain.data.sources import open_sources
from tests.pretrain.data.data_files import (
    config_of,
    edit_members,
    encoded,
    picture,
    t2i_members,
    tar_source,
    write_tar,
)


def opened(tmp_path, *sources, **keys):
    return open_sources(config_of(tmp_path, *sources, **keys))


def same(left, right):
    return left.size == right.size and left.tobytes() == right.tobytes()


def test_text_to_image_shards_are_read_by_number(tmp_path):
    write_tar(tmp_path / "b.tar", t2i_members(2, first=3, size=(60, 30)))
    write_tar(tmp_path / "a.tar", t2i_members(3))
    (source,) = opened(tmp_path, tar_source("t2i", tmp_path / "*.tar"))
    assert len(source) == 5
    assert [source.texts(i) for i in range(5)] == [(f"caption {i}",) for i in range(5)]
    assert all(same(source.pictures(i)[0], picture(i, *((40, 40) if i < 3 else (60, 30)))) for i in range(5))
    assert list(source.widths) == [40, 40, 40, 60, 60]
    assert list(source.heights) == [40, 40, 40, 30, 30]
    assert source.name(4) == (str(tmp_path / "b.tar"), "0004")


def test_edit_shards_give_source_target_and_instruction(tmp_path):
    shard = write_tar(tmp_path / "edits.tar", edit_members(2))
    (source,) = opened(tmp_path, tar_source("edit", shard))
    assert source.texts(1) == ("instruction 1",)
    before, after = source.pictures(1)
    assert same(before, picture(1))
    assert same(after, picture(101))


def test_fields_may_have_other_names_and_keys_may_lie_in_folders(tmp_path):
    png = encoded(picture(0))
    shard = write_tar(
        tmp_path / "named.tar",
        {
            "./v1.2/one.photo.jpg": encoded(picture(0), "JPEG"),
            "./v1.2/one.thumbnail.png": png,
            "./v1.2/one.json": json.dumps({"long": " a \n b ", "short": ["c", ""], "none": None}).encode(),
        },
    )
    config = tar_source("t2i", shard, image="photo", captions=["long", "short", "none"])
    (source,) = opened(tmp_path, config)
    assert source.texts(0) == ("a b", "c")
    assert source.name(0)[1] == "v1.2/one"


def test_pictures_are_upright_rgb_over_white_and_sized_by_their_headers(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    glass = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    striped = picture(1, 12, 8).quantize(4)
    members = {
        "a.jpg": encoded(picture(0, 30, 20), "JPEG", exif=turned),
        "b.png": encoded(glass),
        "c.png": encoded(striped),
        "d.webp": encoded(picture(2, 10, 10).convert("L"), "WEBP", lossless=True),
        "e.png": encoded(picture(0, 30, 20), exif=turned),
    }
    members |= {f"{key}.txt": b"x" for key in "abcde"}
    (source,) = opened(tmp_path, tar_source("t2i", write_tar(tmp_path / "modes.tar", members)))
    pictures = [source.pictures(i)[0] for i in range(5)]
    sizes = [(20, 30), (8, 8), (12, 8), (10, 10), (20, 30)]
    assert [p.size for p in pictures] == sizes == list(zip(source.widths, source.heights, strict=True))
    assert {p.mode for p in pictures} == {"RGB"}
    assert pictures[1].getcolors() == [(64, (255, 255, 255))]
    assert same(pictures[2], striped.convert("RGB"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_corrupt_samples_are_named_counted_and_skipped(tmp_path, caplog):
    members = t2i_members(6)
    members["0001.png"] = b"no picture at all"
    members["0003.txt"] = b" \n"
    del members["0004.png"]
    members["0005.png"] = encoded(Image.new("1", (10_000, 9_000)))
    shard = write_tar(tmp_path / "bad.tar", members)
    (source,) = opened(tmp_path, tar_source("t2i", shard), max_corrupt_share=0.8)
    assert [source.texts(i) for i in range(len(source))] == [("caption 0",), ("caption 2",)]
    assert source.known_corrupt == 4
    for key, reason in (
        ("0001", "image is no JPEG, PNG, WEBP picture"),
        ("0003", "no text in caption"),
        ("0004", "0 pictures for field 'image'"),
        ("0005", "more than 89 megapixels"),
    ):
        assert f"{shard}: {key}: " in caplog.text
        assert reason in caplog.text
    with pytest.raises(DataError, match=r"4 of 6 samples are corrupt, above data.max_corrupt_share=0.5"):
        opened(tmp_path, tar_source("t2i", shard), max_corrupt_share=0.5)


@pytest.mark.parametrize(
    ("left", "usable", "named"),
    [
        ("half of the last picture", 3, "0003"),  # the caption of 0003 is lost, and its picture cut
        ("no end of the archive", 4, "after 0003"),
        ("half a header", 3, "0003"),
    ],
)
def test_a_truncated_shard_keeps_what_is_whole(tmp_path, left, usable, named):
    members = t2i_members(4)
    whole = write_tar(tmp_path / "whole.tar", members)
    listing = index_module.READERS["webdataset"](tar_source("t2i", whole)).places(whole)
    place = dict(listing)["0003"]
    picture_at, text_at = place[0], place[4]
    end = {
        "half of the last picture": picture_at + place[1] // 2,
        "no end of the archive": text_at + 512,
        "half a header": text_at - 256,
    }[left]
    shard = tmp_path / "cut.tar"
    shard.write_bytes(whole.read_bytes()[:end])
    (source,) = opened(tmp_path, tar_source("t2i", shard), max_corrupt_share=0.9)
    assert [source.texts(i) for i in range(len(source))] == [(f"caption {i}",) for i in range(usable)]
    assert any(key == named for _, key, _ in source.index.corrupt)
    assert any("cut off" in reason for _, _, reason in source.index.corrupt)


def test_what_is_no_tar_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b no tar")
    with pytest.raises(DataError, match=r"x\.tar: not an uncompressed tar"):
        opened(tmp_path, tar_source("t2i", tmp_path / "x.tar"))
    with pytest.raises(DataError, match="no file matches"):
        opened(tmp_path, tar_source("t2i", tmp_path / "none-*.tar"))


def test_edit_pairs_of_unlike_proportions_are_corrupt_and_of_like_ones_are_not(tmp_path):
    members = edit_members(3)
    members["0001.target.png"] = encoded(picture(0, 40, 60))
    members["0002.target.png"] = encoded(picture(0, 82, 80))
    shard = write_tar(tmp_path / "pairs.tar", members)
    (source,) = opened(tmp_path, tar_source("edit", shard), max_corrupt_share=0.5)
    assert [source.texts(i) for i in range(len(source))] == [("instruction 0",), ("instruction 2",)]
    ((_, key, reason),) = source.index.corrupt
    assert (key, reason) == ("0001", "pictures of unlike proportions: source 40 x 40 and target 40 x 60")


def test_headers_suffice_for_the_index_and_damage_behind_them_shows_when_read(tmp_path):
    members = t2i_members(1, size=(200, 200))
    members["0000.png"] = members["0000.png"][: len(members["0000.png"]) // 2]
    (source,) = opened(tmp_path, tar_source("t2i", write_tar(tmp_path / "d.tar", members)))
    assert len(source) == 1
    with pytest.raises(SampleError, match="image is unreadable"):
        source.pictures(0)


def test_an_index_is_made_once_and_again_for_a_file_that_changed(tmp_path, monkeypatch):
    first = write_tar(tmp_path / "a.tar", t2i_members(2))
    write_tar(tmp_path / "b.tar", t2i_members(2))
    made = []

    def counted(path, config, index_dir):
        made.append(path.name)
        index_one(path, config, index_dir)

    monkeypatch.setattr(index_module, "index_one", counted)
    config = tar_source("t2i", tmp_path / "*.tar")

    def digest():
        return open_index(config, tmp_path / "index", workers=1, wait_s=5).digest

    before = digest()
    assert digest() == before
    assert made == ["a.tar", "b.tar"]
    write_tar(first, t2i_members(3))
    assert digest() != before
    assert made == ["a.tar", "b.tar", "a.tar"]
    kept = next((tmp_path / "index" / "files").glob("*-b.npz"))
    kept.write_bytes(kept.read_bytes()[:40])  # as a bad disk leaves it
    write_tar(first, t2i_members(4))
    digest()
    assert sorted(made[3:]) == ["a.tar", "b.tar"]


def test_several_processes_make_the_same_index(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", t2i_members(2, first=2 * number))
    config = tar_source("t2i", tmp_path / "*.tar")
    one = open_index(config, tmp_path / "one", workers=1, wait_s=60)
    many = open_index(config, tmp_path / "many", workers=2, wait_s=60)
    for i in range(6):
        assert (one.locate(i), one.key(i)) == (many.locate(i), many.key(i))
    assert one.digest == many.digest


def test_the_wait_for_another_process_is_bounded(tmp_path):
    from filelock import FileLock

    shard = write_tar(tmp_path / "a.tar", t2i_members(1))
    (tmp_path / "index").mkdir()
    with FileLock(tmp_path / "index" / "index.lock"), pytest.raises(DataError, match=r"raise data\.wait_s"):
        open_index(tar_source("t2i", shard), tmp_path / "index", workers=1, wait_s=0.05)


def test_the_shapes_world_is_a_function_of_seed_and_number(tmp_path):
    config = SourceConfig(kind="shapes", task="edit", samples=20, seed=3)
    one, two = (opened(tmp_path, config)[0] for _ in range(2))
    (other,) = opened(tmp_path, SourceConfig(kind="shapes", task="edit", samples=20, seed=4))
    texts = [one.texts(i) for i in range(20)]
    assert texts == [two.texts(i) for i in range(20)] != [other.texts(i) for i in range(20)]
    assert all(same(a, b) for i in range(20) for a, b in zip(one.pictures(i), two.pictures(i), strict=True))
    assert one.pictures(0)[0].size == (32, 32)
    assert np.all(one.widths == 32)


def test_moving_a_file_away_is_told_when_it_is_read(tmp_path):
    shard = write_tar(tmp_path / "a.tar", t2i_members(1))
    (source,) = opened(tmp_path, tar_source("t2i", shard))
    shutil.move(shard, tmp_path / "b.tar")
    with pytest.raises((SampleError, OSError), match=r"a\.tar"):
        source.pictures(0)
    assert os.path.exists(tmp_path / "b.tar")
