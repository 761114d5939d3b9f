"""A tiny model in a folder."""

import pytest
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
