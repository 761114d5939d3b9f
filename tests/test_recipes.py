"""The code blocks of docs/recipes.md run as they stand and compute the loss they claim."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loss_oracle import logits64, relative_error, token_kl64

from opcd_fast.loss import LMHead

pytest.importorskip("transformers")
from tiny import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
ROWS = [
    {"prompt": "Hello?", "answer": "Aye.", "context": "Speak like a pirate. "},
    {"prompt": "Where is it?", "answer": "Over there, mate.", "context": "You are tired. "},
]


def recipe(title):
    """The names that the code block under a heading defines."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE).group(1)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(code, f"docs/recipes.md, {title}", "exec"), names)
    return names


def trl(name):
    pytest.importorskip("datasets")
    return pytest.importorskip(name, reason="needs the trl extra: pip install 'opcd-fast[trl]'")


def logits(model, hidden):
    return logits64(hidden, LMHead.from_model(model))


def settings(tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 1, "report_to": [], "bf16": False,
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False,
        **more,
    }  # fmt: skip


def trained(trainer):
    """(loss logged, gradients that the optimizer saw) of the first step."""
    seen = {}
    original = trainer.create_optimizer()
    step = original.step

    def spy(*args, **kwargs):
        seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return step(*args, **kwargs)

    original.step = spy
    result = trainer.train()
    return result.training_loss, seen


def test_plain_loop():
    student, teacher = tiny_model(1), tiny_model(2)
    ids = torch.randint(3, 200, (2, 9))
    batch = {
        "student_ids": ids, "student_mask": torch.ones_like(ids),
        "teacher_ids": torch.cat([torch.randint(3, 200, (2, 4)), ids], 1), "teacher_mask": torch.ones(2, 13),
        "answer_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }  # fmt: skip
    with torch.no_grad():
        z_s = logits(student, student.base_model(batch["student_ids"]).last_hidden_state[:, -5:-1])
        z_t = logits(teacher, teacher.base_model(batch["teacher_ids"]).last_hidden_state[:, -5:-1])
        expected = float(token_kl64(z_s, z_t)[batch["answer_mask"] != 0].mean())
    step, optimizer = recipe("Plain PyTorch")["training_step"], torch.optim.Adam(student.parameters(), 1e-3)
    losses = [float(step(student, teacher, optimizer, batch)) for _ in range(8)]
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]


