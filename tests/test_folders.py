"""Folders of pictures: the rules of the data section, each with inputs that were met in use."""
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import edm_sc


def picture(path, colour=128, size=(12, 10), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour,) * 3).save(path, **kwargs)
    return path


def tree(root, *files):
    for i, file in enumerate(files):
        picture(root / file, colour=10 * i)
    return root


def load(root, train=True, dataset="folder"):
    cfg = edm_sc.make_config(dataset, data_dir=str(root), size=8, backbone="unet_tiny")
    return edm_sc.load_data(cfg, train)


def refusal(*args, **kwargs):
    with pytest.raises(edm_sc.UserError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("train, val", [("train", "val"), ("train", "test"), ("Training", "Testing"),
                                        ("TRAIN", "validation"), ("train", "valid")])
def test_names_of_splits(tmp_path, capsys, train, val):
    tree(tmp_path, f"{train}/cat/a.png", f"{train}/dog/deep/er/b.jpg", f"{val}/dog/c.png")
    assert load(tmp_path)[1].tolist() == [0, 1]
    assert "2 classes (cat, dog), 2 images" in capsys.readouterr().out
    assert load(tmp_path, train=False)[1].tolist() == [1]


def test_without_a_folder_train(tmp_path, capsys):
    """Class folders in ROOT, for training. A split's name among them is an error that says so."""
    tree(tmp_path, "ant/a.png", "bee/b.png", "fly/c.png")
    assert load(tmp_path)[1].tolist() == [0, 1, 2]
    assert "3 classes (ant, ..., fly), 3 images" in capsys.readouterr().out
    assert "val/CLASS" in refusal(tmp_path, train=False)
    tree(tmp_path, "Test/ant/d.png")
    assert "train/CLASS" in refusal(tmp_path) and "Test" in refusal(tmp_path)


def test_classes_that_do_not_fit(tmp_path):
    tree(tmp_path, "train/cat/a.png", "val/cat/b.png", "val/cow/c.png")
    (tmp_path / "train/dog").mkdir()
    assert "train/dog holds no picture" in refusal(tmp_path)
    assert "val/cow is no class" in refusal(tmp_path, train=False)
    assert "needs 1000" in refusal(tmp_path, dataset="imagenet")
    assert "no folder" in refusal(tmp_path / "nowhere")


def test_what_is_not_read(tmp_path, capsys):
    """Hidden files and folders, __MACOSX and ._* at any depth; other files are counted."""
    tree(tmp_path, "train/cat/a.png", "train/cat/._a.png", "train/cat/.b.png", "train/.git/c.png",
         "train/__MACOSX/cat/d.png", "train/cat/__MACOSX/e.png", "train/cat/.thumbs/f.png")
    (tmp_path / "train/cat/notes.txt").write_text("a cat")
    assert load(tmp_path)[1].tolist() == [0]
    assert "1 files are no pictures" in capsys.readouterr().out


def test_links_to_folders(tmp_path):
    """They are followed, but each folder once in a class: also where a link leads to its parent."""
    tree(tmp_path / "elsewhere", "a.png", "b.png")
    tree(tmp_path / "data", "train/cat/c.png", "train/dog/d.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/train/cat/more")
    os.symlink(tmp_path / "data/train/cat", tmp_path / "data/train/cat/more/again")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/train/owl")
    assert load(tmp_path / "data")[1].tolist() == [0, 0, 0, 1, 2, 2, 2]


def read(tmp_path, name, image, **kwargs):
    image.save(tmp_path / name, **kwargs)
    image = edm_sc.read_image(tmp_path / name)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_transparency_is_put_on_white(tmp_path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (read(tmp_path, "icon.png", clear) == 255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert (abs(read(tmp_path, "grey.png", half).astype(int) - 127) <= 1).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    assert (read(tmp_path, "palette.png", palette) == (200, 0, 0)).all()
    assert (read(tmp_path, "clear.png", palette, transparency=1) == 255).all()


def test_16_bits_of_grey(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    pixels = read(tmp_path, "deep.png", Image.fromarray(values))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_unknown_range_are_refused(tmp_path, dtype):
    picture(tmp_path / "train/cat/good.png")
    path = tmp_path / "train/cat/map.tif"
    Image.fromarray(np.ones((8, 8), dtype)).save(path)
    with pytest.raises(ValueError, match="32 bits"):
        edm_sc.read_image(path)
    assert "map.tif" in refusal(tmp_path) and "32 bits" in refusal(tmp_path)


def test_orientation_frames_and_colours(tmp_path):
    image = Image.new("RGB", (6, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6                                            # taken with the phone on its side
    assert read(tmp_path, "phone.jpg", image, exif=exif).shape == (6, 4, 3)
    blue = Image.new("RGB", (6, 4), "blue")
    pixels = read(tmp_path, "moving.gif", image, save_all=True, append_images=[blue])
    assert (pixels == (255, 0, 0)).all()
    pixels = read(tmp_path, "print.jpg", image.convert("CMYK"))
    assert abs(pixels.astype(int) - (254, 0, 0)).max() <= 3     # as JPEG rounds it


def test_no_other_program_is_started(tmp_path):
    """PostScript with a picture's name would be handed to Ghostscript."""
    path = tmp_path / "page.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(Exception, match="cannot identify"):
        edm_sc.read_image(path)


def test_pictures_that_cannot_be_decoded(tmp_path, capsys):
    """One in a hundred is left out with a note that names it; more are an error, nothing written."""
    for i in range(199):
        picture(tmp_path / f"train/cat/{i:03d}.png")
    (tmp_path / "train/cat/bad1.png").write_bytes(b"no picture")
    assert len(load(tmp_path)[0]) == 199
    err = capsys.readouterr().err
    assert "1 of 200 pictures cannot be decoded" in err and "bad1.png" in err
    for i in range(2, 5):
        (tmp_path / f"train/cat/bad{i}.png").write_bytes(b"no picture")
    assert "4 of 203" in refusal(tmp_path)
    assert len(list(tmp_path.glob("*.u8"))) == 1 and not list(tmp_path.glob(".*part"))


def test_centre_crop_is_adms():
    """Halved by box filters while twice too large, then bicubic, then the middle."""
    pixels = np.random.RandomState(0).randint(0, 256, (50, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    half = image.resize((20, 25), Image.BOX).resize((16, 20), Image.BICUBIC)
    expected = np.asarray(half)[2:18].transpose(2, 0, 1)
    assert np.array_equal(edm_sc.centre_crop(image, 16), expected)


def test_fingerprint(tmp_path):
    """Grown folders, other pictures and other labels are other data; a copy is not."""
    def mark(name, *files):
        return edm_sc.fingerprint(*load(tree(tmp_path / name, *files)))

    whole = mark("a", "train/x/1.png", "train/y/2.png")
    assert whole == mark("copy", "train/x/1.png", "train/y/2.png")
    assert whole == mark("renamed", "train/x/1.png", "train/z/2.png")       # names do not matter
    assert whole != mark("grown", "train/x/1.png", "train/y/2.png", "train/y/3.png")
    assert whole != mark("moved", "train/x/0/1.png", "train/x/2.png")
    assert whole != mark("other", "train/x/0/1.png", "train/x/1/2.png", "train/y/3.png")
    picture(tmp_path / "copy/train/x/1.png", colour=99)
    assert whole != edm_sc.fingerprint(*load(tmp_path / "copy"))


def test_tiny_imagenet(tmp_path, monkeypatch):
    """The zip is read in place; val_annotations.txt has the labels, in the order of train."""
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
        for i, (folder, name) in enumerate([("n02", "a"), ("n01", "b"), ("n01", "c")]):
            path = picture(tmp_path / "one.jpg", 40 * i, size=(64, 64))
            archive.write(path, f"tiny-imagenet-200/train/{folder}/images/{name}.JPEG")
        archive.write(path, "tiny-imagenet-200/val/images/v0.JPEG")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "v0.JPEG\tn02\t0\t0\t9\t9\n")
    cfg = edm_sc.make_config("tiny_imagenet", data_dir=str(tmp_path))
    images, labels = edm_sc.load_data(cfg, train=True)
    assert labels.tolist() == [0, 0, 1] and images.shape == (3, 3, 64, 64)
    assert [int(images[i].float().mean().round()) for i in range(3)] == [40, 80, 0]
    assert edm_sc.load_data(cfg, train=False)[1].tolist() == [1]
    assert isinstance(images, torch.Tensor) and len(list(tmp_path.glob("*.u8"))) == 2
