"""Samplers outside of this process get the weights of now, whoever changed them: no teacher lives here that would
tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import lora_model, tiny_model

from opcd_fast.rollout import CommandWeights, LoRAWeights, ServerRollout, TransformersRollout
from opcd_fast.rollout.protocol import weights_version

IDS = torch.arange(3, 20)[None]


class Server:
    """A server that keeps what it was told to load, as vLLM would read it from the folder."""

    url = "http://server"

    def __init__(self):
        self.loaded = {}

    def post(self, path, body, stop=None):
        from safetensors.torch import load_file

        if path == "/v1/load_lora_adapter":
            self.loaded[body["lora_name"]] = load_file(Path(body["lora_path"]) / "adapter_model.safetensors")
        elif path == "/v1/unload_lora_adapter":
            del self.loaded[body["lora_name"]]
        return {}


def sampler(weights):
    rollout = ServerRollout("http://server", stop_token_ids=[256], weights=weights)
    rollout.server = Server()
    return rollout


def fused_step(model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(parameters, lr=0.05, fused=True).step()


def through_data(model):
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(p.data * 1.5)


def swapped(model, folder):
    from peft.utils.hotswap import hotswap_adapter

    other = lora_model()
    through_data(other)
    other.save_pretrained(folder)
    hotswap_adapter(model, str(folder), adapter_name="default")


def adapter_of(model):
    return {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("change", [fused_step, through_data, swapped])
def test_a_server_has_the_adapter_of_now(tmp_path, change):
    model, rollout = lora_model(), sampler(LoRAWeights(tmp_path / "adapters"))
    rollout.sync(model)
    (first,) = rollout.server.loaded
    rollout.sync(model)
    assert list(rollout.server.loaded) == [first], "what did not change is not sent again"
    change(model, tmp_path / "other") if change is swapped else change(model)
    rollout.sync(model)
    ((name, loaded),) = rollout.server.loaded.items()
    assert name != first and loaded.keys() == adapter_of(model).keys()
    for key, weight in adapter_of(model).items():
        assert torch.equal(loaded[key], weight), key


@pytest.mark.parametrize("change", [fused_step, through_data])
def test_a_command_gets_the_model_of_now(tmp_path, change):
    from safetensors.torch import load_file

    seen = []
    weights = CommandWeights(tmp_path, "m", lambda folder: seen.append(load_file(folder / "model.safetensors")))
    model, rollout = tiny_model().requires_grad_(True), sampler(weights)
    for _ in range(2):
        rollout.sync(model)
    change(model)
    rollout.sync(model)
    first, last = seen
    assert not torch.equal(first["lm_head.weight"], last["lm_head.weight"])
    for name, weight in model.state_dict().items():
        assert torch.equal(last[name], weight), name


def test_what_is_frozen_and_never_sent_does_not_count():
    model = lora_model()
    before = weights_version(model)
    model.base_model.model.lm_head.weight.data.mul_(2)
    assert weights_version(model) == before
    next(p for name, p in model.named_parameters() if "lora_A" in name).data[0, 0] += 1
    assert weights_version(model) != before


def test_where_ranks_hold_parts_none_can_tell(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fully_shard(tiny_model(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert weights_version(model) != weights_version(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", [fused_step, through_data])
def test_the_merged_copy_folds_the_adapter_of_now(change):
    model = lora_model()
    plain, merged = (TransformersRollout(model, stop_token_ids=[256], merge_adapter=on) for on in (False, True))

    def answers(rollout):
        return rollout.generate([[7, 9, 11], [13, 17]], max_new_tokens=6, temperature=0)

    before = answers(merged)
    change(model)
    after = answers(merged)
    assert [a.token_ids for a in after] == [a.token_ids for a in answers(plain)] != [a.token_ids for a in before]
