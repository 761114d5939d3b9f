"""Training steps at Qwen3-1.7B's shape with random weights: the seconds of each part, and one under the profiler."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.kernel_times import profiler, summed
from benchmarks.measure import wait
from benchmarks.schema import Row, Value, Values, value
from benchmarks.session import Session
from benchmarks.step_cases import Case, cases, make_job
from benchmarks.step_worker import opcd_trainer

STEPS = 3  # the last under the profiler, where one is wanted
TRACE = "step_trace.json.gz"
TRACE_BYTES = 12 << 20


def run(session: Session) -> None:
    case = cases(session.device, session.dry)[0]
    if not session.dry:
        # A quarter of the answers' length: rollouts are nearly all of a step, and decoding has a phase of its own.
        case = replace(case, tokens=128)
    with tempfile.TemporaryDirectory() as folder:
        Steps(session, case, Path(folder), traced=True).run()


class Steps:
    """A training run whose steps are rows as soon as they are made. `settings` go before those of the case."""

    def __init__(self, session: Session, case: Case, folder: Path, *, traced: bool, **settings: Any) -> None:
        self.session, self.case, self.folder, self.settings = session, case, folder, settings
        self.traced = traced
        self.made = self.peak = 0
        self.trace: Any = None  # of the last step, once it has begun

    def run(self) -> None:
        """Build, train, and tell what was chosen."""
        shape = {"prompts": self.case.prompts, "tokens": self.case.tokens, "context": self.case.context_words}
        about = {"model": self.case.model, "dtype": self.case.dtype, "checkpointing": self.case.checkpointing,
                 **self.settings}  # fmt: skip
        trainer: Any = None

        def build() -> Values:
            nonlocal trainer
            job = make_job(self.case, self.session.device)
            steps = STEPS if self.traced else STEPS - 1
            trainer = opcd_trainer(self.case, job, self.folder, steps, self.note, **self.settings)
            trainer.rollout.generate = self.watched(trainer.rollout.generate)
            return {"held": self.held()}

        def train() -> Values:
            trainer.train()
            return {"steps": value(self.made, "1"), "peak": value(self.peak, "bytes")}

        chosen: dict[str, str] = {}

        def choices() -> Values:
            chosen.update(rollout=trainer.rollout.explain(), teacher=trainer.teacher.explain())
            return {"batch": value(trainer.rollout.max_batch or 0, "1")}

        if self.session.row("build", build, shape=shape, settings=about) is None or trainer is None:
            return
        if self.session.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.session.row("run", train, shape=shape) is not None and self.trace is not None:
            self.session.row("profile", lambda: summed(self.trace, self.session.device), settings={"step": STEPS})
            self.session.row("trace", self.keep_trace, settings={"file": TRACE})
        self.session.row("choices", choices, settings=chosen)

    def watched(self, generate: Any) -> Any:
        """The last step is profiled from the end of its rollout on, whose calls are too many for a trace."""

        def drawn(*args: Any, **options: Any) -> Any:
            answers = generate(*args, **options)
            if self.traced and self.made == STEPS - 1 and self.trace is None and self.session.left() > 12:
                self.trace = profiler(self.session.device)
                self.trace.start()
            return answers

        return drawn

    def note(self, record: dict[str, Any]) -> None:
        if record.get("kind") != "step":
            return
        wait(self.session.device)
        self.made += 1
        if self.trace is not None and self.made == STEPS:
            self.trace.stop()
        parts = {part: value(1e3 * seconds, "ms") for part, seconds in record["seconds"].items()}
        tokens, total = float(record["response_tokens"]), sum(record["seconds"].values())
        self.session.write(Row(self.session.table, f"step {self.made}", values={
            "time": value(1e3 * total, "ms"), "rate": value(tokens / total, "tokens/s"), **parts,
            "answer_tokens": value(tokens, "1"), "peak": self.held(peak=True),
        }))  # fmt: skip

    def held(self, peak: bool = False) -> Value:
        """What the allocator holds, or held at most since training began."""
        found = 0
        if self.session.device.type == "cuda":
            found = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        self.peak = max(self.peak, found)
        return value(found, "bytes")

    def keep_trace(self) -> Values:
        plain, path = self.folder / "trace.json", self.session.folder / TRACE
        self.trace.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        nbytes = path.stat().st_size
        if nbytes > TRACE_BYTES:
            path.unlink()
            raise RuntimeError(f"the trace has {nbytes >> 20} MiB; kept are at most {TRACE_BYTES >> 20}")
        return {"size": value(nbytes, "bytes")}
