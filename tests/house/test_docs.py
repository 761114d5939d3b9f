"""The pages of docs/: links lead somewhere, commands have the options that are shown, and nothing is left out."""

import ast
import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest

import opcd_fast
from opcd_fast.cli import main
from opcd_fast.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
TWO_LEVELS = ("train", "preview")
FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2$", re.DOTALL | re.MULTILINE)
REFERENCE = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(text: str) -> set[str]:
    """Targets of links and pictures, but for those on other hosts."""
    found = re.findall(r"\]\(([^()\s]+)\)", text)
    return {target for target in found if not re.match(r"\w+:", target)}


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        twice = sum(re.fullmatch(re.escape(slug) + r"(-\d+)?", one) is not None for one in found)
        found.add(f"{slug}-{twice}" if slug in found else slug)
    return found


def broken(page: Path, text: str) -> list[str]:
    wrong = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        heading = anchor and there.suffix == ".md"
        if not there.exists() or heading and anchor not in anchors(text if there == page else prose(there)):
            wrong.append(target)
    return sorted(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    assert not broken(page, prose(page))


def test_a_broken_link_is_found():
    page = ROOT / "docs" / "index.md"
    text = "# A `b`: c, d\n[1](#a-b-c-d) [2](data.md#prompts) [3](../README.md) [4](https://nowhere.example)\n"
    assert not broken(page, text)
    assert broken(page, text + "[5](#a-b) [6](data.md#no) [7](no.md) ![8](../no.png)") == [
        "#a-b", "../no.png", "data.md#no", "no.md",
    ]  # fmt: skip


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/-]+\.md", menu)) == pages


def test_the_reference_has_every_public_name():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| public through its door |")[1].split("\n\n")[0]
    rows = [line.rsplit("|", 2)[1] for line in table.splitlines() if line.startswith("| `")]
    public = set(re.findall(r"`(\w+)`", " ".join(rows)))
    public |= set(opcd_fast.__all__) - {"__version__"}
    there = "\n".join(REFERENCE.values())
    assert len(public) > 30
    assert not [name for name in sorted(public) if not re.search(rf"\b{name}\b", there)]


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_names_of_the_reference_exist(page):
    for name in re.findall(r"^::: (\S+)$", REFERENCE[page], re.MULTILINE):
        module, _, last = name.rpartition(".")
        if module.endswith((".trl", ".transformers")):
            pytest.importorskip(module.rpartition(".")[2])
        assert getattr(importlib.import_module(module), last) is not None


def shown_commands() -> dict[str, list[list[str]]]:
    """Words of each `opcd ...` line in the blocks of all pages, by the command's name."""
    found: dict[str, list[list[str]]] = {}
    for page in PAGES:
        for _, _, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines() if language in ("bash", "sh", "console") else []:
                words = line.removeprefix("$ ").split("  #")[0]
                if words.startswith("opcd "):
                    name, *more = shlex.split(words)[1:]
                    found.setdefault(name, []).append(more)
    return found


SHOWN = shown_commands()


@pytest.mark.parametrize("name", SHOWN)
def test_commands_have_the_options_that_pages_show(name, capsys):
    pytest.importorskip("tyro")
    assert name in COMMANDS
    with contextlib.suppress(SystemExit):
        main([name, "--help-all" if name in TWO_LEVELS else "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    used = {word.partition("=")[0] for words in SHOWN[name] for word in words if word.startswith("--")}
    assert {re.sub("^--no-", "--", word) for word in used} <= known | {"--help"}


def said_in_the_code() -> list[str]:
    """Every text in the package, without what is put into it."""
    found = []
    for path in [*(ROOT / "opcd_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found += [part.value for part in node.values if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_symptoms_are_what_the_code_says():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    texts = said_in_the_code()
    assert len(symptoms) > 20
    assert not [symptom for symptom in symptoms if not any(symptom in text for text in texts)]
