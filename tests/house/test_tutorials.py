"""The blocks of docs/tutorials/ run one after the other, as they are written but for the size of things.

A tiny random model takes the place of SmolLM2; there are two steps, and few tokens. Data of other packages is stood in
for. Lines that install something or start an experiment are left out, and blocks of `console` and `text` are not run.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from tiny import tiny_model, tiny_tokenizer

from opcd_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
CHEAPER = {"--steps": "2", "--max-new-tokens": "4", "--max-prompts": "3", "--lora-rank": "4"}
LEFT_OUT = ("make ", ". .venv", "python -", "ls ", "opcd prompts ")  # of a random model no question comes


def blocks(page, *languages):
    text = (TUTORIALS / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what a checkout has, and the prepared data of the experiments."""
    for name in ("examples", "experiments", "opcd_fast"):
        (tmp_path / name).symlink_to(ROOT / name)
    rows = [json.dumps({"prompt": f"question {i}"}) for i in range(30)]
    for name, context in (("policy", "context.txt"), ("article", "context.json")):
        data = tmp_path / "runs" / "experiments" / "data" / name
        data.mkdir(parents=True)
        turns = [{"role": "system", "content": "zzz"}, {"role": "user", "content": "a"}]
        turns.append({"role": "assistant", "content": "b"})
        (data / context).write_text("one rule\n\nanother rule\n" if name == "policy" else json.dumps(turns))
        for file in ("train_prompts.jsonl", "eval_prompts.jsonl"):
            (data / file).write_text("\n".join(rows))
    model = tmp_path / "smollm2"
    tiny_model(max_position_embeddings=4096).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(page):
    """Words of each `opcd` line of a page; files that `cat` writes are written."""
    for block in blocks(page, "bash"):
        for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", block, re.DOTALL | re.MULTILINE):
            Path(name).write_text(text)
        lines = re.sub(r"^cat > .*?^END\n", "", block, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
        for line in lines.splitlines():
            assert line.startswith(("opcd ", *LEFT_OUT)), line
            if not line.startswith(LEFT_OUT):
                yield shlex.split(line)[1:]


def cheaper(words):
    """The same with less to do. `--max-new-tokens` and `--steps` are given where a run would have defaults."""
    words = [CHEAPER.get(before, word) for before, word in zip(["", *words], words)]
    words = ["./smollm2" if word == "smollm2" else word for word in words]
    if words[0] == "train":
        words += [x for name in ("--steps", "--max-new-tokens") if name not in words for x in (name, CHEAPER[name])]
        words += ["--eval-every", "2", "--eval-batch", "2", "--batch-size", "2", "--preview", "1", "--no-plots"]
    if words[0] == "report":
        words += ["--max-prompts", "2"]
    return words


@pytest.mark.parametrize(("page", "run"), [("system-prompt", ["preview", "train", "generate", "report"]),
                                           ("few-shot", ["preview", "preview", "train", "report"]),
                                           ("policy", ["plan", "preview", "compress"]),
                                           ("article", ["preview"])])  # fmt: skip
def test_the_commands_run(page, run, folder, capsys):
    ran = []
    for words in commands(page):
        status = main(cheaper(words))
        assert status == 0 or (words[0] in ("preview", "plan") and status == 1), (words, capsys.readouterr().err)
        ran.append(words[0])
    assert ran == run
    if "report" in run:
        assert len(list((folder / "runs").glob("*/report.html"))) == 1


def test_the_first_tutorial_has_at_most_six_commands():
    lines = "".join(blocks("system-prompt", "bash")).replace("\\\n", " ").splitlines()
    assert len(lines) <= 6


def test_turns_that_are_shown_are_those_of_the_files():
    files = {"system-prompt": "examples/bike_shop/context.json", "few-shot": "experiments/persona/turns.json"}
    for page, file in files.items():
        (shown,) = map(json.loads, blocks(page, "json"))
        assert shown == json.loads((ROOT / file).read_text(encoding="utf-8"))[: len(shown)]


def test_the_loss_in_your_own_trainer(folder, capsys):
    names: dict = {}
    for code in blocks("own-trainer", "python"):
        exec(compile(code.replace('"smollm2"', '"./smollm2"'), "docs/tutorials/own-trainer.md", "exec"), names)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10 and min(losses[-3:]) < losses[0]
    with torch.no_grad(), names["model"].disable_adapter():  # the teacher of the last block is that of the loop
        plain = names["states"](names["first"], names["answers"][0])
    row, answer = len(names["rows"][0]), len(names["answers"][0])
    found = names["hidden"][row - answer - 1 : row - 1]
    torch.testing.assert_close(found.float(), plain.float(), rtol=0.02, atol=0.05)


def test_the_scorer_of_the_article():
    names: dict = {}
    exec(blocks("article", "python")[0], names)
    assert names["has_the_answer"]([], "It is in BRAZIL.", {"answers": ["Peru", "Brazil"]}) == 1.0
    assert names["has_the_answer"]([], "No idea.", {"answers": ["Peru"]}) == 0.0
