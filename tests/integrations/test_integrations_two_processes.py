"""The integrations on two processes (gloo, CPU): DDP trainers make the steps that one process or TRL makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

WORKER = Path(__file__).resolve().parent / "integrations_worker.py"
pytestmark = pytest.mark.slow


def run(job, folder, processes=2):
    """The results of all processes, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        command = [sys.executable, "-W", "ignore", str(WORKER), job, str(folder)]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = []
    for process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
        results.append(json.loads(line.removeprefix("RESULT ")))
    return results


def test_two_processes_make_the_step_of_one(tmp_path):
    from test_integrations_transformers import make
    from tiny import tiny_model

    trainer = make(
        tmp_path / "one", tiny_model(1), tiny_model(2), per_device_train_batch_size=4, max_steps=1, optim="sgd",
        learning_rate=1.0,
    )  # fmt: skip
    trainer.train()
    wanted = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    for result in run("transformers", tmp_path):
        assert result["differ"] == 0
        torch.testing.assert_close(torch.tensor(result["weights"]), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["distillation", "gkd", "sdft"])
def test_trls_trainers_make_trls_steps(tmp_path, kind):
    pytest.importorskip("trl")
    results = {name: run(f"{kind} {name}", tmp_path) for name in ("ours", "theirs")}
    for ours, theirs in zip(results["ours"], results["theirs"], strict=True):
        assert ours["differ"] == 0 and theirs["differ"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        torch.testing.assert_close(torch.tensor(ours["weights"]), torch.tensor(theirs["weights"]), rtol=1e-4, atol=1e-5)


def test_context_distillation_averages_over_all_tokens_of_both(tmp_path):
    pytest.importorskip("trl")
    for result in run("context", tmp_path):
        assert result["differ"] == 0 and result["error"] < 1e-3


def test_verls_forward_under_fsdp2(tmp_path):
    for result in run("verl", tmp_path):
        assert result["error"] < 1e-4 and result["losses"][-1] < result["losses"][0]
