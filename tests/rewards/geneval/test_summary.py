import logging

import pytest

from rewards.geneval import TAGS, GenEvalResult, summarize


def result(tag: str, correct: bool, prompt: str, dense: float = 0.0) -> GenEvalResult:
    return GenEvalResult(correct, "" if correct else "why", correct, dense, 0.0, tag, prompt)


def test_overall_is_the_mean_over_tags(caplog):
    rows = [result("colors", True, "a", 1.0)] + [result("counting", i == 0, "b", 0.5) for i in range(4)]
    with caplog.at_level(logging.WARNING):
        summary = summarize(rows)
    # Tags: 1 and 1/4. Images: 2 of 5. Prompts: both have a correct image.
    assert summary.overall == pytest.approx(0.625)
    assert summary.overall_strict == pytest.approx(0.625)
    assert summary.overall_dense == pytest.approx(0.75)
    assert summary.image_accuracy == pytest.approx(0.4)
    assert summary.prompt_accuracy == 1.0
    assert (summary.images, summary.prompts) == (5, 2)
    assert summary.tags["counting"].correct == pytest.approx(0.25)
    assert "single_object" in caplog.text and "colors" not in caplog.text


def test_all_tags_in_their_order_and_foreign_ones_last(caplog):
    summary = summarize([result(tag, True, tag) for tag in ("texture", *reversed(TAGS))])
    assert list(summary.tags) == [*TAGS, "texture"]
    assert not caplog.records


def test_nothing_to_summarize_is_an_error():
    with pytest.raises(ValueError, match="no results"):
        summarize([])
