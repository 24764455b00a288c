"""The loss against an independent reference, and the density of noise levels."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from core.cluster.ranks import LocalRank
from models.components import load_transformer, load_vae
from models.latents import encode_images
from models.metaquery.reading import QueryReader
from models.text import SD3TextEncoder
from pretrain.flow.conditions import Encoders, micro_batches, rows_of
from pretrain.flow.costs import sample_flops
from pretrain.flow.loss import draw_noise
from pretrain.flow.metrics import METRICS, StepFigures, window_record
from pretrain.flow.rank import FlowRank
from pretrain.flow.sizes import measure
from tests.pretrain.flow.flow_runs import flow_recipe


@pytest.fixture(scope="module")
def kontext(tmp_path_factory, tiny_model):
    recipe = flow_recipe(tmp_path_factory.mktemp("kontext"), tiny_model)
    return LocalRank(partial(FlowRank, recipe)).rank


@pytest.fixture(scope="module")
def unified(tmp_path_factory, tiny_model, tiny_vlm):
    recipe = flow_recipe(tmp_path_factory.mktemp("unified"), tiny_model, vlm=tiny_vlm)
    return LocalRank(partial(FlowRank, recipe)).rank


def batch_of(rank, task):
    return next(batch for batch in map(rank.stream.batch, range(4)) if batch.task == task)


def reference_losses(rank, batch, prompt, tiny_model):
    """Written from the formula: x = (1 - s) x0 + s e, the network answers v, the loss is mean (v - (e - x0))²."""
    vae, transformer = load_vae(tiny_model), load_transformer(tiny_model, dtype=torch.float32)
    x0 = encode_images(vae, batch.pixels)
    references = None if batch.references is None else encode_images(vae, batch.references)
    s, e = draw_noise(rank.recipe.seed, rank.step, batch.indices.tolist(), x0.shape[1:], 3.0)
    found = []
    for i in range(len(x0)):
        x = (1 - s[i]) * x0[i] + s[i] * e[i]
        v = transformer(
            x[None], prompt[0][i : i + 1], prompt[1][i : i + 1], 1000 * s[i : i + 1],
            reference_hidden_states=None if references is None else references[i : i + 1],
        ).sample[0]  # fmt: skip
        found.append(((v - (e[i] - x0[i])) ** 2).mean())
    return torch.stack(found)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_the_loss_of_kontext_is_the_formula(kontext, tiny_model, task):
    batch = batch_of(kontext, task)
    encoder = SD3TextEncoder.from_pretrained(
        tiny_model, dtype=torch.float32, device="cpu", max_sequence_length=16
    )
    embeds = encoder.encode(batch.prompts)
    prompt = (
        torch.stack([one.prompt_embeds for one in embeds]),
        torch.stack([one.pooled_prompt_embeds for one in embeds]),
    )
    with torch.no_grad():
        losses, _ = kontext.losses(batch)
        torch.testing.assert_close(
            losses, reference_losses(kontext, batch, prompt, tiny_model), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_the_loss_of_unified_reads_prompt_and_picture_through_the_vlm(unified, tiny_model, tiny_vlm, task):
    batch = batch_of(unified, task)
    reader = QueryReader.from_pretrained(tiny_vlm)
    conditioner = unified.model.conditioner
    with torch.no_grad():
        hidden = reader.hidden_states(
            conditioner.meta_queries,
            batch.prompts,
            batch.reference_images and [[one] for one in batch.reference_images],
        )
        expected = reference_losses(unified, batch, conditioner.project(hidden), tiny_model)
        torch.testing.assert_close(unified.losses(batch)[0], expected, rtol=1e-5, atol=1e-6)
    assert (batch.reference_images is not None) == (task == "edit")


def test_references_go_where_the_recipe_sends_them(unified):
    batch, recipe = batch_of(unified, "edit"), unified.recipe

    def losses(transformer, vlm):
        routed = replace(recipe, references=replace(recipe.references, transformer=transformer, vlm=vlm))
        encoders = Encoders.__new__(Encoders)
        encoders.__dict__ |= unified.encoders.__dict__ | {"recipe": routed}
        encoded = encoders.encode(batch)
        assert (encoded.references is not None) == transformer
        assert (encoded.prompt.keywords["images"] is not None) == vlm
        return unified.model.embed(encoded.prompt)[0]

    with torch.no_grad():
        assert torch.equal(losses(True, True), losses(False, True))
        assert not torch.allclose(losses(True, True), losses(True, False))


def test_cached_latents_and_texts_give_the_loss_of_live_ones(kontext):
    batch = batch_of(kontext, "edit")
    embeds, pooled = kontext.encoders.encode(batch).prompt
    vae = kontext.encoders.vae
    cached = replace(
        batch, pixels=None, references=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled,
        latents=encode_images(vae, batch.pixels), reference_latents=encode_images(vae, batch.references),
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(kontext.losses(batch)[0], kontext.losses(cached)[0])


def test_micro_batches_are_the_batch(unified):
    batch = batch_of(unified, "edit")
    parts = list(micro_batches(batch, 3))
    assert [len(part.prompts) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.references for part in parts]), batch.references)
    assert [image for part in parts for image in part.reference_images] == batch.reference_images
    assert rows_of(batch, [2]).indices.tolist() == [2] and parts[1].indices.tolist() == [3]


def test_noise_belongs_to_the_place_in_the_global_batch():
    sigma, noise = draw_noise(3, 7, range(6), (4, 8, 8), 3.0)
    part_sigma, part_noise = draw_noise(3, 7, [4, 5], (4, 8, 8), 3.0)
    assert torch.equal(sigma[4:], part_sigma) and torch.equal(noise[4:], part_noise)
    assert len({*sigma.tolist()}) == 6
    for seed, step in ((4, 7), (3, 8)):
        assert not torch.equal(draw_noise(seed, step, range(6), (1,), 3.0)[0], sigma)


def test_noise_levels_have_the_stated_density():
    """P(sigma < x) = Phi(logit(x / (3 - 2 x))): the shift 3 s / (1 + 2 s) undone, then logit-normal(0, 1)."""
    sigma = np.sort(draw_noise(0, 0, range(4000), (1,), 3.0)[0].numpy().astype(np.float64))
    unshifted = sigma / (3 - 2 * sigma)
    expected = np.array([0.5 * (1 + math.erf(math.log(u / (1 - u)) / math.sqrt(2))) for u in unshifted])
    distance = np.abs(expected - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov at 1 %


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_operations_are_those_that_pytorch_counts(kontext, task):
    """Forward and backward of the transformer; the first layers' inputs need no gradient, which the formula ignores."""
    batch = rows_of(batch_of(kontext, task), [0])
    encoded = kontext.encoders.encode(batch)
    sigma, noise = draw_noise(0, 0, [0], encoded.clean.shape[1:], 3.0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = kontext.model(noise, 1000 * sigma, encoded.prompt, encoded.references)
        out.sum().backward()
    kontext.model.zero_grad()
    formula = sample_flops(kontext.recipe, measure(kontext.recipe), height=32, width=32, edit=task == "edit")
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_a_record_is_of_all_samples_whatever_the_ranks():
    def figures(step, task, losses, sigmas):
        return StepFigures(step, task, losses, sigmas, 2.0, 1e-3, 1e12)

    one = [
        figures(1, "t2i", (1.0, 2.0, 3.0, 6.0), (0.05, 0.15, 0.99, 0.15)),
        figures(2, "edit", (4.0,) * 4, (0.5,) * 4),
    ]
    halves = [
        [replace(f, losses=f.losses[part], sigmas=f.sigmas[part], flops=5e11) for f in one]
        for part in (slice(0, 2), slice(2, 4))
    ]
    record = window_record([one], 2.0, card="h100")
    assert (record["step"], record["loss"], record["loss/t2i"], record["loss/edit"]) == (2, 3.5, 3.0, 4.0)
    assert (record["loss/sigma/0.0"], record["loss/sigma/0.1"], record["loss/sigma/0.9"]) == (1.0, 4.0, 3.0)
    assert record["loss/sigma/0.3"] is None and record["throughput/images_per_second"] == 4.0
    assert record["throughput/mfu"] == pytest.approx(2e12 / 2.0 / 989e12)
    two = window_record(halves, 2.0, card="h100")
    assert two.pop("throughput/mfu") == pytest.approx(record.pop("throughput/mfu") / 2)
    assert two == record
    assert window_record([one], 2.0, card=None)["throughput/mfu"] is None
    for name in record.keys() - {"step"}:
        assert any(metric.matches(name) for metric in METRICS), name
