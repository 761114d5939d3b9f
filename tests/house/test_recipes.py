"""The code blocks of docs/recipes.md run as they stand.

That the losses are what they claim is tested with the integrations (test_integrations_*.py).
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loss_oracle import logits64, token_kl64

from opcd_fast.loss import LMHead

pytest.importorskip("transformers")
from tiny import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
TURNS = [("Hello?", "Aye."), ("Where is it?", "Over there, mate."), ("Why?", "The wind."), ("Who?", "A parrot.")]


def recipe(title, **names):
    """Run the code block under a heading, where `names` exist already; all names there are then."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    exec(compile(code, f"docs/recipes.md, {title}", "exec"), names)
    return names


def settings(tmp_path):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "bf16": False,
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False, "learning_rate": 1e-2,
    }  # fmt: skip


def trained(trainer, steps):
    """The run is over: it logged a loss for each step, and weights moved."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == steps and all(loss > 1e-4 for loss in losses)
    before = tiny_model(1).state_dict()
    names = [name for name, _ in trainer.model.named_parameters()]
    moved = [n for n in names if n in before and not torch.equal(trainer.model.state_dict()[n], before[n])]
    lora = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert moved or (lora and all(p.any() for p in lora))


def test_plain_loop():
    student, teacher = tiny_model(1), tiny_model(2)
    ids = torch.randint(3, 200, (2, 9))
    batch = {
        "student_ids": ids, "student_mask": torch.ones_like(ids),
        "teacher_ids": torch.cat([torch.randint(3, 200, (2, 4)), ids], 1), "teacher_mask": torch.ones(2, 13),
        "answer_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }  # fmt: skip
    with torch.no_grad():
        h_s = student.base_model(batch["student_ids"]).last_hidden_state[:, -5:-1]
        h_t = teacher.base_model(batch["teacher_ids"]).last_hidden_state[:, -5:-1]
        z_s, z_t = logits64(h_s, LMHead.from_model(student)), logits64(h_t, LMHead.from_model(teacher))
        expected = float(token_kl64(z_s, z_t)[batch["answer_mask"] != 0].mean())
    step, optimizer = recipe("Plain PyTorch")["training_step"], torch.optim.Adam(student.parameters(), 1e-3)
    losses = [float(step(student, teacher, optimizer, batch)) for _ in range(8)]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


def test_transformers_trainer(tmp_path):
    from transformers import TrainingArguments

    options = settings(tmp_path)
    rows = [{"input_ids": torch.randint(3, 200, (6,))} for _ in range(4)]

    def data_collator(batch):
        ids = torch.stack([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": ids}

    names = recipe(
        "transformers.Trainer", model=tiny_model(1), teacher=tiny_model(2), args=TrainingArguments(**options),
        train_dataset=rows, data_collator=data_collator,
    )  # fmt: skip
    trained(names["trainer"], 2)


def test_trls_own_trainers(tmp_path):
    pytest.importorskip("trl", reason="needs the trl extra: pip install 'opcd-fast[trl]'")
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": a}] for p, a in TURNS]
    names = recipe(
        "TRL's own trainers", model=tiny_model(1), teacher_model=tiny_model(2), tokenizer=tiny_tokenizer(),
        args=GKDConfig(**settings(tmp_path), max_new_tokens=4, max_length=128),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
    )  # fmt: skip
    trained(names["trainer"], 2)
    assert names["trainer"].compute_loss.__func__ is GKDTrainer.compute_loss  # restored


def test_context_distillation_in_trl(tmp_path):
    pytest.importorskip("trl", reason="needs the trl extra: pip install 'opcd-fast[trl]'")
    pytest.importorskip("peft")
    from datasets import Dataset
    from trl import DistillationConfig

    names = recipe(
        "Context distillation in TRL", model=tiny_model(1), tokenizer=tiny_tokenizer(),
        args=DistillationConfig(**settings(tmp_path), max_completion_length=4),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p, _ in TURNS]),
    )  # fmt: skip
    trained(names["trainer"], 2)
    assert (tmp_path / "adapter_config.json").is_file()


def test_verl_with_another_teacher(monkeypatch):
    import opcd_fast.integrations.verl as integration

    monkeypatch.setattr(integration, "register", lambda: None)  # verl is not here
    use = recipe("verl")["use"]
    student, teacher = tiny_model(1).train(), tiny_model(2)
    heads = LMHead.from_model(student), LMHead.from_model(teacher)

    def fused(self, input_ids=None, position_ids=None, temperature=1.0):  # as verl's: no logits come out
        self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return SimpleNamespace(log_probs=torch.zeros(input_ids.shape))

    def teach(model, ids, cu_seqlens):
        assert cu_seqlens.tolist() == [0, 11]
        return teacher.model(ids[None]).last_hidden_state[0, 4:], heads[1], torch.arange(4, 11)

    monkeypatch.setattr(type(student), "forward", fused)
    use(type(student), teach, heads[0])
    ids = torch.randint(3, 200, (1, 11))
    output = student(input_ids=ids, position_ids=torch.arange(11)[None], temperature=0.7)
    aux = output.fused_linear_aux
    with torch.no_grad():
        states = (m.model(ids).last_hidden_state for m in (student, teacher))
        expected = token_kl64(*(logits64(h, head) / 0.7 for h, head in zip(states, heads, strict=True)))
    torch.testing.assert_close(aux.distillation_losses[0, 4:].detach().double(), expected[0, 4:], rtol=1e-3, atol=1e-7)
    assert not aux.distillation_losses[0, :4].any()
    aux.distillation_losses.sum().backward()
    assert student.lm_head.weight.grad.any() and student.model.embed_tokens.weight.grad.any()
