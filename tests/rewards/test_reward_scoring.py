"""Every way a reward can fail ends as a missing score, and the policy does with it what the recipe says."""

import asyncio
import logging
import math
from collections import Counter

import pytest

from rewards import scoring
from rewards.base import FatalRewardError, RewardContractError, RewardOutput, RewardSpec
from rewards.calling import RewardBatch, call_reward
from rewards.loading import LoadedReward, RewardSource
from rewards.scoring import RewardResult, combine, score_group

KEYWORDS = "*, images, prompts, references, metadata"
FORMS = {
    "function": f"def reward({KEYWORDS}):\n    BODY",
    "async function": f"async def reward({KEYWORDS}):\n    BODY",
    "class with score": f"class reward:\n    def score(self, {KEYWORDS}):\n        BODY",
    "class with async score": f"class reward:\n    async def score(self, {KEYWORDS}):\n        BODY",
    "class with call": f"class reward:\n    def __call__(self, {KEYWORDS}):\n        BODY",
    "class with async call": f"class reward:\n    async def __call__(self, {KEYWORDS}):\n        BODY",
}
FAILURES = {
    "none": "return [None] * 4",
    "nan": "return [float('nan')] * 4",
    "inf": "return [float('-inf')] * 4",
    "exception": "raise ValueError('broken')",
    "infrastructure": "raise RetryableRewardError('503')",
    "timeout": "WAIT",
}


class Sleeps(list):
    """Stands in for asyncio.sleep and notes the waits that were asked for, in seconds."""

    async def __call__(self, seconds):
        self.append(seconds)


def score(rewards, batch, sleep=None):
    return asyncio.run(score_group((3, 1), rewards, batch, sleep=Sleeps() if sleep is None else sleep))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cause", FAILURES)
def test_a_failed_reward_is_missing_and_never_a_number(load, batch, form, cause):
    wait = "await asyncio.sleep(60)" if "async" in form else "time.sleep(0.5)"
    code = FORMS[form].replace("BODY", FAILURES[cause]).replace("WAIT", wait)
    group = score([load(code, attempts=2, timeout_s=0.05)], batch)
    assert group.components == {"own": [None] * 4}
    assert group.rewards == [None] * 4
    assert group.mask == [False] * 4
    assert group.failures == {f"own/{cause}": 4}
    assert group.dropped and "0 of 4" in group.reason
    returned = cause in ("none", "nan", "inf")  # an answer, so nothing to try again
    assert group.attempts == {"own": 1 if returned else 2}


@pytest.mark.parametrize("form", FORMS)
def test_scores_arrive_in_order_whatever_the_form(load, batch, form):
    code = FORMS[form].replace("BODY", "return [image.getpixel((0, 0))[0] / 4 for image in images]")
    group = score([load(code)], batch)
    assert group.rewards == [0.0, 0.25, 0.5, 0.75]
    assert group.mask == [True] * 4
    assert group.failures == {} and not group.dropped and group.reason == ""
    assert group.group_id == (3, 1)


@pytest.mark.parametrize(
    "answer",
    [
        "numpy.array([0.0, 0.25, 0.5, 0.75])",
        "[numpy.float32(k / 4) for k in range(4)]",
        "(0, 0.25, 0.5, 0.75)",
    ],
)
def test_arrays_and_tuples_become_plain_floats(load, batch, answer):
    group = score([load(f"import numpy\ndef reward({KEYWORDS}): return {answer}")], batch)
    assert group.rewards == [0.0, 0.25, 0.5, 0.75]
    assert all(type(value) is float for value in group.rewards)


def test_a_score_that_no_statistics_can_hold_is_missing(load, batch):
    group = score([load(f"def reward({KEYWORDS}): return [1e308, -1e308, 1e99, 1.0]")], batch)
    assert group.rewards == [None, None, 1e99, 1.0] and group.failures == {"own/inf": 2}
    heavy = score([load(f"def reward({KEYWORDS}): return [1e99, -1e99, 0.0, 1.0]", weight=1e200)], batch)
    assert heavy.rewards == [None, None, 0.0, None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[1.0]", "returned 1 scores for 4 images"),
        ("0.5", "returned a float"),
        ("dict(a=1)", "returned a dict"),
        ("['good'] * 4", "returned 'good'"),
        ("None", "returned a NoneType"),
        ("RewardOutput([1.0] * 4, {'part': [1.0]})", "component 'part' returned 1 scores"),
        ("RewardOutput([1.0] * 4, [1.0] * 4)", "components must map"),
    ],
)
def test_a_wrong_count_or_type_is_a_bug_and_not_retried(load, batch, answer, message):
    loaded = load(
        f"calls = []\ndef reward({KEYWORDS}):\n    calls.append(1)\n    return {answer}", attempts=5
    )
    with pytest.raises(RewardContractError, match=message.replace("(", r"\(")):
        asyncio.run(call_reward(loaded, batch))
    with pytest.raises(FatalRewardError, match="reward 'own'"):
        score([loaded], batch)
    assert len(loaded.function.__globals__["calls"]) == 2  # one for each of the two calls above


