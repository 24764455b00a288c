"""Batches: purity, ranks, replacement of broken samples, resume, prefetch."""

import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from core.failures import DataError
from pretrain.data.batch import PretrainBatch, fitted, fitted_pair, to_pixels
from pretrain.data.config import CacheConfig, Resolution, SourceConfig, data_problems
from pretrain.data.prefetch import Prefetch
from pretrain.data.stream import BatchStream
from tests.pretrain.data.data_files import (
    config_of,
    edit_members,
    encoded,
    picture,
    shapes_source,
    t2i_members,
    tar_source,
    write_tar,
)


def stream_of(config, *, batch_size=4, seed=0, rank=0, world_size=1):
    return BatchStream(config, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size)


def both_tasks(tmp_path, **keys):
    """Square and wide pictures with captions, and edits, in tar shards."""
    t2i = write_tar(tmp_path / "t2i.tar", t2i_members(12) | t2i_members(12, first=12, size=(80, 45)))
    edit = write_tar(tmp_path / "edit.tar", edit_members(12))
    return config_of(tmp_path, tar_source("t2i", t2i), tar_source("edit", edit), **keys)


def assert_equal(one: PretrainBatch, two: PretrainBatch):
    for name in PretrainBatch.__dataclass_fields__:
        left, right = getattr(one, name), getattr(two, name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), name
        elif name == "reference_images" and left is not None:
            assert [image.tobytes() for image in left] == [image.tobytes() for image in right]
        else:
            assert left == right, name


def test_a_batch_has_one_task_one_size_and_the_pictures_of_its_prompts(tmp_path):
    stream = stream_of(both_tasks(tmp_path, reference_images=True))
    seen = set()
    for step in range(12):
        batch = stream.batch(step)
        seen.add((batch.task, batch.height, batch.width))
        assert batch.pixels.shape == (4, 3, batch.height, batch.width)
        assert batch.indices.tolist() == [0, 1, 2, 3]
        if batch.task == "t2i":
            assert batch.references is batch.reference_images is None
        for i, prompt in enumerate(batch.prompts):
            number = int(prompt.split()[1])
            blue = 17 * number % 250 if batch.task == "t2i" else 17 * (number + 100) % 250
            assert torch.allclose(batch.pixels[i, 2], torch.tensor(blue / 127.5 - 1), atol=0.02)
            if batch.task == "edit":
                assert prompt == f"instruction {number}"
                blue = 17 * number % 250
                assert torch.allclose(batch.references[i, 2], torch.tensor(blue / 127.5 - 1), atol=0.02)
                assert torch.equal(to_pixels([batch.reference_images[i]])[0], batch.references[i])
    assert seen == {("edit", 32, 32), ("t2i", 32, 32), ("t2i", 24, 40)}


def test_batches_are_a_pure_function_of_seed_and_step(tmp_path):
    config = both_tasks(tmp_path, prompt_dropout=0.3)
    one, two = stream_of(config), stream_of(config)
    for step in (7, 0, 3, 7):
        assert_equal(one.batch(step), two.batch(step))
    assert any(one.batch(s).prompts != stream_of(config, seed=1).batch(s).prompts for s in range(4))


def test_the_slices_of_ranks_are_the_batch_of_one_rank(tmp_path):
    config = both_tasks(tmp_path, prompt_dropout=0.3)
    whole = stream_of(config, batch_size=6)
    for ranks in (2, 3):
        parts = [stream_of(config, batch_size=6, rank=r, world_size=ranks) for r in range(ranks)]
        for step in range(4):
            batch, slices = whole.batch(step), [part.batch(step) for part in parts]
            assert torch.equal(torch.cat([s.pixels for s in slices]), batch.pixels)
            assert torch.equal(torch.cat([s.indices for s in slices]), batch.indices)
            assert [prompt for s in slices for prompt in s.prompts] == batch.prompts
            assert {(s.task, s.height, s.width) for s in slices} == {(batch.task, batch.height, batch.width)}


def test_resume_in_the_middle_of_an_epoch_continues_the_straight_run(tmp_path):
    config = both_tasks(tmp_path)
    with stream_of(config).batches() as straight:
        run = [next(straight) for _ in range(10)]
    with stream_of(config).batches(first_step=5) as resumed:
        for batch in run[5:]:
            assert_equal(next(resumed), batch)


