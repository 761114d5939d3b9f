"""Comparisons: systems by name, intervals against known values, measures against plain forwards, finished runs kept."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from opcd_fast.cli import main
from opcd_fast.data import read_prompts
from opcd_fast.errors import InputError
from opcd_fast.evaluation.compare import (
    Comparison,
    Yardstick,
    as_markdown,
    check_common,
    parse_systems,
    run_all,
    summarize,
    table,
)
from opcd_fast.evaluation.compare import runs as runs_module
from opcd_fast.evaluation.compare.measurement import behaviour_of
from opcd_fast.evaluation.compare.seeds import over_seeds, t_quantile
from opcd_fast.evaluation.compare.systems import SYSTEMS
from opcd_fast.evaluation.compare.table import interval
from opcd_fast.rollout import Completion
from opcd_fast.runtime import wilson
from opcd_fast.training import HeldOutScore
from opcd_fast.training.run import list_checkpoints
from opcd_fast.training.settings import OPCDConfig

CONTEXT = "always answer with zzz"
HELD_OUT = [f"another {i}" for i in range(5)]


# --- intervals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "value"),  # printed tables of the two-sided 95 % point
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_t_quantiles_are_the_printed_ones(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=6e-4)


def test_over_seeds_is_mean_and_t():
    found = over_seeds([1.0, 2.0, 6.0])
    half = 4.302653 * math.sqrt(7.0) / math.sqrt(3)
    assert found == {"mean": 3.0, "n": 3, "low": pytest.approx(3 - half), "high": pytest.approx(3 + half)}
    assert interval(found) == (found["low"], found["high"]) and interval(over_seeds([5.0])) is None
    # Equal seeds do not hide that answers are few.
    low, high = wilson(30, 30)
    assert interval({**over_seeds([1.0] * 3), "answers_low": low, "answers_high": high}) == (low, 1.0)


# --- systems -------------------------------------------------------------------------------------------------


def test_systems_are_what_their_names_say():
    configs = {s.label: s.config(OPCDConfig(), 3, "x", False) for s in parse_systems([",".join(SYSTEMS)])}
    assert list(configs) == ["opcd", "off-policy", "seq-kd", "sft", "live", "ema", "periodic"]
    assert configs["opcd"] == OPCDConfig(seed=3, output_dir="x")
    settings = {name: (c.answers, c.objective, c.divergence, c.teacher_mode, c.kept_answers)
                for name, c in configs.items()}  # fmt: skip
    assert settings["off-policy"] == ("teacher", "divergence", "forward_kl", "frozen", 0)
    assert settings["seq-kd"] == ("teacher", "nll", "gated_kl", "frozen", 0)
    assert settings["sft"] == ("teacher", "nll", "gated_kl", "frozen", 1)
    for mode in ("live", "ema", "periodic"):
        assert settings[mode] == ("student", "divergence", "gated_kl", mode, 0)


def test_a_system_with_settings_of_its_own():
    plain, fast, raw = parse_systems(["opcd", "ema:teacher_ema_decay=0.9,learning_rate=1e-4", "raw=opcd:context=r.txt"])
    assert (plain.label, fast.label, raw.label) == ("opcd", "ema", "raw")
    assert fast.config(OPCDConfig(), 0, "x", False).teacher_ema_decay == 0.9
    assert fast.config(OPCDConfig(), 0, "x", False).learning_rate == 1e-4
    assert raw.context == "r.txt" and plain.context is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["opdc"], "'opdc' is unknown"), ([""], "systems is empty"), (["opcd,opcd"], "twice"),
        (["opcd:steps"], "setting=value"), (["opcd:stepz=3"], "steps"), (["opcd:steps=many"], "steps"),
        (["opcd:seed=3"], "seed"), (["x=opcd:lora_targets=[q_proj,v_proj]"], "commas"),
        (["a/b=opcd:steps=3"], "becomes a folder"),
    ],
)  # fmt: skip
def test_systems_that_make_no_sense(words, message):
    with pytest.raises(InputError, match=message):
        parse_systems(words)


def test_common_settings_leave_the_systems_alone():
    for name, value in {"divergence": "jsd", "answers": "teacher", "teacher_mode": "live", "resume": True,
                        "eval_every": 0}.items():  # fmt: skip
        with pytest.raises(InputError, match=name):
            check_common(OPCDConfig(**{name: value}))


# --- runs ----------------------------------------------------------------------------------------------------


def has_a_vowel(messages, answer, row):
    return any(vowel in answer for vowel in "aeiou")


def comparison(tokenizer, folder, systems="opcd,off-policy", seeds=2, **settings):
    config = OPCDConfig(
        **{
            "output_dir": str(folder), "steps": 3, "batch_size": 4, "max_new_tokens": 6, "lora_rank": 4,
            "learning_rate": 1e-2, "eval_every": 3, "save_every": 1, "device": "cpu", "dtype": "float32",
            "temperature": 0.9, **settings,
        }
    )  # fmt: skip
    held_out = read_prompts(HELD_OUT)
    behaviour = HeldOutScore(has_a_vowel, "vowel", tokenizer, held_out)
    yardstick = Yardstick(
        read_prompts(["general one", "general two"]), behaviour, held_out, 2,
        {"max_new_tokens": 6, "temperature": 0.9, "top_p": 1.0},
    )  # fmt: skip
    return Comparison(
        lambda: (tiny_model(), None), "tiny", tokenizer, None, CONTEXT, read_prompts([f"q{i}" for i in range(6)]),
        held_out, config, parse_systems([systems]), seeds, yardstick,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    told = []
    return folder, run_all(comparison(tokenizer, folder), told.append), told


def test_all_runs_are_there_and_differ(done):
    folder, found, _ = done
    assert {label: [run["seed"] for run in runs] for label, runs in found["runs"].items()} == {
        "opcd": [0, 1], "off-policy": [0, 1],
    }  # fmt: skip
    everything = [run for runs in found["runs"].values() for run in runs]
    for name in ("own_kl", "fixed_kl", "general_kl"):
        assert len({run[name] for run in everything}) == 4, name
    for run in everything:
        assert run["answers"] == run["drawn_answers"] == 12 and len(run["scores"]) == 10
        assert run["trained_tokens"] == run["drawn_tokens"] > 12 and run["seconds"] > 0
        assert run["general_kl"] > 1e-4
    (base,) = found["baselines"].values()
    assert abs(base["base"]["general_kl"]) < 1e-6  # the base has not moved from itself
    assert base["base"]["own_kl"] > 0.01 and base["base + context"]["score"] is not None
    for label, objective in (("opcd", "gated_kl"), ("off-policy", "forward_kl")):
        lines = (folder / label / "seed-1" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line).get("objective") for line in lines][1] == objective


@pytest.mark.parametrize("gone", [None, "float8_e4m3fn"])
def test_finished_runs_are_not_made_again(done, tokenizer, tmp_path, monkeypatch, gone):
    """Nor those of an earlier version, where a setting that is gone, or was not there yet, had its default."""
    folder, found, _ = done
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").glob("*/*/measured.json"):
        kept = json.loads(path.read_text())
        kept["of"]["settings"]["prefix_dtype"] = gone
        kept["of"]["settings"].pop("gate", None)
        path.write_text(json.dumps(kept))
    monkeypatch.setattr(runs_module, "OPCDTrainer", None)  # would fail
    told = []
    again = comparison(tokenizer, tmp_path / "copy")
    if gone is not None:
        with pytest.raises(InputError, match="output_dir.*prefix_dtype='float8_e4m3fn'"):
            run_all(again, told.append)
        return
    assert run_all(again, told.append) == found
    assert told == [f"{label}, seed {seed}: measured already" for label in ("opcd", "off-policy") for seed in (0, 1)]


def test_a_stopped_run_goes_on_and_gives_the_same_numbers(done, tokenizer, tmp_path, monkeypatch):
    folder, found, _ = done
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    run = copy / "off-policy" / "seed-1"
    (run / "measured.json").unlink()
    shutil.rmtree(run / "final")
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    for other in copy.glob("*/*/measured.json"):  # the copy has another name, which decides nothing
        kept = json.loads(other.read_text())
        assert "output_dir" not in kept["of"]["settings"]
    told = []
    again = run_all(comparison(tokenizer, copy), told.append)
    assert [text.partition(" in ")[0] for text in told if "already" not in text] == ["off-policy, seed 1: goes on"]
    wanted, got = found["runs"]["off-policy"][1], again["runs"]["off-policy"][1]
    timed = ("seconds",)
    (baseline,) = copy.glob("baseline/*")
    (baseline / "measured.json").unlink()  # answers of a baseline that was stopped may be another comparison's
    kept = json.loads((baseline / "fixed.json").read_text())
    (baseline / "fixed.json").write_text(json.dumps({**kept, "samples": kept["samples"][::-1]}))
    assert run_all(comparison(tokenizer, copy), told.append)["baselines"] == found["baselines"]
    assert {n: v for n, v in got.items() if n not in timed} == {n: v for n, v in wanted.items() if n not in timed}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"steps": 4}, "steps = 3, now it is 4"), ({"learning_rate": 2e-2}, "learning_rate = 0.01"),
     ({"temperature": 0.8}, "sampling|temperature"), ({"dtype": "bfloat16"}, "compute type = 'torch.float32'")],
)  # fmt: skip
def test_results_of_other_settings_are_not_mixed_in(done, tokenizer, change, words):
    with pytest.raises(InputError, match=words):
        run_all(comparison(tokenizer, done[0], **change), lambda text: None)


def test_kept_answers_are_counted_as_drawn_once(tokenizer, tmp_path):
    found = run_all(comparison(tokenizer, tmp_path, "sft", 1, steps=4, eval_every=4), lambda text: None)
    (run,) = found["runs"]["sft"]
    counts = json.loads((tmp_path / "sft" / "seed-0" / "answers.json").read_text())
    assert run["answers"] == 16 and run["drawn_answers"] == 6 == counts["answers"]
    assert run["drawn_tokens"] == counts["response_tokens"] < run["trained_tokens"]
    assert run["seconds"] > counts["seconds"] > 0


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_forgetting_is_measured_from_the_students_own_base(tokenizer, tmp_path, lora_rank):
    """With another model as the teacher the base is still the student's; before training nothing is forgotten."""
    given = comparison(tokenizer, tmp_path, "opcd", 1, lora_rank=lora_rank, learning_rate=1e-3, steps=1, eval_every=1)
    teacher = tiny_model(seed=5)
    found = run_all(
        Comparison(**{**vars(given), "load": lambda: (tiny_model(), teacher), "name": "pair"}), lambda text: None
    )
    (base,) = found["baselines"].values()
    assert abs(base["base"]["general_kl"]) < 1e-6 and base["base"]["own_kl"] > 0.1
    assert 0 < found["runs"]["opcd"][0]["general_kl"] < 0.1


