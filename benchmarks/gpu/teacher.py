"""Hidden states of many answers after one long context: ours beside the context in every sequence and transformers'
own cache. The first layers of Qwen3-8B, random weights."""

from __future__ import annotations

from functools import cache

from benchmarks import teacher
from benchmarks.schema import BOUND, Values, value
from benchmarks.session import Session
from benchmarks.teacher_cases import cases, make_model, references

LAYERS = 8
WANTED = (BOUND, teacher.OURS_BUILT, "transformers-cache", teacher.CONCAT, teacher.OURS_REBUILT)


def run(session: Session) -> None:
    case = cases(session.device, session.dry)[0]
    made = cache(lambda: make_model(session.device, session.dry, None if session.dry else LAYERS))
    about: dict[str, str] = {}

    def build() -> Values:
        model, name, note = made()
        about.update(model=name, note=note)
        return {"weights": value(sum(p.nbytes for p in model.parameters()), "bytes")}

    if session.row("model", build, settings=about) is None:
        return
    model, name, _ = made()
    exact = references(model, [case]).get(case.name)
    teacher.measure(session, case, model, name, exact, only=WANTED, seconds=6.0, needs=3)
