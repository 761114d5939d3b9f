"""What is written by asking models: prompts for a context, lessons, shorter texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "compression": ("Candidate", "cut_candidates", "rank", "written_candidates"),
        "experience": ("ExperienceFolder", "Player", "accumulate", "extract", "select"),
        "lessons": ("lessons_of_notes", "token_counter", "without_similar"),
        "prompt_files": ("make_prompts",),
        "traces": ("traces_within_budget",),
    },
)

if TYPE_CHECKING:
    from opcd_fast.contexts.compression import Candidate, cut_candidates, rank, written_candidates
    from opcd_fast.contexts.experience import ExperienceFolder, Player, accumulate, extract, select
    from opcd_fast.contexts.lessons import lessons_of_notes, token_counter, without_similar
    from opcd_fast.contexts.prompt_files import make_prompts
    from opcd_fast.contexts.traces import traces_within_budget
