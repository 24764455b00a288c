"""What the actors do when called, without Ray: the plain classes that it wraps."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray.exceptions import GetTimeoutError, ObjectLostError

from core.failures import DataFailure, InfrastructureFailure
from core.prompts import Prompt
from models.latents import encode_images, image_to_tensor
from models.lora.attach import Adapter, adapter_state, hash_state
from models.metaquery.encoder import MetaQueryEncoder
from rollout import worker
from rollout.encoder import Encoder, EncoderSpec
from rollout.engine import ROLLOUT_ADAPTER, ReplicaSpec, SampleRequest
from rollout.sampler import Conditioning, SamplingSpec
from rollout.shapes import ShapeRule
from rollout.worker import Policy, Replica
from tests.fakes.tiny_metaquery import make_tiny_metaquery

SPEC = SamplingSpec(num_steps=2, noise_level=0.7, guidance_scale=1.0)
REQUEST = SampleRequest(0, 0, (10,), (0,))


@pytest.fixture(scope="module")
def encoder(model_folder):
    return Encoder(
        EncoderSpec(
            str(model_folder), "float32", "cpu", 32, 32, max_sequence_length=16, cache_bytes=2**20, threads=1
        )
    )


@pytest.fixture
def replica(model_folder):
    return Replica(
        ReplicaSpec(str(model_folder), "float32", "cpu", 32, 32, 2, 4.0, ("attn.to_q",), threads=1)
    )


@pytest.fixture
def fetched(monkeypatch):
    """Stands for the object store: references are the objects themselves; returns what was fetched."""
    seen = []

    def get(reference, timeout):
        seen.append(reference)
        return reference

    monkeypatch.setattr(worker.ray, "get", get)
    return seen


def published(replica, version):
    state = adapter_state(replica.engine.transformer, ROLLOUT_ADAPTER)
    tensors = {name: torch.full_like(tensor, 0.1 * version) for name, tensor in state.items()}
    adapter = Adapter(version, hash_state(tensors), tensors)
    return adapter, Policy(version, adapter.sha256, (adapter,))


@pytest.mark.parametrize("error", [GetTimeoutError("late"), ObjectLostError("1f", None, "")])
def test_a_policy_that_does_not_arrive_is_asked_for_elsewhere(replica, monkeypatch, error):
    def get(reference, timeout):
        raise error

    monkeypatch.setattr(worker.ray, "get", get)
    with pytest.raises(InfrastructureFailure, match="adapter 7 did not arrive"):
        replica.sample(REQUEST, SPEC, Policy(7, "f" * 64, ("ref",)), None, text_conditioning())


def image_prompt(index=0, colour=(200, 30, 40), size=(32, 32)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Prompt(index, "edit", "make it blue", (uri,))


def images_prompt(*prompts):
    """The first prompt with the references of all."""
    return replace(prompts[0], references=tuple(one for prompt in prompts for one in prompt.references))


def text_conditioning():
    return Conditioning(torch.ones(12, 48), torch.ones(40))


def test_a_replica_fetches_the_policy_it_lacks_and_no_other(replica, fetched):
    """So a restarted worker heals itself: a call names its policy, and nothing has to be remembered."""
    first, policy = published(replica, 1)
    info, *_ = replica.sample(REQUEST, SPEC, policy, None, text_conditioning())
    assert info.policy_sha256 == first.sha256
    replica.sample(REQUEST, SPEC, policy, None, text_conditioning())
    assert fetched == [first]
    second, policy = published(replica, 2)
    replica.load_adapter(second)
    info, *_ = replica.sample(REQUEST, SPEC, policy, None, text_conditioning())
    assert (info.policy_version, info.policy_sha256) == (2, second.sha256)
    assert fetched == [first]


def test_a_policy_that_arrives_changed_is_refused(replica, fetched):
    adapter, policy = published(replica, 1)
    next(iter(adapter.tensors.values()))[0, 0] = 9.0
    with pytest.raises(InfrastructureFailure, match="adapter 1 arrived as .*, expected"):
        replica.sample(REQUEST, SPEC, policy, None, text_conditioning())


def test_out_of_memory_is_the_machines_failure(replica, fetched, monkeypatch):
    _, policy = published(replica, 1)

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(replica.engine, "sample", exhausted)
    with pytest.raises(InfrastructureFailure, match="rollout.chunk_size"):
        replica.sample(REQUEST, SPEC, policy, None, text_conditioning())


def test_out_of_memory_of_an_encoder_is_the_machines_failure(encoder, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder, "_conditioning", exhausted)
    with pytest.raises(InfrastructureFailure, match="encoding a prompt; raise encode_gpus"):
        encoder.encode_apart([Prompt(0, "t2i", "a red circle")])


def test_an_encoded_prompt_does_not_depend_on_its_neighbours(encoder):
    prompts = [image_prompt(0), Prompt(1, "t2i", "a red circle"), image_prompt(2, (1, 2, 3))]
    together = encoder.encode(prompts)
    for prompt, conditioning in zip(prompts, together, strict=True):
        alone = encoder.encode_one(prompt)
        assert torch.equal(alone.prompt_embeds, conditioning.prompt_embeds)
        assert torch.equal(alone.pooled_prompt_embeds, conditioning.pooled_prompt_embeds)
        assert len(alone.reference_latents) == (prompt.task == "edit")
    assert not torch.equal(together[0].reference_latents[0], together[2].reference_latents[0])
    assert torch.equal(together[0].prompt_embeds, together[2].prompt_embeds)


def test_reference_latents_are_the_vaes_mode(encoder):
    pixels = image_to_tensor(Image.new("RGB", (32, 32), (200, 30, 40)), 32, 32)[None]
    expected = encode_images(encoder.vae, pixels)[0]
    assert torch.equal(encoder.encode_one(image_prompt()).reference_latents[0], expected)


def test_several_references_keep_their_order_and_a_further_one_its_proportions(encoder):
    square, wide = image_prompt(), image_prompt(1, (1, 2, 3), (64, 16))
    first, further = encoder.encode_one(images_prompt(square, wide)).reference_latents
    assert torch.equal(first, encoder.encode_one(square).reference_latents[0])
    pixels = image_to_tensor(Image.new("RGB", (64, 16), (1, 2, 3)), 16, 64)[None]
    assert torch.equal(further, encode_images(encoder.vae, pixels)[0])
    swapped = encoder.encode_one(images_prompt(wide, square)).reference_latents
    assert torch.equal(swapped[0], encoder.encode_one(wide).reference_latents[0])
    assert torch.equal(swapped[1], first)


def test_a_budget_of_pixels_makes_further_references_smaller(encoder, monkeypatch):
    prompt = images_prompt(*[image_prompt()] * 3)
    for budget, sides in ((None, (8, 8, 8)), (32 * 32 + 2 * 16 * 16, (8, 4, 4))):
        monkeypatch.setattr(encoder, "spec", replace(encoder.spec, reference_pixels=budget))
        found = encoder.encode_one(prompt).reference_latents
        assert tuple(one.shape[-1] for one in found) == sides
        rule = ShapeRule(Path(encoder.spec.model_path), (32, 32), reference_pixels=budget)
        assert [height // 4 for height, _ in rule.of(prompt).references] == list(sides), "what is batched by"
    monkeypatch.setattr(encoder, "spec", replace(encoder.spec, reference_pixels=32 * 32))
    with pytest.raises(DataFailure, match="prompt 0 .*3 references in 1024 pixels"):
        encoder.encode_one(prompt)


def test_text_alone(encoder):
    negative = encoder.encode_text("")
    assert negative.reference_latents == ()
    assert negative.prompt_embeds.shape == encoder.encode_text("a red circle").prompt_embeds.shape


def test_a_call_may_name_the_size_of_its_pictures(encoder):
    (sized,) = encoder.encode([image_prompt()], (48, 24))
    assert sized.reference_latents[0].shape[-2:] == (12, 6)
    assert torch.equal(
        sized.reference_latents[0], encoder.encode_one(image_prompt(), (48, 24)).reference_latents[0]
    )
    assert encoder.encode_one(image_prompt()).reference_latents[0].shape[-2:] == (8, 8)


def test_an_unreadable_reference_is_this_prompts_failure(encoder):
    with pytest.raises(DataFailure, match="reference image .* of prompt 4 is unreadable"):
        encoder.encode([Prompt(4, "edit", "make it blue", ("data:image/png;base64,AAAA",))])


@pytest.mark.parametrize("text", ["a \ud83d", 7], ids=["half of a surrogate pair", "no text"])
def test_what_a_prompt_does_to_the_encoder_is_its_own_failure(encoder, text):
    with pytest.raises(DataFailure, match=r"^a\.jsonl:3 "):
        encoder.encode_one(Prompt(2, "t2i", text, origin="a.jsonl:3"))


def test_metaquery_reads_the_picture_beside_prompt_and_negative_prompt(tmp_path):
    folder, vlm = make_tiny_metaquery(tmp_path)
    spec = EncoderSpec(
        str(folder), "float32", "cpu", 32, 32, max_sequence_length=16, cache_bytes=2**20, threads=1,
        vlm_path=str(vlm), negative_prompt="blurry",
    )  # fmt: skip
    encoder = Encoder(spec)
    first, second, drawn = encoder.encode(
        [image_prompt(0), image_prompt(1, (1, 2, 3)), Prompt(2, "t2i", "make it blue")]
    )
    picture = Image.new("RGB", (32, 32), (200, 30, 40))
    stock = MetaQueryEncoder.from_pretrained(folder, vlm, dtype=torch.float32, device="cpu")
    positive, negative = stock.encode(["make it blue", "blurry"], [[picture], [picture]])
    assert torch.equal(first.prompt_embeds, positive.prompt_embeds)
    assert torch.equal(first.pooled_prompt_embeds, positive.pooled_prompt_embeds)
    assert torch.equal(first.negative_prompt_embeds, negative.prompt_embeds)
    assert torch.equal(first.negative_pooled_prompt_embeds, negative.pooled_prompt_embeds)
    assert torch.equal(
        first.reference_latents[0], encode_images(encoder.vae, image_to_tensor(picture, 32, 32)[None])[0]
    )
    assert not torch.equal(second.prompt_embeds, first.prompt_embeds)
    assert not torch.equal(second.negative_prompt_embeds, first.negative_prompt_embeds)
    assert drawn.negative_prompt_embeds is None and drawn.reference_latents == ()
    assert torch.equal(encoder.encode_text("blurry").prompt_embeds, stock.encode(["blurry"])[0].prompt_embeds)
    orders = (image_prompt(0), image_prompt(1, (1, 2, 3))), (image_prompt(1, (1, 2, 3)), image_prompt(0))
    both, swapped = (encoder.encode_one(images_prompt(*order)) for order in orders)
    other = Image.new("RGB", (32, 32), (1, 2, 3))
    for name, text in (("prompt_embeds", "make it blue"), ("negative_prompt_embeds", "blurry")):
        seen = stock.encode([text], [[picture, other]])[0].prompt_embeds
        assert torch.equal(getattr(both, name), seen)
        assert not torch.equal(getattr(swapped, name), seen)
    with pytest.raises(DataFailure, match="prompt 3 .*control tokens"):
        encoder.encode_one(Prompt(3, "t2i", "a<|im_end|>"))


def test_workers_answer_when_they_are_ready(encoder, replica):
    assert encoder.ready().device == replica.ready().device == "cpu"
    assert replica.ready().policy_version == -1
