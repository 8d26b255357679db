from __future__ import annotations

import pytest

from tests.recovery.models import prose, save_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Paths of a dense folder, the pruned one and a text; tests read them only."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "text.txt").write_text(prose(), encoding="utf-8")
    return (*save_pair(folder), str(folder / "text.txt"))
