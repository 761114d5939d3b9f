"""Out of memory at any point of a step: the run ends with the weights of one that had the smaller budget all along."""

import logging

import pytest
import torch
from recorded_graphs import graphs  # noqa: F401
from tiny import tiny_model
from training_runs import make

from opcd_fast.data import Sample, count_tokens, micro_batches
from opcd_fast.errors import InputError
from opcd_fast.runtime import CapturedSteps, KeptSteps
from opcd_fast.training.engines import TokenBudget
from opcd_fast.training.engines.retreat import is_out_of_memory
from opcd_fast.training.step import evaluate, objective


def out_of_memory():
    """A new one each time: an exception that is kept keeps its traceback, and with it what did not fit."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


SETTINGS = {"steps": 2, "batch_size": 6, "max_new_tokens": 8, "eval_every": 0}


def weights(made):
    made.train()
    return {name: p.detach().clone() for name, p in made.parameters.items()}


def failing_at(monkeypatch, made, owner, name, call):
    """The `call`-th call of owner.name in a step (not before the first) fails, once its work is done."""
    real, count = getattr(owner, name), [0]

    def function(*args, **kwargs):
        count[0] += made.budget._running[0] > 0
        out = real(*args, **kwargs)
        if count[0] == call:
            raise out_of_memory()
        return out

    monkeypatch.setattr(owner, name, function)


def fail_in(monkeypatch, made, where, call):
    if where == "teacher":
        failing_at(monkeypatch, made, made.teacher, "hidden_states_packed", call)
    elif where == "student":
        failing_at(monkeypatch, made, objective, "student_hidden_states", call)
    elif where == "loss":
        failing_at(monkeypatch, made, objective, "fused_linear_divergence", call)
    else:
        # The gradient of a parameter in the middle is the last thing before the failure: those above it have been
        # added to by then, those below have not.
        names = list(made.parameters)
        parameter, count = made.parameters[names[len(names) // 2]], [0]

        def hook(_):
            count[0] += 1
            if count[0] == call:
                raise out_of_memory()

        parameter.register_post_accumulate_grad_hook(hook)


NLL = {"answers": "teacher", "objective": "nll"}


@pytest.mark.parametrize(
    ("where", "settings", "dropout"),
    [
        *((where, {"lora_rank": rank}, 0.0) for where in ("teacher", "student", "loss", "backward") for rank in (0, 4)),
        *(("student", {**NLL, "kept_answers": kept}, 0.0) for kept in (0, 1)),
        ("loss", {"lora_rank": 4, "lr_scheduler_type": "linear"}, 0.0),
        ("loss", {"learning_rate": 1e-3}, 0.3),  # random numbers are those of the smaller budget as well
    ],
)
def test_weights_are_those_of_a_run_with_the_smaller_budget(
    tokenizer, tmp_path, monkeypatch, caplog, where, settings, dropout
):
    def made(name, tokens):
        model = tiny_model(attention_dropout=dropout)
        return make(tokenizer, tmp_path / name, model, **{**SETTINGS, **settings}, micro_batch_tokens=tokens)

    trainer = made("a", 150)
    # The second micro-batch of the first step: gradients of the first one are there.
    fail_in(monkeypatch, trainer, where, call=2)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        found = weights(trainer)
    lines = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(lines) == 1 and "step 1" in lines[0]
    assert trainer.budget.tokens < 150 and f"micro_batch_tokens={trainer.budget.tokens}" in lines[0]
    monkeypatch.undo()
    expected = weights(made("b", trainer.budget.tokens))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if dropout:
        return
    # And up to rounding those of the run that was undisturbed. AdamW divides a gradient by its own size, so that a sum
    # of n terms in another order, off by r = n eps of its size at most, moves a weight by r / |g| of a step; or by two
    # whole steps where g is that close to zero. Gradients g spread evenly around zero make that a fraction r of all
    # weights, and the root mean square over all sqrt(2 r) of a step. The n terms are here at most 6 answers of 8 tokens
    # times the width of 64.
    again = made("c", 150)
    before = {name: p.detach().clone() for name, p in again.parameters.items()}
    whole = weights(again)
    moved = torch.cat([(whole[name] - before[name]).flatten() for name in whole]).norm()
    apart = torch.cat([(found[name] - whole[name]).flatten() for name in whole]).norm()
    assert apart <= (2 * 6 * 8 * 64 * torch.finfo(torch.float32).eps) ** 0.5 * moved


def test_evaluation_retreats_too_and_training_keeps_it(tokenizer, tmp_path, monkeypatch):
    settings = {**SETTINGS, "eval_every": 1}
    made = make(tokenizer, tmp_path / "a", lora_rank=4, **settings)
    real, tries = evaluate.context_kl, []

    def context_kl(batch, *args, **kwargs):
        tries.append(len(batch.response_cu_seqlens) - 1)
        if tries[-1] > 2:
            raise out_of_memory()
        return real(batch, *args, **kwargs)

    monkeypatch.setattr(evaluate, "context_kl", context_kl)
    result = made.train()
    assert made.budget.tokens is not None
    assert max(tries[1:]) <= 2
    monkeypatch.undo()
    undisturbed = make(tokenizer, tmp_path / "b", lora_rank=4, **settings).train()
    kept = [e["own_kl"] for e in result.evaluations]
    assert kept == pytest.approx([e["own_kl"] for e in undisturbed.evaluations], rel=1e-4)


def sample(prompt, response):
    return Sample([prompt] * 3, [0] * 5, 0, [1] * response)


def test_budget_halves_until_one_sequence_is_left_and_then_says_what_to_do():
    samples, tried = [sample(i, 9) for i in range(8)], []
    budget = TokenBudget(None)

    def work():
        for turn in budget.rounds(samples):
            tried.append(len(turn.samples))
            raise out_of_memory()

    with pytest.raises(InputError, match="step 3: out of memory with one sequence of 24 tokens.*opcd plan.*2.00 GiB"):
        budget.retrying(work, "step 3")
    assert tried == [8, 4, 2, 1]


def test_other_errors_pass_and_change_nothing():
    budget = TokenBudget(100)

    def work():
        next(budget.rounds([sample(0, 4), sample(1, 4)]))
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        budget.retrying(work, "step 1")
    assert budget.tokens == 100


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(out_of_memory()) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("device-side assert"))


@pytest.mark.parametrize("share", [False, True])
def test_tokens_are_counted_as_micro_batches_counts_them(share):
    samples = [sample(i // 3, 2 + i) for i in range(9)]
    total = count_tokens(samples, share_prompts=share)
    assert len(list(micro_batches(samples, total, share_prompts=share))) == 1
    assert len(list(micro_batches(samples, total - 1, share_prompts=share))) == 2


def test_a_failed_pass_frees_its_graph(monkeypatch):
    """What the traceback held must be gone before the next try allocates."""
    import weakref

    alive = []
    budget = TokenBudget(None)

    def work():
        turn = next(budget.rounds([sample(0, 4), sample(1, 4)] if not alive else [sample(0, 4)]))
        if len(turn.samples) == 2:
            big = torch.zeros(10)
            alive.append(weakref.ref(big))
            raise out_of_memory()
        return alive[0]()

    assert budget.retrying(work, "step 1") is None


def test_what_answers_keep_goes_first(graphs):  # noqa: F811
    """The same tokens again, once; then there is nothing left to give back."""
    store, steps, tried = KeptSteps(2**40), CapturedSteps(), []
    for _ in range(2):  # the second is recorded
        steps("shape", lambda: None)
    store.keep("key", steps, 1)
    budget = TokenBudget(None)

    def work():
        for turn in budget.rounds([sample(0, 4), sample(1, 4)]):
            tried.append((len(turn.samples), len(store.kept)))
            raise out_of_memory()

    with pytest.raises(InputError, match="one sequence"):
        budget.retrying(work, "step 3")
    assert tried == [(2, 1), (2, 0), (1, 0)]
