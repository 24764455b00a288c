"""The parts of an evaluation that need no Ray: batches and seeds, intervals, pictures and scores on disk, tables."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from core.prompts import Prompt
from core.statistics import bootstrap_mean, strata_bootstrap
from rewards.base import RewardSpec
from rewards.benchmarks.figures import Figure, image_mean
from rewards.benchmarks.items import Item, ScoredItem
from rewards.benchmarks.layouts import Keyed, Numbered
from rewards.benchmarks.registry import Part
from rl.evaluate.cluster import make_placement
from rl.evaluate.images import ImageStore
from rl.evaluate.plan import Batch, Plan, Sampling, item_sizes, make_batches, prompts_sha256
from rl.evaluate.preflight import _reward_set
from rl.evaluate.report import markdown, table_rows
from rl.evaluate.scores import ImageScore, ScoreStore
from rl.recipe.schema import ResourcesConfig


def items(count, task="t2i", prefix=""):
    return tuple(Item(f"{prefix}{k:05d}", "g", Prompt(k, task, f"prompt {k}")) for k in range(count))


def part(found):
    return Part(found[0].prompt.task, found, RewardSpec("x"))


def rows(values, weight=1.0):
    return tuple((weight * value, weight) for value in values)


def test_batches_hold_whole_items_of_one_part_and_one_size():
    drawn, edited = items(5), items(3, "edit", "e")
    sizes = {item.key: (32, 32) for item in (*drawn, *edited)} | {edited[1].key: (32, 48)}
    batches = make_batches([part(drawn), part(edited)], sizes, count=4, batch_size=8)
    assert [batch.index for batch in batches] == list(range(5))
    assert [(batch.part, batch.size, [item.key for item in batch.items]) for batch in batches] == [
        (0, (32, 32), ["00000", "00001"]),
        (0, (32, 32), ["00002", "00003"]),
        (0, (32, 32), ["00004"]),
        (1, (32, 32), ["e00000", "e00002"]),
        (1, (32, 48), ["e00001"]),
    ]
    assert len(make_batches([part(drawn)], sizes, count=4, batch_size=1)) == 5, "one item at least"


def test_benchmarks_give_rewards_the_source_as_it_is():
    plan = SimpleNamespace(model="m", sampling=SimpleNamespace(size=32))
    found = _reward_set(plan, 3, part(items(1, "edit")))
    assert found.references_as_given and found.name == "benchmark:3"


def test_seeds_follow_from_seed_prompt_and_number_alone():
    sampling = Sampling(32, 2, 1.0, "", 16, "float32", seed=3)
    plan = SimpleNamespace(sampling=sampling, count=3)
    one, two = items(2)
    seeds = Plan.seeds(plan, one)
    assert len({*seeds, *Plan.seeds(plan, two)}) == 6
    assert Plan.seeds(SimpleNamespace(sampling=sampling, count=2), one) == seeds[:2]
    assert (
        Plan.seeds(SimpleNamespace(sampling=Sampling(32, 2, 1.0, "", 16, "float32", 4), count=3), one)
        != seeds
    )


def test_an_edit_takes_the_aspect_ratio_of_its_source(tmp_path):
    Image.new("RGB", (300, 200)).save(tmp_path / "wide.png")
    wide = Item("w", "", Prompt(0, "edit", "x", (str(tmp_path / "wide.png"),)))
    gone = Item("g", "", Prompt(1, "edit", "x", (str(tmp_path / "gone.png"),)))
    sizes, problems = item_sizes([*items(1), wide, gone], 512, 16)
    assert sizes["00000"] == (512, 512)
    height, width = sizes["w"]
    assert width / height == pytest.approx(1.5, abs=0.05) and height * width == pytest.approx(
        512**2, rel=0.05
    )
    assert len(problems) == 1 and "gone.png" in problems[0]


def test_the_hash_of_prompts_knows_the_bytes_of_the_sources(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    edit = [Item("e", "", Prompt(0, "edit", "x", (str(path),)))]
    before = prompts_sha256(edit)
    assert prompts_sha256(edit) == before != prompts_sha256(items(1))
    Image.new("RGB", (4, 4), "red").save(path)
    assert prompts_sha256(edit) != before


def test_the_interval_of_one_group_is_the_bootstrap_of_a_mean():
    values = np.random.default_rng(0).random(40)
    expected = bootstrap_mean(values, resamples=500)
    found = strata_bootstrap([rows(values, weight=4.0)], resamples=500)
    assert found == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_mean_over_groups_draws_within_each_group():
    """Two groups of no spread have no interval, however far apart they are; drawn together they would have one."""
    strata = {"a": rows([0.0] * 10), "b": rows([1.0] * 10)}
    assert strata_bootstrap(strata.values(), resamples=200) == (0.5, 0.5)
    rng = np.random.default_rng(1)
    spread = {name: rows(rng.normal(size=50)) for name in "abc"}
    low, high = strata_bootstrap(spread.values())
    groups = [np.array([v for v, _ in spread[name]]) for name in "abc"]
    error = np.sqrt(sum(g.var() / len(g) for g in groups)) / 3
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)


def test_prompts_weigh_by_their_pictures_and_missing_ones_not_at_all():
    heavy = Figure("x", {"": ((4.0, 4.0), (0.0, 1.0), (0.0, 0.0))}, 5, 0)
    assert heavy.value == 0.8
    low, high = strata_bootstrap(heavy.strata.values(), resamples=2000)
    assert (low, high) == (0.0, 1.0)
    assert strata_bootstrap([rows([1.0]), rows([1.0, 0.0])]) == (None, None)
    assert strata_bootstrap([]) == (None, None)


@pytest.mark.parametrize(
    ("settings", "bundles"),
    [
        ({"device": "cpu"}, [{"CPU": 2}, {"CPU": 2}, {"CPU": 2}, {"CPU": 2}, {"CPU": 2}]),
        ({}, [{"CPU": 2, "GPU": 1}, {"CPU": 2}, {"CPU": 2, "GPU": 1}, {"CPU": 2}, {"CPU": 2}]),
        ({"encode_gpus": 0.25}, [{"CPU": 4, "GPU": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 2}, {"CPU": 2}]),
        (
            {"reward_gpus": 1.0, "reward_workers": 1},
            [{"CPU": 2, "GPU": 1}, {"CPU": 2}, {"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}],
        ),
    ],
    ids=["cpu", "gpu", "encode_on_gpu", "detector_on_gpu"],
)
def test_who_gets_what(settings, bundles):
    plan = SimpleNamespace(resources=ResourcesConfig(**settings), workers=2)
    placement = make_placement(plan, generate=True, score=True)
    assert list(placement.bundles) == bundles
    for number, bundle in enumerate(placement.bundles):
        inside = [actor for actor in placement.actors if actor.bundle == number]
        assert sum(actor.gpus for actor in inside) == pytest.approx(bundle.get("GPU", 0))
    scoring = make_placement(plan, generate=False, score=True)
    assert {actor.role for actor in scoring.actors} == {"reward"}
    assert {actor.role for actor in make_placement(plan, generate=True, score=False).actors} == {
        "rollout",
        "encode",
    }


@pytest.fixture
def batch():
    return Batch(3, 0, (4, 4), items(2))


def pixels(count, side=4):
    return np.random.default_rng(count).integers(0, 255, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout", [Numbered(), Keyed()])
def test_a_committed_batch_is_laid_out_and_leaves_no_spool(tmp_path, batch, layout):
    store = ImageStore(layout, tmp_path / "images", 4, tmp_path / "spool")
    images = pixels(8)
    assert store.lacks(batch)
    store.commit(batch, images)
    assert not store.lacks(batch)
    assert list((tmp_path / "spool").iterdir()) == []
    found = [np.asarray(picture.load()) for item in batch.items for picture in store.pictures(item)]
    assert np.array_equal(np.stack(found), images)


def test_a_kill_between_spool_and_layout_loses_nothing(tmp_path, batch, monkeypatch):
    store = ImageStore(Numbered(), tmp_path / "images", 2, tmp_path / "spool")
    images, written = pixels(4), []

    def killed(self, folder, item, pictures):
        if written:
            raise KeyboardInterrupt
        written.append(item)
        Numbered().write(folder, item, pictures)

    monkeypatch.setattr(store, "layout", SimpleNamespace(write=killed.__get__(store), find=Numbered().find))
    with pytest.raises(KeyboardInterrupt):
        store.commit(batch, images)
    first = tmp_path / "images" / "00000" / "samples" / "00000.png"
    stamp = first.stat().st_mtime_ns

    again = ImageStore(Numbered(), tmp_path / "images", 2, tmp_path / "spool")
    assert again.lacks(batch)
    again.recover([None, None, None, batch])
    assert not again.lacks(batch) and list((tmp_path / "spool").iterdir()) == []
    found = [np.asarray(picture.load()) for item in batch.items for picture in again.pictures(item)]
    assert np.array_equal(np.stack(found), images)
    assert first.stat().st_mtime_ns == stamp


def test_nothing_is_added_to_somebody_elses_folder_and_wrong_arrays_are_refused(tmp_path, batch):
    with pytest.raises(ValueError, match="somebody else's"):
        ImageStore(Numbered(), tmp_path, 1, None).commit(batch, pixels(2))
    store = ImageStore(Numbered(), tmp_path, 1, tmp_path / "spool")
    for wrong in (pixels(3), pixels(2).astype(np.float32)):
        with pytest.raises(ValueError, match="needs uint8"):
            store.commit(batch, wrong)


def test_scores_survive_a_torn_line_and_belong_to_the_bytes_of_a_picture(tmp_path):
    store = ScoreStore(tmp_path, "abcdef0123456789")
    assert store.empty
    store.add(
        0,
        [
            ImageScore("a", 0, "s1", {"score": 0.5, "x": 1.0}),
            ImageScore("a", 1, "s2", {"ended.refused": 1.0}),
        ],
        {},
    )
    store.add(1, [ImageScore("b", 0, "s3", {"score": 1.0})], {"scorer/none": 1})
    with store.path.open("a") as file:
        file.write('{"batch": 2, "images": [{"key": "c"')
    again = ScoreStore(tmp_path, "abcdef0123456789")
    assert not again.empty
    assert again.get("a", 0, "s1") == {"score": 0.5, "x": 1.0}
    assert again.scored("a", 0, "s1") and not again.scored("a", 0, "other bytes")
    assert again.get("a", 1, "s2") == {"ended.refused": 1.0} and not again.scored("a", 1, "s2")
    again.add(2, [ImageScore("a", 1, "s2", {"score": 0.25})], {})
    final = ScoreStore(tmp_path, "abcdef0123456789")
    assert final.scored("a", 1, "s2") and final.scored("b", 0, "s3")
    assert [json.loads(line)["batch"] for line in final.path.read_text().splitlines()] == [0, 1, 2]
    assert ScoreStore(tmp_path, "0" * 16).get("a", 0, "s1") is None, "another scorer has a file of its own"


def document(**changes):
    scored = [
        ScoredItem(item, ({"score": float(k % 2)}, None if k == 0 else {"score": 1.0}))
        for k, item in enumerate(items(4))
    ]
    found = table_rows([image_mean("all", "score", {"": scored}), image_mean("none", "other", {"": scored})])
    base = {
        "benchmark": "geneval",
        "scoring": "published",
        "version": "1",
        "table": [vars(row) for row in found],
        "images": {"expected": 8, "present": 7, "scored": 7},
        "generation": {"model_sha256": "abc", "seed": 0},
        "scorers": [{"name": "r", "params": {"model": "m"}, "files": {"t.v1": "def"}}],
        "detectors": ["m2f.clip"],
        "judge_snapshots": ["judge-1"],
    }
    return base | changes


def test_the_table_shows_intervals_missing_pictures_and_who_scored():
    text = markdown(document(), 3)
    assert "**Incomplete: of 8 pictures 7 are there and 7 are scored.**" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| all |"))
    assert line.startswith("| all | 0.714 | [0.") and line.endswith("] | 4 | 1 of 8 |")
    assert "| none | – | – | 0 | 8 of 8 |" in text
    for fact in (
        "model sha256: abc",
        "scorer: r(model=m)",
        "sha256 of t.v1: def",
        "detector: m2f.clip",
        "judge snapshot: judge-1",
    ):
        assert f"- {fact}\n" in text
    whole = markdown(document(images={"expected": 8, "present": 8, "scored": 8}, scoring="compat"), 3)
    assert "Incomplete" not in whole and whole.startswith("# geneval, scored as the public scripts do\n")
