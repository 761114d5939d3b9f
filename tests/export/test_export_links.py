"""A run's folder from somebody else may hold links to files that are not its own: they are not exported."""

import pytest
from test_export import make_run, save_base

from opcd_fast.cli import main
from opcd_fast.errors import InputError
from opcd_fast.export import ExportOptions, export


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates", "tokenizer.json"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_link_out_of_the_run_is_refused(tmp_path, name, merged, capsys):
    base = save_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    secret = tmp_path / "secret"
    if name.endswith("templates"):
        secret.mkdir()
        (secret / "x.jinja").write_text("not yours")
    else:
        secret.write_text("not yours")
    (run / "final" / name).unlink(missing_ok=True)
    (run / "final" / name).symlink_to(secret)
    arguments = ["export", str(run), "--output-dir", str(tmp_path / "out"), *["--merged"] * merged]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert str(run / "final" / name) in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_links_inside_and_a_snapshot_of_the_hub_are_files(tmp_path):
    base = save_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    final, blobs = run / "final", tmp_path / "hub" / "blobs"
    (final / "template").write_text((final / "chat_template.jinja").read_text())
    (final / "chat_template.jinja").unlink()
    (final / "chat_template.jinja").symlink_to("template")
    export(run, tmp_path / "a")
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in final.iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / file.name)
    export(snapshot, tmp_path / "b", ExportOptions(model=base))
    (snapshot / "more.jinja").symlink_to(run / "config.json")
    with pytest.raises(InputError, match="more.jinja"):
        export(snapshot, tmp_path / "c", ExportOptions(model=base))
