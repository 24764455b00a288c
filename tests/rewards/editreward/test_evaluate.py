"""Figures of an evaluation against loops and scipy, pair sets, and probes on models whose fault is known."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from core.agreement import agreement, best_threshold
from core.statistics import bootstrap_mean
from rewards.editreward.config import PairSetSection
from rewards.editreward.data.index import Entry
from rewards.editreward.data.shards import DataError, EditSample
from rewards.editreward.evaluate.metrics import (
    Scored,
    group_differences,
    group_estimates,
    overall,
    tie_threshold,
    within_groups,
)
from rewards.editreward.evaluate.pairs import evaluate_pairs, load_pairs
from rewards.editreward.evaluate.probes import PROBES, changed_edits, choose_probe_entries, run_probes
from rewards.editreward.evaluate.report import plot_calibration


def reference_pairwise(target, predicted):
    right = total = 0.0
    for i, j in itertools.combinations(range(len(target)), 2):
        if target[i] != target[j]:
            total += 1
            product = (target[i] - target[j]) * (predicted[i] - predicted[j])
            right += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    return right / total


def make_scored(groups=12, size=4, noise=1.0, seed=0):
    """Integer labels, so that ties occur; every second group belongs to the source of the one before."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 6, groups * size).astype(float)
    predicted = target + rng.normal(0, noise, len(target)) + np.repeat(rng.normal(0, 2, groups), size)
    names = [f"g{i // size}" for i in range(len(target))]
    sources = [f"s{i // (2 * size)}" for i in range(len(target))]
    return Scored(target, predicted, *map(np.array, (names, sources, ["a", "b"] * 24)))


def test_agreement_is_that_of_scipy_and_of_plain_loops():
    rng = np.random.default_rng(0)
    for ties in (False, True):
        target = rng.integers(0, 5, 40).astype(float)
        predicted = target + rng.normal(0, 2, 40)
        if ties:
            predicted = predicted.round()
        found = agreement(target, predicted)
        assert found["spearman"] == pytest.approx(stats.spearmanr(target, predicted).statistic)
        assert found["kendall"] == pytest.approx(stats.kendalltau(target, predicted).statistic)
        assert found["pearson"] == pytest.approx(np.corrcoef(target, predicted)[0, 1])
        assert found["pairwise"] == pytest.approx(reference_pairwise(target, predicted))
        assert found["mae"] == pytest.approx(
            np.mean([abs(a - b) for a, b in zip(target, predicted, strict=True)])
        )
        assert found["rmse"] == pytest.approx(np.mean((target - predicted) ** 2) ** 0.5)


def test_equal_labels_define_no_order_and_equal_predictions_have_found_none():
    flat, rising = np.ones(4), np.arange(4.0)
    assert agreement(flat, rising)["spearman"] is None and agreement(flat, rising)["pairwise"] is None
    found = agreement(rising, flat)
    assert (found["spearman"], found["pairwise"]) == (0.0, 0.5)


def test_within_groups_ignores_what_only_tells_sources_apart():
    """Predicting every group's mean looks good over all samples, and is worthless inside the groups."""
    rng = np.random.default_rng(1)
    level = np.repeat(rng.normal(0, 10, 30), 4)
    target = level + np.tile([0.0, 1.0, 2.0, 3.0], 30)
    names = [f"g{i // 4}" for i in range(120)]
    names, kinds = np.array(names), np.array(["x"] * 120)
    meter = Scored(target, level, names, names, kinds)
    assert agreement(meter.target, meter.predicted)["spearman"] > 0.95
    values = within_groups(meter, tie_margin=0, threshold=0)
    assert set(values["spearman"].values()) == {0.0} and set(values["pairwise"].values()) == {0.5}
    perfect = Scored(target, target**3, names, names, kinds)
    figures = group_estimates(within_groups(perfect, tie_margin=0, threshold=0), resamples=100, seed=0)
    assert figures["spearman"].mean == pytest.approx(1) and figures["pairwise"].mean == 1
    difference = group_differences(
        values, within_groups(perfect, tie_margin=0, threshold=0), resamples=100, seed=0
    )
    assert difference["spearman"].mean == pytest.approx(1) and difference["spearman"].low > 0.9


