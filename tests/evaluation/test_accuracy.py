"""Accuracy of classifiers on pictures whose class is known, beside a slow twin."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import tawny
from tawny.errors import ModelError, TextError
from tawny.evaluation import compare
from tawny.report.comparison import compared
from tests.encoders import tiny_encoder
from tests.pictures import save_pictures, save_seeing
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A classifier, a pruned one, twelve pictures, and labels of which the classifier gets about two thirds right."""
    root = tmp_path_factory.mktemp("seen")
    dense = save_seeing(root / "dense")
    tawny.prune(dense, root / "pruned", sparsity=0.7, solver="magnitude", allocator="uniform")
    pictures = save_pictures(root / "pictures", 12)
    said = slowly(dense, pictures)
    rows = [
        f"./{path.name},{(c + (i % 3 == 0)) % 7}"
        for i, (path, c) in enumerate(zip(pictures, said, strict=True))
    ]
    rows[3] = rows[3].replace(",", ",LABEL_")
    table = root / "labels.csv"
    table.write_text("picture,what it is\n" + "\n".join(rows) + "\n")
    return SimpleNamespace(dense=dense, pruned=root / "pruned", pictures=pictures, table=table, root=root)


def slowly(folder, pictures):
    """The class that a model says of each picture, one after another."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return [
            int(
                model(
                    **processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
                ).logits.argmax()
            )
            for path in pictures
        ]


def measure(seen, labels=None, model=None, **keys):
    data = keys.pop("data", f"images:{seen.root / 'pictures'}")
    return tawny.accuracy(model or seen.dense, data, labels or seen.table, compute="float32", **keys)


def test_accuracy_is_what_the_slow_twin_counts_alone_and_beside_the_dense_model(seen, monkeypatch):
    monkeypatch.setattr("tawny.evaluation.accuracy.PART", 5)
    said = slowly(seen.pruned, seen.pictures)
    truth = [(c + (i % 3 == 0)) % 7 for i, c in enumerate(slowly(seen.dense, seen.pictures))]
    mine = [float(a == b) for a, b in zip(said, truth, strict=True)]
    theirs = [float(i % 3 != 0) for i in range(12)]
    found = measure(seen, model=seen.pruned, dense=seen.dense)
    for values, share, error in (
        (mine, found.accuracy, found.stderr),
        (theirs, found.dense, found.dense_stderr),
        ([a - b for a, b in zip(mine, theirs, strict=True)], found.difference, found.difference_stderr),
    ):
        mean = sum(values) / 12
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 11 / 12)
        assert (share, error) == (pytest.approx(mean), pytest.approx(spread))
    alone = measure(seen)
    assert alone.accuracy == pytest.approx(8 / 12) and alone.dense is None and alone.difference is None
    assert measure(seen, samples=3).samples == 3


def test_folders_name_the_classes_and_pictures_without_a_label_are_left_out(seen, tmp_path):
    for path, label in zip(seen.pictures, slowly(seen.dense, seen.pictures), strict=True):
        (tmp_path / f"LABEL_{label}").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / f"LABEL_{label}")
    assert measure(seen, "folder", data=f"images:{tmp_path}").accuracy == 1
    few = tmp_path / "few.csv"
    few.write_text("00.png,LABEL_1\n\n07.png,3\n")
    found = measure(seen, few)
    assert (found.samples, found.unlabelled) == (2, 10)


def test_a_broken_picture_is_named_and_skipped_or_with_strict_refused(seen, tmp_path):
    (tmp_path / "0").mkdir()
    shutil.copy(seen.pictures[0], tmp_path / "0")
    (tmp_path / "0" / "torn.png").write_bytes(seen.pictures[1].read_bytes()[:60])
    found = measure(seen, "folder", data=f"images:{tmp_path}")
    assert found.samples == 1 and "torn.png: " in found.skipped[0]
    with pytest.raises(
        TextError, match=r"torn\.png cannot be read as a picture \(.*\): repair it or take it away"
    ):
        measure(seen, "folder", data=f"images:{tmp_path}", strict=True)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            "00.png,0\n01.png,LABEL_9",
            r"line 2: 'LABEL_9' is not one of the model's 7 classes .*a number from 0 to 6",
        ),
        ("00.png,0\n01.png,7", r"line 2: '7' is not one of the model's 7 classes"),
        ("00.png,0\n99.png,1", r"line 2: '99.png' is not a picture in .*pictures .*: give names relative"),
        ("99.png,1", r"line 1: '99.png' is not a picture"),
        ("00.png,0\n00.png,1", r"line 2: '00.png' stands in line 1 already"),
        ("00.png 0", "line 1: '00.png 0' is not FILE,CLASS"),
        ("file,class", "name no picture"),
    ],
)
def test_labels_that_fit_no_picture_or_no_class_are_refused(seen, tmp_path, rows, reason):
    table = tmp_path / "labels.csv"
    table.write_text(rows)
    with pytest.raises(TextError, match=reason):
        measure(seen, table)


def test_a_class_with_a_comma_stands_in_quotes(seen, tmp_path):
    model = tiny_encoder("vit")
    names = ["suit", "suit, black", "c", "d", "e", "f", "g"]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    folder, table = save_seeing(tmp_path / "model", model=model), tmp_path / "labels.csv"
    table.write_text("00.png,suit, black")
    with pytest.raises(TextError, match=r"line 1: the class 'suit, black' holds a comma: put it in quotes"):
        measure(seen, table, model=folder)
    table.write_text('00.png,"suit, black"\n01.png,suit')
    assert measure(seen, table, model=folder).samples == 2


def test_what_labels_say_nothing_of_is_refused(seen, tmp_path):
    with pytest.raises(TextError, match=r"expected FILE\.csv, or folder for DIR/CLASS/picture"):
        measure(seen, "folders")
    with pytest.raises(TextError, match="lies in no folder of a class"):
        measure(seen, "folder")
    with pytest.raises(TextError, match="labels are of the pictures in a folder, and sample was given"):
        measure(seen, data="sample")
    blind = save_seeing(tmp_path / "blind", "dinov2")
    with pytest.raises(ModelError, match="Dinov2Model has no classes"):
        measure(seen, model=blind)
    twice = tiny_encoder("vit")
    twice.config.id2label = dict.fromkeys(range(7), "crane")
    with pytest.raises(TextError, match=r"'crane' is the name of the classes 0 and 1"):
        table = tmp_path / "cranes.csv"
        table.write_text("00.png,crane")
        measure(seen, table, model=save_seeing(tmp_path / "twice", model=twice))


def test_the_command_line_shows_accuracy_beside_features(run, seen):
    pictures = ["--text", f"images:{seen.root / 'pictures'}"]
    code, out, err = run(
        "eval", seen.pruned, *pictures, "--labels", seen.table, "--against", seen.dense, "--json"
    )
    assert code == 0, err
    measured = json.loads(out)
    assert measured["accuracy"]["samples"] == 12 and measured["features"]["samples"] > 0
    code, out, err = run("eval", seen.dense, *pictures, "--labels", seen.table)
    assert code == 0 and "66.7 ± 14.2 %" in out, err
    assert "12 of images:" in " ".join(out.split())  # a long path stands in a line of its own
    tiny_model("llama").save_pretrained(seen.root / "reads")
    for arguments, reason in (
        ((seen.root / "reads", "--labels", seen.table), "--labels can be used with pictures only"),
        ((seen.root / "reads", "--strict"), "--strict can be used with pictures only"),
        ((seen.dense, "--labels", seen.table), "and sample was given: give one images:DIR"),
        ((seen.dense, *pictures, "--labels", seen.table, "--seqlen", 64), "so --seqlen does not apply to it"),
        ((seen.dense, *pictures, "--labels", "none.csv"), "'none.csv': no such table"),
    ):
        code, out, err = run("eval", *arguments)
        assert (code, out) == (2, "") and reason in " ".join(err.split())


def test_a_comparison_has_a_line_of_accuracy(seen):
    keys = ("seqlen", "windows", "bos", "tasks", "task_data", "limit", "threads", "cache")
    setting = dict.fromkeys(keys) | {"text": f"images:{seen.root / 'pictures'}", "labels": str(seen.table)}
    setting |= {"seqlen": 128, "speed": False, "rounds": 1, "compute": "float32", "device": "cpu"}
    rows = [{"name": m.name, **compare.measure(str(m), None, setting)} for m in (seen.dense, seen.pruned)]
    first, second = next(row[1:] for row in compared({"models": rows}).rows if row[0] == "accuracy, %")
    assert first.text.startswith("66.7 ± ") and second.change.endswith(tuple("0123456789"))
