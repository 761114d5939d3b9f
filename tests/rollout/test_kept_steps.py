"""Recorded steps that are kept from call to call: their answers are those of steps that run as they are.

On a CPU, with a stand-in for CUDA's graphs that replays operators on the tensors of the time of recording.
"""

import gc
import weakref

import architectures
import pytest
import torch
from recorded_graphs import graphs  # noqa: F401
from tiny import lora_model, prefixed, tiny_model

from opcd_fast.models import seam
from opcd_fast.rollout import TransformersRollout, decoding
from opcd_fast.rollout import transformers as rollout_module
from opcd_fast.rollout.decoding import decode
from opcd_fast.runtime import KeptSteps, release_steps

LARGE = 2**40
NONE = (999,)  # so that no row leaves


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several buckets in a few tokens; rows leave."""
    for setting, number in (("HOLD_ONCE", 0), ("BUCKET", 16), ("LOOK_EVERY", 4), ("ROWS", 2), ("PREFIX", 8)):
        monkeypatch.setattr(decoding, setting, number)


def prompts(seed, context=20, rows=5, own=9):
    """Behind a context, of the same lengths for every seed, other tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (rows, context + own), generator=generator)
    ids[:, :context] = ids[0, :context]
    ids[:, context] = torch.arange(5, 5 + rows)
    return [row[: context + own - i % 3].tolist() for i, row in enumerate(ids)]


def answers(model, rows, seed=0, tokens=30, kept=None, stops=tuple(range(2, 97, 9)), **options):
    uniform = torch.rand(len(rows), tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before, sampling = uniform.clone(), {"temperature": 1.0, "top_p": 1.0, **options}
    with seam.scoring_mode(model):
        found = decode(model, rows, uniform, stop_token_ids=stops, static=True, kept=kept, **sampling)
    assert torch.equal(uniform, before)
    return found


def assert_same(found, wanted):
    for (ids, values), (other, theirs) in zip(found, wanted, strict=True):
        assert ids == other and values == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma4-shared-kv", "mistral-window", "gpt2"])
def test_a_later_call_replays_what_an_earlier_one_recorded(name, graphs):  # noqa: F811
    model, kept = architectures.build(name), KeptSteps(LARGE)
    recorded = []
    for seed in range(4):
        rows = prompts(seed)
        found = answers(model, rows, seed, kept=kept)
        replayed = graphs.replayed
        assert_same(found, answers(model, rows, seed))
        assert graphs.replayed == replayed > 0
        recorded.append(graphs.recorded)
    assert len({len(ids) for ids, _ in found}) > 2, "or no row leaves"
    assert len(kept.kept) == 1
    assert recorded[-1] < 4 * recorded[0], "only what had not been there"
    answers(model, prompts(0), 0, kept=kept)
    assert graphs.recorded == recorded[-1]


@pytest.mark.parametrize("make", [lora_model, lambda: prefixed(tiny_model())], ids=["lora", "trained prefix"])
def test_weights_that_change_in_place_are_read_anew(make, graphs):  # noqa: F811
    model, kept = make(), KeptSteps(LARGE)
    answers(model, prompts(1), kept=kept, stops=NONE)
    count = graphs.recorded
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    found = answers(model, prompts(1), kept=kept, stops=NONE)
    assert graphs.recorded == count > 0
    assert_same(found, answers(model, prompts(1), stops=NONE))


def moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().mul_(1.05)


def another_scale(model):
    for module in seam.adapter_modules(model):
        module.scaling["default"] *= 2


def disabled(model):
    for module in seam.adapter_modules(model):
        module._disable_adapters = True


def doubled(model):
    model.double()


@pytest.mark.parametrize("change", [moved, another_scale, disabled, doubled], ids=lambda change: change.__name__)
def test_what_graphs_do_not_see_makes_new_ones(change, graphs):  # noqa: F811
    model, kept = lora_model(), KeptSteps(LARGE)
    first = answers(model, prompts(1), kept=kept, stops=NONE)
    count, (steps,) = graphs.recorded, [weakref.ref(steps) for steps, _ in kept.kept.values()]
    change(model)
    found = answers(model, prompts(1), kept=kept, stops=NONE)
    wanted = answers(model, prompts(1), stops=NONE)
    assert_same(found, wanted)
    assert change is doubled or [ids for ids, _ in wanted] != [ids for ids, _ in first]
    assert graphs.recorded == 2 * count and len(kept.kept) == 1
    gc.collect()
    assert steps() is None, "what reads weights that are gone is gone"


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"top_p": 0.8},
        {"vocab_size": 60},
        {"stops": (7, 30)},
        {"tokens": 21},
        {"rows": prompts(1, context=12)},
        {"rows": prompts(1, rows=4)},
        {"rows": prompts(1, own=30)},
        {"rows": [prompts(1)[0]] * 5},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_calls_do_not_disturb_each_other(other, graphs):  # noqa: F811
    model, kept = tiny_model(), KeptSteps(LARGE)
    usual = {"rows": prompts(2), "stops": (50,)}
    for options in (usual, {**usual, **other}, usual, {**usual, **other}):
        assert_same(answers(model, **options, kept=kept), answers(model, **options))
    assert len(kept.kept) == 2


