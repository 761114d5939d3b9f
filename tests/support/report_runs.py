"""A tiny finished run in a folder, made as a user makes one: files in, `OPCDTrainer`, files out."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import tiny_model, tiny_tokenizer

from opcd_fast.models import load_model, load_tokenizer
from opcd_fast.training import OPCDTrainer
from opcd_fast.training.settings import OPCDConfig

CONTEXT = "always answer with zzz"
TRAIN = [f"question {i}" for i in range(6)]
HELD_OUT = ["other one", "other two", "and a third", "number four"]


def save_base(folder: Path, seed: int = 0) -> Path:
    tiny_model(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_run(base: Path, output: Path, *, context=CONTEXT, train=None, held_out=None, **settings) -> Path:
    config = OPCDConfig(
        **{
            "output_dir": str(output), "steps": 12, "batch_size": 6, "max_new_tokens": 6, "lora_rank": 4,
            "learning_rate": 1e-2, "eval_every": 6, "save_every": 0, "device": "cpu", "dtype": "float32", **settings,
        }
    )  # fmt: skip
    trainer = OPCDTrainer(
        load_model(base, dtype="float32", device="cpu"), load_tokenizer(base), context,
        TRAIN if train is None else train, config, eval_prompts=HELD_OUT if held_out is None else held_out, quiet=True,
    )  # fmt: skip
    trainer.train()
    return output


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
