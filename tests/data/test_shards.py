"""Images in tar files: found, labelled, read, and trained on as the same images in folders."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.in_process import pretrain
from support.processes import write_labelled_images

from clever.checkpoint import load_checkpoint
from clever.data import shards
from clever.data.augmentations import eval_transform
from clever.data.datasets import CheckRecord, keep_readable, labelled_dataset
from clever.data.files import labelled_samples, list_images, read_image, read_pixels
from clever.utils import InputError


def png(value, size=8):
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, format="PNG")
    return file.getvalue()


def write_tar(path, files, **options):
    """A tar file with these (name, bytes) in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_patterns_and_folders_of_tar_files(tmp_path, capsys):
    for name in ("a-08", "a-09", "b-08", "b[1]", "deep/er/C.TAR"):
        write_tar(tmp_path / (name if "." in name else f"{name}.tar"), [("x.png", png(1))])

    def found(pattern):
        return [os.path.relpath(shards.file_of(path), tmp_path) for path in list_images(f"{tmp_path}/{pattern}")]

    assert found("a-*.tar") == ["a-08.tar", "a-09.tar"] and found("?-08.tar") == ["a-08.tar", "b-08.tar"]
    assert found("b[1].tar") == ["b[1].tar"]  # a file of that name
    assert found("") == ["a-08.tar", "a-09.tar", "b-08.tar", "b[1].tar", "deep/er/C.TAR"]
    with pytest.raises(InputError, match=r"c-\*.tar: do not exist"):
        found("c-*.tar")
    assert capsys.readouterr().out == ""
    (tmp_path / "deep" / "y.png").write_bytes(png(2))  # images beside archives are taken alone, and the others named
    assert list_images(tmp_path) == [str(tmp_path / "deep" / "y.png")]
    assert "5 .tar; taken are .jpg" in (said := capsys.readouterr().out) and "'folder/*.tar'" in said


def test_images_are_found_in_their_order_and_read_by_their_place(tmp_path):
    names = ["b/2.png", "a/1.JPG", "b/10.png", "long/" + "n" * 150 + ".png", "ü.png"]
    files = [(name, png(i)) for i, name in enumerate(names)]
    files[1:1] = [("notes.txt", b"x"), ("._b/2.png", b"no image"), ("__MACOSX/b.png", b"no image"), ("b/2.seg.png", png(99))]
    path = write_tar(tmp_path / "x.tar", files)
    found = list_images(path)
    assert [name.rsplit("+", 1)[1].split("/", 1)[1] for name in found] == names
    assert all(shards.file_of(name) == str(path) for name in found)
    for i, name in enumerate(found):
        assert (read_pixels(name) == i).all() and (np.asarray(read_image(name)) == i).all()


@pytest.mark.parametrize("kind", ["gnu", "posix"])
def test_tars_made_by_the_tar_program(tmp_path, kind):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "images" / "a" / f"{i}.png").write_bytes(png(i))
    assert os.system(f"tar -C {tmp_path}/images -cf {tmp_path}/x.tar --format={kind} --sort=name .") == 0
    assert [read_pixels(name)[0, 0, 0] for name in list_images(tmp_path / "x.tar")] == [0, 1, 2]


def test_labels_from_cls_and_json(tmp_path):
    files = [("a.png", png(1)), ("a.cls", b"10\n"), ("b.json", json.dumps({"label": 2, "x": 1}).encode()), ("b.png", png(2))]
    write_tar(tmp_path / "train" / "0.tar", files)
    files = [("a.json", b'{"cls": "2"}'), ("a.png", png(3)), ("b.json", b'{"cls": 7}'), ("b.cls", b"2"), ("b.png", png(4))]
    write_tar(tmp_path / "train" / "1.tar", files)  # keys are those of one file; .cls wins
    classes, samples = labelled_samples(tmp_path / "train")
    assert classes == ["2", "10"] and [label for _, label in samples] == [1, 0, 0, 0]
    dataset = labelled_dataset(tmp_path / "train", eval_transform("ori", 8))
    assert [int(dataset[i][0].float().mean()) for i in range(4)] == [1, 2, 3, 4]