def test_trl_distillation_loss_is_trls_own(monkeypatch):
    module = trl("trl.trainer.distillation_trainer")
    theirs = module._chunked_divergence_loss
    monkeypatch.setattr(module, "_chunked_divergence_loss", theirs)  # puts it back at the end
    ours = recipe("TRL DistillationTrainer")["exact_reverse_kl"]
    assert module._chunked_divergence_loss is ours
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    options = {
        "completion_mask": mask, "beta": 1.0, "num_items_in_batch": 7, "student_lm_head_bias": torch.randn(50),
        "teacher_logit_scale": 0.5, "student_final_logit_softcapping": 3.0, "temperature": 0.7,
    }  # fmt: skip
    shapes = ((2, 3, 8), (2, 3, 6), (50, 8), (50, 6))
    inputs = [torch.randn(shape, requires_grad=index in (0, 2)) for index, shape in enumerate(shapes)]
    expected = theirs(*inputs, **options)
    gradients = torch.autograd.grad(expected[0], [inputs[0], inputs[2]])
    got = ours(*inputs, options.pop("completion_mask"), **options)
    for mine, other in zip([*got, *torch.autograd.grad(got[0], [inputs[0], inputs[2]])], [*expected, *gradients]):
        torch.testing.assert_close(mine.double(), other.detach().double(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="beta is 0.5"):
        ours(*inputs, mask, 0.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trl_gkd(tmp_path, accumulate):
    gkd = trl("trl.experimental.gkd")
    from datasets import Dataset

    trainer_class = recipe("TRL GKDTrainer")["ExactGKDTrainer"]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        for row in ROWS * 2
    ]
    options = settings(tmp_path, gradient_accumulation_steps=accumulate, lmbda=0.0, beta=1.0, max_length=128)
    student, teacher, before = tiny_model(1), tiny_model(2), tiny_model(1)
    trainer = trainer_class(
        model=student, teacher_model=teacher, args=gkd.GKDConfig(**options), processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
    )  # fmt: skip
    batches = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *rest, **more: (
        batches.append(inputs) or compute(model, inputs, *rest, **more)
    )
    loss, gradients = trained(trainer)
    assert len(batches) == accumulate
    expected = 0.0
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        z_s, z_t = (m(input_ids=ids, attention_mask=mask).logits[:, :-1].double() for m in (before, teacher))
        expected = expected + token_kl64(z_s, z_t.detach())[batch["labels"][:, 1:] != -100].mean() / accumulate
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    wanted = {n: p.grad for n, p in before.named_parameters()}
    norm = torch.cat([g.flatten() for g in wanted.values()]).norm()
    scale = min(1.0, 1.0 / float(norm))  # Trainer clips the norm at 1
    for name, gradient in gradients.items():
        assert relative_error(gradient, scale * wanted[name]) < 1e-3, name


def test_trl_sdft(tmp_path):
    sdft = trl("trl.experimental.sdft")
    from datasets import Dataset

    trainer_class = recipe("TRL SDFTTrainer")["ExactSDFTTrainer"]
    tiny_model(1).save_pretrained(tmp_path / "base")  # the teacher is loaded from where the student came from
    rows = [{"prompt": row["prompt"], "privileged_context": row["context"]} for row in ROWS]
    options = settings(
        tmp_path, distillation_mode="full_logits", distillation_alpha=1.0, max_prompt_length=None, num_generations=2,
        max_completion_length=6, num_loss_tokens_to_skip=1,
    )  # fmt: skip
    trainer = trainer_class(
        model=str(tmp_path / "base"), args=sdft.SDFTConfig(**options), processing_class=tiny_tokenizer(),
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    compared = []
    compute = trainer.compute_loss

    def both(model, inputs, *rest, **more):
        got = compute(model, inputs, *rest, **more)
        parameters = list(model.parameters())
        ours = torch.autograd.grad(got, parameters, retain_graph=True)
        theirs = sdft.SDFTTrainer.compute_loss(trainer, model, inputs)
        compared.append((float(got.detach()), float(theirs.detach()), ours, torch.autograd.grad(theirs, parameters)))
        return got

    trainer.compute_loss = both
    trainer.train()
    ((got, theirs, ours, wanted),) = compared
    assert theirs > 1e-4 and got == pytest.approx(theirs, rel=1e-3)
    for mine, other in zip(ours, wanted):
        assert relative_error(mine, other) < 1e-2


def test_verl_forward():
    """Against the documented shapes: hidden states (1, total_nnz, D), one loss and two masses (1, total_nnz)."""
    student, teacher = tiny_model(1), tiny_model(2)
    ids = torch.randint(3, 200, (1, 11))
    heads = LMHead.from_model(student), LMHead.from_model(teacher)

    def fused(self, input_ids=None, temperature=1.0, return_dict=None, **kwargs):  # as verl's: no logits come out
        self.model(input_ids=input_ids, **kwargs)
        return SimpleNamespace(log_probs=torch.zeros(input_ids.shape), entropy=torch.zeros(input_ids.shape))

    forward = recipe("verl")["with_reverse_kl"](fused, *heads)
    with torch.no_grad():
        h_t = teacher.base_model(ids).last_hidden_state
        expected = token_kl64(*(logits(m, m.base_model(ids).last_hidden_state) / 0.7 for m in (student, teacher)))
    output = forward(student, input_ids=ids, temperature=torch.full((11,), 0.7), teacher_hidden=h_t, return_dict=True)
    aux = output.fused_linear_aux
    assert aux.distillation_losses.shape == aux.student_mass.shape == aux.teacher_mass.shape == (1, 11)
    torch.testing.assert_close(aux.distillation_losses.detach().double(), expected, rtol=1e-3, atol=1e-7)
    aux.distillation_losses.sum().backward()
    assert student.lm_head.weight.grad.any() and student.model.embed_tokens.weight.grad.any()
    assert not hasattr(forward(student, input_ids=ids, return_dict=True), "fused_linear_aux")
