"""What a run leaves on disk and on screen: whole files or none, plain lines outside a terminal, a picture."""

import io
import sys

import pytest
import torch

from opcd_fast import OPCDConfig
from opcd_fast.errors import InputError
from opcd_fast.runtime import write_folder
from opcd_fast.training.engines import Ranks
from opcd_fast.training.monitoring.plots import plot_run
from opcd_fast.training.monitoring.progress import Progress, seconds_ahead, seconds_by_part
from opcd_fast.training.run import RunFolder
from opcd_fast.training.run import checkpoints as checkpoint


def test_a_failed_write_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    target = tmp_path / "final"
    write_folder(target, lambda folder: (folder / "a").write_text("old"))

    def fail(folder):
        (folder / "a").write_text("new")
        raise RuntimeError("power cut")

    def check(name, text):
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        assert [(path.name, path.read_text()) for path in target.iterdir()] == [(name, text)]

    with pytest.raises(InputError, match="power cut"):
        write_folder(target, fail)
    check("a", "old")
    inner, calls = type(target).rename, []

    def interrupted(self, to):  # between the two renames
        calls.append(to)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(self, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(target), "rename", interrupted)
        write_folder(target, lambda folder: (folder / "a").write_text("new"))
    check("a", "old")
    write_folder(target, lambda folder: (folder / "b").write_text("newer"))
    check("b", "newer")


def test_checkpoints_round_trip_and_only_the_newest_stay(tmp_path):
    weights = {"w": torch.randn(3, 2), "b": torch.randn(2, dtype=torch.float64)}
    for step in (1, 2, 10):
        saved = checkpoint.Saved(weights, {"state": {0: {"step": step}}}, {"w": weights["w"] + step})
        checkpoint.save_checkpoint(tmp_path, step, saved, {"identity": {}}, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]
    loaded, state = checkpoint.load_checkpoint(tmp_path / "step-000010")
    assert all(torch.equal(loaded.weights[name], weights[name]) for name in weights)
    assert torch.equal(loaded.teacher["w"], weights["w"] + 10) and set(loaded.teacher) == {"w"}
    assert loaded.optimizer == {"state": {0: {"step": 10}}} and state["step"] == 10
    for step in (999_999, 1_000_000):
        checkpoint.save_checkpoint(tmp_path / "long", step, saved, {"identity": {}}, keep=1)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "long")] == ["step-1000000"]
    (tmp_path / "step-000011").mkdir()  # half written, it is none
    (tmp_path / "step-000011" / checkpoint.WEIGHTS).write_bytes(b"half")
    assert checkpoint.list_checkpoints(tmp_path)[-1].name == "step-000010"


def test_a_killed_run_may_leave_half_a_line(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.start({"output_dir": "run"})
    for step in (1, 2, 3):
        folder.log({"kind": "step", "step": step, "loss": 1.0})
        if step == 2:
            folder.save(2, checkpoint.Saved({"w": torch.zeros(1)}, {}), {"seed": 0}, keep=1)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "st')
    step, _, records = RunFolder(tmp_path / "run", resume=True).restore({"seed": 0}, 9)
    assert step == 2 and [record["step"] for record in records] == [1, 2]
    with pytest.raises(InputError, match="seed differs"):
        RunFolder(tmp_path / "run", resume=True).restore({"seed": 1}, 9)


def test_all_ranks_meet_equally_often_in_what_one_of_them_writes(tmp_path):
    """Or else they wait for each other for ever."""
    met = []
    for rank in (0, 1):
        ranks, calls = Ranks(alone=True), []
        ranks.rank, ranks.world = rank, 2
        ranks.gather = lambda value, calls=calls: calls.append("gather") or [None, None]
        ranks.broadcast = lambda value, calls=calls: calls.append("broadcast")
        folder = RunFolder(tmp_path / str(rank), resume=False, ranks=ranks)
        folder.start({})
        folder.write_config({})
        folder.log({"kind": "step", "step": 1})
        folder.save(1, checkpoint.Saved({"w": torch.zeros(1)}, {}), {}, keep=1)
        folder.save_best({"step": 1}, lambda folder: None)
        folder.write_samples([])
        met.append(calls)
    assert met[0] == met[1] == ["gather", "broadcast"] * 7
    assert not (tmp_path / "1").exists() and (tmp_path / "0" / "config.json").exists()


def record_of(loss, step=1, speed=100.0):
    return {
        "step": step, "kind": "step", "loss": loss, "kl_per_token": loss / 2, "tokens_per_second": speed,
        "response_length": 9.0, "student_entropy": 1.5, "seconds": {"rollout": 3.0, "teacher": 1.0},
    }  # fmt: skip


def test_time_ahead_by_the_first_evaluation():
    seconds = {"rollout": 8.0, "teacher": 1.0, "student": 2.0, "loss": 0.5}

    def ahead(**changed):
        config = OPCDConfig(**{
            "steps": 10, "eval_every": 5, "batch_size": 16, "rollouts_per_prompt": 1, "lora_rank": 4, **changed
        })  # fmt: skip
        return seconds_ahead(seconds, 8, config)

    evaluation = 8 + 2 * 3.5
    assert ahead() == pytest.approx(10 * (12 + 2 * (1 + 4 + 1)) + 2 * evaluation)
    assert ahead(eval_every=10) == pytest.approx(ahead() - evaluation)
    assert ahead(rollout="replay", rollout_file="x") == pytest.approx(ahead() - 10 * 12)
    assert ahead(objective="nll", answers="teacher") == pytest.approx(ahead() - 10 * 2)
    for more in ({"lora_rank": 0}, {"gradient_checkpointing": True}):
        assert ahead(**more) == pytest.approx(ahead() + 10 * 4), "a forward more"


def test_progress_outside_a_terminal_is_plain_lines(capsys, monkeypatch):
    clock = iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr("opcd_fast.training.monitoring.progress.time.perf_counter", lambda: next(clock))
    progress = Progress(total=6, done=1)
    progress.step(record_of(0.5))
    progress.evaluation("held-out", {"step": 2, "own_kl": 1.0})
    progress.step(record_of(0.25, speed=120.0))
    progress.step(record_of(0.125))
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 2/6  loss 0.5000  KL 0.2500  100 tokens/s  0:16 left",  # its parts: the clock saw an evaluation, too
        "held-out",
        "step 3/6  loss 0.2500  KL 0.1250  120 tokens/s  0:30 left",  # without the first step
        "step 4/6  loss 0.1250  KL 0.0625  100 tokens/s  0:30 left",
    ]


