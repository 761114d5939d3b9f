"""What is written by asking models: prompts for a context, lessons, shorter texts."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.contexts.asking import ask
    from opcd_fast.contexts.compression import (
        FULL, Candidate, Ranked, cut_candidates, parts_that_matter, plot_ranked, rank, written_candidates,
    )  # fmt: skip
    from opcd_fast.contexts.experience import ExperienceFolder, accumulate, extract, select
    from opcd_fast.contexts.lessons import as_traces, lessons_of_notes, within_budget, without_similar
    from opcd_fast.contexts.player import Player, token_counter

__getattr__, __dir__, __all__ = door(__name__)
