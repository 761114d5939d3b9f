"""docs/export.md: commands and snippets run as they stand, but for other programs'."""

import json
import re
import shlex
from pathlib import Path

from test_export import make_run, save_base
from test_export_hub import hub  # noqa: F401

from opcd_fast.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_runs(hub, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "pirate", save_base(tmp_path / "base"))
    (tmp_path / "questions.jsonl").write_text(json.dumps({"prompt": "Hello?"}) + "\n")
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 6 and all(line.startswith("opcd ") for line in commands)
    for line in commands:
        words = shlex.split(line)[1:]
        if "--push-to-hub" in words:
            assert main(words) == 2  # no report has been run: as the page says
            assert "opcd report runs/pirate" in capsys.readouterr().err
            words.append("--without-card")
        assert main(words) == 0, line
    assert hub.repos["me/pirate"]["private"] and "config.json" in hub.repos["me/pirate"]["files"]
    assert "adapter_config.json" in hub.repos["me/pirate-adapter"]["files"]

    (line,) = (line for line in commands if "--prompt " in line)
    capsys.readouterr()
    main([*shlex.split(line)[1:], "--dtype", "bfloat16"])  # the type of the file, as the snippet asks for
    answer = capsys.readouterr().out
    snippets = blocks("python")
    assert len(snippets) == 3
    for code in snippets:
        exec(compile(code, "docs/export.md", "exec"), {})
    # The snippet answers as the command does.
    assert capsys.readouterr().out == answer + "<|user|>Where is the harbour?<|end|><|assistant|>\n"
    assert answer.strip()


def test_the_template_for_ollama_is_chatml():
    """The Go template, read by hand: every piece of it in the order in which ChatML's own template writes them."""
    from jinja2 import Template

    (text,) = re.findall(r'^TEMPLATE """(.*?)"""', PAGE, re.DOTALL | re.MULTILINE)
    loop, end = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", text, re.DOTALL).groups()
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    ours = "".join(loop.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages)
    jinja = (Path(__file__).parents[1] / "support" / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    theirs = Template(jinja, trim_blocks=True, lstrip_blocks=True).render(messages=messages, add_generation_prompt=True)
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"  # Qwen2.5's, which the page's has not
    assert default + ours + end == theirs
