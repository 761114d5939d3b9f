"""What a server is given, adapters and other weights, and what it says that it has."""

import shutil
import sys

import pytest
import torch
from test_rollout_server import PROMPTS, FixedWeights, Process, assert_drawn_by, rollout
from tiny import lora_model, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.rollout import CommandWeights, LoRAWeights, ServerRollout


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    process = Process(folder)
    yield process
    process.stop()


@pytest.fixture
def server(running):
    running.cards()
    return running


def move(model, factor):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(factor)


def test_the_adapter_follows(server, tmp_path):
    model = lora_model()
    engine = rollout(server, LoRAWeights(tmp_path / "adapters"))
    since = len(server.log())
    for _ in range(2):
        engine.sync(model)
        engine.sync(model)  # nothing moved: nothing is sent
        assert_drawn_by(model, PROMPTS, engine.generate(PROMPTS, max_new_tokens=5))
        move(model, -3)
    moves = [entry for entry in server.log(since) if entry[0] != "completion"]
    assert [kind for kind, _ in moves] == ["load", "load", "unload"]
    first, second, gone = (name for _, name in moves)
    assert first != second and gone == first
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [second]
    with pytest.raises(InputError, match="lora_rank"):
        engine.sync(tiny_model())
    with pytest.raises(InputError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or give rollout_command"):
        bare = ServerRollout(f"{server.url}/elsewhere", stop_token_ids=[1], weights=LoRAWeights(tmp_path / "b"))
        bare.sync(model)


def test_runs_do_not_share_an_adapter(server, tmp_path):
    """vLLM may read an adapter's files again: a run must not get the name of one that was removed."""
    model, used, since = lora_model(), [], len(server.log())
    for folder in (tmp_path / "first", tmp_path / "again", tmp_path / "again"):
        engine = rollout(server, LoRAWeights(folder), patience=1)
        engine.sync(model)
        used.append(engine._model_name)
        assert_drawn_by(model, PROMPTS[:2], engine.generate(PROMPTS[:2], max_new_tokens=3))
        if folder.name == "first":
            shutil.rmtree(folder)
    assert len(set(used)) == 3
    gone = [name for kind, name, *_ in server.log(since) if kind == "unload"]
    assert gone == [used[1]], "an earlier process's adapter goes"


def test_what_the_server_can_never_load_is_asked_for_once(server, tmp_path):
    since = len(server.log())
    with pytest.raises(InputError, match="rank 16 is greater than max_lora_rank 8.*start it with --max-lora-rank 16"):
        rollout(server, LoRAWeights(tmp_path / "a")).sync(lora_model(rank=16))
    assert [kind for kind, *_ in server.log(since)] == ["refused"]


HERE = {"id": "base", "root": "/models/Qwen3-1.7B", "parent": None, "max_model_len": 64}


@pytest.mark.parametrize(
    ("cards", "options", "message"),
    [
        ([HERE], {"base": "Qwen/Qwen3-8B"}, "serves '/models/Qwen3-1.7B', .* 'Qwen/Qwen3-8B'.*rollout_model='base'"),
        ([HERE], {"base": "Qwen/Qwen3-1.7B", "longest": 65}, "room for 64 tokens.* 65; .*--max-model-len 65"),
        ([HERE], {"base": "Qwen/Qwen3-1.7B", "longest": 64}, None),
        ([HERE], {"base": "base"}, None),
        ([{"id": "other"}], {"base": "Qwen/Qwen3-8B"}, "serves 'other'"),
        ([HERE, {"id": "b", "root": "/x/qwen3-8b"}], {"base": "Qwen/Qwen3-8B", "longest": 64}, None),
        ([{**HERE, "parent": "x"}], {"base": "Qwen/Qwen3-8B"}, None),
        ([], {"base": "Qwen/Qwen3-8B", "longest": 10**6}, None),
    ],
)  # fmt: skip
def test_the_servers_model_is_compared_before_anything_is_drawn(server, cards, options, message):
    server.cards(*cards)
    since = len(server.log())
    engine = ServerRollout(server.url, stop_token_ids=[1], weights=FixedWeights("base"), tries=1, **options)
    if message is None:
        engine.sync(None)
    else:
        with pytest.raises(InputError, match=message):
            engine.sync(None)
    assert server.log(since) == []


def test_a_folder_is_the_same_model_and_a_copy_of_it_is_not(server, tmp_path):
    here, copy = tmp_path / "a" / "model", tmp_path / "b" / "model"
    for folder in (here, copy):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(here)
    server.cards({**HERE, "root": str(here)})
    for base, same in ((here, True), (tmp_path / "link", True), (copy, False)):
        engine = ServerRollout(server.url, stop_token_ids=[1], weights=FixedWeights("base"), base=str(base))
        if same:
            engine.sync(None)
        else:
            with pytest.raises(InputError, match="where they are the same weights, set rollout_model='base'"):
                engine.sync(None)


def test_other_servers_get_the_weights_by_a_command(server, tmp_path):
    model, note, script = lora_model(), tmp_path / "seen", tmp_path / "reload.py"
    script.write_text(f"import sys, os; open({str(note)!r}, 'a').write(' '.join(os.listdir(sys.argv[1])))")
    engine = rollout(server, CommandWeights(tmp_path / "w", "base", f"{sys.executable} {script}"))
    for times in (1, 2):
        engine.sync(model)
        engine.sync(model)
        assert note.read_text().count("adapter_model.safetensors") == times
        move(model, 2)
    assert len(engine.generate(PROMPTS, max_new_tokens=2)) == len(PROMPTS)
    found = lambda path: "other" if (path / "config.json").exists() else None  # noqa: E731
    whole = CommandWeights(tmp_path / "whole", "base", found)
    assert whole.push(engine.server, tiny_model()) == "other"
    for command, message in [
        (f"{sys.executable} -c 'import sys; sys.exit(\"no such gpu\")'", "status 1: no such gpu"),
        ("/nowhere/reload", "cannot be run: No such file"),
        (f"{sys.executable} -c 'import time; time.sleep(5)'", "did not end within 0.2 s"),
    ]:
        with pytest.raises(InputError, match=f"rollout_command.*{message}"):
            limit = 0.2 if "sleep" in command else 60
            CommandWeights(tmp_path / "x", "base", command, timeout=limit).push(engine.server, model)
