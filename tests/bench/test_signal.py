"""The share that noisy gradients have in common, and the bench that measures it on a recipe."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.signal_groups import SignalBench
from bench.signal_share import common_share
from models.lora.attach import use_adapter
from rl.recipe.schema import load_config
from rollout.engine import ROLLOUT_ADAPTER
from rollout.sampler import ConditioningBatch, replay_step
from tests.fakes.tiny_run import tiny_recipe


@pytest.mark.parametrize("signal", [0.0, 0.1, 0.5])
def test_the_share_of_a_known_mixture(signal):
    """Noise of deviation 1 over a mean of `signal` in every coordinate: share signal^2 / (signal^2 + 1)."""
    generator = torch.Generator().manual_seed(3)
    shares = [common_share(signal + torch.randn(120, 500, generator=generator)) for _ in range(20)]
    values = torch.tensor([share.value for share in shares])
    expected = signal**2 / (signal**2 + 1)
    assert float(values.mean()) == pytest.approx(expected, abs=4 * float(values.std()) / 20**0.5)
    if signal:
        error = sum(share.error for share in shares) / len(shares)
        assert 0.5 * float(values.std()) < error < 2 * float(values.std()), "the stated error is the real one"


def test_the_metric_is_adams():
    """Scaling a coordinate changes nothing, however large it becomes."""
    generator = torch.Generator().manual_seed(4)
    gradients = 0.3 + torch.randn(60, 40, generator=generator)
    scales = torch.logspace(0, 1, 40)
    assert common_share(gradients * scales).value == pytest.approx(common_share(gradients).value, rel=0.02)


@pytest.mark.parametrize("gradients", [torch.ones(2, 5), torch.zeros(4, 5)])
def test_too_little_to_say_anything(gradients):
    with pytest.raises(ValueError, match="gradients"):
        common_share(gradients)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("signal") / "tiny")


def test_a_row_for_each_step_and_one_for_the_mixture(recipe, tmp_path, capsys):
    path = tmp_path / "rows.json"
    command = [
        "signal",
        str(recipe),
        "--stage",
        "t2i",
        "--steps",
        "0",
        "2",
        "--groups",
        "4",
        "--json",
        str(path),
    ]
    assert main(command) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table] == ["step", "0", "2", "mixed"]
    rows = json.loads(path.read_text())
    assert [row["groups"] for row in rows] == [4, 4, 4]
    for row in rows:
        assert row["norm"] > 0 and row["share"]["error"] > 0 and 0 <= row["zero_spread"] < 1
    assert rows[2]["reward_mean"] == pytest.approx(_mean_in_turn(recipe), rel=1e-6)


def _mean_in_turn(recipe) -> float:
    """Groups 0 and 2 part at step 0, groups 1 and 3 at step 2."""
    bench = SignalBench(load_config(str(recipe)), "t2i", None, 10)
    first, second = bench.groups(0, 4), bench.groups(2, 4)
    return float(sum(g.rewards.mean() for g in [first[0], second[1], first[2], second[3]]) / 4)


def test_a_part_of_the_coordinates_is_the_same_gradient(recipe):
    config = load_config(str(recipe))
    whole, part = (SignalBench(config, "edit", None, n) for n in (10**9, 50))
    gradient, some = whole.groups(1, 1)[0].gradient, part.groups(1, 1)[0].gradient
    assert len(some) == 50 < len(gradient)
    torch.testing.assert_close(gradient[part.chosen], some)


def test_the_gradient_is_that_of_the_log_probabilities(recipe):
    """Against a finite difference along the gradient: f(theta + h g) - f(theta - h g) = 2 h |g|^2."""
    bench = SignalBench(load_config(str(recipe)), "t2i", None, 10**9)
    seen = []
    inner = bench._gradient
    bench._gradient = lambda *args: seen.append(args) or inner(*args)  # type: ignore[method-assign]
    gradient = bench.groups(1, 1)[0].gradient
    sampled, conditioning, weights, spec = seen[0]

    def objective() -> float:
        latents = torch.cat([t.latents for t in sampled])
        size = len(latents)
        batch = ConditioningBatch.stack([conditioning] * size, device="cpu", dtype=torch.float32)
        with torch.no_grad(), use_adapter(bench.engine.transformer, ROLLOUT_ADAPTER):
            taken = replay_step(
                bench.engine.transformer, latents[:, 0], latents[:, 1], torch.ones(size, dtype=torch.long),
                sampled[0].sigmas, batch, bench.negative, spec,
            )  # fmt: skip
        return float((weights.double() * taken.log_prob.double()).sum())

    def move(h: float) -> None:
        done = 0
        for parameter in bench.parameters:
            part = gradient[done : done + parameter.numel()].view_as(parameter)
            done += parameter.numel()
            parameter.data += h * part

    square = float(gradient.double().square().sum())
    h = 1e-2 / square**0.5
    move(h)
    up = objective()
    move(-2 * h)
    down = objective()
    assert (up - down) / (2 * h) == pytest.approx(square, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "has steps 0 to 3"),
        (["--groups", "2"], "3 or more"),
        (["--stage", "x"], "edit, t2i"),
    ],
)
def test_what_cannot_be_measured(recipe, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["signal", str(recipe), *arguments])


def test_a_failed_reward_is_no_gradient(tmp_path):
    path = tiny_recipe(tmp_path / "tiny")
    (tmp_path / "none.py").write_text(
        "def none(*, images, prompts, references, metadata):\n    return [None] * len(images)\n"
    )
    name = f"{tmp_path / 'none.py'}:none"
    config = load_config(str(path), [f"stages[1].rewards=[{{name: '{name}'}}]"])
    bench = SignalBench(config, "t2i", None, 10)
    with pytest.raises(RuntimeError, match=r"group 0 .* was not scored"):
        bench.groups(0, 3)