def test_labels_that_are_names(tmp_path):
    labels = [b"wolf\n", b"cat", "42", b"cat"]
    files = [(f"{i}.cls", label) if type(label) is bytes else (f"{i}.json", json.dumps({"cls": label}).encode())
             for i, label in enumerate(labels)]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", [*files, *((f"{i}.png", png(i)) for i in range(4))])
    classes, samples = labelled_samples(path)
    assert classes == ["42", "cat", "wolf"] and [label for _, label in samples] == [2, 1, 0, 1]


@pytest.mark.parametrize(
    "files, words",
    [
        ([("a.txt", b"x")], ["has no images"]),
        ([("a.png", png(1)), ("a.png", png(2))], ["two images of the name a"]),
        ([("a.png", png(1)), ("a.cls", b"-1")], ["the label in a.cls"]),
        ([("a.png", png(1)), ("a.cls", b" ")], ["the label in a.cls"]),
        ([("a.png", png(1)), ("a.json", b'{"cls": 1.5}')], ["the label in a.json"]),
        ([("a.png", png(1)), ("a.json", b'{"cls": [1]}')], ["the label in a.json"]),
        ([("a.png", png(1)), ("a.json", b'{"caption": "a cat"}')], ["labels <image>.cls or .json"]),
    ],
)
def test_bad_tar_files_are_named_where_labels_are_needed(tmp_path, files, words):
    path = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(InputError) as caught:
        labelled_samples(path)
    assert all(word in str(caught.value) for word in (str(path), *words)) and "\n" not in str(caught.value)
    if len(files) == 2 and files[1][0] != "a.png":  # a bad label, which pretraining does not read
        assert len(list_images(path)) == 1


def test_images_without_a_label_are_left_out_and_counted(tmp_path, capsys):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", png(2)), ("b.cls", b"7"), ("c.png", png(3))])
    classes, ((name, label),) = labelled_samples(path)
    assert (classes, label) == (["7"], 0) and name.endswith("/b.png")
    assert capsys.readouterr().out == f"left out of {path}: 2 images without a class folder or label\n"


@pytest.mark.parametrize("change", [lambda whole: whole[:700], gzip.compress, lambda whole: b"no tar file " * 100])
def test_damaged_and_compressed_tar_files_are_named(tmp_path, change):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", os.urandom(1000)) for i in range(3)])  # 3 x 1536 bytes, and the end
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=f"{path}: damaged, or compressed"):
        list_images(path)


def test_the_check_knows_images_in_tar_files(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.png", b"no image"), ("c.png", png(3))])
    record = CheckRecord(tmp_path / "record.npy")
    samples = keep_readable([(path, 0) for path in list_images(path)], record=record, skip_bad_images=True)
    record.save()
    keys = {record.key(sample) for sample, _ in samples}
    assert len(keys) == 2 and keys < set(CheckRecord(tmp_path / "record.npy").known.tolist())
    os.utime(path, ns=(1, 1))
    assert not {record.key(sample) for sample, _ in samples} & keys


def test_views_and_training_are_the_same_as_from_a_folder_bit_for_bit(tmp_path):
    folder, tars = write_labelled_images(tmp_path / "folders", train=5, val=0) / "train", tmp_path / "tars"
    _, samples = labelled_samples(folder)
    for number, part in enumerate((samples[:4], samples[4:])):
        pairs = [[(f"{i}.png", Path(path).read_bytes()), (f"{i}.cls", b"%d" % label)] for i, (path, label) in enumerate(part)]
        write_tar(tars / f"{number}.tar", sum(pairs, []))
    images, members = (labelled_dataset(path, eval_transform("aug1_4_2", 16)) for path in (folder, tars))
    assert all(torch.equal(images[i][0], members[i][0]) and images[i][1] == members[i][1] for i in range(len(images)))
    for name, path in (("folder", folder), ("tars", f"{tars}/*.tar")):
        outcome = pretrain(path, tmp_path / name, "--num_workers", 2)
        assert outcome.status == 0, outcome.stderr
    states = [load_checkpoint(tmp_path / name / "checkpoint.pth")["student"] for name in ("folder", "tars")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
