"""What a call of the teacher holds: counted by the allocator, below the bound, in parts that change no number."""

from __future__ import annotations

import logging

import pytest
import torch
from memory_record import peak_bytes
from tiny_models import pack, plain_after_context, random_ids, tiny_model, told
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from opcd_fast.models import seam
from opcd_fast.teacher import ContextTeacher
from opcd_fast.teacher import budget as teacher_budget
from opcd_fast.teacher.parts import split

FACTOR = 1.25  # what is allocated may be this much more than what is counted
KB = 1024


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


_SHAPE = {
    "vocab_size": 97,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, intermediate_size=176, num_key_value_heads=2),
    "eager": lambda: LlamaConfig(**_SHAPE, intermediate_size=176, num_key_value_heads=2, attn_implementation="eager"),
    "wide-mlp": lambda: LlamaConfig(**_SHAPE, intermediate_size=800, num_key_value_heads=1),
    "many-keys": lambda: LlamaConfig(**_SHAPE, intermediate_size=64, num_key_value_heads=4, head_dim=64),
    "mixtral": lambda: MixtralConfig(
        **_SHAPE, intermediate_size=96, num_key_value_heads=2, num_local_experts=4, sliding_window=None
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=97,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=2048,
        **{name: _SHAPE[name] for name in ("bos_token_id", "eos_token_id")},
    ),
}


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(dtype)


def counted(model, path, lengths, context, **options):
    part = teacher_budget.Part()
    for length in lengths:
        part = part.plus(length, 0, context, teacher_budget.sizes_of(seam.body_of(model)).window)
    return teacher_budget.part_bytes(teacher_budget.sizes_of(seam.body_of(model)), path, part, **options)


CASES = [(300, [32] * 16), (300, [64, 48, 16, 3, 1] * 3), (20, [128] * 6), (900, [8] * 6), (0, [60] * 6)]
WAYS = [("llama", "merge"), ("llama", "pad"), ("llama", "concat"),
        ("eager", "pad"), ("eager", "concat"),
        ("wide-mlp", "merge"), ("many-keys", "merge"), ("many-keys", "pad"), ("mixtral", "merge"), ("gpt2", "pad"),
        ("gpt2", "concat")]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "path"), WAYS)
def test_what_is_counted_is_what_is_allocated(name, path, dtype):
    model = model_of(name, dtype)
    for context, lengths in CASES if dtype == torch.float32 else CASES[1:2]:
        context //= 4 if path == "concat" else 1
        teacher = ContextTeacher(model, random_ids(context)[0], path=path)
        ids, bounds = pack(random_ids(*lengths))
        teacher.hidden_states_packed(ids, bounds)
        peak = peak_bytes(lambda: teacher.hidden_states_packed(ids, bounds))  # noqa: B023
        # Nor far more than is needed: then batches would be cut up for nothing.
        assert 0.4 < peak / counted(model, path, lengths, context) <= FACTOR, (context, lengths)


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
@pytest.mark.parametrize("selected", [False, True])
def test_peak_of_a_divided_call_stays_below_the_bound(path, selected):
    model, lengths, contexts = model_of("llama"), [64, 40, 64, 8, 30, 64, 64, 1] * 4, random_ids(200, 150)
    index = [0, 1, 1, 0] * 8
    ids, bounds = pack(random_ids(*lengths))
    select = torch.tensor([3, 0, 700, 700]) if selected else None

    def peak(**options):
        teacher = ContextTeacher(model, contexts, path=path, **options)
        run = lambda: teacher.hidden_states_packed(ids, bounds, context_index=index, select=select)  # noqa: E731
        run()
        return peak_bytes(run)

    whole, bound = peak(), 300 * KB if path == "merge" else 1500 * KB
    kept = (4 if selected else sum(lengths)) * 64 * 4  # what the call returns
    part = peak(max_batch_bytes=bound)
    assert part <= FACTOR * bound + kept + 32 * KB
    assert whole > 2 * part


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
@pytest.mark.parametrize("name", ["llama", "qwen2-mixed-window"])
def test_parts_change_no_number(name, path):
    model, contexts = tiny_model(name), random_ids(20, 6, 0)
    sequences, index = random_ids(5, 1, 17, 4, 0, 9, 12, seed=2), [1, 0, 2, 0, 1, 1, 0]
    ids, bounds = pack(sequences)
    want = torch.cat([plain_after_context(model, contexts[i], s) for i, s in zip(index, sequences, strict=True)])
    select = torch.tensor([47, 0, 5, 5, 6, 30])
    for bound in (1, 40 * KB, 120 * KB, None):
        teacher = ContextTeacher(model, contexts, path=path, max_batch_bytes=bound)
        got = teacher.hidden_states_packed(ids, bounds, context_index=index)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        some = teacher.hidden_states_packed(ids, bounds, context_index=index, select=select)
        torch.testing.assert_close(some, want[select], atol=1e-4, rtol=0)
        none = teacher.hidden_states_packed(ids, bounds, context_index=index, select=select[:0])
        assert none.shape == (0, 48)


