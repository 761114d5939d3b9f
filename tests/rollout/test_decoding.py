"""The decoding loop: every architecture that runs packed, what all rows share held once, and the bytes of that."""

import architectures
import pytest
import tiny_models
import torch
from memory_record import peak_bytes
from tiny import prefixed, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from opcd_fast.models import seam
from opcd_fast.rollout import decoding
from opcd_fast.rollout.check import scored
from opcd_fast.rollout.decoding import BatchRun, decode
from opcd_fast.rollout.memory import BYTES_PER_LOGIT, cache_bytes_per_token

CONTEXT = list(range(5, 25))
RESTS = [row.tolist() for row in tiny_models.random_ids(5, 12, 12, 1, 9)]
PROMPTS = {
    "ragged": RESTS,
    "behind a context": [[*CONTEXT, *rest] for rest in RESTS],
    "one prompt": [[*CONTEXT, *RESTS[1]]] * 5,
    "all of one length": [[*CONTEXT, 7, token] for token in (8, 9, 10, 10)],
}
MODELS = [name for name in architectures.MERGE if name != "phi3-longrope"]


def answers(model, prompts, tokens=14, stops=tuple(range(2, 97, 9)), **options):
    uniform = torch.rand(len(prompts), tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with seam.scoring_mode(model):
        return decode(model, prompts, uniform, **{"stop_token_ids": stops, "temperature": 1.0, "top_p": 1.0, **options})


def assert_as_concatenated(model, prompts, found, tolerance=1e-4):
    exact, _ = scored(model, prompts, found)
    values = torch.tensor([value for _, logprobs in found for value in logprobs], dtype=torch.float64)
    torch.testing.assert_close(values, exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("hold", [0, 10**12], ids=["held once", "copied"])
@pytest.mark.parametrize("name", architectures.walk(MODELS))
def test_logprobs_are_those_of_a_plain_pass(name, hold, monkeypatch):
    """Prompts and answers beyond the window of 8; rows leave at different tokens."""
    monkeypatch.setattr(decoding, "HOLD_ONCE", hold)
    model = architectures.build(name)
    assert decoding.refuses_decoding(model) is None
    lengths = set()
    for prompts in PROMPTS.values():
        found = answers(model, prompts)
        assert_as_concatenated(model, prompts, found)
        lengths |= {len(ids) for ids, _ in found}
    assert len(lengths) > 3 and max(lengths) > architectures.WINDOW


@pytest.mark.parametrize("hold", [0, 10**12], ids=["held once", "copied"])
@pytest.mark.parametrize("name", ["llama", "llama-mha", "mistral-window-in-suffix"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_what_is_held_once_changes_no_answer(name, kind, hold, monkeypatch):
    model = tiny_models.tiny_model(name)
    prompts = PROMPTS[kind]
    monkeypatch.setattr(decoding, "HOLD_ONCE", hold)
    uniform = torch.rand(len(prompts), 14, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"stop_token_ids": (2, 50), "temperature": 1.0, "top_p": 0.9}
    wanted = [decode(model, [p], uniform[i : i + 1], **options)[0] for i, p in enumerate(prompts)]
    found = decode(model, prompts, uniform, **options)
    for (ids, values), (other, theirs) in zip(found, wanted, strict=True):
        assert ids == other and values == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("hold", [0, 10**12], ids=["held once", "copied"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_trained_prefix_is_in_front_of_all(kind, hold, monkeypatch):
    monkeypatch.setattr(decoding, "HOLD_ONCE", hold)
    model = prefixed(tiny_model())
    found = answers(model, PROMPTS[kind])
    assert_as_concatenated(model, PROMPTS[kind], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_holding_once_is_as_near_as_copying(dtype, monkeypatch):
    prompts = PROMPTS["behind a context"]
    errors = []
    for hold in (0, 10**12):
        monkeypatch.setattr(decoding, "HOLD_ONCE", hold)
        found = answers(tiny_model(dtype=dtype), prompts, temperature=0.0)
        exact, _ = scored(tiny_model(dtype=dtype).float(), prompts, found)
        values = torch.tensor([value for _, logprobs in found for value in logprobs], dtype=torch.float64)
        errors.append(float((values - exact).abs().mean()))
    assert errors[0] < 1.5 * errors[1] and errors[1] < 0.1


def test_many_answers_behind_a_context_hold_it_once():
    """Peak bytes: one context's keys and values, what reading it takes, and the answers' own."""
    context, tokens, rows = 1536, 6, 32
    model = tiny_model(num_hidden_layers=12, head_dim=32, max_position_embeddings=2048)
    prompts = [[*torch.arange(context).remainder(200).tolist(), 201 + row % 40, row] for row in range(rows)]
    per_token = cache_bytes_per_token(model)
    assert (rows - 1) * context * per_token // (12 * 4) >= decoding.HOLD_ONCE

    def peak(count):
        return peak_bytes(lambda: answers(model, prompts[:count], tokens, stops=(256,)))

    once = peak(2)  # below it copies would be made, of little
    own = rows * ((2 + 8 + tokens) * per_token + 261 * BYTES_PER_LOGIT)
    found = peak(rows)
    assert found < 2.0 * context * per_token + own, "one context, and what its tokens take while they are read"
    assert found < once + own


def test_what_decides_whether_it_is_held_once():
    model = tiny_model()
    width = 2 * 2 * 8  # keys and values of 2 heads
    enough = -(-decoding.HOLD_ONCE // (7 * width))
    for tokens, held in ((enough, True), (enough - 1, False)):
        run = BatchRun(model, [0] * 8, [[1] * 3], 4)
        assert run._worth_holding(tokens) == held


# --- steps of fixed shapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", [0, 10**12], ids=["held once", "copied"])
@pytest.mark.parametrize("name", architectures.walk(MODELS))
def test_fixed_shapes_change_no_logprob(name, hold, monkeypatch):
    """Buckets of 16 slots, so that several are passed."""
    for setting, number in (("HOLD_ONCE", hold), ("BUCKET", 16), ("LOOK_EVERY", 4), ("ROWS", 2), ("PREFIX", 8)):
        monkeypatch.setattr(decoding, setting, number)
    model = architectures.build(name)
    for prompts in PROMPTS.values():
        found = answers(model, prompts, 26, static=True)
        assert_as_concatenated(model, prompts, found)
        if "moe" not in name and name not in ("mixtral", "olmoe", "deepseek-v3"):  # a near tie takes another expert
            assert [ids for ids, _ in found] == [ids for ids, _ in answers(model, prompts, 26)]


class Calls(TorchDispatchMode):
    """Each operator with the shapes of its tensors and all of its numbers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, _ = tree_flatten((args, kwargs or {}))
        self.seen.append((str(func), [tuple(x.shape) if torch.is_tensor(x) else x for x in flat]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_a_step_of_fixed_shapes_leaves_nothing_to_the_host(name, monkeypatch):
    """The same operators with the same shapes and numbers at every token of a bucket: what a CUDA graph replays."""
    monkeypatch.setattr(decoding, "HOLD_ONCE", 0)
    steps = []
    inner = BatchRun.next

    def recorded(self, tokens):
        with Calls() as calls:
            logits = inner(self, tokens)
        steps.append((self.cache.slots.shown, calls.seen))
        return logits

    monkeypatch.setattr(BatchRun, "next", recorded)
    model = architectures.build(name)
    for prompts in (PROMPTS["behind a context"], PROMPTS["one prompt"]):
        steps.clear()
        answers(model, prompts, 8, stops=(96,), static=True)
        # The first makes the buffers where prompts have nothing of their own.
        assert len(steps) == 7 and all(step == steps[1] for step in steps[2:])
        steps.clear()
        answers(model, prompts, 8, stops=(96,), static=False)
        assert steps[1][1] != steps[2][1], "shapes grow, or this test shows nothing"


@pytest.mark.parametrize("static", [False, True])
def test_layers_of_one_window_share_their_biases(static, monkeypatch):
    """Made once a token, with rows that begin at multiples of 8 elements, as a device's kernels want them."""
    monkeypatch.setattr(decoding, "HOLD_ONCE", 0)
    monkeypatch.setattr(decoding, "PREFIX", 8)
    seen, inner = [], decoding.step_attention
    monkeypatch.setattr(decoding, "step_attention", lambda *a, **o: seen.append(a[5]) or inner(*a, **o))
    model = architectures.build("mistral-window", num_hidden_layers=4)
    answers(model, PROMPTS["behind a context"], 3, stops=(96,), static=static)
    assert len(seen) == 2 * 4 and seen[0].prefix_bias is not None
    for step in (seen[:4], seen[4:]):
        assert len({id(x) for visible in step for x in visible}) == 3
        assert all(x.stride(0) % 8 == 0 for x in step[0][:2])
