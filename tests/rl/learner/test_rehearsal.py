"""Rehearsal: what is drawn, what its gradient is, that it holds, and that a resumed run rehearses the same."""

from dataclasses import replace

import pytest
import ray
import torch

from core.prompts import Prompt
from models.components import load_transformer
from models.lora.attach import adapter_parameters, attach_lora, load_adapter_state
from rl.learner.batching import make_train_batch
from rl.learner.learner import LearnerSpec
from rl.learner.rehearsal import Rehearsal, RehearsalPicture, SampledPicture, rank_share
from rl.learner.stats import StatsAccumulator
from rl.learner.worker import LearnerGroup, LearnerRank
from rl.loop.rehearsal import draw_pictures, rehearsal_prompts
from rl.recipe.schema import EmaConfig, RehearsalConfig, StageConfig, StagePartConfig, load_config
from rl.recipe.stage_parts import rehearsed_parts
from rollout.engine import RolloutEngine, SampleRequest
from rollout.sampler import SamplingSpec
from rollout.shapes import Shape
from tests.fakes.tiny_models import make_tiny_folder
from tests.fakes.tiny_run import tiny_recipe
from tests.rl.learner.learner_fixtures import (
    conditioning,
    learner_config,
    make_learner,
    publish,
    randomise,
    replica_spec,
    rollout,
    sample_group,
    sample_refs,
    sampling_spec,
    updates,
)
from tests.rl.loop.test_run import copy_run, final_hash, learned, records, run

pytestmark = pytest.mark.usefixtures("process_group")
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


def pictures(count=5):
    generator = torch.Generator().manual_seed(3)
    return [
        RehearsalPicture(
            torch.randn((4, 8, 8), generator=generator), conditioning(f"old {i}", reference=True)
        )
        for i in range(count)
    ]


def rehearsal(beta=2.0, samples=6, rank=0, ranks=1, count=5):
    config = RehearsalConfig(beta, samples=samples)
    return Rehearsal(config, pictures(count), SIGMAS, rank=rank, ranks=ranks, micro_batch_size=4)


def test_states_lie_on_the_way_from_noise_to_the_drawn_pictures():
    few = rehearsal(samples=400, count=1)
    batches = list(few.batches(7, device="cpu", dtype=torch.float32))
    x, sigma = torch.cat([b.x for b in batches]), torch.cat([b.sigma for b in batches])
    assert len(batches) == 100 and x.shape == (400, 4, 8, 8)
    level = sigma[:, None, None, None]
    noise = (x - (1 - level) * few.pictures[0].latents) / level
    assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1.0, abs=0.02)
    shares = [float(((low < sigma) & (sigma <= high)).float().mean()) for low, high in
              ((0.9, 1.0), (0.6, 0.9), (0.0, 0.6))]  # fmt: skip
    assert shares == pytest.approx([1 / 3] * 3, abs=0.08), "as many levels in each step of the schedule"


def test_states_follow_from_the_update_and_the_rank():
    def states(seed, rank=0):
        return [b.x for b in rehearsal(rank=rank, ranks=2).batches(seed, device="cpu", dtype=torch.float32)]

    assert all(torch.equal(a, b) for a, b in zip(states(1), states(1), strict=True))
    assert not torch.equal(states(1)[0], states(2)[0])
    assert not torch.equal(states(1)[0], states(1, rank=1)[0])


@pytest.mark.parametrize(
    ("samples", "ranks", "batches", "size"), [(6, 1, 2, 3), (6, 2, 1, 3), (9, 2, 2, 3), (1, 4, 1, 1)]
)
def test_all_ranks_run_as_many_micro_batches_of_one_size(samples, ranks, batches, size):
    for rank in range(ranks):
        found = rehearsal(samples=samples, rank=rank, ranks=ranks)
        assert (found.micro_batches, found.size) == (batches, size)


def test_a_batch_of_states_has_one_shape_and_all_shapes_come():
    drawn = rehearsal(samples=200, count=5)
    tall = [(4, 16, 4), (4, 8, 8)]
    drawn.pictures = [
        replace(picture, latents=torch.randn(tall[i % 2]), shape=Shape((64, 16)) if i % 2 == 0 else Shape((32, 32)),
                conditioning=conditioning(f"old {i}", reference=True, latents=tall[i % 2][1:]))
        for i, picture in enumerate(drawn.pictures)
    ]  # fmt: skip
    batches = list(drawn.batches(7, device="cpu", dtype=torch.float32))
    assert len(batches) == 50 and all(len(b.x) == 4 for b in batches)
    assert {tuple(b.x.shape[1:]) for b in batches} == set(tall)
    assert all(b.conditioning.reference_latents[0].shape == b.x.shape for b in batches)
    one = rehearsal(samples=40)
    plain = [b.x for b in one.batches(7, device="cpu", dtype=torch.float32)]
    one.pictures = [replace(picture, shape=Shape((32, 32))) for picture in one.pictures]
    shaped = [b.x for b in one.batches(7, device="cpu", dtype=torch.float32)]
    assert all(torch.equal(a, b) for a, b in zip(plain, shaped, strict=True))


