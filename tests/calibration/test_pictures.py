"""Pictures as calibration samples: seeded crops of the files in a folder."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tawny.calibration.mixture import check_texts, load_texts, parse_texts
from tawny.calibration.pictures import BrokenPicture, pictures_in, read_pictures, whole
from tawny.errors import TextError
from tawny.recipe.merge import resolve_recipe


@pytest.fixture
def folder(tmp_path):
    """Three pictures, each of one shade, and a file that only looks like one."""
    for shade in (10, 100, 200):
        Image.fromarray(np.full((20, 30, 3), shade, np.uint8)).save(tmp_path / f"{shade}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    return tmp_path


def processor(images, return_tensors):
    pixels = torch.from_numpy(np.array(images.resize((4, 4)))).permute(2, 0, 1)
    return {"pixel_values": [pixels.float()]}


def shades(found):
    return [int(x.mean()) for x in found.pixels]


def test_the_same_seed_gives_the_same_pixels_and_each_picture_comes_once_before_any_comes_twice(folder):
    sources = parse_texts(f"images:{folder}")
    first, again, other = (read_pictures(sources, 6, seed, processor) for seed in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels) and first.about() == again.about()
    assert not torch.equal(first.pixels, other.pixels)
    assert set(shades(first)[:3]) == set(shades(first)[3:]) == {10, 100, 200}


def test_a_picture_is_seen_the_way_up_that_its_file_says(tmp_path):
    colours = np.zeros((20, 40, 3), np.uint8)
    colours[:, :10] = 255  # stored lying on its side
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd = struct.pack(
        "<HHIf", 0x8298, 11, 1, 1.5
    )  # a copyright that is a number: nothing could write it again
    for entries in ([turned], [turned, odd]):
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
        Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
        seen = np.asarray(whole(tmp_path / "a.png"))
        assert seen.shape == (40, 20, 3) and seen[:10].min() == 255 and seen[10:].max() == 0


def test_a_program_that_is_called_a_picture_is_not_run(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(1))
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    )
    with pytest.raises(BrokenPicture):
        whole(tmp_path / "a.png")
    (tmp_path / "b.eps").write_text("")
    (found,) = pictures_in(*parse_texts(f"images:{tmp_path}"))
    assert found.name == "a.png" and not started


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    greys = np.array([[0, 256, 32768, 65535]], np.uint16)
    for name, values in (
        ("a.png", greys),
        ("a.tif", greys),
        ("b.tif", greys.astype(">u2")),
        ("a.pgm", greys),
    ):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(whole(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_broken_picture_is_named_once(folder):
    found = read_pictures(parse_texts(f"images:{folder}"), 8, 0, processor)
    assert len(found.broken) == 1 and "broken.jpg: " in found.broken[0]
    assert found.files == 4


def test_folders_share_the_samples(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    Image.fromarray(np.full((9, 9), 50, np.uint8)).save(other / "grey.png")
    found = read_pictures(parse_texts([f"images:{folder}=0.75", f"images:{other}=0.25"]), 8, 0, processor)
    assert shades(found).count(50) == 2


def test_what_holds_no_picture_is_refused(tmp_path, folder):
    with pytest.raises(TextError, match="no such folder"):
        check_texts(f"images:{tmp_path / 'absent'}")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TextError, match="holds no pictures"):
        read_pictures(parse_texts(f"images:{empty}"), 2, 0, processor)
    (empty / "a.png").write_bytes(b"")
    with pytest.raises(TextError, match=r"no picture that can be read, first .*a\.png: "):
        read_pictures(parse_texts(f"images:{empty}"), 2, 0, processor)
    with pytest.raises(TextError, match="is a text, and this model sees pictures"):
        read_pictures(parse_texts("wiki"), 2, 0, processor)
    with pytest.raises(TextError, match="names pictures, and this model reads text"):
        load_texts(f"images:{folder}")


def test_strict_refuses_the_first_broken_picture_by_name(folder):
    assert resolve_recipe({"sparsity": 0.5}, ["strict=true"]).calibration.strict
    with pytest.raises(TextError, match=r"broken\.jpg cannot be read as a picture .*leave strict out"):
        read_pictures(parse_texts(f"images:{folder}"), 8, 0, processor, strict=True)
