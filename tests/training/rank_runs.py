"""Runs of `ranks_worker.py` by two processes and by one, made once for all modules that look at them."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CONTEXTS = ["always answer with zzz", "never say anything but q"]
PROMPTS = [{"prompt": f"question {i}" + " and more" * (i % 3), "privileged_context": CONTEXTS[i % 2]} for i in range(7)]
WORKER = Path(__file__).with_name("ranks_worker.py")
UNEVEN = {"micro_batch_tokens": 1, "batch_size": 5}  # shares of 3 and 2 answers, each a micro-batch
RUNNING = {
    **UNEVEN, "eval_every": 1, "steps": 4, "save_best": True, "best_by": "score", "early_stop_patience": 2,
    "early_stop_delta": 100.0, "importance_correction": "token",
    "divergence": "reverse_kl",  # Adam's second step makes 1e-7 of the gated KL's gradient 1e-5
}  # fmt: skip
JOBS = {
    "ddp-lora": {
        "engine": "ddp", "settings": {
            "lora_rank": 4, "normalize": "token", "rollouts_per_prompt": 2, "lr_scheduler_type": "linear",
        },
    },
    "ddp-full": {"engine": "ddp", "settings": UNEVEN},
    "fsdp2-lora": {
        "engine": "fsdp2", "settings": {
            "lora_rank": 4, "rollouts_per_prompt": 2, "micro_batch_tokens": 250, "max_grad_norm": 0.01,
            "gradient_checkpointing": True,
        },
    },
    "fsdp2-full": {"engine": "fsdp2", "settings": {**UNEVEN, "lr_scheduler_type": "cosine"}, "tied": True},
    "kept-answers": {
        "engine": "ddp", "settings": {**UNEVEN, "answers": "teacher", "objective": "nll", "kept_answers": 2},
    },
    "teacher-writes": {
        "engine": "fsdp2", "settings": {**UNEVEN, "lora_rank": 4, "answers": "teacher", "divergence": "forward_kl"},
    },
    "both-write": {
        "engine": "fsdp2", "settings": {
            **UNEVEN, "lora_rank": 4, "off_policy_share": 0.5, "answer_growth": 1.0,
        },
    },
    "one-prompt": {"engine": "ddp", "settings": {"lora_rank": 4, "batch_size": 1, "eval_every": 0, "steps": 2}},
    "running-ddp": {"engine": "ddp", "settings": RUNNING, "scores": True, "stale": True},
    "running-fsdp2": {"engine": "fsdp2", "settings": RUNNING, "scores": True, "stale": True},
}  # fmt: skip
SLOW_JOBS = {
    "moving-teacher": {"engine": "ddp", "settings": {"teacher_mode": "ema", "lora_rank": 4}},
    "other-teacher": {"engine": "fsdp2", "settings": {**UNEVEN, "gradient_checkpointing": True}, "teacher": True},
    "saved-parts": {"engine": "fsdp2", "settings": {"eval_every": 0}, "saved_parts": True},
    "accumulating": {
        "engine": "ddp", "settings": {"lora_rank": 4, "rollouts_per_prompt": 3, "micro_batch_tokens": 200},
    },
}
OTHER_JOBS = {  # of which one process does not make the same
    "served": {"engine": "fsdp2", "settings": {"lora_rank": 4, "eval_every": 0, "steps": 3}, "served": True},
    "bf16": {"engine": "fsdp2", "settings": {"dtype": "bfloat16", "eval_every": 0}, "tied": True},
    "bf16-lora": {"engine": "fsdp2", "settings": {"dtype": "bfloat16", "lora_rank": 4, "eval_every": 0, "steps": 1}},
}
GROUP_OF_TWO = 80  # tokens: a rank has several micro-batches, some of more than one sequence, which can be halved


def environment():
    """Of a process that this one starts: it finds the same modules, those of tests/support included."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def launch(jobs, world, folder):
    """Run the worker's jobs in `world` processes; raises with the ranks' last words when one fails."""
    file = folder / f"jobs-{world}-{len(list(folder.iterdir()))}.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        env = environment()
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with open(folder / f"{file.stem}.{rank}", "w") as log:
            command = [sys.executable, WORKER, file]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    codes = [rank.wait(timeout=540) for rank in ranks]
    said = [(folder / f"{file.stem}.{rank}").read_text() for rank in range(world)]
    assert not any(codes), "\n".join(f"rank {rank}: {words[-3000:]}" for rank, words in enumerate(said))


def job(name, folder, *, settings=(), **more):
    made = {**JOBS, **SLOW_JOBS, **OTHER_JOBS}[name]
    return {**made, "settings": {**made["settings"], "output_dir": str(folder), **dict(settings)}, **more}


