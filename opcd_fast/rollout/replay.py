"""Answers from a file instead of a sampler: training off-policy, on what somebody else wrote.

One JSON object a line, in either form:

    {"prompt_ids": [1, 2], "response_ids": [3, 4], "logprobs": [-0.1, -0.2]}      logprobs are optional
    {"prompt": "..." or [messages], "response": "..."}                            needs the tokenizer

A prompt may have several answers. `write_replay` writes the first form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd_fast.data import adapt_to_tokenizer, read_prompts, read_rows, student_ids
from opcd_fast.errors import InputError
from opcd_fast.rollout.protocol import Completion, Request, Sampler, checked_prompts, cut_at_stop
from opcd_fast.runtime import stream_seed, token_ids, write_text


class ReplayRollout(Sampler):
    """The answers that a file holds for the prompts that are asked for. See Rollout.

    Temperature and top_p cannot change answers that are written already; the file must fit them.

    Args:
        file: JSONL, see above, or another table that `opcd_fast.data.read_rows` reads.
        stop_token_ids: an answer ends after the first of these. To text, the first one is added at the end.
        tokenizer: for rows of text; prompts are rendered with its chat template, as the trainer does.
        template_kwargs: variables of that template.
        vocab_size: an id from here on is an error.
    Raises:
        InputError: the file is missing or a line is wrong (it says which).
    """

    uses_model = "no"

    def __init__(
        self,
        file: str | Path,
        *,
        stop_token_ids: Sequence[int],
        tokenizer: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(stop_token_ids, vocab_size)
        self.file = Path(file)
        self._tokenizer, self._template_kwargs = tokenizer, template_kwargs
        self._held: dict[tuple[int, ...], list[Completion]] = {}
        for where, row in read_rows(self.file, "rollout_file"):
            prompt, answer = self._read(where, row)
            self._held.setdefault(prompt, []).append(answer)
        if not self._held:
            raise InputError(f"rollout_file={str(file)!r} holds no answers")

    def sync(self, model: Any) -> None:
        """Nothing to do: the answers are not the model's."""

    def explain(self) -> str:
        count = sum(map(len, self._held.values()))
        return f"engine: replay ({count} answers to {len(self._held)} prompts from {self.file}; off-policy)"

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises InputError when the file has no answer to one of these prompts."""
        missing = [i for i, prompt in enumerate(prompts) if tuple(prompt) not in self._held]
        if missing:
            shown = list(prompts[missing[0]])[:12]
            raise InputError(
                f"{self.file}: no answer to {len(missing)} of {len(prompts)} prompts, the first is number "
                f"{missing[0]} ({shown} ...); prompts are compared as token ids, template included"
            )

    def check_logprobs(self) -> None:
        """Raises InputError when an answer has none."""
        bare = sum(answer.logprobs is None for answers in self._held.values() for answer in answers)
        if bare:
            raise InputError(
                f"importance_correction needs log-probabilities, and {bare} answers of rollout_file="
                f"{str(self.file)!r} have none; add logprobs to them, or set importance_correction='none'"
            )

    def _answers(self, rows: list[tuple[int, ...]], request: Request) -> list[Completion]:
        """The seed decides where to begin among a prompt's answers; a prompt asked for again gets the next one."""
        self.check(rows)
        turns: dict[tuple[int, ...], int] = {}
        given = []
        for row in rows:
            held = self._held[row]
            turn = turns.setdefault(row, stream_seed(request.seed, "replay", len(row)))
            turns[row] = turn + 1
            answer = held[turn % len(held)]
            tokens = answer.token_ids[: request.max_new_tokens]
            known = answer.logprobs if request.logprobs else None
            values = None if known is None else known[: len(tokens)]
            given.append(Completion(tokens, values, answer.finished and len(tokens) == len(answer.token_ids)))
        return given

    def _read(self, where: str, row: Any) -> tuple[tuple[int, ...], Completion]:
        if not isinstance(row, dict):
            raise InputError(f"{where}: must be an object with prompt_ids and response_ids, or prompt and response")
        if "prompt_ids" in row or "response_ids" in row:
            prompt, tokens = (self._ids(where, row, name) for name in ("prompt_ids", "response_ids"))
        else:
            prompt, tokens = self._from_text(where, row)
        kept, finished = cut_at_stop(tokens, self.stop_token_ids)
        values = row.get("logprobs")
        if values is None:
            return prompt, Completion(kept, None, finished)
        if not isinstance(values, list) or [type(value) in (int, float) for value in values] != [True] * len(tokens):
            raise InputError(f"{where}: logprobs must be a number for each of the {len(tokens)} response_ids")
        return prompt, Completion(kept, tuple(map(float, values[: len(kept)])), finished)

    def _ids(self, where: str, row: dict[str, Any], name: str) -> tuple[int, ...]:
        ids = token_ids(f"{where}: {name}", row.get(name), self.vocab_size if name == "response_ids" else None)
        if not ids:
            raise InputError(f"{where}: {name} is empty; give at least one token id")
        return tuple(ids)

    def _from_text(self, where: str, row: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not isinstance(row.get("response"), str) or "prompt" not in row:
            raise InputError(f"{where}: must have prompt_ids and response_ids, or prompt and response (text)")
        if self._tokenizer is None:
            raise InputError(f"{where}: the answer is text; give tokenizer=, or write response_ids")
        (prompt,) = adapt_to_tokenizer(self._tokenizer, read_prompts([{"prompt": row["prompt"]}], where))
        written = self._tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        return tuple(student_ids(self._tokenizer, prompt, self._template_kwargs)), (*written, self.stop_token_ids[0])


def write_replay(file: str | Path, prompts: Sequence[Sequence[int]], answers: Sequence[Completion]) -> None:
    """Write prompts and their answers as a file for `ReplayRollout`; whole or not at all."""
    if len(prompts) != len(answers):
        raise InputError(f"{len(prompts)} prompts, but {len(answers)} answers")
    lines = []
    for index, (prompt, answer) in enumerate(zip(checked_prompts(prompts), answers)):
        ids = token_ids(f"answers[{index}].token_ids", answer.token_ids)
        row: dict[str, Any] = {"prompt_ids": prompt, "response_ids": ids}
        if answer.logprobs is not None:
            row["logprobs"] = [*map(float, answer.logprobs)]
        lines.append(json.dumps(row) + "\n")
    write_text(Path(file), "".join(lines))
