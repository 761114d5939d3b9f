"""What is compared is the same computation; the tables run and their rows say what they must."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import loss, loss_cases, models, peers, step, step_cases, step_worker, targets, teacher, teacher_cases
from benchmarks.gpu import loss as loss_gpu
from benchmarks.loss_cases import Case, make_inputs, oracle
from benchmarks.schema import BOUND, OURS, read
from benchmarks.session import Failed, Session, Skip

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(folder, table, *options):
    """(exit status, the rows, the whole run)"""
    status = command_line.main([table, "--out", str(folder), "--dry-run", *options])
    (path,) = folder.glob("*.jsonl")
    found = read(path)
    (name,) = found.heads
    return status, found.of(name), found


def test_cases_are_named_once_and_the_promised_ones_are_there():
    for device in (CPU, CUDA):
        for table, source in {"loss": loss_cases, "teacher": teacher_cases, "step": step_cases}.items():
            chosen = source.cases(device, dry=False)
            assert len({case.name for case in chosen}) == len(chosen) and chosen[0].group == "main"
            promised = {t.case for t in targets.TARGETS[table] if (t.devices == targets.CPU) == (device == CPU)}
            names = {case.name.partition(", KL")[0] for case in chosen}
            assert promised - {"every case", teacher.CHECK, "plan"} <= names  # the plan is a phase of its own


@pytest.mark.parametrize(
    "options",
    [["loss", "groups=speed"], ["loss", "rounds=3"], ["loss", "case_seconds=soon"], ["loss", "groups"],
     ["step", "steps=0"], ["step", "trainers=nobody"], ["gpu.ceilings", "layers=2"], ["nothing"]],
)  # fmt: skip
def test_bad_arguments(tmp_path, options):
    try:
        status = command_line.main([*options, "--out", str(tmp_path), "--dry-run"])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and not list(tmp_path.iterdir())


def test_options_are_those_of_the_benchmark():
    found = command_line.options_of(step.run, ["trainers=opcd_fast,trl-sdft, our loss", "steps=2"])
    assert found == {"trainers": ("opcd_fast", "trl-sdft, our loss"), "steps": 2}
    assert {"loss", "teacher", "step", "bf16_logits", "gpu.decoding", "gpu.sweep"} <= set(command_line.names())


# --- the loss -----------------------------------------------------------------------------------------------


def test_oracle_is_autograd_in_float64():
    inputs = make_inputs(replace(loss_cases.cases(CPU, dry=True)[0], mean_kl=1e-2), CPU)
    kl, dh, dw = oracle(inputs.h_s, inputs.w_s, inputs.h_t, inputs.w_t, weight=True)
    h, w = (x.detach().double().requires_grad_() for x in (inputs.h_s, inputs.w_s))
    log_p = torch.log_softmax(h @ w.T, -1)
    log_q = torch.log_softmax(inputs.h_t.double() @ inputs.w_t.double().T, -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(kl, expected.detach())
    for gradient, reference in zip((dh, dw), torch.autograd.grad(expected.sum(), (h, w))):
        torch.testing.assert_close(gradient, reference)
    assert float(kl.mean()) == pytest.approx(1e-2, rel=0.2)  # calibrated on some of the rows


def test_what_is_compared():
    case = Case("c", 8, 64, 16, torch.bfloat16, False)
    chosen = {group: {one.name for one in loss.contenders(replace(case, group=group), CPU, None)}
              for group in ("main", "accuracy", "workspace")}  # fmt: skip
    names = {"trl", "liger-fused", "liger-chunked", "eager-fp32", "eager-bf16-logits", "compile-bf16-logits", BOUND}
    assert names | {"opcd_fast-torch"} <= chosen["main"] <= names | set(OURS)
    assert chosen["workspace"] == chosen["main"] & set(OURS) | {BOUND}
    assert chosen["accuracy"] == chosen["main"] - {BOUND, "compile-bf16-logits"}
    inexact = {one.name for one in loss.contenders(case, CPU, None) if "gradient" in one.settings}
    assert inexact == {name for name in names if "bf16" in name} | {"liger-fused", "liger-chunked"}


def test_a_frozen_head_in_bf16_is_also_measured_by_differences(monkeypatch):
    """On a GPU: what `projection="auto"` takes there. The tokens are the student's own."""
    case = replace(loss_cases.cases(CPU, dry=True)[0], dtype=torch.bfloat16, frozen=True)
    monkeypatch.setattr(peers, "liger_fused_is_exact", lambda *_: True)
    names = lambda case: [one.name for one in loss.contenders(case, CUDA, None)]  # noqa: E731
    frozen, full = names(case), names(replace(case, frozen=False))
    assert frozen[:2] == [loss.DIFFERENCE, "opcd_fast-triton"] and loss.DIFFERENCE in loss_gpu.WANTED
    assert loss.DIFFERENCE not in full
    inputs = make_inputs(replace(case, N=4000, V=8), CPU)
    p = torch.softmax(inputs.h_s.detach().double() @ inputs.w_s.double().T, -1)
    found, expected = torch.bincount(inputs.ids, minlength=8).double(), p.sum(0)
    assert float(((found - expected) ** 2 / expected).sum()) < 24.3  # chi-square, 7 degrees, 0.1 %


