"""The loss curve of a tiny run with a fixed seed. A change that moves it must say why and record it anew:

PYTHONPATH=tests/support python tests/training/test_golden.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_tokenizer
from training_runs import losses, make

CURVES = {"loss": "reverse_kl", "gated": "gated_kl"}
CURVE = Path(__file__).parent / "golden" / "tiny_lora.json"


def run(folder, divergence):
    prompts = [f"what is {i} plus {i + 1}?" for i in range(8)]
    trainer = make(
        tiny_tokenizer(), folder, steps=8, max_new_tokens=8, eval_every=0, save_every=0, eval_prompts=None,
        context="answer in digits only", prompts=prompts, divergence=divergence,
    )  # fmt: skip
    return losses(trainer.train())


@pytest.mark.parametrize(("curve", "divergence"), CURVES.items())
def test_the_loss_curve_is_the_recorded_one(tmp_path, curve, divergence):
    recorded = json.loads(CURVE.read_text())[curve]
    assert run(tmp_path / "run", divergence) == pytest.approx(recorded, rel=2e-3)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        curves = {curve: run(Path(scratch) / curve, divergence) for curve, divergence in CURVES.items()}
    CURVE.write_text(json.dumps({"torch": torch.__version__, **curves}, indent=1) + "\n")
    print(curves, file=sys.stderr)
