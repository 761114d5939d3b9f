"""Whole runs with answers from a server that fails, from a file, and with what an earlier run decided."""

import json
import threading

import pytest
import torch
from test_rollout_server import Process, assert_drawn_by
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.errors import InputError
from opcd_fast.rollout import Completion, ReplayRollout, ServerGone, ServerRollout, write_replay
from opcd_fast.training import OPCDConfig, OPCDTrainer
from opcd_fast.training.engines import OtherRankError

TOKENIZER = tiny_tokenizer()
PROMPTS = [f"question {n}?" for n in range(6)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    process = Process(folder)
    yield process
    process.stop()


def trainer(folder, **settings):
    options = {
        "output_dir": str(folder), "steps": 3, "batch_size": 3, "max_new_tokens": 6, "lora_rank": 4, "dtype": "float32",
        "device": "cpu", "eval_every": 3, "save_every": 0, "learning_rate": 1e-2,
        **({"rollout_patience": 20.0} if settings.get("rollout") == "server" else {}), **settings,
    }  # fmt: skip
    return OPCDTrainer(
        tiny_model(), TOKENIZER, "Answer in French.", PROMPTS, OPCDConfig(**options),
        eval_prompts=["held out?"], quiet=True,
    )  # fmt: skip


def test_a_run_on_a_server_that_fails_and_dies_is_the_run_on_one_that_does_not(tmp_path, server):
    calm = trainer(tmp_path / "calm", rollout="server", rollout_url=server.url)
    seen = []
    inner = calm.rollout.generate

    def spy(prompts, **options):
        answers = inner(prompts, **options)
        assert_drawn_by(calm.model, list(map(list, prompts)), answers)  # its weights at this moment
        seen.extend(answers)
        return answers

    calm.rollout.generate = spy
    result = calm.train()
    assert isinstance(calm.rollout, ServerRollout) and len(seen) == 3 * 3 + 2
    assert sum(kind == "load" for kind, *_ in server.log()) == 4, "once before the first step, once after each"

    rough = trainer(tmp_path / "rough", rollout="server", rollout_url=server.url, rollout_tries=4)
    server.faults("500", None, "cut", None, "reset", "die")
    done = []
    thread = threading.Thread(target=lambda: done.append(rough.train()), daemon=True)
    thread.start()
    server.wait_for_death()
    server.start()
    thread.join(timeout=120)
    assert [r["loss"] for r in done[0].history] == [r["loss"] for r in result.history]
    for a, b in zip(calm.parameters.values(), rough.parameters.values(), strict=True):
        assert torch.equal(a, b)


def test_a_server_that_stays_away_ends_a_run_that_goes_on_where_it_was(tmp_path, server):
    whole = trainer(tmp_path / "whole", rollout="server", rollout_url=server.url).train()
    settings = {"rollout": "server", "rollout_url": server.url, "rollout_patience": 0.2}
    cut = trainer(tmp_path / "cut", **settings)
    server.faults(*[None] * (2 + 2 * 3), "die")  # after an evaluation of two and two steps
    with pytest.raises(ServerGone, match=r"Connection refused.*\(step 2 is saved\)"):
        cut.train()
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    server.start()
    again = trainer(tmp_path / "cut", resume=True, **settings)
    result = again.train()
    assert [r["loss"] for r in result.history] == [r["loss"] for r in whole.history]


@pytest.mark.parametrize(("said", "saved"), [("ServerGone: refused", True), ("MemoryError: full", False)])
def test_ranks_that_ask_no_server_save_as_the_one_that_does(tmp_path, said, saved):
    run = trainer(tmp_path / "run", eval_every=0)
    inner, calls = run.rollout.generate, []

    def generate(prompts, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OtherRankError(f"rank 0 failed: {said}")
        return inner(prompts, **options)

    run.rollout.generate = generate
    with pytest.raises(OtherRankError, match="step 1 is saved" if saved else "full$"):
        run.train()
    assert (tmp_path / "run" / "checkpoints" / "step-000001").exists() == saved


def test_a_server_with_another_base_is_told_of_at_the_first_step(tmp_path, server):
    run = trainer(tmp_path / "run", rollout="server", rollout_url=server.url, steps=1)
    with torch.no_grad():
        run.model.base_model.model.lm_head.weight.mul_(3)
    assert [(w["name"], w["step"]) for w in run.train().warnings] == [("sampler_differs", 1)]
    here = trainer(tmp_path / "here", rollout="server", rollout_url=server.url, steps=1)
    assert here.train().warnings == []


def test_replayed_answers_are_trained_on_and_evaluations_are_the_students_own(tmp_path):
    probe = trainer(tmp_path / "probe")
    prompts = [row.student_ids for row in probe.train_rows]
    answers = probe.rollout.generate(prompts, max_new_tokens=6, seed=1)
    file = tmp_path / "answers.jsonl"
    write_replay(file, prompts, answers)
    run = trainer(tmp_path / "run", rollout="replay", rollout_file=str(file), divergence="forward_kl")
    assert isinstance(run.rollout, ReplayRollout) and run.eval_rollout is not run.rollout
    result = run.train()
    lengths = {prompt: len(answer.token_ids) for prompt, answer in zip(prompts, answers)}
    for step, record in enumerate(result.history):
        assert record["response_tokens"] == sum(lengths[row.student_ids] for row in run.source.rows_of(step))
    assert len(result.evaluations) == 2
    write_replay(file, prompts[:-1], answers[:-1])
    with pytest.raises(InputError, match="no answer to 1 of 6 prompts"):
        trainer(tmp_path / "gap", rollout="replay", rollout_file=str(file))
    assert not (tmp_path / "gap").exists()


SERVER = {"rollout": "server", "rollout_url": "http://x"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rollout": "sglang"}, "rollout='sglang'"),
        ({"rollout": "server"}, "rollout_url"),
        ({"rollout": "replay"}, "rollout_file"),
        ({"rollout_url": "http://x"}, "rollout_url is set, but rollout='transformers'"),
        ({"rollout_timeout": 5.0}, "rollout_timeout is set, but"),
        ({**SERVER, "merge_for_rollout": True}, "merge_for_rollout is set, but"),
        ({**SERVER, "lora_rank": 0}, "sends a LoRA adapter, and the model has"),
        ({**SERVER, "rollout_url": "x:1"}, "rollout_url='x:1' must look like"),
        ({"rollout": "vllm", "lora_rank": 0}, "sends a LoRA adapter, and the model has none"),
        ({"rollout_batch": 0}, "rollout_batch=0"),
        ({"rollout_logprobs": "cooked"}, "rollout_logprobs='cooked'"),
    ],
)
def test_settings_that_cannot_work_are_found_before_anything_is_written(tmp_path, settings, named):
    with pytest.raises(InputError, match=named):
        trainer(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_every_setting_reaches_the_engine(tmp_path):
    run = trainer(
        tmp_path / "a", rollout="server", rollout_url="http://h:1/v1", rollout_timeout=3.0, rollout_tries=2,
        rollout_concurrency=5, rollout_logprobs="processed", rollout_patience=7.0, rollout_model="served",
        rollout_command="reload --now",
        lora_rank=0, stop_tokens=("z",),
    )  # fmt: skip
    engine = run.rollout
    assert (engine.server.url, engine.server.timeout, engine.server.tries) == ("http://h:1", 3.0, 2)
    assert (engine.concurrency, engine.logprobs_are, engine.server.patience) == (5, "processed", 7.0)
    assert engine.base is None, "a command may load the weights from anywhere"
    assert engine.longest == max(len(row.student_ids) for row in (*run.train_rows, *run.eval_rows)) + 6
    lora = {"rollout": "server", "rollout_url": "http://h:1"}
    assert trainer(tmp_path / "b", rollout_model="/on/the/server", **lora).rollout.base == "/on/the/server"
    assert (engine.weights.command, engine.weights.model_name) == ("reload --now", "served")
    assert engine.stop_token_ids == (256, TOKENIZER.get_vocab()["z"])
    own = trainer(tmp_path / "own", rollout="generate")
    assert "engine: generate " in own.rollout.explain() and "engine: generate " in own.teacher_rollout.explain()


def test_a_resumed_run_goes_on_with_what_was_decided(tmp_path):
    run = trainer(tmp_path / "run", save_every=1)
    run.train()
    file = tmp_path / "run" / "rollout.json"
    kept = json.loads(file.read_text())
    assert kept["values"]["engine"] == "decode" and kept["values"]["batch"] >= 1 and kept["values"]["merge"] is True
    kept["values"].update(engine="generate", batch=2, merge=False)
    file.write_text(json.dumps(kept))
    again = trainer(tmp_path / "run", steps=4, eval_every=4, resume=True)
    again.train()
    assert again.rollout._engine == "generate" and again.rollout.max_batch == 2 and not again.rollout.copies
    assert json.loads(file.read_text()) == kept


def test_a_correction_needs_every_answers_logprobs(tmp_path):
    prompts = [row.student_ids for row in trainer(tmp_path / "probe").train_rows]
    file = tmp_path / "answers.jsonl"
    settings = {"rollout": "replay", "rollout_file": str(file), "importance_correction": "token"}
    known, bare = Completion((4, 5), (-0.5, -0.25), False), Completion((4, 5), None, False)
    write_replay(file, prompts, [known] * 5 + [bare])
    with pytest.raises(InputError, match="importance_correction needs log-probabilities, and 1 answers of rollout_fi"):
        trainer(tmp_path / "run", **settings)
    trainer(tmp_path / "run", **{**settings, "importance_correction": "none"})
    write_replay(file, prompts, [known] * 6)
    trainer(tmp_path / "run", **settings)
