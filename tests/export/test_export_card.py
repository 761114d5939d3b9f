"""The card that `opcd report` wrote goes along, fitted to the form of the weights, without context or answers."""

import json
import shutil

import pytest
from report_runs import make_run, save_base
from safetensors.torch import load_file, save_file
from test_export import refused
from test_export_hub import hub  # noqa: F401

from opcd_fast.cli import main
from opcd_fast.export import ExportOptions, export

CONTEXT = "Talk like a pirate, with as many parrots as fit."
QUESTION = "Which way is it to the harbour?"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    root = tmp_path_factory.mktemp("measured")
    held_out = [QUESTION, "Who is there?", "Why?"]
    settings = {"context": CONTEXT, "held_out": held_out, "steps": 2, "eval_every": 0, "learning_rate": 0.05}
    run = make_run(save_base(root / "base"), root / "run", **settings)
    assert main(["report", str(run), "--regex", "parrot"]) == 0
    return run


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_card_goes_along(measured, tmp_path, form):
    out = tmp_path / "out"
    done = export(measured, out, ExportOptions(merged=form == "merged"))
    assert done.has_card
    text, card = (out / "README.md").read_text(), json.loads((out / "opcd_card.json").read_text())
    front = text.split("---")[1]
    assert f"library_name: {'peft' if form == 'adapter' else 'transformers'}\n" in front
    assert ("- lora\n" in front) == card["adapter"] == (form == "adapter")
    first = json.loads((measured / "final" / "opcd_card.json").read_text())
    assert card["kl"] == first["kl"] and card["hashes"] == first["hashes"]
    assert "drawn out" in text
    for file in out.iterdir():
        for words in (CONTEXT, "parrots as fit", QUESTION):
            assert words.encode() not in file.read_bytes(), file
    again = export(out, tmp_path / "again")  # what was exported can be exported
    assert again.has_card and (tmp_path / "again" / "README.md").read_text() == text


def test_a_card_of_other_weights_is_refused(measured, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    file = run / "final" / "adapter_model.safetensors"
    save_file({name: value * 2 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    refused(lambda: export(run, tmp_path / "out"), "other weights", "opcd report")
    shutil.copytree(measured / "final", run / "final", dirs_exist_ok=True)
    (run / "final" / "opcd_card.json").write_text("{}")
    refused(lambda: export(run, tmp_path / "out"), "opcd report")
    assert not (tmp_path / "out").exists()


def test_with_a_card_nothing_else_is_asked(hub, measured):  # noqa: F811
    assert main(["export", str(measured), "--push-to-hub", "me/x", "--merged"]) == 0
    assert b"drawn out" in hub.repos["me/x"]["files"]["README.md"]
