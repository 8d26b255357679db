from __future__ import annotations

import openai
import pytest

from tests.serving.tiny import byte_tokenizer, served_model, serving


@pytest.fixture(scope="session")
def model():
    return served_model()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def log():
    return []


@pytest.fixture(scope="session")
def server(model, tokenizer, log):
    """A server of a tiny model, in this process, at a free port."""
    with serving(model, tokenizer, max_sequences=3, queue=4, log=log.append) as (running, _):
        yield running


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made