@functools.cache
def default_runs(base):
    """Every job by two processes in `two/NAME` and by one in `one/NAME`, and jobs that something happens to.

    base: pytest's folder of this session.
    """
    folder = base / "ranks"
    folder.mkdir()
    two, one, resume = folder / "two", folder / "one", {"resume": True}
    grouped, same = {"micro_batch_tokens": GROUP_OF_TWO}, same_answers(folder)
    jobs = [job(name, two / name) for name in JOBS]
    jobs += [job("served", two / "served"), job("bf16", two / "bf16", settings=same)]
    jobs += [job("bf16-lora", two / "bf16-lora")]
    # Checkpoints are whole: what two ranks of FSDP2 began, a single process goes on with.
    jobs += [job("fsdp2-full", two / "cut-full", kill=2)]
    jobs += [job("ddp-full", two / "broken", breaks=True, error="the disk of this rank is gone")]
    jobs += [job("running-ddp", two / "stopped-ddp", signal=1)]
    jobs += [job("running-ddp", two / "stopped-ddp", settings=resume)]
    # The second of rank 1's backward passes runs out of memory.
    jobs += [job("ddp-lora", two / "retreat", settings=grouped, memory=2)]
    jobs += [job("ddp-lora", two / "calm", budget_of=str(two / "retreat"))]
    jobs += [job("one-prompt", two / "too-large", settings={"batch_size": 2}, memory=1, error="rank 1")]
    # The last one: its ranks lose each other.
    jobs += [job("fsdp2-lora", two / "sharded-memory", settings=grouped, memory=2, lost=True)]
    launch(jobs, 2, folder)
    jobs = [job(name, one / name, engine="ddp") for name in JOBS if name != "running-fsdp2"]
    jobs += [job("bf16", one / "bf16", settings=same, engine="ddp")]
    jobs += [job("fsdp2-full", two / "cut-full", settings=resume, engine="ddp")]
    launch(jobs, 1, folder)
    return folder


@functools.cache
def slow_runs(base):
    folder = base / "slow-ranks"
    folder.mkdir()
    two, one, resume = folder / "two", folder / "one", {"resume": True}
    jobs = [job(name, two / name) for name in SLOW_JOBS]
    jobs += [job("fsdp2-lora", two / "cut", kill=2), job("fsdp2-lora", two / "cut", settings=resume)]
    jobs += [job("running-fsdp2", two / "stopped-fsdp2", signal=1)]
    jobs += [job("running-fsdp2", two / "stopped-fsdp2", settings=resume)]
    launch(jobs, 2, folder)
    launch([job(name, one / name, engine="ddp") for name in (*SLOW_JOBS, "fsdp2-lora", "running-ddp")], 1, folder)
    return folder


def same_answers(folder):
    """Settings of runs in bf16, where ranks sample other answers than one process: rounding depends on the batch."""
    answers = [{"prompt": prompt["prompt"], "response": "the same"[i:]} for i, prompt in enumerate(PROMPTS)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return {"rollout": "replay", "rollout_file": str(folder / "answers.jsonl")}


def told(folder, ranks=2):
    """What the worker wrote of a finished run, for each rank."""
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(ranks)]


def words_of(folder, kind):
    """What ended each rank: "error" or "stopped"."""
    return [(folder / f"{kind}-{rank}").read_text() for rank in range(2)]


def records(folder, kind="step"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def checkpoint(folder):
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
    return load_file(newest / "trainable.safetensors"), state


def assert_same_adapter(a, b):
    """What was written at the end, saved parts that are not trained included."""
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


def assert_same_run(a, b):
    """Losses, norms, answers' lengths and metrics of every step; weights and both moments after the last."""
    assert len(records(a)) == len(records(b)) > 0
    for kind in ("step", "evaluation"):
        for ours, theirs in zip(records(a, kind), records(b, kind), strict=True):
            for name in ours.keys() - {"seconds", "tokens_per_second", "kind"}:
                wanted = theirs[name]
                wanted = wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-6, abs=1e-6)
                assert ours[name] == wanted, (kind, name)
    (weights, moments), (weights_b, moments_b) = checkpoint(a), checkpoint(b)
    assert weights.keys() == weights_b.keys() and moments.keys() == moments_b.keys()
    for index, state in moments.items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(state[name], moments_b[index][name], rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        # Adam divides by the root of the second moment: where a gradient is as small as rounding, so is its sign's
        # claim to be right, and the weight moves by a share of the learning rate. Compared where it is not.
        off = (weight - weights_b[name]).abs()
        assert float(off.median()) <= 1e-7 and float((off > 1e-6).float().mean()) < 0.01, (name, float(off.max()))
