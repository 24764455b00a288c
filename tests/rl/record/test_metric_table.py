"""Metrics are declared once, and docs/METRICS.md is their current description."""

from pathlib import Path

import pytest

from rl.record.metric_table import METRICS, RECORD_KEYS, describe_metrics, find_metric


def test_the_page_in_docs_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "METRICS.md"
    assert page.read_text() == describe_metrics(), "run: python -m rl.record.metrics > docs/METRICS.md"


def test_declarations_are_complete_and_unique() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.unit and metric.meaning.endswith(".")
        assert "|" not in metric.unit + metric.meaning, "a bar would break the Markdown table"
        assert metric.name not in RECORD_KEYS and "/" in metric.name


def test_every_name_falls_under_its_own_declaration() -> None:
    for metric in METRICS:
        assert find_metric(metric.name) is metric


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("reward/mean", "reward/mean"),
        ("reward/edit_shapes/mean", "reward/{label}/mean"),
        ("reward/my.module:score/missing_share", "reward/{label}/missing_share"),
        ("reward/judge/component/over_editing", "reward/{label}/component/{component}"),
        ("evaluation/t2i/mean", "evaluation/{task}/mean"),
        ("gate/log_prob_gap/3", "gate/log_prob_gap/{timestep}"),
    ],
)
def test_families(name: str, declared: str) -> None:
    assert find_metric(name).name == declared


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("polcy/ratio_maen", "policy/ratio_mean"),
        ("reward/edit/shapes/mean", "reward/{label}/mean"),
        ("evaluation/edit/diference", "evaluation/{task}/difference"),
    ],
)
def test_an_undeclared_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="is not declared") as caught:
        find_metric(name)
    assert nearest in str(caught.value) and "rl/record/metric_table.py" in str(caught.value)