def test_the_end_tells_where_the_time_went():
    line = seconds_by_part([record_of(1.0), {**record_of(1.0), "seconds": {"rollout": 5.0, "teacher": 1.0}}])
    assert line == "seconds a step: 5.00 = rollout 4.00 (80%) + teacher 1.00 (20%)"


def test_plots_are_pictures_of_what_they_say(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    stacked, drawn = [], []
    stack, plot = Axes.stackplot, Axes.plot
    monkeypatch.setattr(Axes, "stackplot", lambda self, *a, **k: stacked.append(a) or stack(self, *a, **k))
    lines = lambda self, *a, **k: drawn.append([list(v) for v in a[:2]]) or plot(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(Axes, "plot", lines)
    history = [record_of(1.0 / i, i) for i in range(1, 9)]
    plot_run(tmp_path, history, [{"step": 0, "own_kl": 1.0, "fixed_kl": 2.0}, {"step": 8, "own_kl": 0.1}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.png", "kl.png", "seconds.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    steps = list(range(1, 9))
    assert stacked == [(steps, [[3.0] * 8, [1.0] * 8])]
    assert drawn == [
        [steps, [1.0 / i for i in steps]], [[0, 8], [1.0, 0.1]], [[0], [2.0]], [steps, [9.0] * 8], [steps, [1.5] * 8],
    ]  # fmt: skip
    plot_run(tmp_path / "nowhere", [], [])  # nothing to draw yet


def test_a_run_without_a_checkpoint_is_started_over(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.start({})
    folder.log({"kind": "step", "step": 1})
    for name in ("checkpoints/.step-000002.abc.opcd-new", "rollout_weights/.weights.abc.opcd-new"):
        (tmp_path / "run" / name).mkdir(parents=True)
    for name in (".rollout.json.abc.opcd-new", ".mine"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(InputError, match="start without resume"):
        RunFolder(tmp_path / "run", resume=True)
    again = RunFolder(tmp_path / "run", resume=False)
    again.start({})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == [".mine"]


def test_the_live_display_draws_one_bar_and_gives_the_cursor_back(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(total=2)
    progress.note("held-out after step 0: top-1 [agreement] 0.0%")
    progress.step(record_of(0.5, 1))
    progress.evaluation("held-out: [b]", {"step": 1, "own_kl": 0.75})
    progress.step(record_of(0.4, 2))
    progress.close()
    text = screen.getvalue()
    for words in ("0.7500 after step 1", "rollout 3.00  teacher 1.00", "0.2000 nats", "100 tokens/s", "left"):
        assert words in text
    assert "2/2" in text and "0/0" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "held-out after step 0: top-1 [agreement] 0.0%" in text
