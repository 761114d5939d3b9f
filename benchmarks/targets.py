"""What the library promises of its speed, accuracy and memory, judged from rows alone; nobody types a verdict.

What a test decides, no target repeats: that a planted error in any path is caught, that a layer which did not read its
context is an error, and that a context is never truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import decoding
from benchmarks.gpu.summary import number
from benchmarks.loss import DIFFERENCE
from benchmarks.schema import BAD, BOUND, OURS, Device, Head, Row

CPU = ("cpu",)  # the devices of a target: every CPU
HOPPER = ("H100", "H200")  # parts of the devices' names
KL_RANGE = (3e-5, 1.0)  # mean KLs that the accuracy rows must reach, within 20 %
PACKAGES = {"trl": "trl", "liger-fused": "liger-kernel", "liger-chunked": "liger-kernel"}
CLAIMS = {  # by measure: what is promised, and whether the measured number must reach the bound or stay below it
    "speed": ("at least {bound:g} times as fast as {against}", True),  # its time over ours
    "rate": ("at least {bound:g} times {against}'s scored and trained tokens per second", True),
    "time": ("at most {bound:g} of the time of {against}", False),  # our time over its
    "pace": ("at least {bound:g} times as many tokens per second as {against}", True),
    "tokens": ("at least {bound:,.0f} tokens/s", True),
    "peak": ("at most {bound:.2g} of the peak memory of {against}", False),
    "error": ("gradient error at most {bound:g} at every mean KL from 1 to 3e-5", False),
    "plan": ("the plan's peak within {bound:.0%} of what the allocator held", False),
    "seconds": ("the check at first use takes at most {bound:g} s", False),
    "copies": ("keys and values of the context are held exactly once, for any batch", False),
}

UNMEASURED = ("unmeasured", None, "no report of such a device")
Outcome = tuple[str, "float | None", str]  # "met", "missed" or "unmeasured"; the number; what was compared


@dataclass(frozen=True)
class Target:
    """One promise about one case."""

    measure: str  # of CLAIMS
    bound: float
    devices: tuple[str, ...]
    case: str
    against: str = ""  # another implementation of the same case
    ours: tuple[str, ...] = OURS  # the first that the rows have

    @property
    def claim(self) -> str:
        text, _ = CLAIMS[self.measure]
        who = f"{self.ours[0]}: " if self.measure in ("speed", "error") and self.ours != OURS else ""
        against = "the bare products" if self.against == BOUND else self.against
        return who + text.format(bound=self.bound, against=against)


_SMALL, _KEPT, _REBUILT = "smollm2-135m-n512", ("opcd_fast-merge",), ("opcd_fast-merge-rebuilt",)
_LARGE, _MEDIUM = "qwen3-8b-n16384-bfloat16", "qwen3-0.6b-n16384-bfloat16"
_STEP = "1.7b-4k-64x512-checkpointed"
_SHARED = (DIFFERENCE,)
TARGETS: dict[str, tuple[Target, ...]] = {
    "loss": (
        Target("speed", 0.75, HOPPER, f"{_LARGE}-full", BOUND),
        Target("speed", 1.4, HOPPER, f"{_LARGE}-full", "trl"),
        Target("speed", 2.0, HOPPER, f"{_LARGE}-full", "liger-fused"),
        Target("speed", 0.52, HOPPER, f"{_MEDIUM}-full", BOUND),
        Target("speed", 1.4, HOPPER, f"{_MEDIUM}-full", "trl"),
        Target("speed", 4.0, HOPPER, f"{_MEDIUM}-full", "liger-fused"),
        Target("speed", 0.88, HOPPER, f"{_LARGE}-frozen", BOUND, _SHARED),
        Target("speed", 0.65, HOPPER, f"{_MEDIUM}-frozen", BOUND, _SHARED),
        Target("speed", 2.0, HOPPER, f"{_LARGE}-frozen", "trl", _SHARED),
        Target("speed", 2.0, HOPPER, f"{_MEDIUM}-frozen", "trl", _SHARED),
        Target("error", 3e-3, HOPPER, "qwen3-0.6b-n256-bfloat16-full-accuracy"),
        Target("error", 3e-3, HOPPER, "qwen3-0.6b-n256-bfloat16-frozen-accuracy", "", _SHARED),
        Target("time", 1.4, CPU, f"{_SMALL}-float32-full", BOUND),
        Target("time", 0.6, CPU, f"{_SMALL}-float32-full", "trl"),
        Target("time", 0.3, CPU, f"{_SMALL}-bfloat16-full", "trl"),
        Target("time", 1.0, CPU, f"{_SMALL}-bfloat16-full", "eager-bf16-logits"),
        Target("error", 3e-3, CPU, "smollm2-135m-n32-bfloat16-full-accuracy"),
    ),
    "teacher": (
        Target("speed", 12.0, HOPPER, "8192x512x64", "concat", _KEPT),
        Target("speed", 10.0, HOPPER, "8192x512x64", "concat", _REBUILT),
        Target("copies", 1.0, HOPPER, "every case"),
        Target("speed", 8.0, CPU, "1024x64x16", "concat", _KEPT),
        Target("speed", 4.0, CPU, "1024x64x16", "concat", _REBUILT),
        Target("copies", 1.0, CPU, "every case"),
        Target("seconds", 1.0, CPU, "self-verification", "", ("opcd_fast-auto",)),
    ),
    "step": (
        Target("time", 0.3, CPU, "demo-bf16-checkpointed", "trl-sdft", ("opcd_fast",)),
        Target("rate", 3.0, HOPPER, _STEP, "trl-sdft", ("opcd_fast",)),
        Target("peak", 1 / 3, HOPPER, _STEP, "trl-sdft", ("opcd_fast",)),
        Target("plan", 0.1, HOPPER, "plan", "", ("",)),
    ),
    "decoding": (
        Target("tokens", 8000.0, HOPPER, "64 answers", "", (decoding.OURS,)),
        Target("pace", 5.0, HOPPER, "64 answers", decoding.DYNAMIC, (decoding.OURS,)),
        Target("time", 1.0, CPU, "demo", decoding.DYNAMIC, (decoding.OURS,)),
    ),
}


def markdown(table: str, found: Sequence[tuple[Head, Sequence[Row]]]) -> list[str]:
    """found: the newest run of each device."""
    lines = ["| target | case | device | | measured | from |", "|---|---|---|---|---|---|"]
    for target in TARGETS[table]:
        outcomes = [
            (head.device.name, judge(target, head, rows)) for head, rows in found if _is_of(target, head.device)
        ]
        wanted = "CPU" if target.devices == CPU else " or ".join(target.devices)
        for device, (status, measured, why) in outcomes or [(wanted, UNMEASURED)]:
            told = "" if measured is None else f"{measured:.2g}" if target.measure == "error" else f"{measured:.2f}"
            lines.append(f"| {target.claim} | {target.case} | {device} | **{status}** | {told} | {why} |")
    return lines


def _is_of(target: Target, device: Device) -> bool:
    return target.devices == CPU if device.kind == "cpu" else any(name in device.name for name in target.devices)


def judge(target: Target, head: Head, rows: Sequence[Row]) -> Outcome:
    """A failure of ours misses every target."""
    of_case = [row for row in rows if row.case.partition(", KL")[0] == target.case]
    present = [name for name in target.ours if any(row.implementation == name for row in of_case)]
    mine = [row for row in of_case if row.implementation in present[:1]]
    other = next((row for row in of_case if row.implementation == target.against), None)
    bad = next((row for row in mine if row.status in BAD), None)
    if bad:
        return "missed", None, f"{bad.implementation} {bad.status}: {bad.note}"
    if target.measure == "copies":
        measured, why = _copies(rows)
    elif not mine or mine[0].status != "ok":
        return "unmeasured", None, f"skipped: {mine[0].note}" if mine else "the case is not in the report"
    elif target.measure == "error":
        measured, why = _error(mine)
    elif target.measure == "plan":
        ratio = mine[0].get("plan over measured")
        measured, why = (None if ratio is None else abs(ratio - 1)), "the plan over what was measured, less 1"
    elif target.measure == "tokens":
        measured, why = mine[0].get("rate"), mine[0].implementation
    elif target.measure == "seconds":
        time = mine[0].values["time"]
        measured, why = (time.high or 0.0) / 1e3, f"the longest of {time.count}"
    elif other is None or other.status != "ok":
        state = "is not in the report" if other is None else f"{other.status}: {other.note}"
        return "unmeasured", None, f"{target.against} {state}"
    else:
        measured, why = _ratio(target.measure, mine[0], other, head)
    if measured is None:
        return "unmeasured", None, why
    reached = measured >= target.bound if CLAIMS[target.measure][1] else measured <= target.bound
    return ("met" if reached else "missed"), measured, why


def _ratio(measure: str, ours: Row, other: Row, head: Head) -> tuple[float | None, str]:
    what = {"peak": "peak", "pace": "rate"}.get(measure, "time")
    mine, theirs = ours.get(what), other.get(what)
    if not mine or not theirs:
        return None, f"{what} is missing"
    package = PACKAGES.get(other.implementation)
    version = f" {head.versions.get(package)}" if package else ""
    why = (f"{ours.implementation} {number(ours.values[what])}, {other.implementation}{version} "
           f"{number(other.values[what])}")  # fmt: skip
    if measure in ("time", "peak", "pace"):
        return mine / theirs, why
    tokens = (ours.get("answer_tokens") or 0.0) / (other.get("answer_tokens") or 1.0)
    return theirs / mine * (tokens if measure == "rate" else 1.0), why


def _copies(rows: Sequence[Row]) -> tuple[float | None, str]:
    """The context's keys and values during a call over those of batch size 1, the worst of all rows."""
    ours = [row for row in rows if row.implementation.startswith("opcd_fast") and row.get("prefix")]
    copies = [(row.get("prefix") or 0.0) / (row.get("one_prefix") or float("inf")) for row in ours]
    batches = ", ".join(str(batch) for batch in sorted({row.shape["batch"] for row in ours}))
    why = f"{len(ours)} rows, batches of {batches}" if ours else "no row says what it held"
    return max(copies, default=None), why


def _error(mine: Sequence[Row]) -> tuple[float | None, str]:
    """The largest gradient error over the accuracy rows of the case."""
    kls = [row.get("mean_kl") or 0.0 for row in mine]
    if min(kls) > 1.2 * KL_RANGE[0] or max(kls) < 0.8 * KL_RANGE[1]:
        return None, "no errors over that range"
    of = [name for name in ("dL/dh", "dL/dW") if name in mine[0].values]
    errors = [row.get(name) or 0.0 for row in mine for name in of]
    return max(errors), f"{mine[0].implementation}, {' and '.join(of)}, {len(errors)} comparisons"
