"""FusedDistillationTrainer: transformers' loop, the exact loss, no logits."""

import pytest
import torch
from loss_oracle import token_kl64

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tiny import lora_model, tiny_model
from trl_runs import compare

from opcd_fast.integrations.transformers import FusedDistillationTrainer
from opcd_fast.teacher import ContextTeacher

CONTEXT = list(range(40, 60))
LENGTHS = ((9, 4), (6, 2), (8, 5), (7, 1))  # (tokens, of which scored)


def rows():
    generator = torch.Generator().manual_seed(0)
    result = []
    for length, scored in LENGTHS:
        ids = torch.randint(3, 200, (length,), generator=generator)
        labels = ids.clone()
        labels[: length - scored] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def collate(batch):
    def pad(name, value):
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (ids.shape[1] - len(row["input_ids"])) for row in batch])
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": mask}


def make(tmp_path, model, teacher, *, distillation=None, **more):
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 1e-2, "max_grad_norm": 0.0,
        "bf16": False, **more,
    }  # fmt: skip
    return FusedDistillationTrainer(
        model=model, args=TrainingArguments(**settings), data_collator=collate, train_dataset=rows(),
        eval_dataset=rows(), teacher=teacher, distillation=distillation,
    )  # fmt: skip


def run(trainer, plain_teacher):
    """Trains; every loss a second time, from plain logits in float64."""

    def plain(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        z_s = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
        with torch.no_grad():
            z_t = plain_teacher(model, ids, mask)[:, :-1].double()
        scored = inputs["labels"][:, 1:] != -100
        t = trainer._distillation.get("temperature", 1.0)
        return token_kl64(z_s / t, z_t / t)[scored].sum() / (num_items_in_batch or scored.sum())

    compared = compare(trainer, "compute_loss", plain)
    trainer.train()
    return compared


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_separate_teacher(tmp_path, accumulate):
    teacher = tiny_model(2)
    trainer = make(
        tmp_path, tiny_model(1), teacher, distillation={"temperature": 0.7},
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    compared = run(trainer, lambda model, ids, mask: teacher(input_ids=ids, attention_mask=mask).logits)
    assert len(compared) == 2 * accumulate
    assert trainer.evaluate()["eval_loss"] > 1e-3 and len(compared) > 2 * accumulate
    for ours, wanted, error, *_ in compared:
        assert wanted > 1e-3 and ours == pytest.approx(wanted, rel=1e-4) and error < 1e-4


def test_the_model_itself_with_a_context(tmp_path):
    model = lora_model()

    def with_context(model, ids, mask):
        with model.disable_adapter():
            front = torch.tensor([CONTEXT]).expand(len(ids), -1)
            out = model(torch.cat([front, ids], 1), attention_mask=torch.cat([torch.ones_like(front), mask], 1))
        return out.logits[:, len(CONTEXT) :]

    trainer = make(tmp_path, model, ContextTeacher(model, CONTEXT))
    base = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    compared = run(trainer, with_context)
    assert len(compared) == 2
    for ours, wanted, error, *_ in compared:
        assert wanted > 1e-3 and ours == pytest.approx(wanted, rel=1e-4) and error < 1e-4
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_micro_batches_of_different_lengths_make_the_same_step(tmp_path):
    after = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        model = tiny_model(1)
        trainer = make(
            tmp_path, model, tiny_model(2), per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            max_steps=1, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        loss = trainer.train().training_loss
        after.append((loss, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for loss, weights in after[1:]:
        assert loss == pytest.approx(after[0][0], rel=1e-5)
        torch.testing.assert_close(weights, after[0][1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(after[0][1], torch.cat([p.detach().flatten() for p in tiny_model(1).parameters()]))


def test_refuses(tmp_path):
    model = tiny_model(1)
    with pytest.raises(ValueError, match="teacher is the model that is trained"):
        make(tmp_path, model, model)
    with pytest.raises(ValueError, match="divergence is 'kl'"):
        make(tmp_path, model, tiny_model(2), distillation={"divergence": "kl"})
    with pytest.raises(ValueError, match="distillation has temprature; it takes divergence, .*temperature"):
        make(tmp_path, model, tiny_model(2), distillation={"temprature": 2.0})
    from transformers import TrainingArguments

    for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
        with pytest.raises(ValueError, match=f"{name} needs logits"):
            FusedDistillationTrainer(
                model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
                teacher=tiny_model(2), **{name: lambda *given: {}},
            )  # fmt: skip
    for wrong in ({"temperature": -1}, {"backend": "tritn"}, {"workspace_bytes": 0}, {"projection": "both"}):
        with pytest.raises(ValueError, match=f"distillation: {next(iter(wrong))} is"):
            make(tmp_path, model, tiny_model(2), distillation=wrong)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make(tmp_path, model, tiny_model(2), label_smoothing_factor=0.1)
    trainer = make(tmp_path, model, tiny_model(2))
    with pytest.raises(ValueError, match="labels: the batch has none"):
        trainer.compute_loss(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
