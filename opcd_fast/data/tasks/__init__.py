"""Tasks with honest scorers, one kind a file."""

from typing import TYPE_CHECKING

from opcd_fast.runtime.doors import door

if TYPE_CHECKING:
    from opcd_fast.data.tasks.episode import SPLITS, Episode, Questions, Task, as_user, final_part
    from opcd_fast.data.tasks.loading import TASKS, load_task, options_of
    from opcd_fast.data.tasks.player import Played, Turn, play_with

__getattr__, __dir__, __all__ = door(__name__)
