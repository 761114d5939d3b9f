"""Answers from vLLM in this process, on the GPU that also trains.

vLLM's Python interface: LLM, SamplingParams, TokensPrompt, LoRARequest, sleep mode. Run with vLLM 0.32.0 on a CPU, and
with a stand-in that checks the calls; never on a GPU.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.models import resolve
from opcd_fast.rollout.protocol import Completion, Request, Sampler
from opcd_fast.rollout.weights import AdapterFolder, rank_for_vllm


class VLLMRollout(Sampler):
    """A sampler over a vLLM engine that holds the base model; the LoRA adapter follows the training. See Rollout.

    Between two calls the engine sleeps (level 1: its weights go to the host's memory, its cache is dropped), so that
    the training step has the GPU to itself.

    Args:
        model_name: folder or hub id of the base model, or "smollm2".
        stop_token_ids: ids that end an answer.
        folder: where adapters are written for vLLM to read.
        max_lora_rank: the adapter's rank; vLLM gets the next one that it takes.
        gpu_memory_utilization: share of the GPU that vLLM may take while it is awake.
        sleep: False keeps it awake (two models and the training must then fit). Platforms without sleep always do.
        options: any other argument of vllm.LLM.
    Raises:
        InputError: vLLM is not installed, or cannot have such an adapter; or this is a process that vLLM started, which
            runs the user's script anew because it has no `if __name__ == "__main__":`.
    """

    uses_model = "saves"

    def __init__(
        self,
        model_name: str,
        *,
        stop_token_ids: Sequence[int],
        folder: str | Path,
        max_lora_rank: int,
        gpu_memory_utilization: float = 0.5,
        sleep: bool = True,
        vocab_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(stop_token_ids, vocab_size)
        if importlib.util.find_spec("vllm") is None:
            raise InputError("rollout='vllm' needs vLLM: pip install vllm, or use rollout='transformers' or 'server'")
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # while it imports the main script
            raise InputError(
                "vLLM's engine is a process that imports the script anew: put what the script does under "
                "if __name__ == '__main__':"
            )
        from vllm import LLM
        from vllm.platforms import current_platform

        self._sleeps, self._name = sleep and current_platform.is_sleep_mode_available(), model_name
        self._adapter = AdapterFolder(folder)
        self._request: Any = None
        self._count = 0
        self._llm = LLM(
            model=resolve(model_name),
            enable_lora=True,
            max_lora_rank=rank_for_vllm(max_lora_rank),
            enable_sleep_mode=self._sleeps,
            gpu_memory_utilization=gpu_memory_utilization,
            generation_config="vllm",  # not the model's own, with its penalties
            logprobs_mode="processed_logprobs",  # after temperature and top_p: of the sampling distribution
            **options,
        )
        self._awake = True
        self._rest()

    def sync(self, model: Any) -> None:
        from vllm.lora.request import LoRARequest

        path = self._adapter.write(model)
        if self._request is None or path.name != self._request.lora_name:
            self._count += 1  # vLLM tells adapters apart by this number, and never reads one twice
            self._request = LoRARequest(lora_name=path.name, lora_int_id=self._count, lora_path=str(path))
            self._adapter.keep_only(path)

    def explain(self) -> str:
        return f"engine: vllm in this process ({self._name}, sleeps between calls: {self._sleeps})"

    def _answers(self, rows: list[tuple[int, ...]], request: Request) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if self._request is None:
            raise InputError("the engine has no adapter yet; call sync(model) before generate()")
        settings = [
            SamplingParams(
                n=1, max_tokens=request.max_new_tokens, temperature=request.temperature, top_p=request.top_p,
                top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
                seed=request.seed_of(index), stop_token_ids=list(self.stop_token_ids),
                logprobs=0 if request.logprobs and request.temperature > 0 else None, detokenize=False,
            )
            for index in range(len(rows))
        ]  # fmt: skip
        if not self._awake:
            self._llm.wake_up()
            self._awake = True
        # Where that fails the engine stays as it is: one that died would never answer a call of sleep.
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(row)) for row in rows],
            sampling_params=settings,
            lora_request=self._request,
            use_tqdm=False,
        )
        self._rest()
        if len(outputs) != len(rows):
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(rows)} prompts")
        return [self._read(output, row, request.max_new_tokens) for output, row in zip(outputs, rows)]

    def _read(self, output: Any, row: tuple[int, ...], limit: int) -> Completion:
        (answer,) = output.outputs
        if tuple(output.prompt_token_ids) != row:
            raise RuntimeError("vLLM gave back answers in another order, or changed a prompt")
        tokens = list(answer.token_ids)
        whole = self._completion("vLLM", tokens, answer.finish_reason, limit)
        if answer.logprobs is None:
            return whole
        steps = zip(answer.logprobs, tokens, strict=True)
        return replace(whole, logprobs=tuple(float(step[token].logprob) for step, token in steps))

    def _rest(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)
            self._awake = False
