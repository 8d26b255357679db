"""A profile is plain data about blocks and their linears."""

from __future__ import annotations

from tawny.allocation import ALLOCATORS, LinearInfo, Profile


def test_a_profile_knows_its_blocks_and_their_weights() -> None:
    profile = Profile((LinearInfo("0.q", (4, 8), 0, "0"), LinearInfo("2.q", (4, 6), 2, "0")))
    assert profile.blocks == 3
    assert [profile.parameters(block) for block in range(3)] == [32, 0, 24]
    assert [linear.name for linear in profile.linears_of(2)] == ["2.q"]
    assert profile.sizes == {"0.q": 32, "2.q": 24}
    assert Profile(()).blocks == 0
    # A block that was measured counts even with nothing to prune.
    assert Profile((LinearInfo("0.q", (4, 8), 0),), ({}, {})).blocks == 2


def test_every_allocator_says_what_it_needs() -> None:
    for name, kind in ALLOCATORS.items():
        allocator = kind(path="allocation.yaml") if name == "file" else kind()
        assert allocator.needs in ("none", "norms", "hessian") and kind.__doc__
        assert isinstance(allocator.measures_weights, bool)
