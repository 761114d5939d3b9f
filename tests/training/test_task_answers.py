"""Tasks as a source of prompts: every turn is a sample, prefixes hold, runs repeat and go on."""

import json
import shutil

import pytest
from tiny import TEMPLATE, prefixed, tiny_model
from training_runs import CONTEXT, losses
from training_runs import make as make_trainer

from opcd_fast.cli import main
from opcd_fast.errors import InputError
from opcd_fast.runtime import wilson
from opcd_fast.training.answers import TaskPrompts, sampling_of
from opcd_fast.training.answers import prompts as task_prompts
from opcd_fast.training.answers.prompts import PROBES


class Counting:
    """Episode k of a split has k % 3 + 1 turns; its score is 1 when the last answer has a vowel."""

    name, max_turns = "counting", 3

    def __init__(self, system=None, size=50):
        self.asked, self._system, self._size = [], system, size

    def episodes(self, split, count, seed=0):
        self.asked.append((split, count, seed))
        start = seed % 1000
        return [CountingEpisode(f"{split} {start + k}", k % 3 + 1, self._system) for k in range(min(count, self._size))]


class CountingEpisode:
    feedback = ""

    def __init__(self, identity, turns, system):
        self.id, self.score, self._turns, self._said, self._system = identity, None, turns, [], system

    def messages(self):
        late = [{"role": "system", "content": "later"}] if self._system == "later" and self._said else []
        start = "\n" if self._said else ""  # other than anything a first turn begins with
        return [*late, {"role": "user", "content": f"{start}{self.id} turn {len(self._said)} {''.join(self._said)!r}"}]

    def answer(self, text):
        self._said.append(text)
        if len(self._said) == self._turns:
            self.score = float(any(vowel in text for vowel in "aeiou"))


def make(tokenizer, folder, task=None, model=None, **settings):
    defaults = {
        "steps": 3, "eval_every": 3, "save_every": 1, "keep_checkpoints": 9, "eval_batch": 5, "task_episodes": 7,
        "eval_prompts": None, "prompts": task or Counting(),
    }  # fmt: skip
    return make_trainer(tokenizer, folder, model or tiny_model(max_position_embeddings=1024), **defaults | settings)


