"""The planner's predictions against what a real step allocates on the CPU."""

import zlib
from dataclasses import replace

import pytest
import torch
from memory_record import peak_bytes, recorded_peaks
from tiny import tiny_model, tiny_tokenizer
from torch._subclasses import FakeTensor

from opcd_fast.data.tasks import as_user
from opcd_fast.errors import InputError
from opcd_fast.loss import LMHead, fused_linear_divergence, resolve_backend, scratch_bytes
from opcd_fast.models import packed_hidden_states
from opcd_fast.planning import depth_to_extrapolate, extrapolated
from opcd_fast.planning.rehearsal import Job, job_of, rehearse
from opcd_fast.training import OPCDConfig, OPCDTrainer
from opcd_fast.training.answers import read_training_prompts

CONTEXT = "always answer with zzz, whatever the question may be, and never say why you do it. " * 3
SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 1024}
OTHER = {**SIZES, "hidden_size": 64, "num_hidden_layers": 5}
CASES = {
    "lora": {"lora_rank": 8},
    "lora, bf16": {"lora_rank": 8, "dtype": "bfloat16"},
    "lora, checkpointing": {"lora_rank": 8, "gradient_checkpointing": True},
    "lora, micro-batches": {"lora_rank": 8, "micro_batch_tokens": 700},
    "lora, four answers each": {"lora_rank": 8, "rollouts_per_prompt": 4, "batch_size": 4},
    "lora, unmerged rollout": {"lora_rank": 8, "merge_for_rollout": False},
    "dora": {"lora_rank": 8, "use_dora": True},
    "dora, bf16, unmerged rollout": {
        "lora_rank": 8,
        "use_dora": True,
        "merge_for_rollout": False,
        "dtype": "bfloat16",
    },
    "prefix": {"num_virtual_tokens": 40},
    "prefix, bf16, checkpointing": {
        "num_virtual_tokens": 40,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "micro_batch_tokens": 700,
    },
    "full": {},
    "full, bf16": {"dtype": "bfloat16"},
    "full, bf16, a copy answers": {"dtype": "bfloat16", "merge_for_rollout": True},
    "full, bf16, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch_tokens": 900},
    "full, average": {"teacher_mode": "ema"},
    "full, adafactor": {"optimizer": "adafactor"},
    "full, bf16, adamw_8bit": {"dtype": "bfloat16", "optimizer": "adamw_8bit"},
    "lora, the teacher writes": {"lora_rank": 8, "off_policy_share": 1.0},
    "other teacher": {"lora_rank": 8, "teacher": OTHER},
    "wide vocabulary": {"lora_rank": 8, "vocabulary": 4096, "workspace_bytes": 4 << 20},
    "task": {"lora_rank": 8, "task": True, "batch_size": 4, "rollouts_per_prompt": 2},
    "task, micro-batches": {"lora_rank": 8, "task": True, "batch_size": 4, "micro_batch_tokens": 500},
    "full, wide vocabulary": {"vocabulary": 4096, "dtype": "bfloat16", "workspace_bytes": 4 << 20},
}


class Asking:
    """A task of three turns, whatever is answered."""

    name, max_turns, score, feedback = "asking", 3, None, ""

    def __init__(self, identity=""):
        self.id, self.turn, self.seen = identity, 0, "nothing"

    def episodes(self, split, count, seed=0):
        return [Asking(f"{split} {index}") for index in range(count)]

    def messages(self):
        return as_user(f"{self.id}: which of these is it, [left] or [right]? ({self.seen})")

    def answer(self, text):
        self.turn, self.seen = self.turn + 1, f"{zlib.crc32(text.encode()):08x}"
        self.score = 0.0 if self.turn == self.max_turns else None


