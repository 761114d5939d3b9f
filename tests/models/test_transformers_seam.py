"""What transformers renames from version to version is known in one place, and its old names are not used."""

import functools
import warnings

import pytest
import torch
from architectures import build
from tiny_models import pack, random_ids

from opcd_fast.models import seam
from opcd_fast.rollout import TransformersRollout
from opcd_fast.teacher import ContextTeacher


class Body(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def old(input_ids, past_key_values=None, **kwargs):
    return "past_key_values", past_key_values


def new(input_ids, cache=None, **kwargs):
    return "cache", cache


def renaming(forward):
    """As a library keeps an old name alive for a while."""

    @functools.wraps(forward)
    def renamed(*args, **kwargs):
        if "past_key_values" in kwargs:
            warnings.warn("deprecated", FutureWarning, stacklevel=2)
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(*args, **kwargs)

    return renamed


@pytest.mark.parametrize(("forward", "name"), [(old, "past_key_values"), (new, "cache"), (renaming(new), "cache")])
def test_a_cache_is_passed_by_the_name_that_forward_has(forward, name):
    body, cache = Body(forward), object()
    assert seam.takes_cache(body) == name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert body(torch.tensor([[1]]), **seam.cache_argument(body, cache)) == (name, cache)


def test_a_forward_that_was_replaced_is_asked_through_its_class():
    model = build("llama")
    name = seam.takes_cache(model)
    assert name in ("cache", "past_key_values")
    honest = model.forward
    model.forward = lambda *args, **kwargs: honest(*args, **kwargs)
    assert seam.takes_cache(model) == name


def test_a_forward_without_a_cache():
    body = Body(lambda input_ids, **kwargs: None)
    assert seam.takes_cache(body) is None
    with pytest.raises(TypeError, match="takes no cache"):
        seam.cache_argument(body, object())


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "falcon", "bloom", "qwen3-next", "lfm2"])
@pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")
def test_no_deprecated_name_is_used(name):
    model = build(name)
    teacher = ContextTeacher(model, random_ids(20)[0])
    teacher.hidden_states_packed(*pack(random_ids(5, 1, 3)))
    assert teacher.path != "concat"
    if name == "qwen3":
        TransformersRollout(model, stop_token_ids=[0], engine="decode").generate([[1, 2, 3], [4]], max_new_tokens=3)
