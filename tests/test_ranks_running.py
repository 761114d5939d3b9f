"""What belongs to running a job, on two ranks: signals, best weights, early stopping, scorers, importance weights."""

import pytest
from safetensors.torch import load_file
from test_ranks import assert_same_run, launch, records, told

SETTINGS = {
    "micro_batch_tokens": 1, "batch_size": 5, "eval_every": 1, "steps": 4, "save_best": True, "best_by": "score",
    "early_stop_patience": 2, "early_stop_delta": 100.0, "importance_correction": "token",
}  # fmt: skip
ENGINES = ("ddp", "fsdp2")


def job(engine, folder, **more):
    settings = {**SETTINGS, "output_dir": str(folder), "resume": more.pop("resume", False)}
    return {"engine": engine, "settings": settings, "scores": True, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("running")
    two = []
    for engine in ENGINES:
        two += [job(engine, folder / engine / "whole"), job(engine, folder / engine / "cut", signal=1)]
        two += [job(engine, folder / engine / "cut", resume=True)]
    launch(two, 2, folder)
    launch([job("ddp", folder / "one")], 1, folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_best_weights_and_the_early_stop_are_those_of_one_process(runs, engine):
    assert_same_run(runs / engine / "whole", runs / "one")
    assert {"importance_weight", "sampler_kl"} <= records(runs / engine / "whole")[0].keys()
    found = [one["best"] for one in told(runs / engine / "whole")]
    assert found[0] == found[1] == told(runs / "one", 1)[0]["best"]
    assert found[0][1:] == [2, True]  # no gain is larger than 100
    best, one = (load_file(folder / "best" / "model.safetensors") for folder in (runs / engine / "whole", runs / "one"))
    assert best.keys() == one.keys()
    assert max(float((best[name] - one[name]).abs().median()) for name in best) <= 1e-7


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_on_one_rank_stops_both_and_the_rest_is_the_same(runs, engine):
    said = [(runs / engine / "cut" / f"stopped-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1] == "143 stopped; step 1 is saved, go on with --resume"
    assert_same_run(runs / engine / "cut", runs / engine / "whole")
