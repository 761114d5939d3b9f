"""On-policy context distillation as a TRL trainer: TRL's loop, sampling, logging and saving; our teacher and loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opcd_fast.data import (
    Message,
    Prompt,
    Sample,
    pack,
    read_context,
    read_prompts,
    render,
    student_ids,
    teacher_ids,
)
from opcd_fast.errors import InputError
from opcd_fast.integrations.forward import (
    Heads,
    chosen_divergence,
    divergence,
    inside_forward,
    refuse_settings,
    refuse_sharding,
)
from opcd_fast.integrations.trl_loss import check_trl
from opcd_fast.models import packed_hidden_states
from opcd_fast.teacher import ContextTeacher
from opcd_fast.training.step import Windows, check_lengths, teacher_hidden_states

check_trl()

from trl import DistillationConfig, DistillationTrainer  # noqa: E402  (another version is refused before its import)


class ContextDistillationTrainer(DistillationTrainer):
    """TRL's DistillationTrainer with a teacher that sees a context and a student that does not.

    The student answers the data set's prompts (TRL's sampling: transformers or vLLM). The teacher reads the context
    once (`ContextTeacher`) and scores those answers after it. The loss is over the full vocabulary at the config's
    `temperature`, from hidden states of packed rows.

    Args:
        model: a name or a model, PEFT-wrapped or not, as for DistillationTrainer.
        context: text, chat messages, or a file of either: what the teacher sees. Rows that have a `privileged_context`
            use that instead; None when all have.
        args: a `DistillationConfig`.
        train_dataset: column `prompt` (messages; or text, which goes in without a chat template, as everywhere in
            TRL), and perhaps `privileged_context` (text or messages). So has `eval_dataset`.
        teacher_model: a frozen model with the same vocabulary. None: the student without its adapter, which needs a
            PEFT model or `peft_config`.
        distillation: the divergence, as keywords of `fused_linear_divergence`: {"divergence": "reverse_kl"}. None: the
            gated KL, or with another `DistillationConfig.beta` than TRL's default of 1 the JSD of that beta.
        teacher_path: how the teacher reads its context, see `ContextTeacher`.
        others: as for DistillationTrainer.

    `context_teacher` is the teacher; its `explain()` tells how it runs. The shared part of a context is found over all
    prompts, so these are rendered once when the trainer is made.

    For one process or DDP. Raises InputError, before any step, for what cannot be trained like this: FSDP, DeepSpeed,
    streaming data sets, images, tools, a prompt without a context, a context that changes nothing, or prompts that do
    not fit the models' windows (nothing is ever truncated).
    """

    _tag_names = ["trl", "opcd-fast", "context-distillation"]
    _name = "Context distillation"
    _paper = {"title": "On-Policy Context Distillation for Language Models", "id": "2602.12275"}

    def __init__(
        self,
        model: Any,
        context: str | Path | Sequence[Message] | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        teacher_model: Any = None,
        peft_config: Any = None,
        teacher_path: str = "auto",
        distillation: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if teacher_model is None and peft_config is None and not hasattr(model, "peft_config"):
            raise InputError(
                "teacher_model is None and the model has no adapter, so there is nothing frozen to learn from; give "
                "peft_config=LoraConfig(...) (the teacher is then the model without it), or teacher_model="
            )
        if others.get("tools"):
            raise InputError("tools are not supported by ContextDistillationTrainer; leave them out")
        super().__init__(
            model=model, teacher_model=teacher_model, args=args, train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=processing_class, peft_config=peft_config, **others,
        )  # fmt: skip
        refuse_settings(self)
        refuse_sharding(self)
        if distillation and self.beta != 1.0:
            raise InputError(f"args.beta={self.beta} and distillation= both choose a divergence; leave one of them out")
        if self.beta != 1.0:
            distillation = {"divergence": "jsd", "beta": self.beta}
        self._distillation = chosen_divergence({"divergence": "gated_kl", **(distillation or {})})
        self._context = None if context is None else read_context(context)
        self._prefixes: dict[str, tuple[int, tuple[int, ...]]] = {}  # by context, as JSON
        groups = self._read_all(train_dataset, eval_dataset)
        rendered, prefixes = render(self._template(), groups, self._context)
        for group, rows in zip(groups, rendered, strict=True):
            for prompt, row in zip(group, rows, strict=True):
                index = row.context_index
                self._prefixes[json.dumps(prompt.context_or(self._context))] = index, prefixes[index]
        teacher = self.accelerator.unwrap_model(self.model if self.teacher_model is None else self.teacher_model)
        windows = Windows.of(self.accelerator.unwrap_model(self.model), teacher)
        for rows in rendered:
            # Without a limit an answer ends at the window; then a prompt must leave room for one token.
            check_lengths(rows, prefixes, self.max_completion_length or 1, windows)
        self.context_teacher = ContextTeacher(
            teacher, [torch.tensor(prefix, dtype=torch.int64) for prefix in prefixes], path=teacher_path,
            adapter="disabled" if self.teacher_model is None else "active",
        )  # fmt: skip
        self._heads = Heads()

    # ------------------------------------------------------------------------------------- prompts and contexts

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = ["prompt", "privileged_context"]

    def _template(self) -> _Template:
        arguments: Any = self.chat_template_kwargs  # a dict; the config's JSON text has been read
        return _Template(self.processing_class, arguments)

    def _read_all(self, train_dataset: Any, eval_dataset: Any) -> list[list[Prompt]]:
        several = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        groups = []
        for name, rows in (("train_dataset", train_dataset), *(("eval_dataset", rows) for rows in several)):
            if rows is None:
                continue
            if not hasattr(rows, "__len__"):
                raise InputError(f"{name} is a stream; the shared context is found over all prompts: give a Dataset")
            columns = [column for column in ("prompt", "privileged_context") if column in rows.column_names]
            groups.append([_prompt(row, f"{name}[{i}]") for i, row in enumerate(rows.select_columns(columns))])
        return groups

    # ---------------------------------------------------------------------------------------------- one batch

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        prompts = [_prompt(row, "prompt") for row in inputs]
        template = self._template()
        suffixes, index = [], []
        for prompt, ids, mask in zip(prompts, output["prompt_ids"], output["prompt_mask"], strict=True):
            if ids[mask.bool()].tolist() != student_ids(template, prompt):
                raise RuntimeError("TRL rendered a prompt into other tokens than opcd_fast.data, which is a bug")
            own = prompt.context_or(self._context)
            which, prefix = self._prefixes[json.dumps(own)]
            assert own is not None  # render refused it
            suffixes.append(torch.tensor(teacher_ids(template, prompt, own)[len(prefix) :]))
            index.append(which)
        device = output["prompt_ids"].device
        padded = torch.nn.utils.rnn.pad_sequence(suffixes, batch_first=True, padding_value=-1)
        output["teacher_suffix_ids"] = padded.to(device)  # -1 where there is none
        output["context_index"] = torch.tensor(index, device=device)
        return output

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = pack([Sample(*row) for row in _rows(inputs)]).to(inputs["prompt_ids"].device)
        h_s = packed_hidden_states(
            unwrapped_student, batch.student_ids, batch.student_cu_seqlens, select=batch.response_index_student
        )
        teacher = self.context_teacher
        score = partial(teacher_hidden_states, teacher, batch)
        h_t = score() if self.teacher_model is None else inside_forward(self.teacher_model, teacher.model, score)
        loss, stats = divergence(
            h_s, self._heads(unwrapped_student), h_t, teacher.head, temperature=self.temperature,
            denominator=num_items_in_batch, return_stats=True, token_ids=batch.response_ids, **self._distillation,
        )  # fmt: skip
        mode = "train" if unwrapped_student.training else "eval"
        self._metrics[mode]["top1_agreement"].append(stats.top1_agreement.mean().item())
        if stats.gate is not None:
            self._metrics[mode]["gate"].append(stats.gate.mean().item())
        return loss, stats.student_entropy.sum(), torch.tensor(len(batch.response_ids), device=loss.device)


class _Template:
    """A tokenizer that renders every chat with the run's own template arguments (say `enable_thinking`)."""

    def __init__(self, tokenizer: Any, arguments: dict[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, arguments

    def apply_chat_template(self, messages: Any, **settings: Any) -> Any:
        return self._tokenizer.apply_chat_template(messages, **{**self._arguments, **settings})

    def __call__(self, text: str) -> Any:
        return self._tokenizer(text)


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    """A row of the data set; text stays text."""
    given = {name: value for name, value in row.items() if value is not None}
    (prompt,) = read_prompts([given], where)
    return Prompt(None, prompt.text, prompt.privileged_context) if prompt.text is not None else prompt


def _rows(inputs: dict[str, Any]) -> list[tuple[list[int], list[int], int, list[int]]]:
    """(student's prompt, teacher's after the shared part, context, answer) of each sequence, without padding."""
    prompts, answers = (
        [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    suffixes = [row[row >= 0].tolist() for row in inputs["teacher_suffix_ids"]]
    return list(zip(prompts, suffixes, inputs["context_index"].tolist(), answers, strict=True))
