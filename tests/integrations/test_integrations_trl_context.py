"""ContextDistillationTrainer: TRL's loop with a teacher that sees a context."""

import json

import pytest
import torch
from loss_oracle import divergence64

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl", reason="needs the trl extra: pip install 'opcd-fast[trl]'")
from tiny import TEMPLATE, lora_model, tiny_model, tiny_tokenizer
from trl_runs import ROWS, compare, dataset, settings

from opcd_fast.errors import InputError
from opcd_fast.integrations.trl import ContextDistillationTrainer

CONTEXT = "You are a pirate captain called Ann. Answer in one short sentence, and never say please. "


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def chats(**columns):
    return dataset(
        lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}], **{n: row[c] for n, c in columns.items()}}
    )


def make(tmp_path, model=None, *, context=CONTEXT, train=None, tokenizer=None, others=None, distillation=None, **more):
    import trl

    options = {"max_completion_length": 6, "learning_rate": 2e-2, **more}
    return ContextDistillationTrainer(
        tiny_model(1) if model is None else model, context,
        trl.DistillationConfig(**settings(tmp_path, **options)), chats() if train is None else train,
        processing_class=tokenizer or tiny_tokenizer(),
        distillation=distillation, **({"peft_config": lora()} if others is None else others),
    )  # fmt: skip


def oracle(trainer, student, teacher, inputs, context_of):
    """TRL's loss by plain forwards of whole rendered prompts, one sequence at a time, in float64."""
    tokenizer, total, count = trainer.processing_class, 0.0, 0
    for row in range(len(inputs["prompt_ids"])):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        answer = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        text = tokenizer.decode(prompt).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        messages = [{"role": "system", "content": context_of(text)}, {"role": "user", "content": text}]
        seen = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        z = []
        for model, before in ((student, prompt), (teacher, seen)):
            ids = torch.tensor([[*before, *answer]])
            z.append(model(ids).logits[0, len(before) - 1 : -1].double() / trainer.temperature)
        total = total + divergence64(z[0], z[1].detach(), trainer._distillation["divergence"]).sum()
        count += len(answer)
    return total, count


@pytest.mark.parametrize(("accumulate", "distillation"), [(1, {"divergence": "reverse_kl"}), (2, None)])
def test_loss_and_gradients_are_those_of_plain_forwards(tmp_path, accumulate, distillation):
    model = lora_model()
    trainer = make(
        tmp_path, model, others={}, temperature=0.8, gradient_accumulation_steps=accumulate,
        gradient_checkpointing=True, max_steps=2, distillation=distillation,
    )  # fmt: skip
    prefixes = []

    def plain(trainer, student, inputs, num_items):
        prefixes.append([id(prefix) for prefix in trainer.context_teacher.prefixes])
        student.gradient_checkpointing_disable()
        total, count = oracle(trainer, student, _Base(student), inputs, lambda text: CONTEXT)
        student.gradient_checkpointing_enable()
        return total / num_items, None, count

    entries = compare(trainer, "_compute_loss", plain)
    trainer.train()
    assert len(entries) == 2 * accumulate
    for loss, wanted, error, ours, theirs in entries:
        assert wanted > 1e-3 and loss == pytest.approx(wanted, rel=1e-4)
        assert error < 1e-4 and int(ours[2]) == theirs[2]
    assert all(read == prefixes[0] for read in prefixes)  # the context is read once
    assert trainer.context_teacher.path == "merge"
    gates = [entry["gate"] for entry in trainer.state.log_history if "gate" in entry]
    assert bool(gates) == (distillation is None) and all(0 < gate < 1 for gate in gates)