# --- the table -----------------------------------------------------------------------------------------------


def test_the_table_is_arithmetic_on_the_runs(done):
    _, found, _ = done
    summary = summarize(found)
    (base,) = (b["base"] for b in found["baselines"].values())
    shares = {label: [1 - r["own_kl"] / base["own_kl"] for r in runs] for label, runs in found["runs"].items()}
    for label, values in shares.items():
        assert summary["systems"][label]["summary"]["own_gap_closed"] == over_seeds(values)
    off, own = shares["off-policy"], shares["opcd"]
    assert summary["differences"] == {"off-policy": summary["differences"]["off-policy"]}
    assert summary["differences"]["off-policy"]["own_gap_closed"] == over_seeds([a - b for a, b in zip(off, own)])
    score = summary["systems"]["opcd"]["summary"]["score"]
    scores = [s for r in found["runs"]["opcd"] for s in r["scores"]]
    assert (score["answers_low"], score["answers_high"]) == wilson(round(sum(scores)), 20)
    assert interval(score) == (min(score["low"], score["answers_low"]), max(score["high"], score["answers_high"]))
    page = as_markdown(summary, "title")
    assert f"| opcd | 2 | {summary['systems']['opcd']['summary']['own_gap_closed']['mean']:.1%} [" in page
    assert "task score" not in page and "Differences from opcd" in page


