"""Signs that a run goes wrong, read off its records. Each is told once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.loss import DIVERGENCES, PARAMETERS, check_divergence
from opcd_fast.training.settings import OPCDConfig

WINDOW = 5  # steps that a mean is taken over
SHORT, DULL = 1 / 3, 1 / 10  # shares of what was normal
CUT_OFF = 0.5  # share of answers that reach the token limit
UNSAID = 1e-4  # between 2e-3, which a run overcame, and 1e-6, which none did (experiments/results/first_token.json)
DRIFT = 0.02  # nats per token; a bfloat16 copy of the same weights stays far below
FOREIGN = 0.05  # the same at the first step: another base (0.6), or another kind of log-probabilities (0.1 to 4)


def check_finite(step: int, loss: float, norm: float) -> None:
    """Raises InputError for a step that would ruin the weights."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(
            f"loss is {loss} and gradient norm {norm} at step {step}; the weights of the last checkpoint are intact: "
            "lower learning_rate (OPCD_CHECK=1 names the first bad row)"
        )


def warning_before_training(evaluation: Mapping[str, Any], config: OPCDConfig) -> Iterator[tuple[str, str]]:
    """Name and text of the warning that the held-out evaluation of the first weights gives reason for, if any."""
    probability = evaluation.get("fixed_first_token", 1.0)
    on_policy = not config.teacher_writes and config.rollout != "replay"
    chosen = check_divergence(config.divergence, {name: getattr(config, name) for name in PARAMETERS})
    if evaluation["step"] == 0 and on_policy and DIVERGENCES[chosen.divergence].blind and probability < UNSAID:
        yield "unsaid_answers", (
            f"the student begins as the teacher does with probability {probability:.1g} (median of held-out prompts): "
            f"divergence={config.divergence!r} on its own answers hardly teaches what it never says; set "
            "divergence='gated_kl'"
        )


def warnings_of(
    history: Sequence[Mapping[str, Any]], told: set[str], teacher_length: float | None, full_sampling: bool = True
) -> Iterator[tuple[str, str]]:
    """Names and texts of the warnings that the steps so far give reason for, without those in `told`.

    teacher_length: mean tokens of the teacher's held-out answers, the normal length; None: that of the first steps.
    full_sampling: answers come from the whole distribution (top_p=1); otherwise the sampler's differs by design.
    A function of the records alone, so that a resumed run warns as it would have.
    """
    if not history:
        return
    begin = history[0]
    drawn_here = begin.get("answers_of", "student") == "student"
    if drawn_here and "sampler_differs" not in told and full_sampling and begin.get("sampler_kl", 0.0) > FOREIGN:
        yield "sampler_differs", (
            f"the sampler's log-probabilities are another model's: KL {begin['sampler_kl']:.3g} nats per token at step "
            f"{begin['step']}; stop, and check that the server has this base, takes the adapter, and was started with "
            "the --logprobs-mode that rollout_logprobs says"
        )
    if len(history) < WINDOW:
        return
    first, last = history[:WINDOW], history[-WINDOW:]
    step = last[-1]["step"]

    def mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
        return sum(record[name] for record in records) / len(records)

    own = last[-1].get("answers_of", "student") == "student"  # whoever else writes does not collapse
    length = mean(last, "response_length")
    normal, whose = mean(first, "response_length"), "in the first steps"
    if teacher_length is not None:
        normal, whose = teacher_length, "for the teacher"
    if own and "short_answers" not in told and length < SHORT * normal:
        yield "short_answers", (
            f"answers have collapsed in length: {length:.1f} tokens on average up to step {step}, {normal:.1f} "
            f"{whose}; look at them, and lower learning_rate"
        )
    if own and "low_entropy" not in told:
        entropy, before = mean(last, "student_entropy"), mean(first, "student_entropy")
        if entropy < DULL * before:
            yield "low_entropy", (
                f"answers have collapsed in entropy: {entropy:.3g} nats per token up to step {step}, {before:.3g} in "
                "the first steps; look at whether they still differ, and lower learning_rate"
            )
    finished = mean(last, "finished")
    if "cut_answers" not in told and finished < 1 - CUT_OFF:
        yield "cut_answers", (
            f"{1 - finished:.0%} of the answers are cut at max_new_tokens (up to step {step}); what comes later cannot "
            "be learnt: raise max_new_tokens"
        )
    measured = [record for record in last if "sampler_kl" in record]
    if "sampler_drift" not in told and full_sampling and len(measured) == WINDOW:
        drift = mean(measured, "sampler_kl")
        if drift > DRIFT:
            yield "sampler_drift", (
                f"the sampler's log-probabilities are not the trainer's: KL {drift:.3g} nats per token up to step "
                f"{step}; check that it has the newest weights, or set importance_correction='token'"
            )
