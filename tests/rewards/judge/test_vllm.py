"""The judge's `expected_score` protocol against a real vLLM server on CPU that holds a tiny random Qwen2.5-VL.

The expectation is computed once more from transformers' own logits for the same chat.
"""

import asyncio
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from rewards.base import RewardSpec
from rewards.judge.questions import Sample
from rewards.judge.template_files import load_template
from rewards.loading import load_reward
from tests.fakes.tiny_vlm import DIGITS, make_tiny_vlm
from tests.fakes.vllm_server import vllm_server

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def endpoint(folder, tmp_path_factory, vllm_forks):
    with vllm_server(folder, tmp_path_factory.mktemp("log") / "vllm.log", vllm_forks, name="judge") as url:
        yield f"{url}/v1"


def pictures(count, height, width):
    noise = np.random.default_rng(height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def expectation(folder, sample):
    """E[digit] / 9 over the digits' probabilities after the prompt, by transformers."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    template = load_template(f"expected_score_{sample.task}", None)
    parts = template.parts(
        instruction=sample.instruction, source=sample.source, result=sample.result, again=False
    )
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    chat = [{"role": "system", "content": template.system}, {"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        shares = model(**inputs).logits[0, -1].double().softmax(-1)
    digits = [shares[processor.tokenizer.convert_tokens_to_ids(digit)].item() for digit in DIGITS]
    return sum(k * share for k, share in enumerate(digits)) / math.fsum(digits) / 9


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_scores_are_the_models_own_expectation(folder, endpoint, task):
    images, sources = pictures(3, 64, 64), pictures(3, 56, 84)
    references = [[source] for source in sources] if task == "edit" else [[]] * 3
    params = {"protocol": "expected_score", "model": "judge", "base_url": endpoint, "api_key_env": None}
    # The tiny model goes on after its digit, so only one token may be asked for.
    loaded = load_reward(RewardSpec("judge", params=params | {"max_tokens": 1, "timeout_s": 60.0}))
    prompts = ["a red circle", "two blue squares", "make it green"]

    async def score():
        try:
            assert await loaded.owner.readiness() == []
            return await loaded.owner.score(
                images=images, prompts=prompts, references=references, metadata=[{}] * 3
            )
        finally:
            await loaded.owner._client.close()

    output = asyncio.run(score())
    samples = [
        Sample(task, prompt, image, *shown)
        for prompt, image, shown in zip(prompts, images, references, strict=True)
    ]
    assert output.scores == pytest.approx([expectation(folder, sample) for sample in samples], abs=1e-4)
    assert len(set(output.scores)) == 3, "the pictures or the texts did not reach the model"
    assert all(mass > 0.99 for mass in output.components["digit_mass"])
