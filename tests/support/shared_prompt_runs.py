"""Prompts with several answers, and what a model computes for them with shared prompts and with copies."""

from __future__ import annotations

import tiny_models
import torch

from opcd_fast.data import Sample, pack
from opcd_fast.models import packed_hidden_states, shared_prompt_hidden_states

PROMPTS = [6, 3, 13, 2]  # the second has one answer, the third one that is longer than the window of all models
ANSWERS = [(4, 1, 2), (5,), (2, 12, 1, 7), (1, 1)]


def make_samples(prompts=PROMPTS, answers=ANSWERS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(3, tiny_models.VOCABULARY, (count,), generator=generator).tolist()

    samples = []
    for length, responses in zip(prompts, answers, strict=True):
        prompt = draw(length)
        samples += [Sample(prompt, [5, *prompt], 0, draw(count)) for count in responses]
    return samples


def run(model, batch):
    row = (batch.student_ids, batch.student_cu_seqlens)
    if batch.student_parent is None:
        return packed_hidden_states(model, *row, select=batch.response_index_student)
    return shared_prompt_hidden_states(model, *row, batch.student_parent, select=batch.response_index_student)


def both(model, samples, device="cpu"):
    """((hidden, gradients) with shared prompts, the same with copies)."""
    results = []
    for share in (True, False):
        model.zero_grad()
        hidden = run(model, pack(samples, share_prompts=share).to(torch.device(device)))
        weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(device)
        (hidden * weight).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), grads))
    return results
