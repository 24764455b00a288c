"""The proof of MetaQuery: its variants are recipes that can run, and its claims fail where they should."""

import json

import numpy as np
import pytest
import torch

from bench.accept import metaquery
from bench.accept.metaquery import DIRECTIONS, mixing_claim, pdtr_claims, unified_claims, verdict
from bench.accept.metaquery_runs import BOTH, EDIT_ONLY, VARIANT, VARIANTS, training_records
from core.statistics import paired_bootstrap
from models.components import load_transformer
from models.lora.attach import adapter_settings, adapter_state, attach_lora
from models.lora.files import save_adapter
from pretrain.flow.validate import load_recipe
from tests.fakes.tiny_models import make_tiny_folder


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_a_recipe_that_differs_in_what_it_says(name):
    recipe = load_recipe("recipes/shapes/metaquery_unified.yaml", [*VARIANT, *VARIANTS[name]])
    plain = load_recipe("recipes/shapes/metaquery_unified.yaml", [*VARIANT])
    assert (recipe == plain) == (name == BOTH)


def test_every_direction_is_between_variants():
    assert {one.less for one in DIRECTIONS} | {one.more for one in DIRECTIONS} <= {*VARIANTS}


def test_a_difference_decides_only_with_its_interval_on_one_side():
    low, high = np.zeros(50), np.ones(50)
    assert verdict(paired_bootstrap(low, high)) == "holds"
    assert verdict(paired_bootstrap(high, low)) == "**does not hold**"
    assert verdict(paired_bootstrap(low, low)) == "undecided"


def test_the_unified_model_has_to_reach_the_floor_on_each_task_in_time(tmp_path):
    clock = metaquery.Clock(tmp_path / "seconds.json")
    clock.seconds = {metaquery.ALIGN: 60.0, metaquery.UNIFIED: 91 * 60.0}
    scores = {("t2i", 1.0): np.full(10, 0.6), ("edit", 1.0): np.full(10, 0.4)}
    assert [claim.holds for claim in unified_claims(scores, clock)] == [True, False, True, False]


def test_mixing_has_to_beat_editing_alone_beyond_its_interval():
    better, worse = ({("t2i", 1.0): np.full(20, value)} for value in (0.6, 0.5))
    assert mixing_claim({BOTH: better, EDIT_ONLY: worse}).holds
    assert not mixing_claim({BOTH: worse, EDIT_ONLY: worse}).holds


@pytest.fixture
def adapter(tmp_path):
    transformer = load_transformer(make_tiny_folder(tmp_path / "model"), dtype=torch.float32)
    attach_lora(transformer, rank=2, alpha=4.0)
    # An adapter fresh from its initialization changes nothing, and no reader takes it.
    state = {name: tensor + 0.1 for name, tensor in adapter_state(transformer).items()}
    return state, adapter_settings(transformer).targets


def write_run(folder, state, targets, gaps):
    save_adapter(state, folder / "adapter", rank=2, alpha=4.0, targets=targets)
    records = [
        {"loss/total": 0.0, "stage": stage, "gate/log_prob_gap_max": gap}
        for stage, gap in zip(("edit", "t2i"), gaps, strict=True)
    ]
    lines = [json.dumps(record) for record in [{"moment": "before"}, *records]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"loss/total": 0.')
    return folder


def test_pdtr_is_held_to_its_gate_and_to_the_straight_adapter(tmp_path, adapter):
    state, targets = adapter
    other = {name: value + 1 for name, value in state.items()}
    fine = write_run(tmp_path / "fine", state, targets, (1e-7, 2e-7))
    differs = write_run(tmp_path / "differs", other, targets, (1e-7, 1e-3))
    assert len(training_records(fine / "metrics.jsonl")) == 2
    assert [claim.holds for claim in pdtr_claims(fine, fine, fine)] == [True, True]
    assert [claim.holds for claim in pdtr_claims(differs, fine, differs)] == [False, False]
