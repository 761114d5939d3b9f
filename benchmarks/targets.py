"""What the library promises of its speed, accuracy and memory, judged from rows alone; nobody types a verdict.

What a test decides, no target repeats: that a planted error in any path is caught, that a layer which did not read its
context is an error, and that a context is never truncated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.schema import BAD, BOUND, OURS, Device, Head, Row

CPU = ("cpu",)  # the devices of a target: every CPU
HOPPER = ("H100", "H200")  # parts of the devices' names
KL_RANGE = (3e-5, 1.0)  # mean KLs that the accuracy rows must reach, within 20 %
PACKAGES = {"trl": "trl", "liger-fused": "liger-kernel", "liger-chunked": "liger-kernel"}
_RATIOS = {"speed": ("time", True), "time": ("time", False), "memory": ("peak", False)}  # of which value; over ours?

Found = Sequence[tuple[Head, Sequence[Row]]]  # the newest run of each device
Outcome = tuple[str, "float | None", str]  # "met", "missed" or "unmeasured"; the measure; what was compared


@dataclass(frozen=True)
class Target:
    """One promise about one case.

    measure: "speed", `against`'s time over ours, and "rate", our answer tokens a second over `against`'s: at least
    `bound`; "time", our time over `against`'s, "memory", our peak over its, "error", our largest gradient error over
    the accuracy rows of the case, "seconds", the longest of our calls: at most `bound`; "copies", the context's keys
    and values during a call over those of batch size 1: exactly `bound` in every row.
    """

    measure: str
    bound: float
    devices: tuple[str, ...]
    case: str
    against: str = ""
    ours: tuple[str, ...] = OURS  # the first that the rows have

    @property
    def claim(self) -> str:
        name = "the bare products" if self.against == BOUND else self.against
        who = f"{self.ours[0]}: " if self.measure == "speed" and self.ours != OURS else ""
        return who + {
            "speed": f"at least {self.bound:.0%} of the speed of {name}" if self.bound < 1
            else f"at least {self.bound:g} times as fast as {name}",
            "time": f"at most {self.bound:g} of the time of {name}" if self.bound != 1 else f"no slower than {name}",
            "rate": f"at least {self.bound:g} times {name}'s scored and trained tokens per second",
            "memory": f"at most {self.bound:.2g} of {name}'s peak memory",
            "error": f"gradient error at most {self.bound:g} at every mean KL from 1 to 3e-5",
            "copies": "keys and values of the context are held exactly once, for any batch",
            "seconds": f"the check at first use takes at most {self.bound:g} s",
        }[self.measure]  # fmt: skip


def _loss(size: str, head: str, *promises: tuple[float, str]) -> tuple[Target, ...]:
    case = f"{size}-n16384-bfloat16-{head}"
    return tuple(Target("speed", bound, HOPPER, case, against) for bound, against in promises)


_SMALL, _KEPT, _REBUILT = "smollm2-135m-n512", ("opcd_fast-merge",), ("opcd_fast-merge-rebuilt",)
_STEP = "1.7b-4k-64x512-checkpointed"
TARGETS: dict[str, tuple[Target, ...]] = {
    "loss": (
        *_loss("qwen3-8b", "full", (0.75, BOUND), (1.4, "trl"), (2.0, "liger-fused")),
        *_loss("qwen3-0.6b", "full", (0.52, BOUND), (1.4, "trl"), (4.0, "liger-fused")),
        *_loss("qwen3-8b", "frozen", (1.5, "trl")),
        *_loss("qwen3-0.6b", "frozen", (1.5, "trl")),
        Target("error", 3e-3, HOPPER, "qwen3-0.6b-n256-bfloat16-full-accuracy"),
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
        Target("time", 0.5, CPU, "demo-bf16-checkpointed", "trl-sdft", ("opcd_fast",)),
        Target("rate", 3.0, HOPPER, _STEP, "trl-sdft", ("opcd_fast",)),
        Target("memory", 1 / 3, HOPPER, _STEP, "trl-sdft", ("opcd_fast",)),
    ),
}


def verdicts(targets: Sequence[Target], found: Found) -> list[tuple[Target, str, Outcome]]:
    """(target, device, outcome) per target and matching device; "unmeasured" where no device matches."""
    judged = []
    for target in targets:
        matching = [(head, rows) for head, rows in found if _matches(target.devices, head.device)]
        judged += [(target, head.device.name, judge(target, head, rows)) for head, rows in matching]
        if not matching:
            wanted = "CPU" if target.devices == CPU else " or ".join(target.devices)
            judged.append((target, wanted, ("unmeasured", None, "no report of such a device")))
    return judged


def markdown(table: str, found: Found) -> list[str]:
    lines = ["| target | case | device | | measured | from |", "|---|---|---|---|---|---|"]
    for target, device, (status, measured, why) in verdicts(TARGETS[table], found):
        told = "" if measured is None else f"{measured:.2g}" if target.measure == "error" else f"{measured:.2f}"
        lines.append(f"| {target.claim} | {target.case} | {device} | **{status}** | {told} | {why} |")
    return lines


def judge(target: Target, head: Head, rows: Sequence[Row]) -> Outcome:
    if target.measure == "copies":
        return _copies(target, rows)
    if target.measure == "error":
        return _error(target, rows)
    of_case = {row.implementation: row for row in rows if row.case == target.case}
    mine = next((of_case[name] for name in target.ours if name in of_case), None)
    if mine is None:
        return "unmeasured", None, "the case is not in the report"
    if mine.status == "skipped":
        return "unmeasured", None, f"{mine.implementation} skipped: {mine.note}"
    if mine.status in BAD:
        return "missed", None, f"{mine.implementation} {mine.status}: {mine.note}"
    if target.measure == "seconds":
        time = mine.values["time"]
        return _at_most(target, (time.high or 0.0) / 1e3, f"the longest of {time.count}")
    other = of_case.get(target.against)
    if other is None or other.status != "ok":
        return "unmeasured", None, f"{target.against} " + (
            "not in the report" if other is None else f"{other.status}: {other.note}"
        )
    what, over_ours = _RATIOS.get(target.measure, ("time", True))
    ours, theirs = mine.get(what), other.get(what)
    if not ours or not theirs:
        return "unmeasured", None, f"{what} is missing"
    why = f"{mine.implementation} {_told(mine, what)}, {_versioned(head, other)} {_told(other, what)}"
    if not over_ours:
        return _at_most(target, ours / theirs, why)
    times = theirs / ours
    if target.measure == "rate":
        times *= (mine.get("answer_tokens") or 0.0) / (other.get("answer_tokens") or 1.0)
    return ("met" if times >= target.bound else "missed"), times, why


def _at_most(target: Target, measured: float, why: str) -> Outcome:
    return ("met" if measured <= target.bound else "missed"), measured, why


def _copies(target: Target, rows: Sequence[Row]) -> Outcome:
    ours = [row for row in rows if row.implementation.startswith("opcd_fast") and row.get("prefix") is not None]
    copies = [(row.get("prefix") or 0.0) / (row.get("one_prefix") or float("inf")) for row in ours]
    if not ours:
        return "unmeasured", None, "no row says what it held"
    worst = max(copies, key=lambda value: abs(value - target.bound))
    batches = ", ".join(str(batch) for batch in sorted({row.shape["batch"] for row in ours}))
    return ("met" if worst == target.bound else "missed"), worst, f"{len(ours)} rows, batches of {batches}"


def _error(target: Target, rows: Sequence[Row]) -> Outcome:
    of_case = [row for row in rows if row.case.partition(", KL")[0] == target.case]
    name = next((name for name in target.ours if any(row.implementation == name for row in of_case)), "ours")
    mine = [row for row in of_case if row.implementation == name]
    if bad := next((row for row in mine if row.status in BAD), None):
        return "missed", None, f"{name} {bad.status}: {bad.note}"
    kls = [kl for row in mine if (kl := row.get("mean_kl")) is not None]
    if not kls or min(kls) > 1.2 * KL_RANGE[0] or max(kls) < 0.8 * KL_RANGE[1]:
        return "unmeasured", None, f"{name} has no errors over that range"
    errors = [error for row in mine for of in ("dL/dh", "dL/dW") if (error := row.get(of)) is not None]
    of = [of for of in ("dL/dh", "dL/dW") if any(of in row.values for row in mine)]
    return _at_most(target, max(errors), f"{name}, {' and '.join(of)}, {len(errors)} comparisons")


def _matches(devices: Sequence[str], device: Device) -> bool:
    if device.kind == "cpu":
        return devices == CPU
    return any(name in device.name for name in devices)


def _told(row: Row, what: str) -> str:
    found = row.get(what) or 0.0
    if what == "peak":
        return f"{found / 2**20:,.0f} MiB"
    return f"{found / 1e3:,.2f} s" if row.table == "step" else f"{found:,.1f} ms"


def _versioned(head: Head, row: Row) -> str:
    package = PACKAGES.get(row.implementation)
    return f"{row.implementation} {head.versions.get(package)}" if package else row.implementation
