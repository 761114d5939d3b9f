"""What the site has beside its pages: files of the repository that pages link to, and readable docstrings."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="needs the docs extra: pip install 'opcd-fast[docs]'")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))


def on_site(page, text):
    from docs_site import on_page_markdown

    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return on_page_markdown(text, page=file, config=None, files=None)


@pytest.mark.parametrize(
    ("page", "link", "wanted"),
    [
        ("data.md", "[a](training.md#settings)", "[a](training.md#settings)"),
        ("tutorials/policy.md", "[a](../data.md)", "[a](../data.md)"),
        ("data.md", "[a](../CHANGELOG.md)", "[a](files/CHANGELOG.md)"),
        ("tutorials/policy.md", "![a](../../experiments/persona.py#x)", "![a](../files/experiments/persona.py#x)"),
        ("files/experiments/README.md", "[a](../docs/data.md)", "[a](../../data.md)"),
        ("data.md", "[`results/`](../experiments/results) [b](#c) [d](https://e.f/g.md)",
         "`results/` [b](#c) [d](https://e.f/g.md)"),
        ("data.md", "```\n[a](../CHANGELOG.md)\n```\n", "```\n[a](../CHANGELOG.md)\n```\n"),
    ],
)  # fmt: skip
def test_links_lead_to_the_same_file_on_the_site(page, link, wanted):
    assert on_site(page, link) == wanted


def test_files_that_are_linked_to_become_part_of_it():
    from docs_site import targets

    text = "[1](../CHANGELOG.md) [2](training.md) [3](../experiments) [4](../no.md) [5](../../etc/passwd)"
    assert targets("data.md", text) == {"CHANGELOG.md"}


def test_the_tables_of_settings_and_commands():
    text = on_site("x.md", "<!-- settings -->\n<!-- commands -->")
    assert "| `lora_rank` | `0` |" in text and "| `opcd train` |" in text


def test_arguments_become_a_list():
    from docstrings import listed

    text = "It adds.\n\na, b: numbers,\nboth finite.\nsign: of b.\n    Or None.\n\nNote: more.\nc: not an argument."
    before, after = "It adds.\n\n\n", "\n\nNote: more.\nc: not an argument."
    items = "- `a, b`: numbers,\nboth finite.\n- `sign`: of b.\n    Or None."
    assert listed(text, {"a", "b", "sign"}) == before + items + after
