"""What belongs to running a job, on two ranks: signals, best weights, early stop, scorers, trackers, out of memory."""

import pytest
import torch
from rank_runs import GROUP_OF_TWO, assert_same_run, checkpoint, default_runs, records, slow_runs, told
from safetensors.torch import load_file

from opcd_fast.data import Sample
from opcd_fast.errors import InputError
from opcd_fast.training.engines import Ranks, TokenBudget
from opcd_fast.training.engines.ranks import OtherRankError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return default_runs(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_best_weights_and_the_early_stop_are_those_of_one_process(runs, engine):
    ours, alone = runs / "two" / f"running-{engine}", runs / "one" / "running-ddp"
    assert_same_run(ours, alone)
    assert records(ours)[0]["sampler_kl"] > 1e-3 and abs(records(ours)[0]["importance_weight"] - 1) > 1e-3
    found = [one["best"] for one in told(ours)]
    assert found[0] == found[1] == told(alone, 1)[0]["best"]
    assert found[0][1:] == [2, True]  # no gain is larger than 100
    best, expected = (load_file(folder / "best" / "model.safetensors") for folder in (ours, alone))
    assert best.keys() == expected.keys()
    assert max(float((best[name] - expected[name]).abs().median()) for name in best) <= 1e-7


def stopped(folder):
    return [(folder / f"stopped-{rank}").read_text() for rank in range(2)]


def test_a_signal_on_one_rank_stops_both_and_the_rest_is_the_same(runs):
    said = stopped(runs / "two" / "stopped-ddp")
    assert said[0] == said[1] == "143 stopped; step 1 is saved, go on with --resume"
    assert_same_run(runs / "two" / "stopped-ddp", runs / "two" / "running-ddp")


@pytest.mark.slow
def test_a_signal_stops_sharded_ranks(tmp_path_factory):
    runs = slow_runs(tmp_path_factory.getbasetemp())
    said = stopped(runs / "two" / "stopped-fsdp2")
    assert said[0] == said[1] == "143 stopped; step 1 is saved, go on with --resume"
    assert_same_run(runs / "two" / "stopped-fsdp2", runs / "one" / "running-ddp")


def test_trackers_are_told_by_one_rank(runs):
    tracked = [one["tracked"] for one in told(runs / "two" / "ddp-full")]
    assert tracked[1] == []
    assert tracked[0] == told(runs / "one" / "ddp-full", 1)[0]["tracked"] and {1, 2, 3} <= set(tracked[0])


# --------------------------------------------------------------------------------------------- out of memory


def test_ranks_repeat_a_step_together_and_it_is_that_of_the_smaller_budget(runs):
    retreat, calm = runs / "two" / "retreat", runs / "two" / "calm"
    budgets = [one["budget"] for one in told(retreat)]
    assert budgets[0] == budgets[1] < GROUP_OF_TWO and told(calm)[0]["budget"] == budgets[0]
    (weights, moments), (expected, expected_moments) = checkpoint(retreat), checkpoint(calm)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert all(torch.equal(moments[i]["exp_avg_sq"], expected_moments[i]["exp_avg_sq"]) for i in expected_moments)
    assert_same_run(retreat, runs / "one" / "ddp-lora")
    logs = [log.read_text() for log in runs.glob("jobs-2-*.?")]
    lines = [line for log in logs for line in log.splitlines() if "repeated with" in line]
    assert len(lines) == 1 and f"micro_batch_tokens={budgets[0]} from here on" in lines[0] and "step 1" in lines[0]


def test_one_answer_that_does_not_fit_ends_all_ranks(runs):
    said = [(runs / "two" / "too-large" / f"error-{rank}").read_text() for rank in range(2)]
    assert "step 1: out of memory with one sequence of" in said[1] and "opcd plan" in said[1]
    assert said[0] == f"rank 1 failed: InputError: {said[1]}"


def test_sharded_ranks_say_how_to_go_on(runs):
    said = [(runs / "two" / "sharded-memory" / f"error-{rank}").read_text() for rank in range(2)]
    assert said[1].startswith("step 1: out of memory on rank 1 with ")
    assert "the last checkpoint with resume, and micro_batch_tokens=" in said[1]
    assert "out of memory" not in said[0]  # it has lost the other one, and ended


class Told(Ranks):
    """Ranks whose other one says what the test lets it say."""

    def __init__(self, *answers):
        super().__init__(alone=True)
        self.world, self.answers = 2, list(answers)

    def gather(self, value):
        return [value, self.answers.pop(0)]

    def share_samples(self, samples):
        return list(samples)


def test_a_rank_that_did_not_fail_starts_again_with_the_others_budget(caplog):
    samples, tried = [Sample([i] * 3, [0] * 5, 0, [1] * 9) for i in range(4)], []

    def work():
        tried.append([len(turn.samples) for turn in budget.rounds(samples)])
        return len(tried)

    budget = TokenBudget(None, Told(None, 96, None, 48, None, None))  # error, tokens that failed; and so on
    assert budget.retrying(work, "step 1") == 3
    assert tried == [[4], [2, 2], [1, 1, 1, 1]] and budget.tokens == 24
    assert len([r for r in caplog.records if "out of memory" in r.getMessage()]) == 2

    budget = TokenBudget(None, Told("InputError: too large"))
    with pytest.raises(OtherRankError, match="rank 1 failed: InputError: too large"):
        budget.retrying(work, "step 1")


def test_where_ranks_meet_inside_of_a_pass_nothing_is_asked_after_it():
    samples = [Sample([i] * 3, [0] * 5, 0, [1] * 9) for i in range(4)]

    def work():
        for _ in budget.rounds(samples):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    budget = TokenBudget(None, Told(1), together=True)  # one micro-batch there, and no further answer
    with pytest.raises(InputError, match="on rank 0 with 96 tokens at once.*resume, and micro_batch_tokens=48"):
        budget.retrying(work, "step 1")


def test_ranks_that_were_started_with_different_settings_are_told_apart():
    mine = {"seed": 0, "batch_size": 4}
    Told(mine).check_alike(mine)
    with pytest.raises(InputError, match=r"batch_size differs between ranks \(\[4, 8\]\)"):
        Told({"seed": 0, "batch_size": 8}).check_alike(mine)
