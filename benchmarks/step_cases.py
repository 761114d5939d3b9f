"""The jobs for benchmarks of whole training steps: the same model, prompts, context and settings for every trainer."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.models import SHAPES, random_model

RANK = 16
LEARNING_RATE = 1e-3
_WORDS_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SPECIAL = ("<end>", "<system>", "<user>", "<assistant>")


@dataclass(frozen=True)
class Case:
    """One optimizer step: `prompts` fresh answers of at most `tokens` tokens each, LoRA on every linear map."""

    name: str
    group: str  # what it is for
    model: str  # "SmolLM2-135M", "Qwen3-1.7B" (random weights) or "tiny Llama" (random weights)
    prompts: int
    tokens: int
    dtype: str
    checkpointing: bool
    micro_batch: int  # sequences run through the models at once by trainers that count sequences
    micro_batch_tokens: int | None = None  # ours counts tokens
    context_words: int = 0  # 0: the demo's six turns


@dataclass(frozen=True, eq=False)
class Job:
    """What all trainers of a case get."""

    model: Any
    tokenizer: Any
    context: list[dict[str, str]]  # chat messages
    questions: list[str]


def cases(device: torch.device, dry: bool) -> list[Case]:
    """The table's cases, what matters most first: a run that is stopped leaves the best part."""
    if dry:
        return [Case("tiny", "main", "tiny Llama", 4, 6, "float32", False, 4, context_words=24)]
    if device.type == "cuda":
        large = {"model": "Qwen3-1.7B", "prompts": 64, "tokens": 512, "dtype": "bfloat16", "context_words": 4080}
        return [
            Case("1.7b-4k-64x512-checkpointed", "main", checkpointing=True, micro_batch=8,
                 micro_batch_tokens=16_384, **large),
        ]  # fmt: skip
    demo = {"model": "SmolLM2-135M", "prompts": 16, "tokens": 24, "micro_batch": 16}
    return [
        Case("demo-bf16-checkpointed", "main", dtype="bfloat16", checkpointing=True, **demo),
        Case("demo-fp32-checkpointed", "dtype", dtype="float32", checkpointing=True, **demo),
        Case("demo-bf16", "checkpointing", dtype="bfloat16", checkpointing=False, **demo),
        Case("demo-fp32", "checkpointing", dtype="float32", checkpointing=False, **demo),
    ]


def make_job(case: Case, device: torch.device) -> Job:
    """The same for every trainer. Raises `InputError` when SmolLM2 is wanted and not installed."""
    dtype = getattr(torch, case.dtype)
    if case.model == "SmolLM2-135M":
        from opcd_fast.evaluation.demo import DATA
        from opcd_fast.models import load_model, load_tokenizer

        lines = (DATA / "train_prompts.jsonl").read_text(encoding="utf-8").splitlines()
        return Job(
            load_model("smollm2", dtype=case.dtype, device=str(device)),
            load_tokenizer("smollm2"),
            json.loads((DATA / "turns.json").read_text(encoding="utf-8")),
            [json.loads(line)["prompt"] for line in lines],
        )
    shape = SHAPES[case.model]
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(shape.vocabulary - 100)}" for _ in range(words))

    context = [{"role": "system", "content": text(case.context_words)}]
    questions = [text(24) for _ in range(256)]
    return Job(random_model(shape, dtype, device), _word_tokenizer(shape.vocabulary), context, questions)


def _word_tokenizer(size: int) -> Any:
    """One token for each word w0, w1, ...: any vocabulary without a download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{index}" for index in range(size - len(_SPECIAL) - 1)] + ["<unk>"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([*_SPECIAL[1:], _SPECIAL[0]])  # <end> is the last one, as the model's config says
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = _WORDS_TEMPLATE
    return tokenizer
