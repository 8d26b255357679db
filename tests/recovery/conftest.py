from __future__ import annotations

import pytest

from tests.recovery.models import save_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Paths of a dense folder, the pruned one and a text; tests read them only."""
    return save_pair(tmp_path_factory.mktemp("pair"))