def test_a_fatal_error_stops_at_once_even_beside_a_healthy_reward(load, batch):
    fatal = load(f"def reward({KEYWORDS}): raise FatalRewardError('401: key refused')", attempts=5)
    sleeps = Sleeps()
    with pytest.raises(FatalRewardError, match="401: key refused"):
        score([fatal, fixed("fine", [1.0] * 4)], batch, sleeps)
    assert sleeps == []


def test_back_off_doubles_with_jitter_and_success_ends_it(load, batch):
    flaky = load(
        f"""
        calls = []
        def reward({KEYWORDS}):
            calls.append(1)
            if len(calls) < 4:
                raise RetryableRewardError("busy")
            return [1.0] * 4
        """,
        attempts=5,
    )
    sleeps = Sleeps()
    group = score([flaky], batch, sleeps)
    assert group.rewards == [1.0] * 4 and group.attempts == {"own": 4} and group.failures == {}
    assert [base <= waited <= base + 1 for base, waited in zip((1, 2, 4), sleeps, strict=True)] == [True] * 3


@pytest.mark.parametrize(("asked", "waited"), [(45.0, 45.0), (9999.0, 120.0)])
def test_back_off_honours_what_the_service_asks_within_a_bound(load, batch, asked, waited):
    busy = load(
        f"def reward({KEYWORDS}): raise RetryableRewardError('429', retry_after_s={asked})", attempts=2
    )
    sleeps = Sleeps()
    score([busy], batch, sleeps)
    assert sleeps == [waited]


def test_a_hanging_function_never_holds_more_than_one_thread(load, batch):
    hanging = load(
        f"""
        started, release = [], threading.Event()
        def reward({KEYWORDS}):
            started.append(1)
            release.wait(60)
            return [1.0] * 4
        """,
        attempts=3,
        timeout_s=0.05,
    )
    state = hanging.function.__globals__
    assert score([hanging], batch).failures == {"own/timeout": 4}
    assert len(state["started"]) == 1
    state["release"].set()
    assert score([hanging], batch).rewards == [1.0] * 4  # usable again once the abandoned call has ended


def test_sync_rewards_take_one_group_after_the_other_and_async_ones_overlap(load, batch):
    code = """
        running, most = 0, 0
        {prefix}def reward({keywords}):
            global running, most
            running += 1
            most = max(most, running)
            {wait}
            running -= 1
            return [1.0] * 4
    """
    blocking = load(code.format(prefix="", keywords=KEYWORDS, wait="time.sleep(0.01)"))
    overlapping = load(code.format(prefix="async ", keywords=KEYWORDS, wait="await asyncio.sleep(0.01)"))

    async def three_groups(loaded):
        await asyncio.gather(*(score_group(k, [loaded], batch) for k in range(3)))
        return loaded.function.__globals__["most"]

    assert asyncio.run(three_groups(blocking)) == 1
    assert asyncio.run(three_groups(overlapping)) == 3


def test_a_reward_cannot_change_what_the_others_and_its_own_retries_see(load, batch):
    vandal = load(
        f"""
        calls = []
        def reward({KEYWORDS}):
            seen = [image.size for image in images], [m["tag"] for m in metadata], list(prompts)
            for image, entry in zip(images, metadata):
                image.thumbnail((2, 2))
                entry["tag"] = "spoilt"
            prompts.clear()
            calls.append(seen)
            if len(calls) == 1:
                raise ValueError("once")
            return [1.0] * 4
        """
    )
    score([vandal], batch)
    first, second = vandal.function.__globals__["calls"]
    assert first == second
    assert batch.images[0].size == (8, 8) and batch.metadata[0] == {"tag": "single_object"}


def test_a_reward_sees_the_protocol_and_its_params_only(load, batch):
    loaded = load(
        "def reward(**given):\n    seen.append(given)\n    return [1.0] * 4\nseen = []", params={"a": 2}
    )
    score([loaded], batch)
    assert sorted(loaded.function.__globals__["seen"][0]) == [
        "a",
        "images",
        "metadata",
        "prompts",
        "references",
    ]


