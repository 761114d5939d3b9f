"""The loss curve of a tiny run with a fixed seed. A change that moves it must say why and record it anew:

PYTHONPATH=tests/support python tests/training/test_golden.py
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.training import OPCDTrainer
from opcd_fast.training.settings import OPCDConfig

CURVE = Path(__file__).parent / "golden" / "tiny_lora.json"


def run(folder):
    config = OPCDConfig(
        output_dir=str(folder), steps=8, batch_size=4, max_new_tokens=8, lora_rank=4, learning_rate=1e-2,
        eval_every=0, save_every=0, device="cpu", dtype="float32",
    )  # fmt: skip
    prompts = [f"what is {i} plus {i + 1}?" for i in range(8)]
    trainer = OPCDTrainer(tiny_model(), tiny_tokenizer(), "answer in digits only", prompts, config, quiet=True)
    return [record["loss"] for record in trainer.train().history]


def test_the_loss_curve_is_the_recorded_one(tmp_path):
    recorded = json.loads(CURVE.read_text())["loss"]
    assert run(tmp_path / "run") == pytest.approx(recorded, rel=2e-3)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        curve = run(Path(scratch) / "run")
    CURVE.write_text(json.dumps({"torch": torch.__version__, "loss": curve}, indent=1) + "\n")
    print(curve, file=sys.stderr)
