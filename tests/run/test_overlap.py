"""Reading the next block and making a written one durable happen beside the work, and nothing of it is lost."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from tawny.errors import OutputError
from tawny.model import checkpoint as checkpoint_module
from tawny.packed.opening import open_stack
from tawny.run.writer import CheckpointWriter
from tests.run.test_place import claimed
from tests.tiny import tiny_model

WEIGHT = {"weight": torch.arange(6.0).view(2, 3)}


def test_loading_a_block_reads_exactly_the_bytes_of_the_next_one_ahead(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    asked: list[set[int]] = []
    done = threading.Event()

    def touch(places):
        asked.append({place.start for _, place in places})
        done.set()

    monkeypatch.setattr(checkpoint_module, "_touch", touch)
    stack = open_stack(tmp_path / "dense", torch.float32)
    found = stack.checkpoint.places
    for index in range(len(stack)):
        done.clear()
        with stack.block(index):
            last = index == len(stack) - 1
            assert done.wait(0 if last else 10) is not last
    ahead = [{p.start for key, p in found.items() if f"layers.{i}." in key} for i in range(1, len(stack))]
    assert asked == ahead


def test_reading_ahead_touches_the_file_and_survives_one_that_is_gone(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    stack = open_stack(tmp_path / "dense", torch.float32)
    place = next(iter(stack.checkpoint.places.values()))
    path = tmp_path / "dense" / "model.safetensors"
    piece = bytearray(checkpoint_module._PIECE)
    monkeypatch.setattr(checkpoint_module, "bytearray", lambda _: piece, raising=False)
    checkpoint_module._touch([(path, place)])
    assert piece[: place.bytes] == path.read_bytes()[place.start : place.start + place.bytes] != b""
    path.unlink()
    checkpoint_module._touch([(path, place)])


def test_a_written_block_has_its_name_once_the_folder_has_settled(tmp_path):
    folder = CheckpointWriter(claimed(tmp_path / "out"))
    folder.write_block("00000", WEIGHT)
    folder.settle()
    assert folder.block_path("00000").is_file()
    assert [path.name for path in folder.block_path("00000").parent.iterdir()] == ["00000.safetensors"]
    folder.place.discard()


def test_shards_are_planned_from_blocks_that_are_whole(tmp_path):
    folder = CheckpointWriter(claimed(tmp_path / "out"))
    folder.write_block("00000", WEIGHT)
    (shard,) = folder.plan_shards(["00000"])
    assert shard["tensors"] == [["00000", "weight"]] and folder.assemble([shard]) == 24
    folder.place.discard()


def test_a_disk_that_fills_up_behind_the_work_is_said_when_it_is_waited_for(tmp_path, monkeypatch):
    folder = CheckpointWriter(claimed(tmp_path / "out"))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    folder.write_block("00000", WEIGHT)
    with pytest.raises(OutputError, match=r"00000\.safetensors: the disk is full"):
        folder.settle()
    assert not list(folder.block_path("00000").parent.iterdir())
    folder.settle()  # said once
    folder.place.discard()
