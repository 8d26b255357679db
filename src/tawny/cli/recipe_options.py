"""The options that make a recipe, written once for prune, plan, profile, search and fit.

@recipe_verb("tawny profile smollm2", ...)
def profile(model: Model, *, given: Given, console: Console) -> None:
    recipe = given.recipe()
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

from typer.core import TyperCommand

from tawny.cli.options import DATA, RECIPE, Device, RecipeFile, shared
from tawny.cli.root import verb
from tawny.errors import UserError
from tawny.gguf_kinds import GGUF_KINDS
from tawny.kinds import GPU_KINDS, names_of, scaled_kinds
from tawny.machine import check_device

if TYPE_CHECKING:
    from tawny.recipe.schema import Recipe

# Shared options that say what a fit finds out.
CHOSEN_BY_FIT = ("sparsity", "allocator", "pattern", "values")


@dataclass(frozen=True)
class Given:
    """What the shared options were given, in the order of the help; None is unset."""

    sparsity: Annotated[
        float | None, shared("-s --sparsity SHARE", "Share of weights to remove, in [0, 1).", RECIPE)
    ] = None
    allocator: Annotated[
        str | None,
        shared(
            "-a --allocator NAME",
            "How blocks share the budget: a name, or the file of an allocation. Default: curves; atp for n:m and where the output is not asked, uniform for blocks and experts, owl for bits of a mean.",
            RECIPE,
        ),
    ] = None
    solver: Annotated[
        str | None,
        shared(
            "-m --solver NAME",
            "How a linear is pruned. Default: alps; obs for channels and heads, divergence for blocks, reap for experts, svd for rank.",
            RECIPE,
        ),
    ] = None
    pattern: Annotated[
        str | None,
        shared(
            "-p --pattern PATTERN",
            "What may be removed: unstructured, n:m (n kept of every m) such as 2:4, channels, heads, channels+heads, blocks, experts or rank. "
            "Default: unstructured.",
            RECIPE,
        ),
    ] = None
    values: Annotated[
        str | None,
        shared(
            "--values KIND",
            f"Round while solving: {names_of(scaled_kinds())}; {names_of(GPU_KINDS.values(), ' or ')} for GPUs; or a type of GGUF files "
            f"({names_of(GGUF_KINDS.values())}). "
            "No zeros unless -s asks for them.",
            RECIPE,
        ),
    ] = None
    base: RecipeFile = None
    overrides: Annotated[
        list[str] | None,
        shared(
            "-o --option KEY=VALUE",
            "Any other recipe key, such as seed=1 or include=*.mlp.*; repeatable. --KEY VALUE is the same.",
            RECIPE,
        ),
    ] = None
    calibration: Annotated[
        list[str] | None,
        shared(
            "--calibration TEXT[=SHARE]",
            "c4, wikitext2, ptb, wiki, a .txt/.jsonl file, chat:FILE.jsonl, or self (the model writes it); images:DIR or sample for "
            "models that see; repeatable. Default: c4.",
            DATA,
        ),
    ] = None
    samples: Annotated[int | None, shared("--samples N", "Windows of text. Default: 128.", DATA)] = None
    seqlen: Annotated[int | None, shared("--seqlen N", "Tokens a window. Default: 2048.", DATA)] = None
    device: Device = None

    def recipe(self, *, default_sparsity: float | None = None, **keys: Any) -> Recipe:
        """The recipe of the file, then the named options and `keys`, then `-o`."""
        from tawny.recipe.merge import resolve_recipe

        named = vars(self) | keys
        base, overrides = named.pop("base"), named.pop("overrides") or ()
        named["calibration.text"] = named.pop("calibration") or None
        for key in ("samples", "seqlen"):  # bare, an allocator's option might have the same name
            named[f"calibration.{key}"] = named.pop(key)
        recipe = resolve_recipe(base, overrides, default_sparsity=default_sparsity, **named)
        check_device(recipe.device)
        return recipe

    def overridden(self) -> list[str]:
        """The keys that -o gives."""
        from tawny.recipe.merge import parse_override

        return [parse_override(text)[0] for text in self.overrides or ()]

    def names_allocator(self) -> bool:
        """Whether a file or an -o says which allocator it is."""
        from tawny.recipe.files import read_mapping

        in_file = self.base is not None and read_mapping(self.base).get("allocator") is not None
        return in_file or not {"allocator", "allocator.name"}.isdisjoint(self.overridden())

    def refuse(self, names: Collection[str], why: str) -> None:
        """Refuse options that mean nothing here.

        Raises:
            UserError: one of them was given, as an option or by -o.
        """
        wrong = [f"--{name}" for name in names if vars(self)[name] is not None]
        wrong += [f"-o {key}" for key in self.overridden() if key.partition(".")[0] in names]
        if wrong:
            raise UserError(f"{why} {' and '.join(wrong)} itself: leave it out")

    def of_fit(self, note: Callable[[str], None]) -> tuple[Recipe, dict[str, Any]]:
        """The recipe of a fit and its own settings; `note` is told what of the file is not used.

        Raises:
            UserError: an option says what a fit finds out.
        """
        from tawny.recipe.files import read_mapping
        from tawny.recipe.schema import as_section

        self.refuse(CHOSEN_BY_FIT, "a fit chooses")
        rest, own = self.parted("fit.")
        plain: dict[str, Any] = {"sparsity": 0.0, "allocator": "uniform", "pattern": "unstructured"}
        said = {} if self.base is None else {**read_mapping(self.base)}
        said["allocator"] = as_section("allocator", said.get("allocator")).get("name")
        unused = [key for key, value in plain.items() if said.get(key) not in (None, value)]
        if unused:
            note(f"a fit chooses {' and '.join(unused)} itself: what {self.base} says of that is not used")
        return rest.recipe(**plain), own

    def parted(self, prefix: str) -> tuple[Given, dict[str, Any]]:
        """Without the overrides whose keys begin with `prefix`, and those, without it."""
        from tawny.recipe.merge import parse_override

        every = self.overrides or ()
        own = dict(parse_override(text.removeprefix(prefix)) for text in every if text.startswith(prefix))
        rest = [text for text in every if not text.startswith(prefix)]
        return replace(self, overrides=rest), own


class RecipeCommand(TyperCommand):
    """A verb that takes a recipe: `--KEY VALUE` for a recipe key that has no option of its own is `-o KEY=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        return super().parse_args(ctx, list(_spelled_out(args, known | set(ctx.help_option_names))))


def _spelled_out(args: Sequence[str], known: set[str]) -> Iterator[str]:
    words = deque(args)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        if word == "--":
            yield from (word, *words)
            return
        # What looks like a slip in an option's own name, or lacks a value, is left to the parser, which says so.
        without_value = not equals and (not words or words[0].startswith("--"))
        if not name.startswith("--") or name in known or without_value or _is_slip(name, known):
            yield word
        else:
            yield from ("-o", f"{name[2:].replace('-', '_')}={value if equals else words.popleft()}")


def _is_slip(name: str, known: set[str]) -> bool:
    """Whether a name is rather one of the options', misspelt, than a recipe key."""
    if "." in name or not get_close_matches(name, known, cutoff=0.8):
        return False
    from tawny.recipe.merge import bare_keys

    return name[2:].replace("-", "_") not in bare_keys()


# Registers a verb that takes a recipe; see `verb`.
recipe_verb = functools.partial(verb, cls=RecipeCommand)
