"""TRL's trainers on tiny models, and a comparison of their loss with ours on every batch of a real training run."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny import lora_model, tiny_model, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

ROWS = [
    {"prompt": "Hello?", "answer": "Aye.", "context": "Speak like a pirate. "},
    {"prompt": "Where is it, then?", "answer": "Over there, mate.", "context": "You are tired. "},
    {"prompt": "Why?", "answer": "Because the wind turned.", "context": "Answer in one word. "},
    {"prompt": "Who are you?", "answer": "A parrot.", "context": "Speak like a pirate. "},
]


def settings(tmp_path, **more):
    return {
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "max_steps": 2, "report_to": [],
        "bf16": False, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False, "learning_rate": 1e-2, "max_grad_norm": 0.0, **more,
    }  # fmt: skip


def dataset(make):
    from datasets import Dataset

    return Dataset.from_list([make(row) for row in ROWS])


def student(lora=False, tmp_path=None):
    if lora:
        return lora_model()
    model = tiny_model(1)
    if tmp_path is None:
        return model
    model.save_pretrained(tmp_path / "base")  # SDFT loads its teacher from where the student came from
    return str(tmp_path / "base")


def distillation_trainer(tmp_path, *, lora=False, cls=None, **more):
    trl = pytest.importorskip("trl")
    options = {"max_completion_length": 6, "beta": 0.3, "temperature": 0.7, **more}
    return (cls or trl.DistillationTrainer)(
        model=student(lora), teacher_model=tiny_model(2), processing_class=tiny_tokenizer(),
        args=trl.DistillationConfig(**settings(tmp_path, **options)),
        train_dataset=dataset(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}),
        eval_dataset=dataset(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]}),
    )  # fmt: skip


def gkd_trainer(tmp_path, *, lora=False, cls=None, **more):
    gkd = pytest.importorskip("trl.experimental.gkd")

    def chat(row):
        answer = {"role": "assistant", "content": row["answer"]}
        return {"messages": [{"role": "user", "content": row["prompt"]}, answer]}

    options = {"lmbda": 0.0, "beta": 0.3, "max_length": 128, "max_new_tokens": 7, **more}
    return (cls or gkd.GKDTrainer)(
        model=student(lora), teacher_model=tiny_model(2), processing_class=tiny_tokenizer(),
        args=gkd.GKDConfig(**settings(tmp_path, **options)), train_dataset=dataset(chat), eval_dataset=dataset(chat),
    )  # fmt: skip


def sdft_trainer(tmp_path, *, lora=False, cls=None, **more):
    sdft = pytest.importorskip("trl.experimental.sdft")
    options = {
        "distillation_mode": "full_logits", "distillation_alpha": 0.3, "max_prompt_length": None, "num_generations": 2,
        "max_completion_length": 6, "temperature": 0.7, **more,
    }  # fmt: skip
    rows = dataset(lambda row: {"prompt": row["prompt"], "privileged_context": row["context"]})
    return (cls or sdft.SDFTTrainer)(
        model=student(lora, tmp_path), args=sdft.SDFTConfig(**settings(tmp_path, **options)),
        processing_class=tiny_tokenizer(), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip


TRAINERS = {"distillation": distillation_trainer, "gkd": gkd_trainer, "sdft": sdft_trainer}
METHOD = {"distillation": "_compute_loss", "gkd": "compute_loss", "sdft": "compute_loss"}


class NoVocabulary(TorchDispatchMode):
    """Raises when a tensor of `rows` x vocabulary, or more, is made."""

    def __init__(self, rows, vocabulary):
        super().__init__()
        self.size, self.vocabulary, self.seen = rows * vocabulary, vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen += 1
                if tensor.numel() >= self.size and self.vocabulary in tensor.shape:
                    raise AssertionError(f"{function} made {tuple(tensor.shape)}")
        return out


@contextmanager
def heads_that_refuse(*models):
    """While open, running an lm-head is an error; its weight may be read."""
    hooks = []

    def refuse(*_):
        raise AssertionError("an lm-head ran: logits exist")

    for model in models:
        layer = model.get_output_embeddings()
        hooks.append(layer.register_forward_pre_hook(refuse))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compare(trainer, name, original):
    """Make `trainer` compute the loss by ours and by `original` on every batch; returns the list of what was compared.

    Each entry: (ours, theirs, largest relative error of a parameter's gradient, all of ours, all of theirs). Training
    goes on with ours, in which no lm-head may run.
    """
    ours, entries = getattr(trainer, name), []

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    def both(model, inputs, *args, **kwargs):
        models = [one for one in (model, getattr(trainer, "teacher_model", None)) if one is not None]
        with heads_that_refuse(*map(trainer.accelerator.unwrap_model, models)):
            got = ours(model, inputs, *args, **kwargs)
        if not torch.is_grad_enabled():
            wanted = original(trainer, model, inputs, *args, **kwargs)
            entries.append((first(got).item(), first(wanted).item(), 0.0, got, wanted))
            return got
        parameters = [p for p in model.parameters() if p.requires_grad]
        mine = torch.autograd.grad(first(got), parameters, retain_graph=True, materialize_grads=True)
        wanted = original(trainer, model, inputs, *args, **kwargs)
        theirs = torch.autograd.grad(first(wanted), parameters, materialize_grads=True)
        scale = max(float(g.norm()) for g in theirs)
        # Relative to the parameter's own gradient; those that are nothing beside the rest, to the rest.
        worst = max(
            float((a - b).norm() / max(float(b.norm()), 1e-3 * scale)) for a, b in zip(mine, theirs, strict=True)
        )
        entries.append((first(got).item(), first(wanted).item(), worst, got, wanted))
        return got

    setattr(trainer, name, both)
    return entries
