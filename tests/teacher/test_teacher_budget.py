"""What a call of the teacher holds: counted by the allocator, below the bound, in parts that change no number."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from memory_record import peak_bytes
from tiny_models import assert_close, pack, random_ids, reference, tiny_model, tokens_run, told
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig

from opcd_fast.models import seam
from opcd_fast.teacher import ContextTeacher, budget

FACTOR = 1.25  # what is allocated may be this much more than what is counted
KB = 1024


TOKENS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    **TOKENS, "pad_token_id": 0, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}  # fmt: skip
LLAMA = {**SHAPE, "intermediate_size": 176, "num_key_value_heads": 2}
CONFIGS = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "eager": lambda: LlamaConfig(**LLAMA, attn_implementation="eager"),
    "wide-mlp": lambda: LlamaConfig(**SHAPE, intermediate_size=800, num_key_value_heads=1),
    "many-keys": lambda: LlamaConfig(**SHAPE, intermediate_size=64, num_key_value_heads=4, head_dim=64),
    "mixtral": lambda: MixtralConfig(
        **SHAPE, intermediate_size=96, num_key_value_heads=2, num_local_experts=4, sliding_window=None
    ),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=2048),
}


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().to(dtype)


def counted(model, path, lengths, context):
    sizes, part = budget.sizes_of(seam.body_of(model)), budget.Part()
    for length in lengths:
        part = part.plus(length, 0, context, sizes.window)
    return budget.part_bytes(sizes, path, part)


def peak_of_a_call(model, contexts, lengths, *, index=None, select=None, **options):
    """Bytes that the call alone holds: its contexts are read, and its weights are not looked at."""
    teacher = ContextTeacher(model, contexts, frozen_weights=True, **options)
    ids, bounds = pack(random_ids(*lengths))
    run = partial(teacher.hidden_states_packed, ids, bounds, context_index=index, select=select)
    run()
    return peak_bytes(run)


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
        peak = peak_of_a_call(model, random_ids(context)[0], lengths, path=path)
        # Nor far more than is needed: then batches would be cut up for nothing.
        assert 0.4 < peak / counted(model, path, lengths, context) <= FACTOR, (context, lengths)


@pytest.mark.parametrize("path", ["merge", "pad", "concat"])
@pytest.mark.parametrize("selected", [False, True])
def test_peak_of_a_divided_call_stays_below_the_bound(path, selected):
    model, lengths, contexts = model_of("llama"), [64, 40, 64, 8, 30, 64, 64, 1] * 4, random_ids(200, 150)
    select = torch.tensor([3, 0, 700, 700]) if selected else None
    peak = partial(peak_of_a_call, model, contexts, lengths, index=[0, 1, 1, 0] * 8, select=select, path=path)
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
    want = reference(model, contexts, sequences, index)
    select = torch.tensor([47, 0, 5, 5, 6, 30])
    for bound in (1, 40 * KB, 120 * KB, None):
        teacher = ContextTeacher(model, contexts, path=path, max_batch_bytes=bound)
        got = teacher.hidden_states_packed(ids, bounds, context_index=index)
        assert_close(got, want)
        some = teacher.hidden_states_packed(ids, bounds, context_index=index, select=select)
        assert_close(some, want[select])
        none = teacher.hidden_states_packed(ids, bounds, context_index=index, select=select[:0])
        assert none.shape == (0, 48)


@pytest.mark.parametrize("window", [None, 64])
def test_the_peak_does_not_grow_with_the_context(window):
    """Joined with the row, one layer's keys and values of 1,536 tokens more would be 1.5 MiB."""
    shape = {**LLAMA, "head_dim": 64, "max_position_embeddings": 4096, "sliding_window": window}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**shape)).eval()
    peaks = [peak_of_a_call(model, random_ids(length)[0], [8] * 6, path="merge") for length in (512, 2048)]
    layer = (2048 - 512) * 2 * 2 * 64 * 4
    assert peaks[1] - peaks[0] < layer / 50


def test_passes_are_as_few_as_the_bound_allows(caplog):
    model, (context,) = tiny_model(), random_ids(20)
    counts = tokens_run(model)
    need = counted(model, "merge", [8] * 16, 20)
    for bound, passes in ((need, 1), (need - 1, 2), (need * 2, 1), (None, 1)):
        teacher = ContextTeacher(model, context, path="merge", max_batch_bytes=bound)
        _ = teacher.prefixes
        counts.clear()
        teacher.hidden_states_packed(*pack(random_ids(*[8] * 16)))
        assert len(counts) == passes and sum(counts) == 128
    assert not told(caplog)
    teacher = ContextTeacher(model, context, path="merge", max_batch_bytes=1)
    _ = teacher.prefixes
    counts.clear()
    for _ in range(2):
        teacher.hidden_states_packed(*pack(random_ids(5, 9, 3)))
    assert counts == [9, 5, 3] * 2
    assert len(told(caplog)) == 1 and "more than max_batch_bytes=1; it runs alone" in caplog.text


def test_a_layer_of_a_prefix_that_comes_from_elsewhere_is_counted():
    sizes = budget.sizes_of(seam.body_of(model_of("llama")))
    part = budget.Part().plus(4, 0, 1500)
    here, there = (budget.part_bytes(sizes, "merge", part, fetched) for fetched in (False, True))
    assert there - here == pytest.approx(1500 * 2 * 2 * 16 * 4, rel=0.1)
    for device, elsewhere in ((None, False), ("meta", True)):
        assert ContextTeacher(tiny_model(), [1], path="merge", prefix_device=device)._fetched() == elsewhere


def test_default_is_a_quarter_of_the_weights_and_at_least_a_gibibyte():
    assert budget.default_batch_bytes(tiny_model()) == 2**30
    with torch.device("meta"):
        assert budget.default_batch_bytes(torch.nn.Linear(2**16, 2**17, bias=False)) == 2**33


@pytest.mark.parametrize("name", ["max_batch_bytes", "max_prefix_bytes"])
@pytest.mark.parametrize("bound", [0, -1, 1.5, True, "1"])
def test_bad_bounds(name, bound):
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1"):
        ContextTeacher(tiny_model(), [1], **{name: bound})