def test_windows_count_for_each_context():
    body = seam.body_of(tiny_model("mistral-window-below-context"))
    sizes, part = teacher_budget.sizes_of(body), teacher_budget.Part()
    for context in range(50):
        part = part.plus(1, context, 20, sizes.window)
    assert part.past == 50 * 7  # a window of 8 sees 7 keys before a token


def tokens_of_passes(model):
    counts = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


def test_a_sequence_too_large_runs_alone_and_that_is_said_once(caplog):
    model = tiny_model()
    teacher = ContextTeacher(model, random_ids(20)[0], path="merge", max_batch_bytes=1)
    ids, bounds = pack(random_ids(5, 9, 3))
    _ = teacher.prefixes
    counts = tokens_of_passes(model)
    with caplog.at_level(logging.WARNING, "opcd_fast"):
        for _ in range(2):
            teacher.hidden_states_packed(ids, bounds)
    assert counts == [9, 5, 3] * 2
    assert len(told(caplog)) == 1 and "more than max_batch_bytes=1; it runs alone" in caplog.text


def test_a_large_batch_runs_in_few_passes_and_a_small_one_in_one(caplog):
    model = tiny_model()
    counts = tokens_of_passes(model)
    ids, bounds = pack(random_ids(*[8] * 16))
    need = counted(model, "merge", [8] * 16, 20)
    for bound, passes in ((need, 1), (need - 1, 2), (need * 2, 1), (None, 1)):
        teacher = ContextTeacher(model, random_ids(20)[0], path="merge", max_batch_bytes=bound)
        _ = teacher.prefixes
        counts.clear()
        with caplog.at_level(logging.WARNING, "opcd_fast"):
            teacher.hidden_states_packed(ids, bounds)
        assert len(counts) == passes and sum(counts) == 128
    assert not told(caplog)


def test_contexts_stay_together_and_every_sequence_comes_once():
    body = seam.body_of(tiny_model())
    lengths, index = [5, 60, 7, 0, 30, 60, 2, 9] * 8, [3, 0, 1, 2] * 16
    contexts = [40, 10, 0, 25]
    for path in ("merge", "pad", "concat"):
        for bound in (1, 100 * KB, 400 * KB, 10**9):
            parts, most = split(body, path, lengths, index, [contexts[i] for i in index], bound)
            assert sorted(s for part in parts for s in part) == [s for s in range(64) if lengths[s]]
            if path != "concat":
                order = [index[s] for part in parts for s in part]
                assert order == sorted(order)  # so that each context is in as few parts as can be
            needs = []
            for part in parts:
                whole = teacher_budget.Part()
                for sequence in part:
                    whole = whole.plus(lengths[sequence], index[sequence], contexts[index[sequence]])
                needs.append(teacher_budget.part_bytes(teacher_budget.sizes_of(body), path, whole))
                assert needs[-1] <= bound or len(part) == 1
            assert most == max(needs)
    assert split(body, "merge", [], [], [], 5) == ([], 0)


def test_default_is_a_quarter_of_the_weights_and_at_least_a_gibibyte():
    assert teacher_budget.default_batch_bytes(tiny_model()) == 2**30
    with torch.device("meta"):
        large = torch.nn.Linear(2**16, 2**17, bias=False)
    assert teacher_budget.default_batch_bytes(large) == 2**33


def test_what_reading_a_prefix_takes_is_counted():
    model = model_of("many-keys")
    teacher = ContextTeacher(model, random_ids(1500)[0], path="merge")
    ids, bounds = pack(random_ids(4))
    teacher.hidden_states_packed(ids, bounds)
    peak = peak_bytes(lambda: teacher.hidden_states_packed(ids, bounds))
    assert 0.4 < peak / counted(model, "merge", [4], 1500, fetched=teacher._fetched()) <= FACTOR
    elsewhere = ContextTeacher(model, [1], path="merge", prefix_device="meta")
    assert elsewhere._fetched() == teacher._fetched() + 2


@pytest.mark.parametrize("bound", [0, -1, 1.5, True, "1"])
def test_bad_bounds(bound):
    with pytest.raises(ValueError, match="max_batch_bytes: expected an integer >= 1"):
        ContextTeacher(tiny_model(), [1], max_batch_bytes=bound)


@pytest.mark.parametrize("bound", [1, None])
def test_select_beyond_the_row_is_an_error(bound):
    teacher = ContextTeacher(tiny_model(), [1, 2], path="merge", max_batch_bytes=bound)
    ids, bounds = pack(random_ids(5, 3))
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match=r"select: positions must lie in \[0, 8\)"):
            teacher.hidden_states_packed(ids, bounds, select=torch.tensor([0, wrong]))
