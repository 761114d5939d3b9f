"""Frozen Lake and Sokoban as text games of several turns, on textarena's and gymnasium's environments.

Every turn is one question: the rules, what happened so far and the present board. An episode scores 1 when it is won
and 0 otherwise; environments that reward progress are not asked. The environments draw from global random streams;
those of the caller are left as they were.
"""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from opcd_fast.data import Message, require
from opcd_fast.data.tasks.episode import as_user, check_split, final_part, identity, split_of
from opcd_fast.errors import InputError

RULES = """\
You cross a frozen lake. P is where you stand, G the goal, H a hole in the ice and . safe ice.
Each turn you move one field: [up], [down], [left] or [right]. A hole ends the game, so does the goal.

"""
ASK_MOVE = "\n\nThink about the board, then choose one action. Write it in brackets, like [up]."
PATIENCE = 200  # boards drawn in vain, one after another, before boards repeat
SHARES = (0.25, 0.25, 0.25, 0.25)  # small boards are few: no split may be left with one or two
DIRECTIONS = {"left": 0, "down": 1, "right": 2, "up": 3}  # gymnasium's numbers
_MOVE = re.compile(r"\[\s*(up|down|left|right)\s*\]", re.IGNORECASE)


def frozen_lake(size: int = 3, max_turns: int = 5) -> Games:
    """textarena's FrozenLake, `size` x `size` with 1 to 3 holes."""
    _textarena("FrozenLake-v0")  # now, not after an hour of sampling
    game = partial(TextarenaGame, "FrozenLake-v0", max_turns=max_turns, size=size)
    return Games("frozen-lake", max_turns, lambda seed, index: game(seed, num_holes=1 + index % 3))


def sokoban(boxes: int = 1, max_turns: int = 15) -> Games:
    """textarena's Sokoban, 6 x 6 with `boxes` boxes."""
    _textarena("Sokoban-v0")
    return Games("sokoban", max_turns, lambda seed, _: TextarenaGame("Sokoban-v0", seed, max_turns, num_boxes=boxes))


def gymnasium_frozen_lake(size: int = 3, max_turns: int = 5) -> Games:
    """gymnasium's FrozenLake-v1 without slipping, drawn as text; boards of `size` x `size`."""
    require("gymnasium", "the game FrozenLake-v1", "tasks")
    return Games("frozen-lake-gymnasium", max_turns, lambda seed, index: GymnasiumLake(size, seed, max_turns))


class Games:
    """A task of games. A board belongs to one split alone."""

    def __init__(self, name: str, max_turns: int, game: Callable[[int, int], Game]) -> None:
        """game: from a seed of the environment and the game's number."""
        self.name, self.max_turns, self._game = name, max_turns, game

    def episodes(self, split: str, count: int, seed: int = 0) -> list[Any]:
        """Different boards while there are any, then the same ones again."""
        check_split(split)
        games: list[Game] = []
        seen: set[str] = set()
        index = in_vain = 0
        while len(games) < count:
            # Below 2**31, which all environments take.
            drawn = self._game(int(identity(f"game {seed} {index}"), 16) % (2**31 - 64), index)
            index, in_vain = index + 1, in_vain + 1
            if split_of(drawn.id, SHARES) == split and (drawn.id not in seen or (seen and in_vain > PATIENCE)):
                seen.add(drawn.id)
                games.append(drawn)
                in_vain = in_vain if in_vain > PATIENCE else 0
            elif not seen and in_vain > 50 * PATIENCE:
                raise InputError(f"split={split!r}: no board of this size belongs to it; use a larger size")
        return games


class Game(ABC):
    """One game as an episode. What the environment shows and does is a subclass's."""

    def __init__(self, board: str, max_turns: int) -> None:
        self.board, self.id = board, identity(board)
        self.score: float | None = None
        self.feedback = ""
        self._turns, self._max_turns = 0, max_turns

    @abstractmethod
    def messages(self) -> list[Message]: ...

    @abstractmethod
    def _step(self, move: str | None, text: str) -> tuple[bool, str] | None:
        """Whether the game was won and why, when it is over. move: up, down, left, right or, where none is named, None;
        text: the whole answer."""

    def answer(self, text: str) -> None:
        """Take a move: the last one named, for models weigh several before they choose."""
        text = final_part(text)
        moves = _MOVE.findall(text)
        self._turns += 1
        outcome = self._step(moves[-1].lower() if moves else None, text)
        if outcome is None and self._turns >= self._max_turns:
            outcome = False, f"The limit of {self._max_turns} moves was reached."
        if outcome is not None:
            won, reason = outcome
            self.score = float(won)
            self.feedback = f"{'You won.' if won else 'You lost.'} {reason}".strip()


class TextarenaGame(Game):
    """A single-player game of textarena."""

    def __init__(self, game: str, seed: int, max_turns: int, **options: Any) -> None:
        self._game = _textarena(game, **options)
        with _own_random_streams():
            self._game.reset(num_players=1, seed=seed)
        self._seen = self._game.get_observation()[1].strip()
        super().__init__(self._seen, max_turns)

    def messages(self) -> list[Message]:
        return as_user(self._seen + ASK_MOVE)

    def _step(self, move: str | None, text: str) -> tuple[bool, str] | None:
        # Text around a move is cut off: the board of the next turn shows what was done, not why.
        over, _ = self._game.step(f"[{move}]" if move else text[-80:] or "nothing")
        if over:
            rewards, infos = self._game.close()
            return rewards[0] == 1, str(infos[0].get("reason", "") if infos else "")
        self._seen = self._game.get_observation()[1].strip()
        return None


class GymnasiumLake(Game):
    """A game of gymnasium's FrozenLake-v1."""

    def __init__(self, size: int, seed: int, max_turns: int) -> None:
        import gymnasium
        from gymnasium.envs.toy_text.frozen_lake import generate_random_map

        with _own_random_streams():
            self._map = generate_random_map(size=size, p=0.7, seed=seed)
            self._game = gymnasium.make("FrozenLake-v1", desc=self._map, is_slippery=False)
            self._place, _ = self._game.reset(seed=seed)
        self._told = ""
        super().__init__(self._drawn(), max_turns)

    def messages(self) -> list[Message]:
        return as_user(f"{RULES}{self._told}Current board:\n{self._drawn()}{ASK_MOVE}")

    def _step(self, move: str | None, text: str) -> tuple[bool, str] | None:
        if move is None:
            self._told = "Your last answer named no move in brackets.\n"
            return None
        self._place, reward, over, _, _ = self._game.step(DIRECTIONS[move])
        self._told = f"Your last move was [{move}].\n"
        return (reward == 1, "" if reward == 1 else "You fell into a hole.") if over else None

    def _drawn(self) -> str:
        rows = [list(row.replace("F", ".").replace("S", ".")) for row in self._map]
        rows[int(self._place) // len(rows)][int(self._place) % len(rows)] = "P"
        return "\n".join(" ".join(row) for row in rows)


def _textarena(game: str, **options: Any) -> Any:
    return require("textarena", f"the game {game}", "tasks").make(game, **options)


@contextmanager
def _own_random_streams() -> Iterator[None]:
    import numpy

    kept = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        numpy.random.set_state(kept[1])
