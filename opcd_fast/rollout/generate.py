"""transformers' own way to generate, with the settings and random numbers of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opcd_fast.attention import sdpa_without_cudnn
from opcd_fast.models import seam
from opcd_fast.rollout.protocol import cut_at_stop
from opcd_fast.rollout.sampling import draw


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], uniform: Tensor, *, stop_token_ids: Sequence[int],
    temperature: float, top_p: float, vocab_size: int | None = None,
) -> list[tuple[list[int], list[float]]]:  # fmt: skip
    """`model.generate` on a left-padded batch; arguments and result as of `opcd_fast.rollout.decoding.decode`.

    The tokens are drawn in a logits processor, from the same random numbers as in `decode`.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = padded([torch.tensor(prompt) for prompt in prompts], padding_value=stop_token_ids[0])  # (B, T)
    mask = padded([torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts])
    sampler = _Sampler(uniform.to(device), temperature, top_p, vocab_size)
    generator, inputs, prefix = seam.generation_inputs(model, ids.to(device), mask.to(device))
    width = inputs["input_ids"].shape[1]
    # Without the model's generation_config: transformers would fill in every setting that a call leaves open, and chat
    # models ship temperatures, penalties and beams. The answers must come from the distribution that is scored.
    with seam.holding([(seam.causal_lm(model), "generation_config", GenerationConfig())]), sdpa_without_cudnn():
        output = generator.generate(
            **inputs,
            logits_processor=[sampler],
            synced_gpus=False,  # weights are whole here, and ranks need not take the same number of steps
            generation_config=GenerationConfig(
                do_sample=False,  # of the drawn token alone, see _Sampler
                max_new_tokens=uniform.shape[1],
                eos_token_id=list(stop_token_ids),
                pad_token_id=stop_token_ids[0],
                bos_token_id=None,
                use_cache=True,
            ),
        )
    if prefix is not None and prefix.get_seq_length() < width:
        raise RuntimeError("model: transformers' generate did not read the trained prefix; use engine='decode'")
    cut = [cut_at_stop(row, stop_token_ids)[0] for row in output[:, width:].tolist()]
    logprobs = torch.stack(sampler.logprobs, dim=1).tolist()
    return [(list(ids), row[: len(ids)]) for ids, row in zip(cut, logprobs)]


class _Sampler:
    """Logits processor that draws: the drawn token keeps a score, so that `generate` must take it."""

    def __init__(self, uniform: Tensor, temperature: float, top_p: float, vocab_size: int | None) -> None:
        self._uniform, self._options = uniform, (temperature, top_p, vocab_size)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens, logprobs = draw(scores, self._uniform[:, len(self.logprobs)], *self._options)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
