"""Who sits where, and what it sums to, for each placement."""

import pytest

from core.cluster.placement import describe_plan, shortage
from rl.recipe.placement import make_plan, plan_title
from rl.recipe.schema import RunConfig, load_config


def config(placement: str, *, ranks: int, workers: int, device: str = "cuda", **resources) -> RunConfig:
    result = RunConfig(name="x")
    result.learner.ranks, result.rollout.workers = ranks, workers
    result.resources.placement, result.resources.device = placement, device
    for key, value in resources.items():
        setattr(result.resources, key, value)
    return result


def used(plan, bundle: int, what: str) -> float:
    return sum(getattr(actor, what) for actor in plan.actors if actor.bundle == bundle)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("placement", "ranks", "workers"),
    [("shared", 8, 8), ("shared", 2, 5), ("shared", 1, 6), ("separate", 2, 3), ("inprocess", 4, 4)],
)
def test_actors_fit_their_bundles(placement, ranks, workers, device):
    plan = make_plan(config(placement, ranks=ranks, workers=workers, device=device, reward_gpus=0.5))
    for index, bundle in enumerate(plan.bundles):
        assert bundle, "a bundle without resources would be refused"
        assert used(plan, index, "cpus") == pytest.approx(bundle.get("CPU", 0.0))
        assert used(plan, index, "gpus") <= bundle.get("GPU", 0.0) + 1e-4
    assert plan.cpus == pytest.approx(sum(actor.cpus for actor in plan.actors))
    assert [actor.index for actor in plan.of("learner")] == list(range(ranks))
    expected = [] if placement == "inprocess" else list(range(workers))
    assert sorted(actor.index for actor in plan.of("rollout")) == expected
    assert len(plan.of("reward")) == 2
    assert len(plan.of("encode")) == 1


def test_shared_puts_a_rank_and_its_workers_on_one_gpu():
    plan = make_plan(config("shared", ranks=2, workers=5))
    assert plan.bundles[0] == {"CPU": 4.0 + 3 * 2.0, "GPU": 1.0}
    assert plan.bundles[1] == {"CPU": 4.0 + 2 * 2.0, "GPU": 1.0}
    assert [(a.bundle, a.gpus) for a in plan.of("learner")] == [
        (0, pytest.approx(1 / 4)),
        (1, pytest.approx(1 / 3)),
    ]
    by_index = sorted(plan.of("rollout"), key=lambda actor: actor.index)
    assert [actor.bundle for actor in by_index] == [0, 1, 0, 1, 0]
    assert plan.gpus == 2.0


def test_a_part_of_a_gpu_puts_reward_workers_beside_the_learners():
    plan = make_plan(config("shared", ranks=2, workers=2, reward_gpus=0.2, reward_workers=3))
    assert sorted((a.index, a.bundle) for a in plan.of("reward")) == [(0, 0), (1, 1), (2, 0)]
    assert plan.gpus == 2.0
    assert plan.bundles[0] == {"CPU": 4.0 + 2.0 + 2 * 2.0, "GPU": 1.0}
    own = make_plan(config("shared", ranks=2, workers=2, reward_gpus=1.0, reward_workers=3))
    assert own.gpus == 5.0


def test_eight_gpus_of_the_paper_recipe():
    plan = make_plan(RunConfig(name="x"))
    assert plan.gpus == 8.0
    assert {actor.gpus for actor in plan.of("rollout") + plan.of("learner")} == {0.5}
    assert plan.cpus == 8 * (4 + 2) + 2 * 2 + 2


def test_separate_gives_each_its_own_gpu():
    plan = make_plan(config("separate", ranks=2, workers=3))
    assert plan.gpus == 5.0
    assert {actor.gpus for actor in plan.of("rollout") + plan.of("learner")} == {1.0}
    assert len({actor.bundle for actor in plan.actors}) == len(plan.actors) == len(plan.bundles)


def test_an_encode_worker_on_a_gpu_shares_the_first_ranks():
    plan = make_plan(config("shared", ranks=2, workers=2, encode_gpus=0.2))
    (encode,) = plan.of("encode")
    assert (encode.bundle, encode.gpus) == (0, pytest.approx(1 / 3))
    assert [actor.gpus for actor in plan.of("learner")] == [pytest.approx(1 / 3), 0.5]
    assert plan.gpus == 2.0
    alone = make_plan(config("separate", ranks=2, workers=2, encode_gpus=1.0))
    assert alone.bundles[-1] == {"CPU": 2.0, "GPU": 1.0}
    assert alone.gpus == 5.0


def test_several_encode_workers_share_the_ranks_in_turn():
    plan = make_plan(config("shared", ranks=2, workers=2, encode_gpus=0.2, encode_workers=3))
    assert sorted(actor.bundle for actor in plan.of("encode")) == [0, 0, 1] and plan.gpus == 2.0
    apart = make_plan(config("separate", ranks=1, workers=1, encode_workers=3))
    assert len({actor.bundle for actor in apart.of("encode")}) == 3


def test_inprocess_has_no_rollout_workers():
    plan = make_plan(config("inprocess", ranks=4, workers=4))
    assert plan.gpus == 4.0
    assert plan.of("rollout") == []


def test_on_the_cpu_nobody_asks_for_a_gpu():
    for placement in ("shared", "separate", "inprocess"):
        plan = make_plan(config(placement, ranks=2, workers=2, device="cpu"))
        assert plan.gpus == 0.0
        assert all("GPU" not in bundle for bundle in plan.bundles)


def test_the_shapes_recipe_fits_a_two_core_head_node():
    recipe = load_config("recipes/shapes/pdtr.yaml")
    plan = make_plan(recipe)
    assert plan.cpus <= 2.0
    assert plan.gpus == 0.0
    assert len(plan.of("rollout")) >= 2
    assert plan.of("reward")
    assert shortage(plan, {"CPU": 2.0, "memory": 1e9}) == []


def test_a_shortage_says_what_and_how_much():
    plan = make_plan(config("separate", ranks=2, workers=3))
    lines = shortage(plan, {"CPU": 1000.0, "GPU": 4.0})
    assert lines == [
        "the plan needs 5 GPUs, the cluster has 4; add nodes (ray start --address=...) or lower learner.ranks, "
        "rollout.workers or resources.*_gpus"
    ]
    assert len(shortage(plan, {})) == 2
    assert shortage(plan, {"CPU": plan.cpus, "GPU": plan.gpus}) == []


def test_the_description_has_a_line_for_each_role():
    shared = config("shared", ranks=8, workers=8)
    lines = describe_plan(make_plan(shared), plan_title(shared.resources))
    assert lines == [
        "placement shared on cuda: 11 bundles",
        "  learner  8 x (4 CPU, 0.5 GPU)",
        "  rollout  8 x (2 CPU, 0.5 GPU)",
        "  reward   2 x (2 CPU, 0 GPU)",
        "  encode   1 x (2 CPU, 0 GPU)",
        "  total    54 CPU, 8 GPU",
    ]
    inprocess = config("inprocess", ranks=1, workers=1)
    assert not any(
        "rollout" in line for line in describe_plan(make_plan(inprocess), plan_title(inprocess.resources))
    )
