"""Every scalar a run may log, declared once with its unit and meaning.

A name may hold placeholders: `reward/{label}/mean` stands for one metric per reward label. A placeholder
matches any text without a slash.
"""

import difflib

from core.scalars import Metric

RECORD_KEYS = ("step", "stage", "part", "stage_step", "time")
"""Keys of a record that are not metrics."""


HEADING = """# Metrics

Made by `python -m rl.record.metrics > docs/METRICS.md` from `rl/record/metric_table.py`; do not edit by hand.

`metrics.jsonl` holds one JSON object per line: `step` (of the run, 0 before training), `stage`, `stage_step`
(within the stage), in a joint stage `part` (the task that the step trained), `time` (Unix seconds), and those of the
metrics below that the record has. `null` means that nothing could be measured; it never stands for zero. A step
may have several records (training, evaluation); where two of them share a name, the later one counts. TensorBoard
shows the same scalars over `step`, each stage (each part of a joint one) as a run of its own.

"""


METRICS: tuple[Metric, ...] = (
    Metric("reward/mean", "reward", "Mean weighted reward of the step's scored samples."),
    Metric("reward/std", "reward", "Population standard deviation of the same rewards."),
    Metric("reward/missing_share", "share", "Samples without a total reward, over all samples of the step."),
    Metric("reward/zero_spread_share", "share", "Complete groups of equal rewards, which teach nothing."),
    Metric("reward/groups_dropped", "groups", "Groups left out because too few samples were scored."),
    Metric("reward/{label}/mean", "reward", "Mean of one reward before its weight, over what it scored."),
    Metric("reward/{label}/missing_share", "share", "Samples that this reward did not score."),
    Metric("reward/{label}/component/{component}", "reward", "Mean of one named part of a reward."),
    Metric("advantage/abs_mean", "std", "Mean absolute advantage (equation 1) of the samples used."),
    Metric("advantage/clamped_share", "share", "Advantages that reached the clamp."),
    Metric("policy/ratio_mean", "ratio", "New over old probability, mean over samples and denoising steps."),
    Metric("policy/ratio_min", "ratio", "Smallest such ratio."),
    Metric("policy/ratio_max", "ratio", "Largest such ratio."),
    Metric("policy/clip_fraction_low", "share", "Ratios below 1 - clip range (for negative advantages)."),
    Metric("policy/clip_fraction_high", "share", "Ratios above 1 + clip range (for positive advantages)."),
    Metric("policy/approx_kl", "nat/element", "Half the mean squared log-ratio: the way since the rollout."),
    Metric("policy/kl", "nat/element", "KL to the reference policy, in the recipe's form, unweighted."),
    Metric("policy/rehearsal", "velocity²", "Squared change of velocity on rehearsed tasks in this stage."),
    Metric("policy/version", "publishes", "Version of the adapter that the rollout workers hold."),
    Metric("loss/policy", "loss", "Clipped surrogate of equation 2, without the KL term."),
    Metric("loss/total", "loss", "Clipped surrogate plus weighted KL: what is differentiated."),
    Metric("optimizer/grad_norm", "L2 norm", "Gradient norm before clipping, mean over the step's updates."),
    Metric("optimizer/lr", "1", "Learning rate of the last update."),
    Metric("optimizer/samples", "samples", "Samples with weight in the step's updates."),
    Metric("optimizer/updates", "updates", "Optimizer updates made; 0 when no group had spread."),
    Metric(
        "optimizer/skipped", "updates", "Those of them that changed nothing: their gradient was not finite."
    ),
    Metric("gate/log_prob_gap_mean", "nat/element", "Mean absolute gap of rollout log-probs to the replay."),
    Metric("gate/log_prob_gap_max", "nat/element", "Largest single gap."),
    Metric(
        "gate/log_prob_gap/{timestep}",
        "nat/element",
        "Mean gap at one denoising step; the run stops above a bound.",
    ),
    Metric("time/rollout", "s", "From the first chunk handed out to the last group finished."),
    Metric("time/reward", "s", "From the first group handed out to the last score; overlaps the rollout."),
    Metric("time/update", "s", "The step's optimizer updates, replay included."),
    Metric("time/publish", "s", "Sending the adapter to every replica and checking that it took effect."),
    Metric("time/evaluate", "s", "Evaluation of all tasks."),
    Metric("time/checkpoint", "s", "Writing the checkpoint."),
    Metric("time/step", "s", "The whole step."),
    Metric("throughput/images_per_second", "images/s", "Images sampled, over the seconds of the rollout."),
    Metric("throughput/samples_per_second", "samples/s", "Samples trained on, over the seconds of the step."),
    Metric("workers/restarts", "actors", "Actors that died and were started again during the step."),
    Metric("workers/redispatched_chunks", "chunks", "Chunks sent again after the failure of their worker."),
    Metric("evaluation/{task}/mean", "reward", "Mean reward of one task over its held-out prompts."),
    Metric("evaluation/{task}/low", "reward", "Lower end of that mean's 95 % bootstrap interval."),
    Metric("evaluation/{task}/high", "reward", "Upper end of that mean's 95 % bootstrap interval."),
    Metric("evaluation/{task}/num_prompts", "prompts", "Held-out prompts that were scored."),
    Metric("evaluation/{task}/missing_share", "share", "Held-out prompts that were not scored."),
    Metric(
        "evaluation/{task}/difference", "reward", "Change since before the first stage, paired by prompt."
    ),
    Metric("evaluation/{task}/component/{component}", "reward", "Mean of one named part of that reward."),
    Metric("log/non_finite", "values", "Values of this record that were NaN or infinite, written as null."),
)
"""A new metric is declared here; then run `python -m rl.record.metrics > docs/METRICS.md`."""


def find_metric(name: str) -> Metric:
    """The declaration that `name` falls under.

    Raises ValueError naming the nearest declarations when there is none.
    """
    for metric in METRICS:
        if metric.matches(name):
            return metric
    near = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "no declared name is near it."
    raise ValueError(
        f"metric {name!r} is not declared: {hint} New ones are declared in rl/record/metric_table.py"
    )


def describe_metrics() -> str:
    """The declarations as a Markdown page."""
    rows = (f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in METRICS)
    return HEADING + "\n".join(["| name | unit | meaning |", "|---|---|---|", *rows, ""])