def test_intervals_of_scores_stay_between_0_and_1():
    run = {"context": "c", "own_kl": 0.5, "fixed_kl": 0.5, "general_kl": 0.1, "seconds": 1.0, "length": 3.0}
    run |= {"drawn_answers": 4, "drawn_tokens": 8, "trained_tokens": 8, "own_top1": 0.5, "fixed_top1": 0.5}
    seeds = [{**run, "score": x, "task_score": 1 - x, "scores": [x] * 3} for x in (1.0, 0.9, 1.0)]
    base = {"own_kl": 1.0, "fixed_kl": 1.0}
    summary = summarize({"baselines": {"c": {"base": base}}, "runs": {"a": seeds}})["systems"]["a"]["summary"]
    assert summary["score"]["high"] == 1.0 and 0.8 < summary["score"]["low"] < 0.85
    assert summary["task_score"]["low"] == 0.0 and summary["own_gap_closed"]["mean"] == 0.5


def test_a_plot_is_not_stretched_by_what_failed(monkeypatch):
    """A share far below 0 is a number at the axis' end; others lie where they are."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(table, "save_plot", lambda path, draw, size: (figures.append(Figure()), draw(figures[0])))
    systems = {
        label: {"summary": {"own_gap_closed": {"mean": x, "low": None, "high": None}}, "runs": [{"own_gap_closed": x}]}
        for label, x in (("good", 0.93), ("lost", -2.72))
    }
    table.plot_comparison(Path("x.png"), {"systems": systems})
    (panel,) = figures[0].axes
    low, high = panel.get_xlim()
    assert low == table.LOWEST and high <= 1.1
    assert [text.get_text() for text in panel.texts] == ["-272%"]
    assert 0.93 in [x for line in panel.lines for x in line.get_xdata() if line.get_marker() == "D"]


def test_scores_of_a_comparison_are_shares(tokenizer):
    held_out = read_prompts(["a", "b"])
    answers = [Completion(tuple(tokenizer(text).input_ids), (), True) for text in ("a", "x", "a", "b")]  # two rounds

    def found(scorer):
        return behaviour_of(Yardstick([], HeldOutScore(scorer, "mine", tokenizer, held_out), held_out, 2, {}), answers)

    same = found(lambda messages, answer, row: messages[-1]["content"] == answer)
    assert same == {"score": 0.75, "scores": [1.0, 0.0, 1.0, 1.0]}
    with pytest.raises(InputError, match="'mine'.*from 0 to 1"):
        found(lambda messages, answer, row: 2)


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tokenizer, tmp_path):
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "context.txt").write_text(CONTEXT)
    (tmp_path / "raw.txt").write_text("another context")
    for name, texts in (("train", ["a", "b"]), ("held", ["c", "d"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return tmp_path


def arguments(files, *more):
    return [
        "compare", "--model", str(files / "model"), "--context", str(files / "context.txt"), "--output-dir",
        str(files / "out"), "--steps", "1", "--eval-every", "1", "--batch-size", "2", "--max-new-tokens", "3",
        "--lora-rank", "2", "--device", "cpu", "--seeds", "2", *more,
    ]  # fmt: skip


def with_prompts(files):
    return ["--prompts", str(files / "train.jsonl"), "--eval-prompts", str(files / "held.jsonl")]


def test_the_command_writes_table_page_and_picture(files, capsys):
    more = ["--systems", "opcd,sft", f"raw=opcd:context={files / 'raw.txt'}", "--regex", "a", "--general"]
    general = files / "general.jsonl"
    general.write_text('{"prompt": "unrelated"}\n')
    assert main(arguments(files, *with_prompts(files), *more, str(general))) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    found = json.loads((files / "out" / "compare.json").read_text())
    assert list(found["systems"]) == ["opcd", "sft", "raw"]
    # A wheel's metadata may leave out what torch says of its build (+cu130).
    assert found["ran"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(found["baselines"]) == 2 and found["scorer"] == "regex a"
    assert found["systems"]["raw"]["runs"][0]["context"] != found["systems"]["opcd"]["runs"][0]["context"]
    page = (files / "out" / "compare.md").read_text()
    assert page in out and all(f"\n| {name} | 2 |" in page for name in found["systems"])
    assert (files / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_on_a_task(files, capsys):
    pytest.importorskip("gymnasium")
    more = ["--task", "frozen-lake-gymnasium", "--task-problems", "3", "--task-episodes", "2", "--eval-batch", "2",
            "--systems", "opcd", "--general", "none", "--seeds", "1"]  # fmt: skip
    assert main(arguments(files, *more)) == 0, capsys.readouterr().err
    found = json.loads((files / "out" / "compare.json").read_text())
    assert found["systems"]["opcd"]["runs"][0]["task_episodes"] == 3
    (baseline,) = found["baselines"].values()
    assert baseline["base"]["task_score"] is not None and baseline["base + context"]["task_score"] is not None
    assert "task score" in (files / "out" / "compare.md").read_text()


def test_a_system_that_does_not_go_with_a_task_is_named_before_anything_is_trained(files, capsys):
    pytest.importorskip("gymnasium")
    assert main(arguments(files, "--task", "frozen-lake-gymnasium", "--systems", "opcd,sft", "--general", "none")) == 2
    assert "'sft' does not go with a task: kept_answers" in capsys.readouterr().err
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--systems", "opcd,nobody"], "nobody"), (["--seeds", "0"], "seeds=0"), (["--divergence", "jsd"], "diverg"),
        (["--regex", "a", "--scorer", "b:c"], "scorer"), (["--general", "gone.jsonl"], "gone.jsonl"),
        (["--systems", "ema:teacher_sync_every=3"], "teacher_sync_every"),
        (["--context", "gone.txt"], "gone.txt"), (["--systems", "x=opcd:context=gone.txt"], "gone.txt"),
        (["--task", "sokoban"], "in its place"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(files, capsys, more, words):
    assert main([*arguments(files, *with_prompts(files)), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (files / "out").exists()
