"""Here reports and their pictures are what is tested."""

from __future__ import annotations

import pytest

from tests.conftest import IN_EARNEST, pictures


@pytest.fixture(scope="package", autouse=True)
def drawn():
    with pictures(*IN_EARNEST):
        yield
