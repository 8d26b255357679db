"""The linter's contract for faces, on graphs that are right and wrong."""

from __future__ import annotations

import pytest
from grimp import ImportGraph

from scripts.faces import Faces

IMPORTS = [
    ("tawny", "tawny.choosing.search"),
    ("tawny.choosing.search", "tawny.allocation"),
    ("tawny.allocation", "tawny.allocation.blend"),
    ("tawny.allocation.blend", "tawny.allocation.registry"),
    ("tawny.cli.search", "tawny"),
    ("tawny.cli", "tawny.cli.search"),
]


def checked(*imports):
    graph = ImportGraph()
    for module in ("tawny", "tawny.allocation", "tawny.choosing", "tawny.cli", "tawny.kernels"):
        graph.add_module(module)
    for importer, imported in (*IMPORTS, *imports):
        graph.add_import(importer=importer, imported=imported)
    check = Faces("faces", {}, {}).check(graph, verbose=False)
    assert check.kept == (not check.metadata["circles"])
    return check.metadata["circles"]


def test_faces_that_only_others_import_are_kept():
    assert checked() == []


@pytest.mark.parametrize(
    ("added", "circle"),
    [
        (
            ("tawny.allocation.blend", "tawny.allocation"),
            ("tawny.allocation", "tawny.allocation.blend", "tawny.allocation"),
        ),
        (  # of which the face knows nothing
            ("tawny.kernels.ops", "tawny.kernels"),
            ("tawny.kernels.ops", "tawny.kernels"),
        ),
        (
            ("tawny.allocation.blend", "tawny"),
            (
                "tawny",
                "tawny.choosing.search",
                "tawny.allocation",
                "tawny.allocation.blend",
                "tawny",
            ),
        ),
    ],
)
def test_a_circle_through_a_face_is_named(added, circle):
    assert checked(added)[0] == circle
