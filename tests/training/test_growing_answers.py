"""The bound on answers grows over the run: by hand, for every writer, without false warnings."""

from functools import partial

import pytest
from resumption import cut_and_resumed
from training_runs import lines_of, make

from opcd_fast.errors import InputError
from opcd_fast.training.settings import OPCDConfig


@pytest.mark.parametrize(
    "more", [{}, {"answers": "teacher"}, {"off_policy_share": 0.5}], ids=str
)
def test_the_bound_by_hand_and_in_every_step(tokenizer, tmp_path, more):
    trainer = make(
        tokenizer, tmp_path / "run", steps=8, max_new_tokens=10, answer_growth=0.5, eval_every=8, batch_size=6, **more
    )
    asked, inner = [], trainer.eval_rollout.generate
    trainer.eval_rollout.generate = lambda rows, **options: (
        asked.append(options["max_new_tokens"]) or inner(rows, **options)
    )
    result = trainer.train()
    bounds = [3, 5, 8, 10, 10, 10, 10, 10]  # 10 (s + 1) / 4, rounded up
    assert [record["max_new_tokens"] for record in result.history] == bounds
    for step, bound in enumerate(bounds):
        lengths = [len(answer.token_ids) for answer in trainer.source.draw(step).answers]
        assert max(lengths) == bound, "of the whole answer, whoever begins it"
    assert asked[0] == asked[-1] == 10, "evaluations have the whole length"


def test_steps_that_are_still_growing_warn_of_nothing(tokenizer, tmp_path):
    def names(name, **settings):
        run = make(tokenizer, tmp_path / name, steps=12, max_new_tokens=40, eval_every=12, **settings).train()
        return {(warning["name"], warning["step"]) for warning in run.warnings}

    cut = {("cut_answers", 5)}
    assert names("whole") >= cut
    assert ("short_answers", 5) not in (grown := names("growing", answer_growth=0.5)) and not grown & cut
    assert ("cut_answers", 10) in grown, "five steps of the whole length: the sixth to the tenth"


def test_a_stopped_run_goes_on_bit_for_bit_with_as_many_steps(tokenizer, tmp_path):
    built = partial(make, tokenizer, eval_prompts=None, save_every=1, answer_growth=0.75)
    built(tmp_path / "whole").train()
    cut_and_resumed(built, tmp_path / "cut", ("step", 3))
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")
    with pytest.raises(InputError, match="steps differs from the run"):
        built(tmp_path / "whole", resume=True, steps=6).train()


def test_kept_answers_do_not_grow():
    with pytest.raises(InputError, match="answer_growth is set, but kept_answers=1"):
        OPCDConfig(answer_growth=0.5, answers="teacher", kept_answers=1)
