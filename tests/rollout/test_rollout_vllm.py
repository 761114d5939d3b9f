"""The calls made to vLLM, against a stand-in that knows only what vLLM documents. vLLM itself does not run here."""

import importlib.machinery
import multiprocessing
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import lora_model, tiny_model

from opcd_fast.errors import InputError
from opcd_fast.rollout import VLLMRollout


@dataclass
class SamplingParams:
    """The fields of vllm.SamplingParams that may be used; any other keyword is a TypeError."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Engine:
    settings: dict
    calls: list = field(default_factory=list)
    asleep: bool = False
    change: object = None
    dead: bool = False

    def sleep(self, level):
        assert not self.dead, "a call that a dead engine never answers"
        assert not self.asleep and level == 1
        self.asleep = True

    def wake_up(self):
        assert self.asleep
        self.asleep = False

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        assert not self.asleep and len(prompts) == len(sampling_params)
        assert (Path(lora_request.lora_path) / "adapter_model.safetensors").is_file()
        self.calls.append((prompts, sampling_params, lora_request))
        outputs = []
        for prompt, settings in zip(prompts, sampling_params):
            tokens = [settings.seed % 200] * settings.max_tokens
            logprobs = None if settings.logprobs is None else [{t: SimpleNamespace(logprob=-1.5)} for t in tokens]
            answer = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="length")
            outputs.append(SimpleNamespace(prompt_token_ids=list(prompt["prompt_token_ids"]), outputs=[answer]))
        if self.change:
            self.change(outputs)
        return outputs


@pytest.fixture
def engines(monkeypatch):
    made = []
    names = ("vllm", "vllm.inputs", "vllm.lora", "vllm.lora.request", "vllm.platforms")
    vllm, inputs, lora, request, platforms = map(types.ModuleType, names)
    platforms.current_platform = SimpleNamespace(is_sleep_mode_available=lambda: True)
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM = lambda **settings: made.append(Engine(settings)) or made[-1]
    vllm.SamplingParams, inputs.TokensPrompt, request.LoRARequest = SamplingParams, dict, LoRARequest
    for module in (vllm, inputs, lora, request, platforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def rollout(tmp_path, **options):
    return VLLMRollout("base", stop_token_ids=[256], folder=tmp_path / "w", max_lora_rank=4, **options)


def test_the_engine_is_made_exact_and_sleeps_between_calls(engines, tmp_path):
    sampler = rollout(tmp_path, gpu_memory_utilization=0.3, max_model_len=99)
    (engine,) = engines
    assert engine.settings == {
        "model": "base", "enable_lora": True, "max_lora_rank": 8, "enable_sleep_mode": True,
        "gpu_memory_utilization": 0.3, "generation_config": "vllm", "logprobs_mode": "processed_logprobs",
        "max_model_len": 99,
    }  # fmt: skip
    assert engine.asleep
    sampler.sync(lora_model())
    answers = sampler.generate([[1, 2], [3]], max_new_tokens=3, temperature=0.7, top_p=0.9, seed=5)
    assert engine.asleep
    prompts, settings, _ = engine.calls[0]
    assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]
    first = settings[0]
    assert (first.temperature, first.top_p, first.max_tokens, first.stop_token_ids) == (0.7, 0.9, 3, [256])
    assert first.logprobs == 0 and not first.detokenize and settings[1].seed != first.seed
    assert answers[0].token_ids == (first.seed % 200,) * 3 and answers[0].logprobs == (-1.5,) * 3
    assert sampler.generate([[1]], max_new_tokens=2, logprobs=False)[0].logprobs is None
    awake = rollout(tmp_path, sleep=False)
    awake.sync(lora_model())
    awake.generate([[1]], max_new_tokens=2)
    assert not engines[1].asleep and engines[1].settings["enable_sleep_mode"] is False


def test_where_the_platform_has_no_sleep_the_engine_stays_awake(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "is_sleep_mode_available", lambda: False)
    sampler = rollout(tmp_path)
    sampler.sync(lora_model())
    sampler.generate([[1]], max_new_tokens=2)
    assert engines[0].settings["enable_sleep_mode"] is False and not engines[0].asleep
    assert "False" in sampler.explain()


@pytest.mark.parametrize(("rank", "taken"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)])
def test_the_rank_is_one_that_vllm_takes(engines, tmp_path, rank, taken):
    VLLMRollout("base", stop_token_ids=[256], folder=tmp_path, max_lora_rank=rank)
    assert engines[0].settings["max_lora_rank"] == taken
    with pytest.raises(InputError, match="lora_rank=513 is more than vLLM's 512"):
        VLLMRollout("base", stop_token_ids=[256], folder=tmp_path, max_lora_rank=513)


def test_the_packaged_model_is_its_folder(engines, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opcd_fast.rollout.vllm.resolve", lambda name: f"/cache/{name}")
    VLLMRollout("smollm2", stop_token_ids=[256], folder=tmp_path / "w", max_lora_rank=4)
    assert engines[0].settings["model"] == "/cache/smollm2"


@pytest.mark.parametrize("error", [RuntimeError("EngineDeadError"), KeyboardInterrupt()])
def test_an_engine_that_died_is_not_put_to_sleep(engines, tmp_path, error):
    def die(_):
        engines[0].dead = True
        raise error

    sampler = rollout(tmp_path)
    sampler.sync(lora_model())
    engines[0].change = die
    with pytest.raises(type(error)):
        sampler.generate([[1]], max_new_tokens=2)
    engines[0].change, engines[0].dead = None, False  # a Ctrl-C in a notebook: the engine lives, and is awake
    assert sampler.generate([[1]], max_new_tokens=2) and engines[0].asleep


def test_a_script_without_a_main_guard_is_told_so(engines, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(InputError, match="if __name__ == '__main__'"):
        rollout(tmp_path)
    assert engines == []


def test_every_version_of_the_adapter_is_a_new_one(engines, tmp_path):
    sampler, model = rollout(tmp_path), lora_model()
    with pytest.raises(InputError, match=r"call sync\(model\)"):
        sampler.generate([[1]], max_new_tokens=1)
    for _ in range(2):
        sampler.sync(model)
        sampler.sync(model)
        sampler.generate([[1]], max_new_tokens=1)
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "lora_B" in n).mul_(2)
    first, second = (call[2] for call in engines[0].calls)
    assert (first.lora_int_id, second.lora_int_id) == (1, 2) and first.lora_name != second.lora_name
    assert [p.name for p in (tmp_path / "w").iterdir()] == [second.lora_name]
    with pytest.raises(InputError, match="the model has none"):
        sampler.sync(tiny_model())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda o: o.reverse(), RuntimeError, "another order"),
        (lambda o: o.pop(), RuntimeError, "answered 1 of 2"),
        (lambda o: setattr(o[0].outputs[0], "finish_reason", "abort"), InputError, "abort"),
        (lambda o: setattr(o[0].outputs[0], "token_ids", [5]), InputError, "cut after 1 tokens, 3 were"),
        (lambda o: setattr(o[0].outputs[0], "finish_reason", "stop"), InputError, "no stop token here"),
        (lambda o: setattr(o[0].outputs[0], "token_ids", [5, 5, 999]), InputError, "drew token 999"),
    ],
)
def test_answers_that_cannot_be_trained_on_are_errors(engines, tmp_path, change, error, message):
    sampler = rollout(tmp_path, vocab_size=261)
    sampler.sync(lora_model())
    engines[0].change = change
    with pytest.raises(error, match=message):
        sampler.generate([[1, 2], [3]], max_new_tokens=3)
    assert engines[0].asleep


def test_without_vllm_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="pip install vllm"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        rollout(tmp_path)
