"""A contract for import-linter: no circle runs through the face of a package, its `__init__`.

import-linter looks at rooms and at modules side by side. A face is neither, so a member that imports the face that imports
it is not seen. Imports inside functions and under TYPE_CHECKING count. So `import tawny` is refused in all that the public
names stand on, which leaves it to the command line.
"""

from __future__ import annotations

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output


class Faces(Contract):
    """Kept where no member imports the face of its own package, and no face is imported by what it imports."""

    type_name = "faces"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        faces = sorted(module for module in graph.modules if graph.find_children(module))
        circles = [circle for face in faces if (circle := _through(graph, face))]
        return ContractCheck(kept=not circles, metadata={"circles": circles})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for circle in check.metadata["circles"]:
            output.print_error(" imports ".join(circle), bold=False)
            output.new_line()


def _through(graph: ImportGraph, face: str) -> tuple[str, ...]:
    """The modules of a circle that begins and ends with a face; of a member that imports its face, the two; else none."""
    for importer in sorted(graph.find_modules_that_directly_import(face)):
        if chain := graph.find_shortest_chain(face, importer):
            return (*chain, face)
        if "." in face and importer.startswith(f"{face}."):  # the whole package is everybody's own
            return importer, face
    return ()
