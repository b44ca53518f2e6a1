"""Folders of images and Tiny-ImageNet: true formats, odd sizes and modes, damaged files, a cache that notices changes."""
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import uvit_sc
from uvit_sc import IMAGENET100, UserError, centre_crop, load_data, make_config

rng = np.random.RandomState(0)


def picture(width, height, mode="RGB"):
    return Image.fromarray(rng.randint(0, 256, (height, width, 3), np.uint8)).convert(mode)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path)


def adm_crop(image, size):
    """The crop of guided-diffusion (facts): BOX halvings, BICUBIC, centre. Written apart from the script's."""
    array = image.convert("RGB")
    while min(*array.size) >= 2 * size:
        array = array.resize((array.width // 2, array.height // 2), Image.BOX)
    scale = size / min(*array.size)
    array = array.resize((round(array.width * scale), round(array.height * scale)), Image.BICUBIC)
    x, y = (array.width - size) // 2, (array.height - size) // 2
    return np.asarray(array.crop((x, y, x + size, y + size)))


@pytest.mark.parametrize("size", [(16, 16), (100, 40), (33, 200), (31, 32), (10, 12), (64, 64)])
def test_centre_crop(size):
    image = picture(*size)
    assert np.array_equal(centre_crop(image, 16).transpose(1, 2, 0), adm_crop(image, 16))


def test_folder_of_odd_images(tmp_path, capsys):
    """Sizes, modes and formats as they come; nested folders; files that are no images are passed over; labels by sorted class."""
    images = {"ant/a.png": picture(20, 50), "ant/deep/b.JPEG": jpeg(picture(70, 30, "L")), "bee/c.jpg": jpeg(picture(40, 40, "CMYK")),
              "bee/d.PNG": picture(9, 8, "P"), "cat/e.png": picture(30, 30, "RGBA"), "cat/f.png": picture(30, 20, "1")}
    for name, image in images.items():
        write(tmp_path / name, image)
    write(tmp_path / "cat" / "notes.txt", b"no image")
    cfg = make_config("folder", data_dir=str(tmp_path), size=16, patch=4)
    x, labels = load_data(cfg, train=True)
    assert x.shape == (6, 3, 16, 16) and x.dtype == torch.uint8 and labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i, name in enumerate(images):
        with Image.open(tmp_path / name) as image:
            assert np.array_equal(x[i].permute(1, 2, 0), adm_crop(image, 16)), name
    assert (x[1][0] == x[1][1]).all()                      # greyscale
    with pytest.raises(UserError, match="--data_dir .*no folder .*val"):
        load_data(cfg, train=False)


def test_decoded_once(tmp_path, monkeypatch):
    """The second run maps the file of the first and opens no image; another file in the folder makes another cache."""
    for i in range(3):
        write(tmp_path / "train" / "a" / f"{i}.png", picture(20, 20))
        write(tmp_path / "val" / "a" / f"{i}.png", picture(20, 20))
    cfg = make_config("folder", data_dir=str(tmp_path), size=8)
    first, _ = load_data(cfg, train=True)
    first[0] = 0                                            # a change in memory must not reach the file
    monkeypatch.setattr(uvit_sc, "centre_crop", None)
    again, _ = load_data(cfg, train=True)
    assert again[0].float().mean() > 10 and torch.equal(again[1:], first[1:])
    monkeypatch.undo()
    write(tmp_path / "train" / "a" / "3.png", picture(20, 20))
    assert len(load_data(cfg, train=True)[0]) == 4 and len(load_data(cfg, train=False)[0]) == 3
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".u8"] * 3


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_images(tmp_path, damage, capsys):
    """Named in the error, and no cache left behind; with --skip_bad passed over with a count."""
    good = jpeg(picture(40, 40))
    for i in range(4):
        write(tmp_path / "a" / f"{i}.jpg", good)
    write(tmp_path / "b" / "broken.jpg", {"cut": good[:len(good) // 2], "empty": b"", "text": b"<html>"}[damage])
    write(tmp_path / "b" / "whole.jpg", good)
    fields = dict(data_dir=str(tmp_path), size=16)
    with pytest.raises(UserError, match=r"b/broken.jpg in --data_dir .* cannot be decoded .*--skip_bad") as caught:
        load_data(make_config("folder", **fields), train=True)
    assert "\n" not in str(caught.value) and {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    images, labels = load_data(make_config("folder", **fields, skip_bad=True), train=True)
    assert len(images) == 5 and labels.tolist() == [0] * 4 + [1]
    assert "1 of 6 images cannot be decoded and are skipped, b/broken.jpg first" in capsys.readouterr().err


def test_nothing_left_to_read(tmp_path, monkeypatch):
    """All files bad: said, and no empty cache; a folder that cannot be written: said with the way round it."""
    write(tmp_path / "a" / "0.jpg", b"bad")
    with pytest.raises(UserError, match="none of 1 images can be decoded"):
        load_data(make_config("folder", data_dir=str(tmp_path), skip_bad=True), train=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    monkeypatch.setattr(uvit_sc.os, "access", lambda *args: False)
    with pytest.raises(UserError, match="is read-only.*ln -s"):
        load_data(make_config("folder", data_dir=str(tmp_path)), train=True)


def test_what_only_looks_like_an_image(tmp_path):
    """Folders and dangling links that end in .png, and hidden files, are passed over; 16 bits are scaled, not cut to white."""
    grey = rng.randint(0, 65536, (16, 16)).astype(np.uint16)
    write(tmp_path / "a" / "deep.png", Image.fromarray(grey))
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    write(tmp_path / "a" / "._deep.png", b"a Mac's note")
    images, labels = load_data(make_config("folder", data_dir=str(tmp_path), size=16), train=True)
    assert len(labels) == 1 and np.array_equal(images[0, 0], grey // 256)


def test_folders_that_are_not_there(tmp_path):
    for dataset in ("folder", "imagenet", "imagenet100"):
        with pytest.raises(UserError, match="--data_dir "):
            load_data(make_config(dataset, data_dir=str(tmp_path / "nowhere")), train=True)
    write(tmp_path / "train" / "n01558993" / "a.png", picture(8, 8))
    with pytest.raises(UserError, match="1 class folders .*--dataset imagenet needs 1000"):
        load_data(make_config("imagenet", data_dir=str(tmp_path)), train=True)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="0 images"):
        load_data(make_config("folder", data_dir=str(tmp_path)), train=False)


def test_imagenet100(tmp_path):
    """The hundred classes of CMC, out of the folders of ImageNet, numbered in sorted order."""
    assert len(set(IMAGENET100)) == 100 and IMAGENET100 == sorted(IMAGENET100)
    for name in [*IMAGENET100, "n99999999", "n00000001"]:
        write(tmp_path / "imagenet100" / "train" / name / "x.JPEG", jpeg(picture(70, 70)))
        write(tmp_path / "imagenet100" / "val" / name / "y.JPEG", jpeg(picture(70, 90)))
    for train in (True, False):
        images, labels = load_data(make_config("imagenet100", data_dir=str(tmp_path)), train)
        assert images.shape == (100, 3, 64, 64) and labels.tolist() == list(range(100))


def test_tiny_imagenet(tmp_path, capsys):
    """The zip as published: train/CLASS/images, val/images with a shuffled list of classes, some greyscale; read in place."""
    classes = [f"n{1000 + 7 * i}" for i in range(3)]
    train = {f"train/{name}/images/{name}_{i}.JPEG": jpeg(picture(64, 64, "L" if i else "RGB")) for name in classes[::-1] for i in range(2)}
    val = {f"val/images/val_{i}.JPEG": jpeg(picture(64, 64)) for i in range(6)}
    answers = [2, 0, 1, 1, 0, 2]
    lines = [f"val_{i}.JPEG\t{classes[answers[i]]}\t0\t0\t62\t62" for i in (3, 1, 5, 0, 2, 4)]
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
        for name, data in {**train, **val, "val/val_annotations.txt": "\n".join(lines) + "\n", "test/images/test_0.JPEG": b"",
                           "wnids.txt": "\n".join(classes[::-1])}.items():
            archive.writestr(f"tiny-imagenet-200/{name}", data)
    cfg = make_config("tiny_imagenet", data_dir=str(tmp_path))
    images, labels = load_data(cfg, train=True)
    assert images.shape == (6, 3, 64, 64) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    with Image.open(io.BytesIO(train[f"train/{classes[0]}/images/{classes[0]}_0.JPEG"])) as image:
        assert np.array_equal(images[0].permute(1, 2, 0), np.asarray(image))
    images, labels = load_data(cfg, train=False)
    assert labels.tolist() == [answers[i] for i in (3, 1, 5, 0, 2, 4)]
    with Image.open(io.BytesIO(val["val/images/val_5.JPEG"])) as image:
        assert np.array_equal(images[2].permute(1, 2, 0), np.asarray(image))
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK cut short")
    with pytest.raises(UserError, match="cannot be read"):
        load_data(cfg, train=True)


def test_test_images_are_no_class(tmp_path):
    """Class folders may lie beside val/, whose images must never be trained on."""
    for name in ("ant/a.png", "bee/b.png", "val/ant/c.png", "val/bee/d.png"):
        write(tmp_path / name, picture(9, 9))
    cfg = make_config("folder", data_dir=str(tmp_path), size=16, patch=4)
    assert [load_data(cfg, train)[1].tolist() for train in (True, False)] == [[0, 1], [0, 1]]
