"""The phases of a run, most valuable first, and the seconds that each may take.

A phase may go on until its place in the schedule ends: what earlier ones left is its own, and none takes from a later
one. Each starts a process, which takes 5 to 15 s with torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# From torch 2.11 cuDNN's attention comes first, and builds a plan for every size that it has not seen.
PEERS = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
TRAINING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@dataclass(frozen=True)
class Phase:
    """A benchmark with options, as `python -m benchmarks` takes them; its rows are a table of the phase's name."""

    name: str
    seconds: int
    about: str
    benchmark: str = ""  # default: gpu.NAME
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> tuple[str, ...]:
        return (self.benchmark or f"gpu.{self.name}", *self.options)


ACCURATE = "only=opcd_fast-difference,opcd_fast-triton,opcd_fast-torch,trl,liger-fused"
SHARED = "only=gemms,opcd_fast-merge,opcd_fast-merge-rebuilt,concat,transformers-cache"
FIRST = (
    Phase("ceilings", 24, "versions, the fastest copy and product, the host's time for a launch"),
    Phase("smoke", 62, "every call that was never made on a device, against float64"),
    Phase("accuracy", 32, "dL/dh and dL/dW at mean KL 1 to 3e-5 against float64", "loss",
          ("groups=accuracy", ACCURATE)),
    Phase("loss", 92, "the main cases beside peers, per kernel; the products by rows"),
    Phase("sweep", 56, "block and warps of every kernel into a launch table"),
    Phase("decoding", 66, "tokens a second beside transformers' generate"),
    Phase("step", 56, "training steps at Qwen3-1.7B's shape, and a trace", environment=TRAINING),
    Phase("consumer", 72, "LoRA at Qwen3-4B's shape on a card of 24 GB, peak against the plan", environment=TRAINING),
    Phase("teacher", 36, "8 layers of Qwen3-8B after a context of 8k", "teacher",
          ("groups=main", "layers=8", "case_seconds=6", SHARED), PEERS),
    Phase("gpu_tests", 46, "the tests marked gpu"),
)  # fmt: skip
SECOND = (
    Phase("ceilings", 24, "the fastest copy and product of this lease"),
    Phase("retimed", 112, "the main cases with the packaged and with the swept launch table"),
    Phase("memcheck", 50, "small calls of every kernel of the loss under compute-sanitizer"),
)
RUNS = {"first": FIRST, "second": SECOND}
SECONDS = {"first": 560, "second": 200}  # hard, the summary included
ENDING = 8  # of those: to kill what hangs and to write the summary
DRY_SECONDS = 350


def schedule(run: str) -> list[tuple[Phase, int]]:
    """(phase, second of the run at which it ends at the latest)."""
    end, ends = 0, []
    for phase in RUNS[run]:
        end += phase.seconds
        ends.append((phase, end))
    return ends