def test_ranks_share_the_pictures_and_none_goes_empty():
    drawn = [SampledPicture("t", row, "c") for row in range(5)]
    shares = [[p.row for p in rank_share(drawn, rank, 3)] for rank in range(3)]
    assert shares == [[0, 3], [1, 4], [2]]
    assert [rank_share(drawn[:1], rank, 2) for rank in range(2)] == [drawn[:1]] * 2


def test_prompts_come_evenly_from_the_earlier_sets():
    sets = [[Prompt(i, "edit", f"{name} {i}") for i in range(size)] for name, size in (("a", 3), ("b", 50))]
    chosen = rehearsal_prompts(sets, 20, seed=0)
    names = [prompt.prompt for prompt in chosen]
    assert len(set(names)) == len(names) == 20 and sum(name.startswith("a") for name in names) == 3
    assert rehearsal_prompts(sets, 20, seed=0) == chosen != rehearsal_prompts(sets, 20, seed=1)
    assert len(rehearsal_prompts(sets, 100, seed=0)) == 53


def test_other_tasks_of_earlier_stages_are_rehearsed():
    parts = [StagePartConfig("edit", "e.jsonl"), StagePartConfig("t2i", "t.jsonl")]
    stages = [
        StageConfig("joint", "joint", steps=1, parts=parts),
        StageConfig("edit", "edit", "e2.jsonl", 1),
        StageConfig("t2i", "t2i", "t2.jsonl", 1),
    ]
    assert [[part.prompts for part in rehearsed_parts(stages, i)] for i in range(3)] == [
        [],
        ["t.jsonl"],
        ["e.jsonl", "e2.jsonl"],
    ]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradient_equals_autograd_of_a_plain_reference(folder, guidance):
    learner = make_learner(folder, guidance=guidance)
    randomise(learner)
    start = learner.adapter()
    learner.begin_stage()
    learner.rehearsal = rehearsal()
    randomise(learner, scale=0.06)
    learner._rehearse(learner.rehearsal, 9, StatsAccumulator("cpu"))
    found = {n: p.grad.clone() for n, p in adapter_parameters(learner.transformer, "policy").items()}

    models = []
    for state in (learner.adapter(), start):
        model = load_transformer(folder, dtype=torch.float32)
        targets = replica_spec(folder).lora_targets
        attach_lora(model, rank=4, alpha=8.0, targets=targets, adapter_name="policy")
        load_adapter_state(model, state, "policy")
        models.append(model)

    def velocity(model, batch):
        text, negative = batch.conditioning, conditioning("negative")
        timestep, shape = batch.sigma * 1000, (len(batch.x), -1, -1)
        v = model(batch.x, text.prompt_embeds, text.pooled_prompt_embeds, timestep,
                  reference_hidden_states=text.reference_latents).sample  # fmt: skip
        if guidance == 1.0:
            return v
        u = model(batch.x, negative.prompt_embeds.expand(shape), negative.pooled_prompt_embeds.expand(shape[:2]),
                  timestep, reference_hidden_states=text.reference_latents).sample  # fmt: skip
        return u.detach() + guidance * (v - u.detach())

    distances = [
        (velocity(models[0], batch) - velocity(models[1], batch).detach()).square().mean()
        for batch in rehearsal().batches(9, device="cpu", dtype=torch.float32)
    ]
    distance = sum(distances) / len(distances)
    (2.0 * distance).backward()
    reference = adapter_parameters(models[0], "policy")
    scale = max(float(p.grad.abs().max()) for p in reference.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name].grad, rtol=1e-4, atol=1e-5 * scale)


