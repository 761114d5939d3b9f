"""Two systems that the package does not have, tried by putting other formulas where it computes its gated KL.

p is the student's distribution, q the teacher's. Both need the loss in plain PyTorch (loss_backend=torch); a formula
that nobody asked for is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from opcd_fast.kernels.reference import divergences
from opcd_fast.training import OPCDTrainer


def forward_then_reverse(steps: int) -> AbstractContextManager[None]:
    """w KL(q || p) + (1 - w) KL(p || q), w falling in equal parts from 1 at the first step to 0 at the last."""
    trained: list[int] = []

    def scheduled(total: Tensor, gate: str) -> tuple[Tensor, Tensor]:
        w = torch.full_like(total, 1 - trained[-1] / max(steps - 1, 1))
        return w, 1 - w

    return _used("gate_from", scheduled, trained)


def todi(steps: int) -> AbstractContextManager[None]:
    """Sum over tokens of a q log(q / p) + (1 - a) p log(p / q), a = q / (p + q) without gradient (arXiv 2505.16297)."""
    return _used("_gated", _todi, [])


def _todi(
    gates: Tensor, forward: Tensor, p: Tensor, q: Tensor, l: Tensor, b: Tensor, none_p: Tensor | None, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """The divergence and sum_v g, (rows,) each, with g = p dD/dp written into phi, (rows, V)."""
    none = torch.zeros_like(p, dtype=torch.bool) if none_p is None else none_p
    nowhere = none & (q == 0)
    a = torch.where(nowhere, 0.0, q / (p + q))
    p_l = torch.where(none, 0.0, p * l)
    value = torch.where(nowhere, 0.0, a * -q * l) + (1 - a) * p_l
    phi.copy_(-a * q + (1 - a) * (p_l + p))
    return value.sum(-1), phi.sum(-1)


@contextmanager
def _used(name: str, formula: object, trained: list[int]) -> Iterator[None]:
    """`formula` in the place of `name`; `trained` gets the steps that are taken, none where the run has ended."""
    train_step = OPCDTrainer._train_step

    def counted(trainer: OPCDTrainer, step: int, *rest: object) -> object:
        trained.append(step)
        return train_step(trainer, step, *rest)

    replaced = patch.object(divergences, name, side_effect=formula)
    with patch.object(OPCDTrainer, "_train_step", counted), replaced as asked:
        yield
    if trained and not asked.called:
        raise RuntimeError(f"the package did not ask for {name}, so the variant was not tried")


VARIANTS = {"forward-then-reverse": forward_then_reverse, "todi": todi}
