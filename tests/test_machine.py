"""What a container may use is less than what its host has."""

from __future__ import annotations

import os

import pytest

from tawny import machine

GB = 10**9
WHOLE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "_kilobytes", lambda file, name: 64 * GB)
    (tmp_path / "fs").mkdir()
    return tmp_path


def group(folder, limit, used, dropped, first=False):
    folder.mkdir(parents=True, exist_ok=True)
    most, now = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
    (folder / f"memory.{most}").write_text(f"{limit}\n")
    (folder / f"memory.{now}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' * first}inactive_file {dropped}\n")


def test_without_limits_the_machine_decides(groups):
    assert (machine.total_memory(), machine.free_memory()) == (WHOLE, 64 * GB)
    (groups / "cgroup").write_text("0::/a/b\n")
    group(groups / "fs/a/b", "max", 7 * GB, 0)
    assert (machine.total_memory(), machine.free_memory()) == (WHOLE, 64 * GB)


def test_the_tightest_group_above_decides_and_cached_files_are_free(groups):
    (groups / "cgroup").write_text("0::/a/b\n")
    group(groups / "fs/a", 2 * GB, 1_500_000_000, 0)
    group(groups / "fs/a/b", 1 * GB, 900_000_000, 700_000_000)
    assert (machine.total_memory(), machine.free_memory()) == (GB, 500_000_000)


def test_the_first_version_of_groups_is_read_by_its_mount(groups):
    """Without a namespace of its own, a container's group is the root of what is mounted, whatever its path says."""
    (groups / "cgroup").write_text("5:cpu:/docker/abc\n4:memory,hugetlb:/docker/abc\n0::/\n")
    group(groups / "fs/memory", 3 * GB, 4 * GB, 500_000_000, first=True)
    assert (machine.total_memory(), machine.free_memory()) == (min(WHOLE, 3 * GB), 0)