@pytest.mark.parametrize("answers", ["student", "teacher"])
def test_every_turn_is_a_sample_as_the_template_renders_it(tokenizer, tmp_path, answers):
    trainer = make(tokenizer, tmp_path / "run", answers=answers)
    asked = []
    writer, name = (trainer.rollout, "student") if answers == "student" else (trainer.teacher_rollout, "teacher")
    inner = writer.generate
    writer.generate = lambda prompts, **kw: asked.extend(tuple(p) for p in prompts) or inner(prompts, **kw)
    drawn = trainer.source.draw(0)
    assert len(drawn.samples) == 1 + 2 + 3 + 1 and len(drawn.answers) == 7  # turns of four episodes
    said = {}
    for sample, answer, prompt in zip(drawn.samples, drawn.answers, asked, strict=True):
        text = tokenizer.decode(sample.student_prompt).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        identity = text.strip().partition(" turn")[0]
        assert text.strip().endswith(repr("".join(said.get(identity, [])))), "the turn shows what was answered before"
        said.setdefault(identity, []).append(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
        for given, messages in (
            (sample.student_prompt, [{"role": "user", "content": text}]),
            ((*trainer.prefixes[0], *sample.teacher_prompt),
             [{"role": "system", "content": CONTEXT}, {"role": "user", "content": text}]),
        ):  # fmt: skip
            wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert list(given) == wanted
        assert tuple(sample.response) == answer.token_ids
        shown = (*trainer.prefixes[0], *sample.teacher_prompt)
        assert prompt == (tuple(sample.student_prompt) if name == "student" else shown)
        assert (sample.logprobs is None) == (answers == "teacher")
    assert len(trainer.prefixes[0]) > len(CONTEXT)
    won = sum(any(v in texts[-1] for v in "aeiou") for texts in said.values())
    assert drawn.more == {"episodes": 4, "train_task_score": won / 4}


def test_a_run_on_a_task_learns_repeats_and_goes_on(tokenizer, tmp_path):
    task = Counting()
    whole = make(tokenizer, tmp_path / "run", task, steps=4, rollouts_per_prompt=2).train()
    assert [record["answers"] for record in whole.history] == [14] * 4 and len(set(losses(whole))) == 4
    trained = {call for call in task.asked if call[0] == "train" and call[2]}
    assert len(trained) == 4 and {call[0] for call in task.asked} == {"train", "selection"}  # never "test"
    for record in whole.evaluations:
        assert record["task_episodes"] == 7
        low, high = wilson(round(record["task_score"] * 7), 7)
        assert (record["task_score_low"], record["task_score_high"]) == (low, high)
    shutil.rmtree(tmp_path / "run" / "final")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    again = make(tokenizer, tmp_path / "run", steps=4, rollouts_per_prompt=2, resume=True).train()
    assert losses(again) == losses(whole) and again.evaluations == whole.evaluations
    with pytest.raises(InputError, match="differs"):
        make(tokenizer, tmp_path / "run", steps=5, rollouts_per_prompt=2, resume=True, context="another").train()


def test_the_held_out_score_is_that_of_the_trained_student(tokenizer, tmp_path):
    trainer = make(tokenizer, tmp_path / "run", steps=3, learning_rate=5e-2)
    last = trainer.train().evaluations[-1]
    sampling = sampling_of(trainer.config, "task", 0)
    write = trainer.samplers.student_writes
    assert trainer.source.score(write, "selection", 7, sampling)["task_score"] == last["task_score"]
    with trainer.base_weights():
        assert trainer.source.score(write, "selection", 7, sampling)["task_episodes"] == 7
    none = make(tokenizer, tmp_path / "none", task_episodes=0, steps=1).train().evaluations[-1]
    assert "task_score" not in none and none["own_kl"] > 0


def merging_tokenizer():
    """Two newlines are one token, and the template ends a role's header with a newline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE.replace("|>{{ message['content'] }}", "|>\n{{ message['content'] }}")
    return tokenizer


def test_the_prefix_holds_for_turns_that_merge_with_what_stands_before_them(monkeypatch):
    tokenizer = merging_tokenizer()
    prompts = TaskPrompts(Counting(), tokenizer, CONTEXT, 3, 0)
    (newline,) = tokenizer("\n").input_ids
    for text in ("\nboard", "\n\nboard", " x", "selection", "é", ""):
        row = prompts.row([{"role": "user", "content": text}])
        messages = [{"role": "system", "content": CONTEXT}, {"role": "user", "content": text}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert [*prompts.prefixes[0], *row.teacher_ids] == wanted and row.teacher_ids
    assert prompts.prefixes[0][-1] != newline
    assert len(set(PROBES)) == len(PROBES)
    monkeypatch.setattr(task_prompts, "PROBES", ("a", "Z"))  # what would go wrong, and that it is seen
    naive = TaskPrompts(Counting(), tokenizer, CONTEXT, 3, 0)
    with pytest.raises(InputError, match="does not begin with"):
        naive.row([{"role": "user", "content": "\nboard"}])


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        (Counting(size=3), {}, "3 problems in its split 'train', batch_size=4"),
        (None, {"context": None}, "context is missing"),
        (None, {"eval_prompts": ["x"]}, "drop eval_prompts"),
        (None, {"answers": "teacher", "kept_answers": 1}, "kept_answers"),
        (None, {"off_policy_share": 0.5}, "off_policy_share: the turns of a task are played by one"),
        (None, {"answer_growth": 0.5}, "answer_growth: the turns of a task are played by one, with whole answers"),
        (None, {"max_new_tokens": 1000}, "exceed"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tokenizer, tmp_path, task, settings, words):
    with pytest.raises(InputError, match=words):
        make(tokenizer, tmp_path / "run", task, **settings)
    assert not (tmp_path / "run").exists()


def test_turns_that_do_not_fit_are_an_error_not_a_wrong_prefix(tokenizer, tmp_path):
    with pytest.raises(InputError, match="does not begin with"):
        make(tokenizer, tmp_path / "a", Counting(system="later")).train()
    with pytest.raises(InputError, match="exceed"):  # only the third turn is too long
        make(tokenizer, tmp_path / "b", LongTurns()).train()


def test_a_trained_prefix_counts_in_the_window_of_every_turn(tokenizer, tmp_path):
    """The third turn alone is too long, and only by the prefix, which is longer than the teacher's context."""

    def made(window):
        model = prefixed(tiny_model(max_position_embeddings=window), 200)
        return make(tokenizer, tmp_path / "run", LongTurns(), model, lora_rank=0, eval_every=0, task_episodes=0)

    trainer = made(2048)
    longest = max(len(s.teacher_prompt) for s in trainer.source.draw(0).samples) + len(trainer.prefixes[0])
    with pytest.raises(InputError, match="exceeds the model's window"):
        made(longest + 20).source.draw(0)


class LongTurns(Counting):
    def episodes(self, split, count, seed=0):
        made = super().episodes(split, count, seed)
        for episode in made:
            inner = episode.messages
            episode.messages = lambda inner=inner, e=episode: [
                {"role": "user", "content": inner()[-1]["content"] + "x" * 500 * len(e._said)}
            ]
        return made


def test_a_game_from_the_command_line(tokenizer, tmp_path, capsys):
    pytest.importorskip("gymnasium")
    tiny_model(max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("Never step on H.")
    command = [
        "train", "--model", str(tmp_path / "model"), "--context", str(tmp_path / "notes.txt"), "--task",
        "frozen-lake-gymnasium", "--output-dir", str(tmp_path / "run"), "--steps", "1", "--batch-size", "3",
        "--max-new-tokens", "4", "--lora-rank", "2", "--device", "cpu", "--eval-batch", "2", "--task-episodes", "2",
    ]  # fmt: skip
    assert main([*command, "--task-options", '{"max_turns": 2}']) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records] == ["evaluation", "step", "evaluation"]
    assert records[1]["answers"] == 6 and records[1]["episodes"] == 3 and records[0]["task_episodes"] == 2
    capsys.readouterr()
    for more, words in ((["--prompts", "x"], "in its place"), (["--task-options", "{"], "JSON"), ):
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["train", "--model", "M", "--task-options", "{}", "--prompts", "P"]) == 2
    assert "no task" in capsys.readouterr().err