class _Base:
    """A PEFT model without its adapter, whatever the training does."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids):
        with torch.no_grad(), self.model.disable_adapter():
            return self.model(ids)


def test_learns_the_context_logs_evaluates_and_saves(tmp_path):
    from peft import PeftModel

    model = tiny_model(1)
    trainer = make(
        tmp_path, model, max_steps=24, per_device_train_batch_size=4, max_completion_length=12, save_strategy="steps",
        save_steps=24, seed=1,
    )  # fmt: skip
    trainer.eval_dataset = trainer.train_dataset
    torch.manual_seed(0)
    before = trainer.evaluate()
    trainer.train()
    torch.manual_seed(0)
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.8 * sum(losses[:6])
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 <= logged["top1_agreement"] <= 1 and logged["entropy"] > 0 and "completions/mean_length" in logged

    saved = tmp_path / "run" / "checkpoint-24"
    assert (saved / "README.md").is_file() and "context-distillation" in (saved / "README.md").read_text()
    again = PeftModel.from_pretrained(tiny_model(1), saved)
    ids = torch.randint(3, 200, (1, 9))
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.allclose(again(ids).logits, tiny_model(1)(ids).logits, atol=1e-3)
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 24


def test_contexts_of_rows_and_a_separate_teacher(tmp_path):
    """Rows with a context of their own; full fine-tuning, so the teacher is another model."""
    rows = {row["prompt"]: row["context"] for row in ROWS}
    teacher = tiny_model(2)
    trainer = make(
        tmp_path, context=None, train=chats(privileged_context="context"), others={"teacher_model": teacher},
        beta=1.0, temperature=1.0, learning_rate=1e-3,
    )  # fmt: skip
    original = lambda trainer, student, inputs, num_items: (  # noqa: E731
        oracle(trainer, student, teacher, inputs, rows.__getitem__)[0] / num_items,
    )
    entries = compare(trainer, "_compute_loss", original)
    trainer.train()
    assert len(entries) == 2
    for ours, wanted, error, *_ in entries:
        assert wanted > 1e-3 and ours == pytest.approx(wanted, rel=1e-4) and error < 1e-4
    assert len(trainer.context_teacher.prefixes) == 3


def test_the_templates_own_arguments_reach_both_renderings(tmp_path):
    """TRL's chat_template_kwargs, which decide for example whether Qwen3 thinks."""
    template = "{% if loud %}!!{% endif %}" + TEMPLATE
    text = make(tmp_path, train=dataset(lambda row: {"prompt": row["prompt"]}), max_steps=1)  # is text, as in TRL
    (prefix,) = {value for _, value in text._prefixes.values()}
    assert text.processing_class.decode(list(prefix)).startswith(f"{CONTEXT}\n\n")
    quiet, loud = (
        make(tmp_path, tokenizer=tiny_tokenizer(template), chat_template_kwargs={"loud": flag} if flag else None)
        for flag in (False, True)
    )
    for trainer, extra in ((quiet, 0), (loud, 2)):
        inputs = trainer._generate_and_score_completions([trainer.train_dataset[0]])
        prompt = trainer.processing_class.decode(inputs["prompt_ids"][0])
        assert prompt.startswith("!!") == bool(extra)
        (prefix,) = {value for _, value in trainer._prefixes.values()}
        text = trainer.processing_class.decode(list(prefix))
        assert text.startswith("!!" * bool(extra) + f"<|system|>{CONTEXT}")


def test_refuses_before_a_step(tmp_path):
    from datasets import Dataset

    stream = chats().to_iterable_dataset()
    long = Dataset.from_list([{"prompt": [{"role": "user", "content": "x" * 600}]}])
    for arguments, message in (
        ({"others": {}}, "nothing frozen to learn from"),
        ({"context": None}, "context is missing"),
        ({"context": " "}, "context is empty"),
        ({"train": stream}, "train_dataset is a stream"),
        ({"distillation": {"divergence": "gated_kl"}, "beta": 0.5}, "args.beta=0.5 and distillation="),
        ({"distillation": {"divergence": "reverse_kl", "gate": "tv"}}, "distillation: 'reverse_kl' has no gate"),
        ({"distillation": {"gate": "open"}}, "distillation: gate is 'open'"),
        ({"distillation": {"temperature": 2.0}}, "distillation has temperature; it takes divergence, beta"),
        ({"train": long}, "by [0-9]+; shorten the prompt"),
        ({"others": {"peft_config": lora(), "tools": [print]}}, "tools are not supported"),
        (
            {"tokenizer": tiny_tokenizer("{{ messages[-1].content[-1:] }}")},  # of a message, its end alone
            "context changes nothing",
        ),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            make(tmp_path, **arguments)
