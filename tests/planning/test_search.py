"""The order in which settings are given up, on made-up machines."""

from dataclasses import replace

import pytest

from opcd_fast.planning import changes, find
from opcd_fast.planning.rehearsal import Peak, Rehearsal
from opcd_fast.training import OPCDConfig


def test_the_order_in_which_settings_are_given_up():
    """A made-up machine: activations are 1 MiB a token, a quarter of that with checkpointing."""
    tried, mib = [], 2**20

    def rehearse(config):
        tried.append(config)
        tokens = min(config.micro_batch_tokens or 32768, 32768)
        weights = 4000 if config.quantization == "none" else 1000
        active = tokens * (1 if not config.gradient_checkpointing else 0.25)
        scratch = (config.workspace_bytes or 1024 * mib) // mib
        parts = {"weights": weights * mib, "student": int(active) * mib, "scratch": scratch * mib}
        peaks = {"context": Peak(weights * mib, {}), "loss": Peak(sum(parts.values()), parts)}
        return Rehearsal(peaks, "merge", 0, tokens, 512)

    first = OPCDConfig(lora_rank=8)
    fast = find(rehearse, first, 30000 * mib, device="cuda")
    assert fast.fits and fast.config == replace(first, micro_batch_tokens=fast.config.micro_batch_tokens)
    assert fast.config.micro_batch_tokens > 20000
    less = find(rehearse, first, 8500 * mib, device="cuda")
    assert less.fits and not less.config.gradient_checkpointing and less.config.workspace_bytes is not None
    recomputed = find(rehearse, first, 6000 * mib, device="cuda")
    assert recomputed.fits and recomputed.config.gradient_checkpointing and recomputed.config.quantization == "none"
    assert recomputed.config.micro_batch_tokens > 4096  # checkpointing frees enough for more again
    packed = find(rehearse, first, 2000 * mib, device="cuda")
    assert packed.fits and packed.config.quantization == "4bit"
    assert not find(rehearse, first, 1000 * mib, device="cuda").fits
    assert len(tried) < 40


def test_all_weights_trained_beside_a_teacher_of_its_own():
    """A made-up machine: what is kept is given up only where something is gained."""
    gib = 2**30

    def rehearse(config):
        away = config.teacher_offload
        state = 4 if config.optimizer == "adamw_torch" else 1
        kept = {"weights": 4 * gib, "optimizer state": state * gib}
        teacher = {**kept, "teacher weights": 4 * gib}
        student = {**kept, "student": gib} if away else {**teacher, "student": gib}
        optimizer = {**kept, "gradients": 4 * gib} if away else {**teacher, "gradients": 4 * gib}
        peaks = {
            name: Peak(sum(parts.values()), parts)
            for name, parts in {"teacher": teacher, "student": student, "optimizer": optimizer}.items()
        }
        return Rehearsal(peaks, "merge", 0, 512, 512)

    first = OPCDConfig(gradient_checkpointing=True)

    def given_up(limit, config=first, device="cuda"):
        found = find(rehearse, config, limit * gib, device=device)
        return changes(config, found.config) if found.fits else None

    assert given_up(16) == {}
    assert given_up(12) == {"teacher_offload": True}
    assert given_up(9) == {"teacher_offload": True, "optimizer": "adamw_8bit"}
    assert given_up(8) is None
    assert given_up(13, device="cpu") == {"optimizer": "adamw_8bit"}
    moving = replace(first, teacher_mode="ema", teacher_ema_decay=0.9)
    assert given_up(13, moving) == {"optimizer": "adamw_8bit"}
    # With the teacher at work at the worst moment it is no use to send it away afterwards.
    assert find(lambda c: Rehearsal({"teacher": rehearse(c).peaks["teacher"]}, "merge", 0, 512, 512), first, 11 * gib,
                device="cuda").config == replace(first, optimizer="adamw_8bit")  # fmt: skip


def made_up(found, **phases):
    """A rehearsal whose phases hold so many GiB of each part."""
    peaks = {name: Peak(int(sum(parts.values()) * 2**30), {part: int(size * 2**30) for part, size in parts.items()})
             for name, parts in phases.items()}  # fmt: skip
    return Rehearsal(peaks, "merge", **found)


def all_weights(config):
    """What is kept while all weights are trained."""
    parts = {"weights": 6.8, "optimizer state": 13 if config.optimizer == "adamw_torch" else 3.3}
    return parts if config.teacher_offload else {**parts, "teacher weights": 3.4}


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [(29.5, {"teacher_offload": True}), (27, {"teacher_offload": True}),
     (24, {"teacher_offload": True, "optimizer": "adamw_8bit"}), (15, None)],
)  # fmt: skip
def test_no_number_of_tokens_makes_the_optimizers_step_smaller(limit, wanted):
    def rehearse(config):
        tokens = min(config.micro_batch_tokens or 140_000, 140_000)
        kept = all_weights(config)
        return made_up(
            {"tokens": tokens, "longest": 1100}, student={**kept, "student": tokens / 60_000},
            optimizer={**kept, "gradients": 6.8},
        )  # fmt: skip

    first = OPCDConfig()
    found = find(rehearse, first, int(limit * 2**30), device="cuda")
    assert found.fits == (wanted is not None)
    if wanted is not None:
        assert changes(first, found.config) == wanted
    assert found.rehearsal.peaks == rehearse(found.config).peaks  # what is returned was rehearsed


@pytest.mark.parametrize(
    ("answers", "limit", "wanted"),
    [("student", 26, {"rollout_batch": 32}), ("student", 23, {"teacher_offload": True, "rollout_batch": 64}),
     ("student", 12, {"teacher_offload": True, "optimizer": "adamw_8bit", "rollout_batch": 32}),
     ("teacher", 23.9, {"rollout_batch": 8}), ("teacher", 14, {"optimizer": "adamw_8bit", "rollout_batch": 8})],
)  # fmt: skip
def test_answers_are_drawn_together_before_the_teacher_stays(answers, limit, wanted):
    def rehearse(config):
        batch = config.rollout_batch or 128
        kept = all_weights(config)
        if answers == "teacher":  # at work
            kept = all_weights(replace(config, teacher_offload=False))
        return made_up({"rollout_batch": batch, "tokens": 512, "longest": 512}, rollout={**kept, "rollout": batch / 20})

    first = OPCDConfig(answers=answers)
    found = find(rehearse, first, int(limit * 2**30), device="cuda")
    assert found.fits and changes(first, found.config) == wanted


def test_a_search_that_does_not_end_returns_what_was_rehearsed():
    def rehearse(config):
        tokens = config.micro_batch_tokens or 1_000_000
        return made_up({"tokens": tokens, "longest": 1}, student={"weights": 10, "student": 1 + tokens / 1e9})

    found = find(rehearse, OPCDConfig(gradient_checkpointing=True), 2**30, device="cuda")
    assert not found.fits and found.rehearsal.peaks == rehearse(found.config).peaks