def test_group_figures_are_means_over_sources_of_means_over_groups():
    scored = make_scored()
    threshold = tie_threshold(scored, tie_margin=0)
    values = within_groups(scored, tie_margin=0, threshold=threshold)
    expected: dict[str, list[float]] = {}
    for g in range(12):
        rows = slice(4 * g, 4 * g + 4)
        if len(set(scored.target[rows])) > 1:
            expected.setdefault(f"s{g // 2}", []).append(
                reference_pairwise(scored.target[rows], scored.predicted[rows])
            )
    assert values["pairwise"] == pytest.approx({s: np.mean(v) for s, v in expected.items()})
    estimate = group_estimates(values, resamples=200, seed=0)["pairwise"]
    assert estimate == bootstrap_mean([float(np.mean(v)) for v in expected.values()], resamples=200, seed=0)


def test_the_tie_threshold_is_the_best_of_all():
    scored = make_scored(noise=0.4)

    def accuracy(threshold):
        right = []
        for g in range(12):
            for i, j in itertools.combinations(range(4 * g, 4 * g + 4), 2):
                label = np.sign(scored.target[i] - scored.target[j])
                difference = scored.predicted[i] - scored.predicted[j]
                right.append(label == (0 if abs(difference) <= threshold else np.sign(difference)))
        return np.mean(right)

    chosen = tie_threshold(scored, tie_margin=0)
    assert chosen > 0 and accuracy(chosen) > accuracy(0)
    assert all(accuracy(chosen) >= accuracy(t) for t in np.linspace(0, 8, 400))
    sources = within_groups(scored, tie_margin=0, threshold=chosen)["pairwise_ties"]
    assert np.mean(list(sources.values())) == pytest.approx(accuracy(chosen))
    assert best_threshold(np.array([1.0, -1.0]), np.array([2.0, -3.0]), 0.0) == 0.0


def test_intervals_over_all_samples_resample_sources():
    scored = make_scored(groups=12)
    once = overall(scored, resamples=300, seed=0)
    assert once["spearman"].low < once["spearman"].mean < once["spearman"].high
    # Ten copies of every sample add no source, so the interval stays as wide; a row bootstrap would shrink it by 3.
    rows = list(range(48)) * 10
    copied = overall(scored.where(rows), resamples=300, seed=0)
    for name in ("pearson", "mae"):
        width = [x[name].high - x[name].low for x in (once, copied)]
        assert width[1] == pytest.approx(width[0], rel=0.05)


def test_calibration_is_drawn(tmp_path):
    plot_calibration(make_scored(), tmp_path)
    with Image.open(tmp_path / "calibration.png") as picture:
        assert picture.size == (540, 540)


# ---- pair sets ------------------------------------------------------------------------------------------------


def save_pictures(folder, levels):
    for level in levels:
        Image.new("L", (40, 40), level).save(folder / f"{level}.png")


def brightness(edits):
    return [float(np.asarray(result).mean()) for _, result, _ in edits]


@pytest.mark.parametrize("as_list", [True, False])
def test_a_public_pair_set_is_read_under_its_own_names(tmp_path, as_list):
    save_pictures(tmp_path, [10, 100, 102, 200])
    records = [
        {"img": "10.png", "text": "x", "left": "200.png", "right": "100.png", "vote": "leftvote"},
        {"img": "10.png", "text": "x", "left": "100.png", "right": "200.png", "vote": "rightvote"},
        {"img": "100.png", "text": "x", "left": "100.png", "right": "102.png", "vote": "tievote"},
        {"img": "200.png", "text": "x", "left": "10.png", "right": "100.png", "vote": "leftvote"},
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(records) if as_list else "\n".join(map(json.dumps, records)))
    section = PairSetSection(
        "bench",
        str(path),
        {"source": "img", "instruction": "text", "first": "left", "second": "right", "preference": "vote"},
        {"leftvote": "first", "rightvote": "second", "tievote": "tie"},
    )
    result = evaluate_pairs("bench", load_pairs(section), brightness, batch_size=3, resamples=50, seed=0)
    assert result.accuracy.mean == pytest.approx(0.5)  # source 10: both right; source 200: wrong
    assert result.accuracy_ties.mean == pytest.approx(2 / 3) and result.tie_threshold == pytest.approx(2)
    assert result.accuracy_ties.n == 3 and result.unscored == 0
    blind = evaluate_pairs(
        "bench", load_pairs(section), lambda e: [None] * len(e), batch_size=3, resamples=5, seed=0
    )
    assert blind.unscored == 4 and blind.accuracy.mean is None