def test_every_sample_comes_once_an_epoch_through_real_files(tmp_path):
    shard = write_tar(tmp_path / "t2i.tar", t2i_members(12))
    stream = stream_of(config_of(tmp_path, tar_source("t2i", shard)))
    epochs = [[p for step in range(3 * e, 3 * e + 3) for p in stream.batch(step).prompts] for e in range(4)]
    assert all(sorted(epoch) == sorted(f"caption {n}" for n in range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_captions_are_drawn_from_all_that_a_sample_has(tmp_path):
    members = t2i_members(4)
    for number in range(4):
        members[f"{number:04d}.json"] = b'{"long": "a long one"}'
    source = tar_source("t2i", write_tar(tmp_path / "a.tar", members), captions=["caption", "long"])
    stream = stream_of(config_of(tmp_path, source))
    counts = Counter(prompt == "a long one" for step in range(50) for prompt in stream.batch(step).prompts)
    assert 70 < counts[True] < 130  # of 200: 4 standard deviations around one half


def test_prompts_are_dropped_at_the_stated_share_by_place(tmp_path):
    stream = stream_of(config_of(tmp_path, shapes_source("t2i"), prompt_dropout=0.25), batch_size=32)
    prompts = [prompt for step in range(25) for prompt in stream.batch(step).prompts]
    assert 150 < prompts.count("") < 250  # of 800: 4 standard deviations around 200


def broken_set(tmp_path, **keys):
    """12 pictures, two of which have whole headers and half a body."""
    members = t2i_members(12, size=(60, 60))
    for key in ("0002.png", "0007.png"):
        members[key] = members[key][: len(members[key]) // 2]
    return config_of(tmp_path, tar_source("t2i", write_tar(tmp_path / "broken.tar", members)), **keys)


def test_broken_samples_are_replaced_the_same_way_by_everyone(tmp_path, caplog):
    config = broken_set(tmp_path, max_corrupt_share=0.2)
    one, two = stream_of(config), stream_of(config)
    halves = [stream_of(config, rank=rank, world_size=2) for rank in range(2)]
    for step in range(6):
        batch = one.batch(step)
        assert not {"caption 2", "caption 7"} & set(batch.prompts)
        assert torch.equal(torch.cat([half.batch(step).pixels for half in halves]), batch.pixels)
    for step in reversed(range(6)):
        assert_equal(two.batch(step), one.batch(step))
    assert one.skipped == two.skipped == 2
    mine = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert all(
        sum(f"broken.tar: {key}: image is unreadable" in line for line in mine) >= 2
        for key in ("0002", "0007")
    )


def test_more_broken_samples_than_allowed_stop_the_run(tmp_path):
    stream = stream_of(broken_set(tmp_path, max_corrupt_share=0.1))
    with pytest.raises(
        DataError, match=r"2 of 12 samples are corrupt.*max_corrupt_share=0.1: the last: .*broken.tar"
    ):
        for step in range(3):
            stream.batch(step)


def test_index_and_reading_share_one_limit(tmp_path):
    config = broken_set(tmp_path, max_corrupt_share=0.2)
    members = t2i_members(10, first=20)
    members["0020.png"] = b""
    config.sources[0].paths.append(str(write_tar(tmp_path / "more.tar", members)))
    stream = stream_of(config)
    assert stream.skipped == 1
    for step in range(6):
        stream.batch(step)
    assert stream.skipped == 3
    config.max_corrupt_share = 0.1  # allows the one that the index found, and one more of 22
    stream = stream_of(config)
    with pytest.raises(DataError, match="3 of 22"):
        for step in range(6):
            stream.batch(step)


def test_what_was_found_is_told(tmp_path):
    lines = stream_of(both_tasks(tmp_path)).lines()
    assert lines[0].startswith("sources[0] webdataset t2i: 24 samples (1:1 12, 16:9 12)")
    assert lines[1].startswith("sources[1] webdataset edit: 12 samples (1:1 12)")


def test_the_largest_centred_part_is_kept():
    tall = picture(0, 40, 80)
    assert fitted(tall, (40, 40)).tobytes() == tall.crop((0, 20, 40, 60)).tobytes()
    wide = picture(0, 90, 40)
    half = fitted(wide, (20, 30))
    assert half.size == (30, 20)
    expected = wide.resize((30, 20), Image.Resampling.LANCZOS, box=(15, 0, 75, 40))
    assert half.tobytes() == expected.tobytes()


def test_an_edit_pair_gets_one_crop_whatever_the_scale_of_its_source():
    """The same picture at half the size, cut by the pair's rule, is what the target's cut is but for smoothing."""
    target = picture(3, 160, 80)
    source = target.resize((80, 40), Image.Resampling.LANCZOS)
    before, after = fitted_pair(source, target, (64, 64))
    difference = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int))
    assert difference.max() <= 3
    same_before, same_after = fitted_pair(target, target, (64, 64))
    assert same_before.tobytes() == same_after.tobytes() == after.tobytes()


def test_pixels_span_minus_one_to_one():
    pixels = to_pixels([Image.new("RGB", (3, 2), (0, 255, 51))])
    assert pixels.shape == (1, 3, 2, 3)
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_progressive_resolution_switches_at_its_step(tmp_path):
    schedule = [Resolution(until_step=2, side=32), Resolution(side=64)]
    stream = stream_of(both_tasks(tmp_path, resolution=schedule))
    areas = [stream.batch(step).height * stream.batch(step).width for step in range(4)]
    assert max(areas[:2]) <= 32 * 32 < 40 * 72 <= min(areas[2:])


@pytest.mark.parametrize(("batch_size", "rank", "world_size"), [(5, 0, 2), (4, 2, 2), (0, 0, 1)])
def test_sizes_that_do_not_divide_are_refused(tmp_path, batch_size, rank, world_size):
    with pytest.raises(DataError, match=f"batch_size={batch_size} must be a multiple"):
        stream_of(
            config_of(tmp_path, shapes_source("t2i")), batch_size=batch_size, rank=rank, world_size=world_size
        )


def test_every_problem_of_a_configuration_is_named_at_once(tmp_path):
    config = config_of(
        tmp_path,
        SourceConfig(kind="lmdb", task="t2i", weight=-1),
        SourceConfig(kind="shapes", task="video", paths=["x"], samples=0, captions=[]),
        edit_share=0.5,
        resolution=[
            Resolution(until_step=5),
            Resolution(until_step=3, side=1),
            Resolution(until_step=9, side=1, area=1),
        ],
        multiple=0,
        max_crop_loss=2,
        cache_dir="",
        cache=CacheConfig(latents=True, text=True, text_dtype="int8", batch_size=0),
    )
    problems = "\n".join(data_problems(config))
    for part in (
        "data.sources[0].kind='lmdb' is not one of",
        "data.sources[0].paths is empty",
        "data.sources[0].weight=-1",
        "data.sources[1].task='video' is not one of",
        "data.sources[1].paths=['x'] has no meaning",
        "data.sources[1].samples=0",
        "data.sources[1].captions is empty",
        "data.edit_share=0.5 needs a source of task edit",
        "data.edit_share=0.5 needs a source of task t2i",
        "data.resolution[0]: give a positive value to exactly one of area (0), side (0)",
        "data.resolution[1].until_step=3 must be above 5",
        "data.resolution[2]: give",
        "data.resolution[2].until_step=9: the last one holds to the end",
        "data.multiple=0",
        "data.max_crop_loss=2",
        "data.cache_dir is empty: name a folder for the sources' indexes",
        "data.cache_dir is empty: name the folder of what",
        "data.cache.vae is empty",
        "data.cache.text_encoders is empty",
        "data.cache.text_dtype='int8'",
        "data.cache.batch_size=0",
    ):
        assert part in problems
    assert data_problems(config_of(tmp_path)) == ["data.sources is empty: name at least one source"]
    assert data_problems(config_of(tmp_path, shapes_source("edit"), cache_dir="")) == []


def numbered(step):
    return PretrainBatch("t2i", 8, 8, torch.tensor([step]), ["x"])


def test_prefetch_keeps_the_order_of_steps_and_its_bound():
    running, most, begun = 0, 0, []
    lock = threading.Lock()

    def make(step):
        nonlocal running, most
        with lock:
            begun.append(step)
            running += 1
            most = max(most, running)
        release[step % 2].wait(5)  # even steps end after odd ones
        with lock:
            running -= 1
        return numbered(step)

    release = [threading.Event(), threading.Event()]
    release[1].set()
    threading.Timer(0.05, release[0].set).start()
    with Prefetch(make, 10, workers=2, depth=3, wait_s=5) as batches:
        assert [int(next(batches).indices) for _ in range(6)] == list(range(10, 16))
        assert most <= 2
        assert max(begun) <= 15 + 3
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_raises_an_error_in_its_turn_and_ends():
    def make(step):
        if step == 2:
            raise DataError("step 2 has no data")
        return numbered(step)

    batches = Prefetch(make, 0, workers=2, depth=4, wait_s=5)
    assert [int(next(batches).indices) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="step 2 has no data"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_prefetch_waits_no_longer_than_it_may():
    gone = threading.Event()
    batches = Prefetch(lambda step: gone.wait(5) and numbered(step), 0, workers=1, depth=1, wait_s=0.02)
    try:
        with pytest.raises(DataError, match=r"no batch within data\.wait_s"):
            next(batches)
    finally:
        gone.set()


def test_encoded_pictures_of_a_shard_reach_the_batch_in_any_format(tmp_path):
    members = {}
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "PNG")):
        members[f"{number}.{kind.lower()}"] = encoded(picture(number), kind)
        members[f"{number}.txt"] = b"x"
    stream = stream_of(config_of(tmp_path, tar_source("t2i", write_tar(tmp_path / "a.tar", members))))
    assert stream.batch(0).pixels.shape == (4, 3, 32, 32)
