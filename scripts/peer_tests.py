"""Run tests that other projects wrote for their divergences against ours, through a thin adapter.

    python scripts/peer_tests.py liger                  Liger-Kernel's tests of its fused linear JSD
    python scripts/peer_tests.py trl CHECKOUT           TRL's tests of its generalised JSD, from a clone of TRL

Liger-Kernel's tests are in its source archive, which is fetched from the index; TRL's are in none, so a clone is named.
Nothing of theirs is kept. What else the command line holds goes to pytest. Exit status: pytest's; 2 for a wrong call.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

TESTS = {
    "liger": ("test/transformers/test_fused_linear_jsd.py",),
    "trl": ("tests/experimental/test_distillation_trainer.py", "-k", "GeneralizedJSDLoss"),
}
LIGER = "liger-kernel==0.8.5"
WHOSE = "OPCD_PEER_TESTS"


def fused(
    student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor | None = None,
    beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, *_: Any,
) -> Tensor:  # fmt: skip
    """Mean over rows whose label is not `ignore_index`, 0 where there is none; beta 0 and 1 are the forward and the
    reverse KL."""
    from opcd_fast.loss import fused_linear_divergence

    rows = None if labels is None else (labels != ignore_index).float()
    count = float(len(student) if rows is None else rows.sum().clamp(min=1))
    how: dict[str, Any] = {0.0: {"divergence": "forward_kl"}, 1.0: {"divergence": "reverse_kl"}}.get(
        float(beta), {"divergence": "jsd", "beta": beta}
    )
    return fused_linear_divergence(student, student_weight, teacher, teacher_weight, token_weights=rows,
                                   temperature=temperature, denominator=count, **how)  # fmt: skip


class FusedJSD(torch.nn.Module):
    def __init__(self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, **_: Any) -> None:
        super().__init__()
        self.settings = jsd_beta, ignore_index, temperature

    def forward(self, student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor,
                labels: Tensor | None = None) -> Tensor:  # fmt: skip
        return fused(student, student_weight, teacher, teacher_weight, labels, *self.settings)


def functional(student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
               shift_labels: Tensor | None = None, jsd_beta: float = 0.5, ignore_index: int = -100,
               temperature: float = 1.0, **_: Any) -> Tensor:  # fmt: skip
    return fused(student_input, student_weight, teacher_input, teacher_weight, shift_labels, jsd_beta, ignore_index,
                 temperature)  # fmt: skip


def of_logits(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, beta: float = 0.5,
              temperature: float = 1.0, reduction: str = "batchmean", **_: Any) -> Tensor:  # fmt: skip
    """TRL's, on logits: ours under a head that is the identity, in float64. "batchmean" divides by tokens that count,
    or without labels by the sequences; "none" is a number for each of the vocabulary, which ours never forms."""
    student, teacher = (x.reshape(-1, x.shape[-1]).double() for x in (student_logits, teacher_logits))
    same = torch.eye(student.shape[-1], dtype=torch.float64)
    flat = None if labels is None else labels.reshape(-1)
    count = len(student) if flat is None else int((flat != -100).sum())
    total = fused(student, same, teacher, same, flat, beta, -100, temperature) * count
    by = {"sum": 1, "batchmean": len(student_logits) if flat is None else count, "mean": count * student.shape[-1]}
    if reduction not in by:
        pytest.skip(f"reduction={reduction!r} needs the whole table of divergences")
    return (total / by[reduction]).to(student_logits.dtype)


def pytest_configure(config: Any) -> None:
    """As a plug-in of pytest: their names mean ours before their tests are imported."""
    if os.environ.get(WHOSE) == "liger":
        module = importlib.import_module
        module("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD = FusedJSD  # type: ignore
        module("liger_kernel.transformers.functional").liger_fused_linear_jsd = functional  # type: ignore
        module("liger_kernel.ops").LigerFusedLinearJSDFunction = types.SimpleNamespace(apply=fused)  # type: ignore
    if os.environ.get(WHOSE) == "trl":
        trainer = type("DistillationTrainer", (), {"generalized_jsd_loss": staticmethod(of_logits)})
        for name in ("trl.experimental.distillation", "trl.experimental.distillation.distillation_trainer"):
            sys.modules[name] = made = types.ModuleType(name)
            vars(made).update(DistillationTrainer=trainer, DistillationConfig=None, _RepeatBatchDataLoader=None)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in TESTS or (arguments[0] == "trl" and not Path(*arguments[1:2]).is_dir()):
        print(__doc__, file=sys.stderr)
        return 2
    whose, more = arguments[0], arguments[1:]
    with tempfile.TemporaryDirectory() as scratch:
        if whose == "liger":
            fetch = ["download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", scratch]
            subprocess.run([sys.executable, "-m", "pip", *fetch, LIGER], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            (folder,) = (path for path in Path(scratch).iterdir() if path.is_dir())
        else:
            folder, more = Path(more[0]).resolve(), more[1:]
        here = Path(__file__).resolve().parent
        paths = [str(here.parent), str(here), str(folder), str(folder / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, WHOSE: whose, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        test = [sys.executable, "-m", "pytest", "-p", "peer_tests", "-p", "no:cacheprovider", *TESTS[whose], *more]
        return subprocess.run(test, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