def test_ours_gets_the_workspace():
    case = replace(loss_cases.cases(CPU, dry=True)[0], workspace_bytes=1)
    mine = next(one for one in loss.contenders(case, CPU, partial(loss.Prepared, case, CPU)) if one.ours)
    with pytest.raises(ValueError, match="workspace_bytes"):
        mine.build()()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_contenders_compute_the_same_gradient(dtype, frozen):
    """Sign, normalisation and exactness of everything that can run here. Slow because of torch.compile."""
    case = Case("c", 70, 4_100, 64, dtype, frozen, "accuracy", mean_kl=1e-2)
    made = loss.Prepared(case, CPU)
    for one in loss.contenders(replace(case, group="main"), CPU, lambda: made):
        if one.name != BOUND:
            try:
                gradients = one.build()()
            except Skip:
                continue
            values = one.judge(gradients)
            assert len(gradients) == (1 if frozen else 2) and ("dL/dW" in values) == (not frozen), one.name
            limit = 0.5 if "gradient" in one.settings else loss.ACCURACY
            assert max(values[of].value for of in values if of.startswith("dL")) <= limit, one.name


@pytest.fixture(scope="module")
def quick_loss(tmp_path_factory):
    return run(tmp_path_factory.mktemp("loss"), "loss", "case_seconds=0")


def test_the_loss_table_has_every_row(quick_loss):
    status, rows, found = quick_loss
    (head,) = found.heads.values()
    assert status == 0 and head.command == "python -m benchmarks loss --dry-run case_seconds=0"
    assert head.table != "loss", "no part of a table is taken for the whole"
    for case in loss_cases.cases(CPU, dry=True):
        mine = {row.implementation: row for row in rows if row.case == case.name}
        assert set(mine) == {one.name for one in loss.contenders(case, CPU, None)}
        for name, row in mine.items():
            assert row.group == case.group and row.shape["N"] == case.N
            if row.status == "skipped":
                assert not name.startswith("opcd_fast") and row.note
                continue
            assert row.status == "ok" and ("time" in row.values) == ("of_bound" in row.values) == case.timed
            if name != BOUND:
                assert ("peak" in row.values) == case.timed
                assert row.get("mean_kl") == pytest.approx(case.mean_kl, rel=0.06)
                assert ("dL/dW" in row.values) == (not case.timed and not case.frozen)
                assert "gradient" in row.settings or row.get("dL/dh") <= loss.ACCURACY
    inexact = (row for row in rows if "full-accuracy" in row.case and row.implementation == "eager-bf16-logits")
    errors = [row.get("dL/dh") for row in inexact]
    assert errors == sorted(errors) and errors[0] > 3e-3 and errors[-1] > 0.5


def test_ours_being_wrong_fails_the_table(tmp_path, monkeypatch):
    right = loss.fused_linear_reverse_kl
    monkeypatch.setattr(loss, "fused_linear_reverse_kl", lambda *inputs, **options: 1.01 * right(*inputs, **options))
    status, rows, _ = run(tmp_path, "loss", "case_seconds=0", "groups=workspace")
    assert status == 1
    assert {row.status for row in rows if row.implementation != BOUND} == {"failed"}, "1 % is too far off"