def compared(case, tmp_path, monkeypatch):
    """{phase: (predicted, recorded)} of one case."""
    case = dict(case)
    if case.get("optimizer", "").endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    teacher, vocabulary, task = case.pop("teacher", None), case.pop("vocabulary", 261), case.pop("task", False)
    settings = {"batch_size": 16, "max_new_tokens": 16, "rollout_batch": 16, "steps": 3, "eval_every": 0, **case}
    settings.setdefault("dtype", "float32")
    config = OPCDConfig(output_dir=str(tmp_path / "run"), device="cpu", **settings)
    dtype, job, plans = getattr(torch, config.dtype), [], []

    def make_and_train():
        model = tiny_model(**SIZES, vocab_size=vocabulary, dtype=dtype)
        other = None if teacher is None else tiny_model(seed=1, **teacher, vocab_size=vocabulary, dtype=dtype)
        plans.extend((model.config, None if other is None else other.config))
        prompts = Asking() if task else [f"question number {i}" for i in range(9)]
        trainer = OPCDTrainer(model, tiny_tokenizer(), CONTEXT, prompts, config, teacher_model=other, quiet=True)
        # All answers have their full length, and are drawn from all of the vocabulary but its last token.
        for sampler in filter(None, (trainer.rollout, trainer.teacher_rollout)):
            sampler.stop_token_ids, sampler.vocab_size = (vocabulary - 1,), vocabulary - 1
        job.append(job_of(read_training_prompts(prompts, None, CONTEXT, trainer.tokenizer, config), config))
        trainer.train()

    recorded = recorded_peaks(make_and_train, monkeypatch)
    backend = resolve_backend("auto", torch.device("cpu"), torch.float32)
    predicted = rehearse(config, job[0], *plans, device="cpu", dtype=dtype, backend=backend)
    return {phase: (predicted.peaks[phase].nbytes, nbytes) for phase, nbytes in recorded.items()}


QUICK = ("lora, checkpointing",)  # the profiler takes its time


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
def test_every_phase_is_within_a_tenth_of_what_a_step_allocates(name, tmp_path, monkeypatch):
    found = compared(CASES[name], tmp_path, monkeypatch)
    print({phase: (p, r, round(p / r, 3)) for phase, (p, r) in found.items()})
    assert set(found) == {"rollout", "teacher", "student", "loss", "backward", "optimizer"}
    for phase, (predicted, recorded) in found.items():
        assert predicted == pytest.approx(recorded, rel=0.1), phase


SMALL = Job((60,), ((20, 20, 0),))


def planned(config, job=SMALL, **options):
    options = {"device": "cpu", "dtype": torch.float32, "backend": "torch", **options}
    return rehearse(config, job, tiny_model(**SIZES).config, **options)


def test_a_rehearsal_leaves_the_process_as_it_was():
    """For a GPU attention makes shapes in place of numbers, which must end with the rehearsal."""
    planned(OPCDConfig(batch_size=2, max_new_tokens=4, lora_rank=4, quantization="4bit"), device="cuda")
    model, ids = tiny_model(**SIZES), torch.arange(12)
    packed = packed_hidden_states(model, ids, torch.tensor([0, 5, 12]))
    alone = model.base_model(ids[None, 5:]).last_hidden_state[0]
    torch.testing.assert_close(packed[5:], alone, rtol=1e-4, atol=1e-5)
    before = model.lm_head.weight
    assert model.double().lm_head.weight is before and not isinstance(before, FakeTensor)


