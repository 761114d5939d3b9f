"""Pushing to the Hub: huggingface_hub as it is, against a server on loopback that speaks the endpoints it uses."""

import json

import pytest
from hub_server import Hub
from test_export import make_run, refused, save_base

from opcd_fast.cli import main
from opcd_fast.export import ExportOptions, check_can_push, export, push
from opcd_fast.export.hub import is_hub_id


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is no part of the server here
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield server
    server.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("pushed")
    return make_run(root / "run", save_base(root / "base"))


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    export(run, root / "adapter", ExportOptions(base_name="somebody/base"))
    export(run, root / "merged", ExportOptions(merged=True, max_shard_size="40KB"))
    return root


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_push_is_one_commit_of_every_file(hub, folders):
    for form in ("adapter", "merged"):
        assert push(folders / form, f"me/{form}", private=form == "adapter").startswith(f"{hub.url}/me/{form}/commit")
        repo = hub.repos[f"me/{form}"]
        assert repo["files"] == contents(folders / form)
        assert len(repo["commits"]) == 1 and repo["private"] == (form == "adapter")


def test_a_second_push_replaces_the_first(hub, folders):
    push(folders / "merged", "me/x", private=False)
    hub.repos["me/x"]["files"].update({"README.md": b"mine", "picture.png": b"mine", ".gitattributes": b"mine"})
    push(folders / "adapter", "me/x", private=False)
    kept = dict.fromkeys(("README.md", "picture.png", ".gitattributes"), b"mine")
    assert hub.repos["me/x"]["files"] == {**contents(folders / "adapter"), **kept}
    assert len(hub.repos["me/x"]["commits"]) == 2


@pytest.mark.parametrize("part", ["preupload", "lfs/objects", "blobs", "/commit/"])
def test_a_push_that_fails_leaves_the_repository_as_it_was(hub, folders, part):
    push(folders / "merged", "me/x", private=False)
    before, hub.blobs = dict(hub.repos["me/x"]["files"]), {}
    hub.fail[part] = 403
    refused(lambda: push(folders / "adapter", "me/x", private=False), "push_to_hub", "refused", part)
    assert hub.repos["me/x"]["files"] == before and len(hub.repos["me/x"]["commits"]) == 1


def test_what_is_wrong_is_seen_before_anything_is_made(hub, monkeypatch):
    hub.repos["me/open"] = {"private": False, "files": {}, "commits": []}
    assert check_can_push("new", private=True) == "me/new"
    assert check_can_push("org/new", private=False) == "org/new"
    assert check_can_push("me/open", private=False) == "me/open"
    refused(lambda: check_can_push("me/open", private=True), "private", "public")
    refused(lambda: check_can_push("no such/name", private=True), "push_to_hub='no such/name'")
    hub.role = "read"
    refused(lambda: check_can_push("new", private=True), "only read")
    hub.role = "write"
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused(lambda: check_can_push("new", private=True), "token", "hf auth login")
    monkeypatch.delenv("HF_TOKEN")
    refused(lambda: check_can_push("new", private=True), "no token", "HF_TOKEN")
    assert list(hub.repos) == ["me/open"]
    assert not any(method != "GET" for method, _ in hub.requests)


def test_no_network_and_no_wish_for_one(hub, folders, monkeypatch):
    from huggingface_hub import constants

    hub.fail["whoami"] = 500
    refused(lambda: check_can_push("x", private=False), "500")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens to "discard"
    refused(lambda: check_can_push("x", private=False), "cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import close_session

    close_session()
    refused(lambda: check_can_push("x", private=False), "HF_HUB_OFFLINE")
    close_session()


def test_an_adapter_that_nobody_could_load_is_not_pushed(hub, run, tmp_path, monkeypatch):
    export(run, tmp_path / "out")
    refused(lambda: push(tmp_path / "out", "me/x", private=False), "--base-name", "--merged")
    assert not hub.repos
    assert is_hub_id("a/b-c.d") and not is_hub_id("smollm2") and not is_hub_id("/a/b") and not is_hub_id("./b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("a/b")


# --- the command line --------------------------------------------------------------------------------------------


def test_push_from_the_command_line(hub, run, tmp_path, capsys):
    arguments = ["export", str(run), "--push-to-hub", "pirate", "--merged", "--private", "--without-card"]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert f"pushed: {hub.url}/me/pirate/commit" in capsys.readouterr().out
    assert hub.repos["me/pirate"]["files"] == contents(tmp_path / "out")
    assert hub.repos["me/pirate"]["private"]


def test_push_without_a_folder_leaves_none(hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ["export", str(run), "--push-to-hub", "me/x", "--base-name", "somebody/base", "--without-card"]
    assert main(arguments) == 0
    settings = json.loads(hub.repos["me/x"]["files"]["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "somebody/base"
    assert not list(tmp_path.iterdir())
    hub.fail["/commit/"] = 403
    assert main(arguments) == 2
    assert not list(tmp_path.iterdir())
    out = tmp_path / "out"
    assert main([*arguments, "--output-dir", str(out)]) == 2  # the export stays whole
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("more", "token", "words"),
    [
        (["--merged"], "good", ("model card", "opcd report", "--without-card")),
        (["--without-card"], "good", ("--base-name", "--merged")),
        (["--without-card", "--merged", "--dtype", "int3"], "good", ("dtype",)),
        (["--without-card", "--base-name", "./here"], "good", ("--base-name",)),
        (["--without-card", "--merged"], "bad", ("hf auth login",)),
    ],
)
def test_refusals_come_before_the_work(hub, run, tmp_path, capsys, monkeypatch, more, token, words):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("opcd_fast.export.folder.export", lambda *a, **k: pytest.fail("exported"))
    arguments = ["export", str(run), "--output-dir", str(tmp_path / "out"), "--push-to-hub", "me/x", *more]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not hub.repos and not (tmp_path / "out").exists()
