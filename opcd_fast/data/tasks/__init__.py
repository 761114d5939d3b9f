"""Tasks with honest scorers, one kind a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

__getattr__, __dir__, __all__ = door(
    __name__,
    {
        "episode": ("Episode", "Task", "as_user", "final_part"),
        "loading": ("TASKS", "load_task", "options_of"),
        "player": ("Played", "play", "play_with"),
    },
)

if TYPE_CHECKING:
    from opcd_fast.data.tasks.episode import Episode, Task, as_user, final_part
    from opcd_fast.data.tasks.loading import TASKS, load_task, options_of
    from opcd_fast.data.tasks.player import Played, play, play_with