def test_what_is_kept_is_known_to_the_byte():
    sizes = [p.numel() for p in tiny_model(**SIZES).parameters()]
    settings = {"batch_size": 2, "max_new_tokens": 4, "dtype": "bfloat16"}
    seen = planned(OPCDConfig(**settings), device="cuda", dtype=torch.bfloat16)
    kept = seen.peaks["optimizer"].parts
    assert kept["weights"] == pytest.approx(4 * sum(sizes), rel=1e-3)  # fp32 masters, and a few buffers
    assert kept["teacher weights"] == 2 * sum(sizes)
    assert kept["gradients"] == 4 * sum(sizes)
    assert kept["optimizer state"] == 8 * sum(sizes) + 4 * len(sizes)  # averages, and each tensor's count of steps
    assert kept["context KV"] == 60 * 3 * 2 * 2 * 24 * 2  # tokens, layers, K and V, heads, size, bytes
    seen = planned(OPCDConfig(**settings, optimizer="adamw_8bit"), device="cuda", dtype=torch.bfloat16)
    wanted = sum(8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in sizes)
    assert seen.peaks["optimizer"].parts["optimizer state"] == wanted
    paged = planned(OPCDConfig(**settings, optimizer="paged_adamw_8bit"), device="cuda", dtype=torch.bfloat16)
    assert paged.peaks["optimizer"].parts["optimizer state"] == wanted  # none of these is large enough for pages
    packed = planned(OPCDConfig(**settings, lora_rank=4, quantization="4bit"), device="cuda", dtype=torch.bfloat16)
    linear = [m.weight.numel() for m in tiny_model(**SIZES).model.modules() if isinstance(m, torch.nn.Linear)]
    wanted = 2 * (sum(sizes) - sum(linear)) + sum(n // 2 + n // 64 + 4 * -(-n // 2**14) + 4 * 273 for n in linear)
    assert packed.peaks["optimizer"].parts["weights"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("divergence", ["reverse_kl", "topk_reverse_kl"])
@pytest.mark.parametrize(("dtype", "backend"), [("float32", "native"), ("bfloat16", "torch")])
def test_the_loss_holds_what_it_says(dtype, backend, divergence, trained):
    n, v, d, dtype = 500, 3000, 64, getattr(torch, dtype)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    heads = [LMHead(torch.randn(v, d, dtype=dtype, requires_grad=trained)), LMHead(torch.randn(v, d, dtype=dtype))]
    options = {"workspace_bytes": 4 << 20, "backend": backend, "divergence": divergence}
    teacher = torch.randn(n, d, dtype=dtype)

    def call():
        return fused_linear_divergence(hidden, heads[0], teacher, heads[1], return_stats=True, **options)

    call()  # what is loaded at first use
    results = hidden.nbytes + 4.0 * (heads[0].weight.numel() if trained else 0)
    said = scratch_bytes(n, *heads, dtype, device="cpu", **options)
    assert said + results == pytest.approx(peak_bytes(call), rel=0.1)


@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_of_differences_holds_what_it_says(trained):
    n, v, d = 300, 3000, 64
    hidden = torch.randn(n, d, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, dtype=torch.bfloat16, requires_grad=trained)
    heads = LMHead(weight), LMHead(weight.detach())
    # Near, and every largest logit near the token's, so that no row is computed again.
    ids = (hidden @ weight.T).argmax(-1)
    options = {"workspace_bytes": 12 << 20, "backend": "torch", "projection": "difference"}

    def call():
        return fused_linear_divergence(
            hidden, heads[0], hidden.detach() * 1.01, heads[1], return_stats=True, token_ids=ids, **options
        )

    assert call()[1].repeated == 0
    results = hidden.nbytes + 4 * (weight.numel() if trained else 0)
    said = results + scratch_bytes(n, LMHead(weight), LMHead(weight), torch.bfloat16, device="cpu", **options)
    assert 0.7 * said <= peak_bytes(call) <= said  # a CPU's float64 and float32 buffers are not there at once


def test_a_plan_of_a_shared_head_counts_what_auto_would_take():
    """On a GPU that need not be here: the copy of the head in float16, and half of the bytes for the logits."""
    weight = torch.empty(151_936, 1024, dtype=torch.bfloat16, device="meta")
    head = LMHead(weight)

    def said(rows=16_384, teacher=head, dtype=torch.bfloat16, **options):
        return scratch_bytes(rows, head, teacher, dtype, device="cuda", backend="triton", **options)

    asked, separate = said(projection="difference"), said(projection="separate")
    assert said() == asked != separate
    other = LMHead(torch.empty_like(weight))
    for same in (said(teacher=other), said(token_ids=False), said(teacher=LMHead(weight, scale=2.0))):
        assert same in (separate, said(teacher=other, projection="separate"))
    assert said(rows=300) == said(rows=300, projection="separate") != said(rows=300, projection="difference")
    small = {"workspace_bytes": 1 << 29}  # the copy would be more than half of it
    assert said(**small) == said(**small, projection="separate") <= 1 << 30
    with pytest.raises(ValueError, match="softcap"):
        scratch_bytes(
            9, LMHead(weight, softcap=3.0), LMHead(weight, softcap=3.0), torch.bfloat16, device="cuda",
            backend="triton", projection="difference",
        )  # fmt: skip


def test_backward_of_flash_attention_is_counted():
    """Beside the gradients: dQ in fp32 with the row sums of dO * O, and dK and dV once for every query head."""
    tokens, heads, size = 1000, 8, 64
    config = tiny_model(
        hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads, head_dim=size,
        num_key_value_heads=2, max_position_embeddings=2048,
    ).config  # fmt: skip
    settings = OPCDConfig(batch_size=1, max_new_tokens=10, lora_rank=2, rollout_batch=1)
    job = Job((10,), ((tokens - 9, 5, 0),))
    seen = rehearse(settings, job, config, device="cuda", dtype=torch.bfloat16, backend="triton")
    inside = tokens * heads * ((size + 1) * 4 + 2 * size * 2)
    gradients = tokens * (2 * heads + 2 * 2) * size * 2  # of output and queries, of keys and values
    assert seen.peaks["backward"].parts["backward"] == pytest.approx(inside + gradients, rel=0.05)


def test_models_with_windows_are_planned_beyond_them():
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=32,
    )  # fmt: skip
    settings = OPCDConfig(batch_size=2, max_new_tokens=20, lora_rank=4)
    seen = rehearse(settings, SMALL, config, device="cuda", dtype=torch.bfloat16, backend="triton")
    assert seen.path == "merge" and any("windowed" in note for note in seen.notes)
    # Keys of 39 tokens in one layer, of 31 in the other: size, K and V, sequences, bytes.
    assert seen.peaks["rollout"].parts["rollout"] >= (38 + 31) * 16 * 2 * 2 * 2


def test_the_answering_cache_is_gone_when_the_teacher_runs():
    seen = planned(OPCDConfig(batch_size=8, max_new_tokens=100, rollout_batch=8, lora_rank=4))
    cache = 8 * (20 + 99) * 3 * 2 * 2 * 24 * 4  # sequences, tokens, layers, K and V, heads, size, bytes
    assert cache < seen.peaks["rollout"].parts["rollout"] < 1.5 * cache
    assert seen.peaks["teacher"].parts.get("rollout", 0) == 0


def test_what_each_setting_saves():
    base = {"batch_size": 16, "max_new_tokens": 32, "lora_rank": 4, "rollout_batch": 16}
    whole = planned(OPCDConfig(**base))
    assert planned(OPCDConfig(**base, gradient_checkpointing=True)).nbytes < 0.6 * whole.nbytes
    assert planned(OPCDConfig(**base, micro_batch_tokens=whole.tokens // 4)).nbytes < 0.5 * whole.nbytes
    smaller = planned(OPCDConfig(**{**base, "rollout_batch": 4}))
    assert smaller.peaks["rollout"].nbytes < whole.peaks["rollout"].nbytes
    far = planned(OPCDConfig(**base, prefix_device="cpu"), Job((600,), ((20, 20, 0),)), device="cuda")
    near = planned(OPCDConfig(**base), Job((600,), ((20, 20, 0),)), device="cuda")
    kept = near.peaks["student"].parts["context KV"]
    assert far.peaks["student"].parts["context KV"] == pytest.approx(kept / 3, rel=0.01)  # one of three layers


def test_a_prefix_is_planned_for_a_gpu():
    config = OPCDConfig(batch_size=2, max_new_tokens=4, num_virtual_tokens=40)
    seen = planned(config, device="cuda", dtype=torch.bfloat16)
    assert seen.peaks["backward"].parts["adapter"] == 40 * 3 * 2 * 2 * 24 * 4  # layers, K and V, heads, size, bytes
    assert seen.peaks["optimizer"].parts["optimizer state"] >= 2 * 40 * 3 * 2 * 2 * 24 * 4
    assert any("trained prefix" in note for note in seen.notes)


def test_held_out_answers_of_the_teacher_read_whole_contexts():
    config = OPCDConfig(batch_size=2, max_new_tokens=4, lora_rank=4, eval_batch=8)
    rows = ((20, 20, 0),) * 8
    seen = planned(config, Job((600,), rows[:2], rows))
    assert seen.worst == "evaluation rollout" and "evaluation" in seen.peaks


@pytest.mark.parametrize("mode", ["frozen", "live"])
def test_training_answers_of_the_teacher_read_whole_contexts(mode):
    base = {"batch_size": 8, "max_new_tokens": 4, "lora_rank": 4, "teacher_mode": mode}
    seen = {}
    for answers in ("student", "teacher"):
        found = planned(OPCDConfig(**base, answers=answers), Job((600,), ((20, 20, 0),) * 8))
        seen[answers] = found.peaks["rollout"].parts["rollout"]
    assert seen["teacher"] > 5 * seen["student"]
    if mode == "frozen":
        kept = planned(OPCDConfig(**base, answers="teacher", kept_answers=3), Job((600,), ((20, 20, 0),) * 8))
        assert kept.rollout_batch == 24  # all at once, before the first step


class Quoting(Asking):
    """Wants a move of those it names, and quotes all that was said."""

    def messages(self):
        said = f" after {self.seen}" if self.turn else ""
        return as_user(f"which way, [left] or [right]?{said}")

    def answer(self, text):
        assert text.endswith(("[left]", "[right]"))
        self.turn, self.seen = self.turn + 1, text if self.turn == 0 else self.seen + text
        self.score = 0.0 if self.turn == self.max_turns else None

    def episodes(self, split, count, seed=0):
        return [Quoting(split) for _ in range(count)]


def test_a_task_is_played_with_answers_of_full_length_that_name_a_move():
    config = OPCDConfig(batch_size=3, max_new_tokens=40, eval_every=5, eval_batch=4, task_episodes=9)
    asked = read_training_prompts(Quoting(), None, CONTEXT, tiny_tokenizer(), config)
    job = job_of(asked, config)
    first = len(asked.rows[0].student_ids)
    quoted = len(" after ")  # the tiny tokenizer's tokens are bytes
    lengths = sorted({student for student, _, _ in job.prompts})
    assert lengths == [first, first + quoted + 40, first + quoted + 80]
    assert job.turns == 3 and job.episodes == 9 and len(job.held_out) == 4
    assert {teacher - student for student, teacher, _ in job.prompts} == {
        len(asked.rows[0].teacher_ids) - first
    }  # fmt: skip
    without = job_of(asked, replace(config, eval_every=0))
    assert without.episodes == 0 and without.held_out == ()


def test_all_turns_of_a_step_and_the_episodes_of_an_evaluation_are_counted():
    settings = OPCDConfig(batch_size=2, max_new_tokens=8, lora_rank=4, rollout_batch=16, eval_batch=1)
    one, three = (planned(settings, replace(SMALL, turns=turns)) for turns in (1, 3))
    assert three.tokens == 3 * one.tokens
    # Turns are answered one after another.
    assert three.peaks["rollout"].nbytes == pytest.approx(one.peaks["rollout"].nbytes, rel=1e-3)
    assert any("3 turns" in note for note in three.notes) and not one.notes
    evaluated = replace(SMALL, held_out=((20, 20, 0),), turns=3)
    few, many = (planned(settings, replace(evaluated, episodes=episodes)) for episodes in (0, 16))
    assert many.peaks["evaluation rollout"].nbytes > 1.2 * few.peaks["evaluation rollout"].nbytes


def test_a_micro_batch_is_full_when_there_is_more_to_do():
    """Three sequences of 52 tokens fit into 190; with answers that end sooner, so do 190 tokens."""
    settings = OPCDConfig(batch_size=8, max_new_tokens=7, lora_rank=4)
    assert planned(replace(settings, micro_batch_tokens=190)).tokens in range(186, 191)
    assert planned(replace(settings, micro_batch_tokens=8 * 52 + 30)).tokens == 8 * 52  # there is no more
    assert planned(replace(settings, micro_batch_tokens=50)).tokens == 52  # a sequence is never cut


def test_shallow_rehearsals_tell_of_deep_models():
    config = OPCDConfig(batch_size=4, max_new_tokens=16, lora_rank=4, rollout_batch=4, merge_for_rollout=False)
    deep = tiny_model(**{**SIZES, "num_hidden_layers": 14}).config
    options = {"device": "cuda", "dtype": torch.bfloat16, "backend": "triton"}
    assert depth_to_extrapolate(deep, None) == 14 and depth_to_extrapolate(tiny_model(**SIZES).config, None) is None
    told = extrapolated(lambda layers: rehearse(config, SMALL, deep, **options, layers=layers), 14)
    whole = rehearse(config, SMALL, deep, **options)
    for phase, peak in whole.peaks.items():
        assert told.peaks[phase].nbytes == pytest.approx(peak.nbytes, rel=0.02), phase


def test_models_that_cannot_be_rehearsed_are_refused_in_words():
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=261, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, experts_implementation="eager",
    )  # fmt: skip
    settings = OPCDConfig(batch_size=2, max_new_tokens=4, lora_rank=4, lora_targets="q_proj")
    with pytest.raises(InputError, match="'mixtral' cannot be planned"):
        rehearse(settings, SMALL, config, device="cuda", dtype=torch.bfloat16, backend="triton")


def test_what_is_not_counted_is_said():
    seen = planned(OPCDConfig(batch_size=2, max_new_tokens=4, lora_rank=4, teacher_device="cpu"), device="cuda")
    assert any("teacher on 'cpu'" in note for note in seen.notes)
    seen = planned(OPCDConfig(batch_size=2, max_new_tokens=4, lora_rank=4, answers="teacher", objective="nll"))
    assert any("objective='nll'" in note for note in seen.notes)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_copy_of_a_gpu_is_not_that_of_the_cpu_that_plans(has_bf16, monkeypatch):
    """Fake tensors lie on a CPU: whether that one multiplies bf16 must not matter, nor how it stores weights."""
    monkeypatch.setenv("OPCD_CPU_BF16", str(int(has_bf16)))
    settings = {"steps": 1, "batch_size": 2, "max_new_tokens": 8, "lora_rank": 4, "dtype": "bfloat16"}
    model, peaks = tiny_model(**SIZES), {}
    for merge in (True, False):
        config = OPCDConfig(**settings, merge_for_rollout=merge)
        found = planned(config, device="cuda", dtype=torch.bfloat16, backend="triton")
        peaks[merge] = found.peaks["optimizer"].nbytes
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert peaks[True] - peaks[False] == pytest.approx(2 * linear, rel=1e-3)
