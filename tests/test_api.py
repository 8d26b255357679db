from __future__ import annotations

import subprocess
import sys

import pytest

import tawny


@pytest.mark.parametrize("name", tawny.__all__)
def test_every_public_name_exists(name):
    assert getattr(tawny, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        tawny.prun  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'numpy', 'rich', 'pydantic'}"
    code = f"import sys, tawny, tawny.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