def test_packed_weights_are_not_kept(graphs):  # noqa: F811
    class Packed(torch.nn.Parameter):
        pass

    model, kept = tiny_model(), KeptSteps(LARGE)
    model.lm_head.weight.__class__ = Packed
    answers(model, prompts(1), kept=kept)
    assert not kept.kept and graphs.recorded


def test_all_stores_together_keep_so_many_bytes(graphs):  # noqa: F811
    model, one, other = tiny_model(), KeptSteps(LARGE), KeptSteps(LARGE)
    for store in (one, other):
        for tokens in (20, 40):
            answers(model, prompts(1), kept=store, tokens=tokens)
    small, large = (size for _, size in one.kept.values())
    (steps, _), *_ = one.kept.values()
    assert sum(x.nbytes for x in steps.places.values()) < small < large
    other.most = small + 2 * large
    answers(model, prompts(1), kept=other, tokens=40)
    assert [key[0][2] for key in other.kept] == [40] and len(one.kept) == 2, "its own oldest goes"
    one.most = 2 * large - 1
    answers(model, prompts(1), kept=one, tokens=20)
    assert [key[0][2] for key in one.kept] == [20]
    answers(model, prompts(1), kept=KeptSteps(0))
    assert release_steps() and not one.kept and not other.kept
    answers(model, prompts(1), kept=one, tokens=20)
    assert not one.kept and not release_steps(), "memory is short from here on"


def test_steps_go_with_what_goes_wrong_and_with_their_store(graphs, monkeypatch):  # noqa: F811
    model, kept = tiny_model(), KeptSteps(LARGE)
    answers(model, prompts(1), kept=kept)
    (steps,) = [weakref.ref(steps) for steps, _ in kept.kept.values()]
    inner = decoding.BatchRun.read_prompts
    monkeypatch.setattr(decoding.BatchRun, "read_prompts", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(model, prompts(1), kept=kept)
    gc.collect()
    assert not kept.kept and steps() is None
    monkeypatch.setattr(decoding.BatchRun, "read_prompts", inner)
    answers(model, prompts(1), kept=kept)
    (steps,) = [weakref.ref(steps) for steps, _ in kept.kept.values()]
    del kept
    gc.collect()
    assert steps() is None and not release_steps()


def sampler(model, graphs, monkeypatch):  # noqa: F811
    """As on a GPU, but for where the numbers are."""
    engine = TransformersRollout(model, stop_token_ids=[256], merge_adapter=False, max_batch=8)
    engine._steps = KeptSteps(LARGE)
    monkeypatch.setattr(rollout_module, "decode", lambda *a, **o: decode(*a, static=True, **o))
    return engine


def test_a_sampler_keeps_them_but_for_its_first_look(graphs, monkeypatch):  # noqa: F811
    """That one runs in float32, with weights that are widened while a layer runs."""
    model = lora_model(torch.bfloat16)
    engine = sampler(model, graphs, monkeypatch)
    engine.generate(prompts(0), max_new_tokens=20)
    count = graphs.recorded
    assert engine.explain().startswith("merge: False") and "engine: decode" in engine.explain()
    for seed in (1, 2):
        found = engine.generate(prompts(seed), max_new_tokens=20, seed=seed)
        wanted = TransformersRollout(model, stop_token_ids=[256], merge_adapter=False, engine="decode")
        for a, b in zip(found, wanted.generate(prompts(seed), max_new_tokens=20, seed=seed), strict=True):
            same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), 20)
            assert a.logprobs[:same] == pytest.approx(b.logprobs[:same], abs=0.1)
    assert graphs.recorded == count > 0


def test_kept_steps_go_before_the_batch_is_halved(graphs, monkeypatch, caplog):  # noqa: F811
    model = tiny_model()
    engine = sampler(model, graphs, monkeypatch)
    wanted = engine.generate(prompts(0), max_new_tokens=20)
    inner, failed = rollout_module.decode, []

    def short(*args, **options):
        if not failed and engine._steps.kept:
            failed.append(1)
            raise torch.cuda.OutOfMemoryError("no")
        return inner(*args, **options)

    monkeypatch.setattr(rollout_module, "decode", short)
    assert engine.generate(prompts(0), max_new_tokens=20) == wanted
    assert failed and engine.max_batch == 8 and not caplog.text and not engine._steps.kept