def test_a_batch_of_unequal_lists_is_refused(batch):
    with pytest.raises(ValueError, match="'prompts': 1"):
        RewardBatch(batch.images, ["one"], batch.references, batch.metadata)


# The policy, on given results.


def fixed(label, scores, **settings):
    """A reward that answers with `scores`."""
    spec = RewardSpec("fixed:reward", label=label, **settings)
    return LoadedReward(spec, label, RewardSource("fixed"), lambda **_: RewardOutput(scores), {}, None)


def result(scores, **components):
    missing = scores.count(None)
    return RewardResult(scores, components, {"none": missing} if missing else {}, 1, 0.1)


def weigh(*rewards):
    """Combine (spec settings, scores) pairs labelled a, b, ..."""
    loaded = [fixed(chr(97 + i), scores, **settings) for i, (settings, scores) in enumerate(rewards)]
    return combine(7, loaded, [result(scores) for _, scores in rewards])


def test_rewards_are_summed_by_weight():
    group = weigh(({"weight": 0.5}, [1.0, 0.0]), ({"weight": -2.0}, [0.25, 1.0]))
    assert group.rewards == [0.5 * 1.0 - 2.0 * 0.25, -2.0]
    assert group.components == {"a": [1.0, 0.0], "b": [0.25, 1.0]}


def test_one_missing_reward_leaves_the_sample_without_a_sum():
    group = weigh(({}, [1.0, None, 1.0]), ({}, [1.0, 1.0, 1.0]))
    assert group.rewards == [2.0, None, 2.0]
    assert group.mask == [True, False, True] and not group.dropped
    assert group.failures == {"a/none": 1}


@pytest.mark.parametrize(("scored", "kept"), [(2, True), (1, False), (4, True), (0, False)])
def test_a_group_is_kept_while_half_of_it_is_scored(scored, kept):
    group = weigh(({}, [0.5] * scored + [None] * (4 - scored)))
    assert group.dropped is not kept
    assert group.mask == ([True] * scored + [False] * (4 - scored) if kept else [False] * 4)
    assert group.rewards == [0.5] * scored + [None] * (4 - scored)


def test_the_half_is_counted_on_samples_with_every_reward():
    group = weigh(({}, [1.0, 1.0, None, None]), ({}, [None, 1.0, 1.0, 1.0]))
    assert group.dropped and "only 1 of 4" in group.reason


def test_drop_group_drops_on_one_missing_score():
    group = weigh(({"on_missing": "drop_group"}, [1.0, None, 1.0, 1.0]))
    assert group.dropped and group.mask == [False] * 4
    assert "'a' left 1 of 4 samples of group 7 unscored (none 1)" in group.reason


def test_stop_ends_the_run_naming_reward_group_and_cause():
    with pytest.raises(FatalRewardError, match=r"'b' left 1 of 2 samples of group 7 unscored \(none 1\)"):
        weigh(({}, [1.0, 1.0]), ({"on_missing": "stop"}, [None, 1.0]))


def test_a_reward_of_weight_zero_is_logged_and_masks_nothing():
    group = weigh(({}, [1.0, 0.5]), ({"weight": 0.0, "on_missing": "stop"}, [None, None]))
    assert group.rewards == [1.0, 0.5] and group.mask == [True, True]
    assert group.failures == {"b/none": 2}


def test_components_are_logged_beside_their_reward_and_mask_nothing(load, batch):
    code = f"def reward({KEYWORDS}): return RewardOutput([1.0] * 4, {{'part': [0.5, None, float('nan'), 1]}})"
    group = score([load(code)], batch)
    assert group.components == {"own": [1.0] * 4, "own/part": [0.5, None, None, 1.0]}
    assert group.mask == [True] * 4 and group.failures == {}
    assert all(
        value is None or math.isfinite(value) for values in group.components.values() for value in values
    )


def test_a_reward_that_always_fails_is_told_and_buries_nothing_else(load, batch, caplog, monkeypatch):
    monkeypatch.setattr(scoring, "_failed", Counter())
    reward = load(FORMS["function"].replace("BODY", "raise ValueError('broken')"), attempts=2)
    for _ in range(12):
        assert score([reward], batch).failures == {"own/exception": 4}
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in told if record.exc_info] == [
        "reward own: 4 samples are not scored"
    ]
    assert "ValueError: broken" in caplog.text
    assert told[-1].getMessage().startswith("reward own failed for the 10th time: ValueError: broken (")
    assert len(told) == 3, "with the one retry of the first call"
