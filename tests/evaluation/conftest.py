"""What several files here ask for: a cache of their own, a base model in a folder, the tiny tokenizer."""

import pytest
from report_runs import save_base
from tiny import tiny_tokenizer


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPCD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()
