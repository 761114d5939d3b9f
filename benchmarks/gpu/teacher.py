"""Hidden states of many answers after one long context: ours beside the context in every sequence and transformers'
own cache. The first layers of Qwen3-8B, random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

from torch import Tensor

from benchmarks.gpu.session import Session, Skip, Values
from benchmarks.measure import SLOW, release, timed, with_peak
from benchmarks.phase_rows import times, value
from benchmarks.schema import BOUND
from benchmarks.teacher_cases import Case, Setting, cases, make_model, make_setting, references
from benchmarks.teacher_implementations import CONCAT, OURS_BUILT, OURS_REBUILT, Implementation, implementations

LAYERS = 8
WANTED = (BOUND, OURS_BUILT, "transformers-cache", CONCAT, OURS_REBUILT)


def run(session: Session) -> None:
    case = cases(session.device, session.dry)[0]
    made = cache(lambda: make_model(session.device, session.dry, None if session.dry else LAYERS))
    setting = cache(lambda: make_setting(made()[0], case))
    exact = cache(lambda: references(made()[0], [case])[case.name])
    shape = {"context": case.context, "response": case.response, "batch": case.batch, "layers": LAYERS}
    about: dict[str, str] = {}

    def build() -> Values:
        model, name, note = made()
        about.update(model=name, note=note)
        exact()
        release(session.device)
        return {"weights": value(sum(p.nbytes for p in model.parameters()), "bytes")}

    if session.row("model", build, shape=shape, settings=about) is None:
        return
    bound: Values | None = None
    for name in WANTED:
        one = cache(partial(_chosen, case, setting, name))
        found = session.row(name, partial(_measure, session, case, one, setting, exact, bound), shape=shape, needs=3)
        bound = found if name == BOUND else bound
        release(session.device)


def _chosen(case: Case, setting: Callable[[], Setting], name: str) -> Implementation:
    return next(one for one in implementations(case, setting()) if one.name == name)


def _measure(
    session: Session,
    case: Case,
    chosen: Callable[[], Implementation],
    setting: Callable[[], Setting],
    exact: Callable[[], Tensor],
    bound: Values | None,
) -> Values:
    one = chosen()
    if one.skip:
        raise Skip(one.skip)
    contender = one.build(setting())
    (contender.warm or contender.call)()
    start = time.perf_counter()
    hidden, peak, _ = with_peak(contender.call, session.device)
    slow = time.perf_counter() - start > SLOW
    values: Values = {}
    if one.name != BOUND:
        ends = hidden.view(case.batch, case.response, -1)[[0, -1]].float()
        values["max_error"] = value(float((ends - exact()).abs().max()), "1")
        values["prefix"] = value(contender.held(), "bytes")
        values["at_once"] = value(contender.at_once or case.batch, "1")
        if peak is not None:
            values["peak"] = value(peak, "bytes")
    del hidden
    found = timed(contender.call, session.device, 2.0, slow=slow)
    first = times(found)
    first["flops"] = value(one.flops, "FLOP")
    if bound is not None and bound["time"].value and bound["flops"].value:
        limit = one.flops / bound["flops"].value * bound["time"].value
        first["of_limit"] = value(limit / found.median, "1")
    return first | values