def test_trl_is_loaded_without_its_package(tmp_path, monkeypatch):
    """From its own files, with neither __init__.py running: a stand-in for trl whose packages cannot be imported."""
    kernels = tmp_path / "trl" / "kernels"
    kernels.mkdir(parents=True)
    for folder in (tmp_path / "trl", kernels):
        (folder / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
    (kernels / "chunked_divergence.py").write_text(
        "from ..trainer.utils import maybe_gather_lm_head_ctx\n"
        "class ChunkedDivergenceFunction:\n"
        "    gather = maybe_gather_lm_head_ctx\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    monkeypatch.setattr(peers, "_TRL_ALIAS", "_stand_in_for_trl")
    with peers.load_trl.__wrapped__().gather(None, None):  # not the one that was loaded before
        pass


# --- the teacher --------------------------------------------------------------------------------------------

SMALL = teacher_cases.Case(20, 5, 3)


@pytest.fixture(scope="module")
def setting():
    return teacher_cases.make_setting(models.random_model(models.SHAPES["tiny Llama"], torch.float32, CPU), SMALL)


def test_each_way_gives_the_same_states_from_the_tokens_that_its_limit_counts(setting):
    """Every answer of the batch, again in a second call: no cache may have grown or moved."""
    body, start = setting.body, setting.context.numel()
    with torch.no_grad():
        alone = torch.cat([body(input_ids=torch.cat([setting.context, ids])[None]).last_hidden_state[0, start:]
                           for ids in setting.answers])  # fmt: skip
    exact = teacher_cases.reference(setting)
    torch.testing.assert_close(exact, alone.view(3, 5, -1)[[0, 2]], atol=1e-5, rtol=0)
    copies, seen = {"concat": 0, "transformers-cache": 3, "transformers-cache-rebuilt": 3}, []
    hook = body.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    try:
        for one in teacher.contenders(setting, exact):
            call = one.build()
            for _ in range(2):
                seen.clear()
                hidden = call()
                ran = sum(seen)
                expected = {"concat": 3 * 25, BOUND: 0}.get(one.name, 3 * 5 + (20 if "rebuilt" in one.name else 0))
                assert ran == expected, one.name
                if one.name != BOUND:
                    torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=0)
            values = one.judge(hidden)
            if one.name != BOUND:
                assert values["prefix"].value == copies.get(one.name, 1) * values["one_prefix"].value, one.name
                assert values["max_error"].value <= 1e-5
                assert one.judge(hidden + 1.0)["max_error"].value == pytest.approx(1.0, abs=1e-4)
    finally:
        hook.remove()


def test_a_model_has_the_modelled_shape():
    for name, kind in (("Qwen3-8B", "Qwen3"), ("tiny Llama", "Llama")):
        model = models.random_model(models.SHAPES[name], torch.bfloat16, torch.device("meta"))
        assert type(model).__name__.startswith(kind) and {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert models.Shape.of(model.config) == models.SHAPES[name]
    longest = max(case.context + case.response for case in teacher_cases.cases(CUDA, dry=False))
    assert longest <= model.config.max_position_embeddings
    with pytest.raises(ValueError, match="1 to 36"):
        teacher_cases.make_model(CUDA, False, 37)


def test_concat_in_parts(setting, monkeypatch):
    whole = teacher._concat(setting)
    monkeypatch.setattr(teacher, "CONCAT_TOKENS", 51)
    parts = teacher._concat(setting)
    assert (whole.at_once, parts.at_once) == (3, 2)
    torch.testing.assert_close(parts.call(), whole.call(), atol=1e-5, rtol=0)


def test_the_teachers_table_has_every_row(tmp_path):
    status, rows, _ = run(tmp_path, "teacher", "case_seconds=0")
    assert status == 0 and {row.group for row in rows} == {"main", "context", "response", "batch", "check"}
    for case in teacher_cases.cases(CPU, dry=True):
        mine = {row.implementation: row for row in rows if row.case == case.name}
        assert len(mine) == 7 and {row.status for row in mine.values()} == {"ok"}
        bound = mine[BOUND].get("time") / mine[BOUND].get("flops")
        for row in (row for name, row in mine.items() if name != BOUND):
            assert row.shape["batch"] == case.batch and row.get("max_error") <= 1e-5
            assert row.get("of_bound") == pytest.approx(row.get("flops") * bound / row.get("time"))
        grown = mine["opcd_fast-merge-rebuilt"].get("peak") - mine["opcd_fast-merge"].get("peak")
        assert grown >= 0.9 * mine["opcd_fast-merge"].get("one_prefix"), "the prefix is part of the call that builds it"
    (check,) = (row for row in rows if row.group == "check")
    assert check.settings["path"] == "merge" and check.values["time"].count == 3


# --- whole steps --------------------------------------------------------------------------------------------

TOLD = {"ms": [1000.0, 3000.0], "answer_tokens": [24.0, 22.0], "peak_bytes": 5, "context": 26, "parts": [],
        "threads": torch.get_num_threads()}  # fmt: skip


def steps(tmp_path, monkeypatch, outcome, **options):
    monkeypatch.setattr(step, "one_process", outcome)
    session = Session("step", tmp_path / "a.jsonl", device=CPU, seconds=60.0)
    (case,) = step_cases.cases(CPU, dry=True)
    return step.measure(session, case, steps=3, rounds=2, **options)


def test_trainers_take_turns_and_a_peer_that_fails_is_a_row(tmp_path, monkeypatch):
    asked = []

    def outcome(case, trainer, *_, **__):
        asked.append(trainer)
        if trainer != step.OURS:
            raise Failed("failed", "ValueError: no")
        return TOLD

    rows = steps(tmp_path, monkeypatch, outcome, trainers=(step.OURS, step.PEER))
    assert asked == [step.OURS, step.PEER, step.OURS]
    mine = rows[step.OURS].values["time"]
    assert (mine.value, mine.low, mine.high, mine.count) == (2000.0, 1000.0, 3000.0, 4)
    assert rows[step.OURS].get("answer_tokens") == 23 and rows[step.PEER].note == "ValueError: no"


def test_a_process_that_fails_later_leaves_what_was_measured(tmp_path, monkeypatch):
    left = [TOLD]

    def late(*_, **__):
        if not left:
            raise Failed("failed", "late")
        return left.pop()

    row = steps(tmp_path, monkeypatch, late, trainers=(step.OURS,))[step.OURS]
    assert (row.status, row.values["time"].count, row.note) == ("ok", 2, "a later process failed: late")


def test_other_threads_are_no_comparison(tmp_path, monkeypatch):
    other = {**TOLD, "threads": TOLD["threads"] + 1}
    with pytest.raises(ValueError, match="threads"):
        steps(tmp_path, monkeypatch, lambda *_, **__: other, trainers=(step.OURS,))


def test_ours_is_timed_in_a_process_of_its_own(tmp_path, monkeypatch):
    """One that has none of the packages that a machine with a GPU may lack: the command line's, and the peers'."""
    missing = ("tyro", "docstring_parser", "typeguard", "trl", "liger_kernel", "datasets", "dill", "multiprocess",
               "bitsandbytes")  # fmt: skip
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({missing!r}))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")
    status, (row,), _ = run(tmp_path, "step", "steps=2", "rounds=1", "trainers=opcd_fast")
    assert status == 0 and row.values["time"].count == 2 and row.get("answer_tokens") == 24 and row.get("peak") > 0
    parts = {name for name, found in row.values.items() if found.unit == "ms" and name != "time"}
    assert parts >= {"rollout", "teacher", "student", "loss", "backward", "optimizer"} and row.shape["context"] == 26


@pytest.mark.slow
@pytest.mark.parametrize("trainer", step.TRAINERS[1:])
def test_peers_run(trainer):
    pytest.importorskip("trl")
    outcome = step.one_process(step_cases.cases(CPU, dry=True)[0], trainer, CPU, steps=1, timeout=300)
    assert outcome["answer_tokens"] == [24.0] and len(outcome["ms"]) == 1


@pytest.mark.parametrize("trainer", ["opcd_fast", "trl-sdft"])
def test_a_process_that_fails_says_why_and_peers_are_spared_cudnns_plans(trainer, monkeypatch):
    seen = {}

    def ended(*_, env, **__):
        seen.update(env)
        return subprocess.CompletedProcess([], 1, "", "Traceback\nModuleNotFoundError: No module named 'trl'\n")

    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(step.subprocess, "run", ended)
    with pytest.raises(Failed, match="No module named 'trl'") as failed:
        step.one_process(step_cases.cases(CPU, dry=True)[0], trainer, CPU, 1, 5)
    assert failed.value.status == "skipped"
    assert seen["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert seen.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == (None if trainer == "opcd_fast" else "1")


def test_job_is_the_same_for_all():
    (case,) = step_cases.cases(CPU, dry=True)
    one, two = step_cases.make_job(case, CPU), step_cases.make_job(case, CPU)
    assert json.dumps([one.context, one.questions]) == json.dumps([two.context, two.questions])
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    ids = one.tokenizer.apply_chat_template(one.context, return_dict=False)
    assert len(ids) == case.context_words + 2 and max(ids) < one.model.config.vocab_size  # <system>, words, <end>
    assert one.tokenizer.unk_token_id not in ids and one.tokenizer.eos_token_id == one.model.config.eos_token_id
    assert case.prompts % case.micro_batch == 0 and set(step_worker.TRAINERS) == set(step.TRAINERS)
