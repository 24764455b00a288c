"""The rollout engine on a card: the CPU's samples, replayed to the bit."""

import pytest
import torch

from bench.engine import EngineBench, Settings
from rollout.engine import ReplicaSpec, RolloutEngine, SampleRequest
from rollout.sampler import Conditioning, SamplingSpec
from tests.fakes.tiny_models import make_tiny_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


def conditioning(task: str) -> Conditioning:
    generator = torch.Generator().manual_seed(3)
    references = (torch.randn(4, 8, 8, generator=generator),) if task == "edit" else ()
    return Conditioning(
        torch.randn(7, 48, generator=generator), torch.randn(40, generator=generator), references
    )


@pytest.mark.parametrize("task", ["t2i", "edit"])
@pytest.mark.parametrize("trunk", [None, 5])
def test_samples_are_those_of_the_cpu(model_folder, task, trunk):
    """Noise is drawn on the CPU in both, so the same seeds give the same pictures up to float32's rounding."""
    spec, request = SamplingSpec(4, 0.7, 2.0), SampleRequest(0, 0, (1, 2, 3), (1, 2), trunk)
    found = {}
    for device in ("cpu", "cuda"):
        replica = ReplicaSpec(str(model_folder), "float32", device, 32, 32, 4, 8.0, ("to_q",), 1)
        both = conditioning(task), conditioning("t2i")
        found[device] = RolloutEngine(replica).sample(request, spec, both[1], [both[0]])
    (_, cpu, cpu_images), (_, cuda, cuda_images) = found["cpu"], found["cuda"]
    torch.testing.assert_close(cuda.final_latents, cpu.final_latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cuda.log_probs, cpu.log_probs, atol=1e-4, rtol=1e-4)
    assert abs(cuda_images.astype(int) - cpu_images.astype(int)).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_a_replay_is_the_rollout_to_the_bit(dtype, task):
    settings = Settings("tiny", task, 64, 4, 4, 3, 4.5, 9, 4, dtype, "cuda", warmup=0, repeats=1)
    result = EngineBench(settings).run()
    assert result.log_prob_gap == 0.0
    assert result.rollout.peak_gib > 0 and result.update.seconds > 0
