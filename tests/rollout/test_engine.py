"""A replica samples what it was asked for under the adapter it was given, and proves which one that is."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from core.failures import ClusterError, DataFailure
from core.inputs import folder_files, hash_files
from models.lora.attach import Adapter, adapter_parameters, adapter_state, attach_lora, hash_state
from models.pipeline import KontextPipeline
from rollout.encoder import Encoder, EncoderSpec
from rollout.engine import ROLLOUT_ADAPTER, ReplicaSpec, RolloutEngine, SampleRequest, attach_rollout_adapter
from rollout.sampler import Conditioning, SamplingSpec
from rollout.worker import Policy
from tests.fakes.tiny_models import make_tiny_transformer

SPEC = SamplingSpec(num_steps=3, noise_level=0.7, guidance_scale=1.0)


@pytest.fixture(scope="module")
def replica_spec(model_folder):
    return ReplicaSpec(
        model_path=str(model_folder), dtype="float32", device="cpu", height=32, width=32,
        lora_rank=2, lora_alpha=4.0, lora_targets=("attn.to_q", "attn.to_v"), threads=1,
    )  # fmt: skip


@pytest.fixture
def engine(replica_spec):
    return RolloutEngine(replica_spec)


def text(seed: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(torch.randn((12, 48), generator=generator), torch.randn((40,), generator=generator))


def adapter(engine, version: int, *, scale: float) -> Adapter:
    """Rank-2 tensors that fit the engine, of size `scale`."""
    generator = torch.Generator().manual_seed(version)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * scale
        for name, tensor in adapter_state(engine.transformer, ROLLOUT_ADAPTER).items()
    }
    return Adapter(version, hash_state(tensors), tensors)


def test_a_receipt_holds_the_hash_of_the_live_weights_and_the_shift(engine):
    one, two = adapter(engine, 1, scale=0.3), adapter(engine, 2, scale=0.3)
    receipt = engine.load_adapter(one)
    assert (receipt.version, receipt.sha256) == (1, one.sha256)
    assert receipt.probe_shift > 0
    assert engine.load_adapter(one).probe_shift == 0.0
    assert engine.load_adapter(two).sha256 == two.sha256 != one.sha256


def test_the_seconds_of_a_sample_are_those_that_passed(engine, monkeypatch):
    engine.load_adapter(adapter(engine, 1, scale=0.3))
    clock = count(1e9, -3600.0)  # set back again and again while the samples are drawn
    monkeypatch.setattr("rollout.engine.time.time", lambda: next(clock))
    info, _, _ = engine.sample(SampleRequest(7, 0, (10,), (0, 1)), SPEC, None, [text(1)])
    assert 0 < info.seconds < 60


def test_an_adapter_whose_b_is_zero_moves_nothing(engine):
    state = adapter(engine, 3, scale=0.3)
    tensors = {n: t * 0 if "lora_B" in n else t for n, t in state.tensors.items()}
    receipt = engine.load_adapter(Adapter(3, hash_state(tensors), tensors))
    assert receipt.sha256 == hash_state(tensors)
    assert receipt.probe_shift == 0.0


def test_the_vae_is_in_float32_whatever_the_transformer_is_in(replica_spec, model_folder):
    """As in the pipelines: in bfloat16 a picture that was trained on is not the one that the model then ships."""
    replica = RolloutEngine(replace(replica_spec, dtype="bfloat16"))
    encoder = Encoder(EncoderSpec(str(model_folder), "bfloat16", "cpu", 32, 32, 16, 0, 1))
    assert replica.transformer.dtype == torch.bfloat16
    assert replica.vae.dtype == encoder.vae.dtype == torch.float32


def test_samples_carry_the_policy_they_came_from(engine):
    loaded = adapter(engine, 4, scale=0.3)
    engine.load_adapter(loaded)
    request = SampleRequest(group_id=7, first=2, seeds=(10, 11), steps=(0, 1))
    info, trajectory, images = engine.sample(request, SPEC, None, [text(1)])
    assert (info.group_id, info.first, info.policy_version, info.policy_sha256) == (7, 2, 4, loaded.sha256)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == "uint8"
    assert trajectory.steps == (0, 1)
    assert trajectory.log_probs.shape == (2, 2)


def test_a_replica_with_another_base_than_the_driver_does_not_start(replica_spec):
    held = hash_files(folder_files("model.path", replica_spec.model_path))
    replace(replica_spec, held=held).check_base()
    other = dict.fromkeys(held, "0" * 64)
    with pytest.raises(
        ClusterError, match="other bytes than the driver .*model.path/transformer/config.json"
    ):
        RolloutEngine(replace(replica_spec, held=other))
    with pytest.raises(ClusterError, match="model.path/tokenizer_3/"):
        Encoder(EncoderSpec(replica_spec.model_path, "float32", "cpu", 32, 32, 16, 0, 1, held=other))


def test_samples_tell_when_the_weights_changed_after_they_were_loaded(engine):
    """A hash kept from the publish would go on naming the policy that is no longer there."""
    loaded = adapter(engine, 4, scale=0.3)
    engine.load_adapter(loaded)
    policy, request = Policy(4, loaded.sha256, ()), SampleRequest(7, 0, (10,), (0, 1))
    policy.check(engine.sample(request, SPEC, None, [text(1)])[0])
    first = next(iter(adapter_parameters(engine.transformer, ROLLOUT_ADAPTER).values()))
    first.data[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match=r"sampled with adapter .* \(version 4\): its weights changed"):
        policy.check(engine.sample(request, SPEC, None, [text(1)])[0])


def test_a_request_gives_the_same_bits_on_another_replica(engine, replica_spec):
    """Which is why a call may be made again elsewhere after a crash."""
    other, loaded = RolloutEngine(replica_spec), adapter(engine, 5, scale=0.3)
    request = SampleRequest(0, 0, (10, 11), (0, 1, 2))
    results = []
    for replica in (engine, other):
        replica.load_adapter(loaded)
        results.append(replica.sample(request, SPEC, None, [text(1)]))
    assert torch.equal(results[0][1].latents, results[1][1].latents)
    assert torch.equal(results[0][1].log_probs, results[1][1].log_probs)
    assert (results[0][2] == results[1][2]).all()


def test_the_adapter_changes_the_samples(engine):
    request = SampleRequest(0, 0, (10,), (0, 1, 2))
    before = engine.sample(request, SPEC, None, [text(1)])[1]
    engine.load_adapter(adapter(engine, 6, scale=0.5))
    after = engine.sample(request, SPEC, None, [text(1)])[1]
    assert not torch.equal(before.final_latents, after.final_latents)


def test_one_conditioning_serves_all_samples_or_each_has_its_own(engine):
    seeds = (10, 10)
    shared = engine.sample(SampleRequest(0, 0, seeds, ()), SPEC, None, [text(1)])[1].final_latents
    own = engine.sample(SampleRequest(0, 0, seeds, ()), SPEC, None, [text(1), text(2)])[1].final_latents
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(own[0], shared[0])
    assert not torch.equal(own[0], own[1])


def test_non_finite_latents_are_this_prompts_failure(engine):
    broken = text(1)
    broken.prompt_embeds[0, 0] = float("nan")
    with pytest.raises(DataFailure, match="group 3: the sampled latents are not finite"):
        engine.sample(SampleRequest(3, 0, (10,), (0,)), SPEC, None, [broken])


def test_a_shared_transformer_keeps_the_learners_adapter_active(replica_spec):
    """In-process: sampling selects its own adapter for the call alone and never trains it."""
    torch.manual_seed(0)
    transformer = make_tiny_transformer()
    attach_lora(transformer, rank=2, alpha=4.0, targets=["attn.to_q"], adapter_name="policy")
    attach_rollout_adapter(transformer, replica_spec)
    engine = RolloutEngine(replica_spec, transformer.train())
    engine.load_adapter(adapter(engine, 8, scale=0.3))
    engine.sample(SampleRequest(0, 0, (10,), (0,)), SPEC, None, [text(1)])
    assert all(p.requires_grad for p in adapter_parameters(transformer, "policy").values())
    assert not any(p.requires_grad for p in adapter_parameters(transformer, ROLLOUT_ADAPTER).values())
    assert transformer.transformer_blocks[0].attn.to_q.active_adapters == ["policy"]
    assert transformer.training


def test_a_request_may_name_its_size_and_draws_what_the_pipeline_draws(engine, model_folder):
    """Evaluation and `models.generate` make the same picture, up to the rounding of one forward pass or two."""
    pipeline = KontextPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    spec, negative = SamplingSpec(4, 0.0, 3.5, variant="ode"), text(9)
    request = SampleRequest(0, 0, (10,), (), size=(48, 24))
    _, trajectory, images = engine.sample(request, spec, negative, [text(1)])
    drawn = pipeline(
        prompt_embeds=text(1).prompt_embeds[None], pooled_prompt_embeds=text(1).pooled_prompt_embeds[None],
        negative_prompt_embeds=negative.prompt_embeds[None],
        negative_pooled_prompt_embeds=negative.pooled_prompt_embeds[None],
        height=48, width=24, num_inference_steps=4, generator=[torch.Generator().manual_seed(10)],
        output_type="latent",
    ).images  # fmt: skip
    assert images.shape == (1, 48, 24, 3)
    torch.testing.assert_close(trajectory.final_latents, drawn, atol=1e-5, rtol=1e-5)
    assert engine.sample(SampleRequest(0, 0, (10,), ()), spec, negative, [text(1)])[2].shape == (1, 32, 32, 3)