def test_a_rehearsed_policy_stays_nearer_to_its_start_on_the_old_task(folder):
    distances = {}
    for beta in (1e-12, 1e3):
        learner = make_learner(folder, learning_rate=5e-3, kl_beta=0.0)
        learner.rehearsal = rehearsal(beta=beta)
        engine = RolloutEngine(replica_spec(folder))
        found = []
        for version in range(1, 7):
            publish(learner, engine, version)
            (stats,) = learner.update(updates(rollout(engine, first=2 * version)))
            found.append(stats.rehearsal)
            assert stats.loss == pytest.approx(stats.policy_loss + beta * stats.rehearsal)
        assert found[0] == 0.0
        distances[beta] = found[-1]
        learner.begin_stage()
        assert learner.rehearsal is None, "the next stage asks for its own"
    assert distances[1e3] < 0.5 * distances[1e-12]


@pytest.mark.parametrize("stage", [1, 3], ids=["zero1", "zero3"])
def test_two_ranks_rehearse_their_shares(folder, ray_session, stage):
    """The collectives of both ranks match, and the next stage begins from the average on both."""
    config = learner_config(ranks=2, zero_stage=stage, ema=EmaConfig(True, 0.5, 1))
    spec = LearnerSpec(replica_spec(folder), config, sampling_spec(), 0, False, False, 120.0, 120.0)
    actors = [ray.remote(LearnerRank).options(num_cpus=0.1).remote(spec, rank, 2) for rank in range(2)]
    group = LearnerGroup(actors, call_timeout_s=240, start_timeout_s=240)
    engine = RolloutEngine(replica_spec(folder))
    drawn = []
    for i in range(3):
        own = conditioning(f"old {i}", reference=True)
        ode = SamplingSpec(4, 0.0, 1.0, variant="ode")
        _, trajectory, _ = engine.sample(SampleRequest(i, 0, (i,), ()), ode, None, [own])
        drawn.append(SampledPicture(ray.put(trajectory), 0, ray.put(own)))
    group.rehearse(RehearsalConfig(1.0, samples=4), drawn)
    found = []
    for first in (0, 2):
        groups = [(g, *sample_group(engine, sampling_spec(), g, 4)) for g in (first, first + 1)]
        refs = [
            type(r)(
                r.group, r.k, ray.put(r.trajectory), r.row, ray.put(r.conditioning), r.positions, r.advantage
            )
            for r in sample_refs(groups, 4)
        ]
        group.fetch(make_train_batch(refs, 1, 2, 2))
        (stats,), _ = group.update(1e-3)
        found.append(stats.rehearsal)
        engine.load_adapter(group.adapter(1, shipped=False))
    assert found[0] == 0.0 < found[1]
    assert not any(t.any() for n, t in group.reference_adapter(1).tensors.items() if "lora_B" in n)
    shipped = group.adapter(1, shipped=True)
    assert group.adapter(1, shipped=False).sha256 != shipped.sha256
    group.begin_stage()
    assert group.adapter(1, shipped=False).sha256 == group.reference_adapter(1).sha256 == shipped.sha256
    for actor in actors:
        ray.kill(actor)


def test_a_run_rehearses_and_resumes_to_the_same(tmp_path, ray_session):
    recipe = tiny_recipe(tmp_path / "straight")
    changes = (
        "stages[0].steps=1",
        "stages[1].rehearsal={beta: 5.0, num_prompts: 4, samples: 2}",
        "learner.ema={enabled: true, every: 1, decay: 0.5}",
    )
    run(recipe, *changes)
    steps = [r for r in records(tmp_path / "straight") if "loss/total" in r]
    assert ["policy/rehearsal" in r for r in steps] == [False, True, True]
    assert steps[2]["policy/rehearsal"] > 0
    for keep in ("stage_0_end", "step_000002"):
        copy_run(tmp_path / "straight", tmp_path / keep, (keep,))
        run(recipe, *changes, f"output_dir={tmp_path / keep / 'runs'}", resume="auto")
        assert final_hash(tmp_path / keep) == final_hash(tmp_path / "straight")
        assert learned(tmp_path / keep) == learned(tmp_path / "straight")
    without = tmp_path / "without"
    run(recipe, changes[0], changes[2], f"output_dir={without / 'runs'}")
    assert final_hash(without) != final_hash(tmp_path / "straight")


def test_a_run_whose_old_prompts_cannot_be_sampled_says_so(tmp_path):
    class Nothing:
        def sample(self, *args, **kwargs):
            return []

    config = load_config(tiny_recipe(tmp_path), ["stages[1].rehearsal={beta: 1.0, num_prompts: 4}"])
    with pytest.raises(RuntimeError, match="stage 't2i': none of its 4 rehearsal prompts could be sampled"):
        draw_pictures(Nothing(), config, 1, None, 0)