def test_a_pair_set_that_cannot_be_read_is_refused_by_name(tmp_path):
    save_pictures(tmp_path, [10])
    path = tmp_path / "pairs.json"
    good = {
        "source": "10.png",
        "instruction": "x",
        "first": "10.png",
        "second": "10.png",
        "preference": "first",
    }
    for record, message in (
        (good | {"preference": "leftvote"}, "preference 'leftvote' is not"),
        ({k: v for k, v in good.items() if k != "first"}, "record 0: no text under 'first'"),
        (good | {"second": "11.png"}, "11.png does not exist"),
    ):
        path.write_text(json.dumps([record]))
        with pytest.raises(DataError, match=message):
            load_pairs(PairSetSection("bench", str(path)))
    path.write_text("{")
    with pytest.raises(DataError, match="neither a JSON list nor JSON lines"):
        load_pairs(PairSetSection("bench", str(path)))
    with pytest.raises(DataError, match="does not exist"):
        load_pairs(PairSetSection("bench", str(tmp_path / "none.json")))


# ---- probes ---------------------------------------------------------------------------------------------------


def probe_samples():
    """The instruction names the grey value that the result then has; the source is another."""
    return [
        EditSample(
            f"k{i}",
            Image.new("RGB", (20, 20), (10, 10, 10)),
            Image.new("RGB", (20, 20), (v, v, v)),
            str(v),
            "x",
        )
        for i, v in enumerate(range(60, 260, 20))
    ]


def judge(edits):
    """A right judge: how near the result is to what was asked, and 0 for no change."""
    scores = []
    for source, result, text in edits:
        value, before = np.asarray(result).mean(), np.asarray(source).mean()
        scores.append(0.0 if value == before else 10 - abs(value - float(text)) / 5)
    return scores


MODELS = {
    "right": (judge, ()),
    "blind to the text": (lambda edits: [0.04 * np.asarray(r).mean() for _, r, _ in edits], ("instruction",)),
    "blind to the result": (lambda edits: [float(len(t)) for _, _, t in edits], PROBES),
    "blind to the source": (
        lambda edits: [10.0 if np.asarray(r).mean() > 5 else 0.0 for _, r, _ in edits],
        ("instruction", "unchanged"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_probes_fail_exactly_where_a_model_is_blind(name):
    model, blind = MODELS[name]
    samples = probe_samples()
    scores = model([(s.source, s.result, s.instruction) for s in samples])
    texts = [s.instruction for s in samples]
    results = run_probes(
        samples, scores, model, instructions=texts, std=3.0, needed=1.0, resamples=100, seed=0
    )
    assert [r.name for r in results] == list(PROBES)
    assert tuple(r.name for r in results if not r.passed) == tuple(blind)
    black = next(r for r in results if r.name == "black")
    expected = (
        np.mean(
            [a - b for a, b in zip(scores, model(changed_edits("black", samples, texts, 0)), strict=True)]
        )
        / 3
    )
    assert black.drop.mean == pytest.approx(expected)


def test_a_probe_that_was_never_scored_does_not_pass():
    common = {"instructions": ["60", "80"], "needed": 1.0, "resamples": 10, "seed": 0}
    results = run_probes(probe_samples(), [9.0] * 10, lambda e: [None] * len(e), std=1.0, **common)
    assert not any(r.passed for r in results) and all(r.drop.missing == 10 for r in results)
    constant = run_probes(probe_samples(), [9.0] * 10, lambda e: [9.0] * len(e), std=0.0, **common)
    assert not any(r.passed for r in constant)
    with pytest.raises(ValueError, match="1 edits have labels above the mean"):
        run_probes(probe_samples()[:1], [9.0], judge, std=1.0, **common)


def test_shuffled_instructions_are_other_ones_of_the_set():
    samples = probe_samples()
    known = ["60", "80", "somewhere else"]
    edits = changed_edits("instruction", samples, known * 3, 0)
    for sample, (source, result, text) in zip(samples, edits, strict=True):
        assert source is sample.source and result is sample.result
        assert text in known and text != sample.instruction
    assert (
        edits
        == changed_edits("instruction", samples, known, 0)
        != changed_edits("instruction", samples, known, 1)
    )
    with pytest.raises(ValueError, match="there is no other to show"):
        changed_edits("instruction", samples, ["60"], 0)


def test_the_best_edit_of_each_good_group_is_probed():
    entries = [Entry("s", str(i), {}, "src", f"g{i // 3}", "t", "k", (0.0,)) for i in range(9)]
    labels = [1.0, 9.0, 2.0, 0.0, 1.0, 2.0, 8.0, 3.0, 9.5]
    assert choose_probe_entries(entries, labels, 9) == [1, 8]
    assert choose_probe_entries(entries, labels, 1) == [1]
