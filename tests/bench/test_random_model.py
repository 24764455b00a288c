"""The folder of random weights: published shapes at full size, and at tiny size a model that loads and runs."""

import pytest
import torch

from bench.__main__ import main
from bench.random_model import parts
from models.folders import PARTS, check_model_folder
from models.sd35_medium import NUM_PARAMETERS
from models.text import SD3TextEncoder
from rollout.engine import ReplicaSpec, RolloutEngine, SampleRequest
from rollout.sampler import Conditioning, SamplingSpec

PUBLISHED = {
    "transformer": NUM_PARAMETERS,
    "vae": 83_819_683,
    "text_encoder": 123_650_304,
    "text_encoder_2": 694_659_840,
    "text_encoder_3": 4_762_310_656,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        part = parts("sd35m")[name]()
    assert sum(p.numel() for p in part.parameters()) == PUBLISHED[name]


def test_a_tiny_one_loads_encodes_and_samples(tmp_path):
    folder = tmp_path / "model"
    assert main(["model", str(folder), "--size", "tiny"]) == 0
    assert check_model_folder(folder, PARTS) == []
    encoder = SD3TextEncoder.from_pretrained(folder, dtype=torch.float32, device="cpu", max_sequence_length=8)
    embeds = encoder.encode(["a red circle"])[0]
    assert embeds.prompt_embeds.shape[0] == 77 + 8 and embeds.prompt_embeds.isfinite().all()
    spec = ReplicaSpec(str(folder), "bfloat16", "cpu", 32, 32, 2, 4.0, ("to_q",), 1)
    conditioning = Conditioning(embeds.prompt_embeds, embeds.pooled_prompt_embeds)
    _, trajectory, images = RolloutEngine(spec).sample(
        SampleRequest(0, 0, (1, 2), (0, 1)), SamplingSpec(2, 0.7, 1.0), None, [conditioning]
    )
    assert images.shape == (2, 32, 32, 3) and trajectory.log_probs.isfinite().all()


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(SystemExit, match="exists"):
        main(["model", str(tmp_path), "--size", "tiny"])
