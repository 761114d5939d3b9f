"""Folders of older runs: settings that are gone are ignored where a run did not use them, else refused."""

import json
from pathlib import Path

import pytest
from report_runs import CONTEXT, make_run, save_base

from opcd_fast.cli import main
from opcd_fast.errors import InputError
from opcd_fast.training.run import list_checkpoints, run_settings
from opcd_fast.training.settings import OPCDConfig, settings_with

# config.json of a run with all defaults, as an earlier version wrote it.
OLDER = json.loads((Path(__file__).parent / "older_run_config.json").read_text())
USED = {"prefix_store": "somewhere", "prefix_dtype": "float8_e4m3fn", "teacher_tokens": 4}


def age(folder, **settings):
    """Make the run in `folder` one of an earlier version that had `settings`."""
    path = folder / "config.json"
    path.write_text(json.dumps({**OLDER, **json.loads(path.read_text()), **settings}))
    state = list_checkpoints(folder / "checkpoints")[-1] / "state.json"
    kept = json.loads(state.read_text())
    kept["identity"] |= {"prefix_dtype": None, **settings}
    kept["identity"].pop("prefix_store", None)  # it was free on resume
    state.write_text(json.dumps(kept))
    state.with_name("manifest.json").unlink(missing_ok=True)  # later versions write it


@pytest.fixture
def older(tmp_path):
    """A base and a run of it, not yet old."""
    return save_base(tmp_path / "base"), make_run(tmp_path / "base", tmp_path / "run", steps=2, eval_every=2)


def test_an_older_run_goes_on_and_is_reported(older):
    base, run = older
    age(run)
    make_run(base, run, steps=3, eval_every=2, resume=True)
    age(run)
    assert main(["report", str(run), "--max-prompts", "2"]) == 0
    settings = json.loads((run / "opcd_card.json").read_text())["settings"]
    assert settings.keys() == OPCDConfig.__dataclass_fields__.keys() - set(settings_with("machine"))
    assert settings["lora_rank"] == 4
    (base / "context.txt").write_text(CONTEXT)
    assert main(["check", str(run), "--context", str(base / "context.txt")]) == 0


def test_an_older_run_that_used_it_is_refused(older, capsys):
    base, run = older
    without = (run / "config.json").read_text()
    for name, value in USED.items():
        age(run, **{name: value})
        before = (run / "config.json").read_bytes()
        with pytest.raises(InputError, match=name):
            make_run(base, run, steps=3, eval_every=2, resume=True)
        assert (run / "config.json").read_bytes() == before
        with pytest.raises(InputError, match=f"{name}={value!r}, which this version does not know; take it out"):
            run_settings(run)
        assert main(["report", str(run)]) == 2 and name in capsys.readouterr().err
        # Taking it out of the file does not change what the run began with.
        (run / "config.json").write_text(without)
        if name != "prefix_store":
            with pytest.raises(InputError, match=f"{name}={value!r}.*another output_dir"):
                make_run(base, run, steps=3, eval_every=2, resume=True)
