"""Folders of pictures: the rules of the data section, with inputs that were met in use."""
import io, os, time

import numpy as np
import pytest
from PIL import Image

import edm_sc
from conftest import ROOT, finish, start


def tree(root, files):
    """Pictures, each of a grey of its own; .txt files; empty folders, whose names end with /."""
    for i, name in enumerate(files.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name.endswith(".txt"):
            path.write_text("no picture")
        else:
            Image.new("RGB", (12, 10), (i % 20 * 10,) * 3).save(path)
    return root


def load(root, train=True, dataset="folder"):
    return edm_sc.load_data(edm_sc.make_config(dataset, data_dir=str(root), size=8), train)


def refusal(*args):
    with pytest.raises(edm_sc.UserError) as caught:
        load(*args)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--data_dir ")
    return message


LAYOUTS = [     # files; labels of the training and of the test images, or what the error says
    ("train/-rf/été.png train/Ünï/a;b&c.png val/Ünï/図.png", [0, 1], [1]),
    ("train/cat/x/a.png train/cat/y/z/b.jpg train/cat/c.PNG test/cat/d.png", [0] * 3, [0]),
    ("Training/cat/a.png Training/dog/b.png Testing/dog/c.png", [0, 1], [1]),
    ("TRAIN/cat/a.png Validation/cat/b.png", [0], [0]),
    ("train/cat/a.png Valid/cat/b.png test/cat/c.png test/cat/d.png", [0], [0]),
    ("ant/a.png bee/b.png", [0, 1], "no split; --dataset folder reads train/CLASS and val/CLASS"),
    ("ant/a.png bee/b.png Test/ant/c.png", "has Test;", "has Test;"),
    ("bus/a.png car/b.png train/c.png", "train has 0 class folders", "has train;"),
    ("train/bus/a.png train/train/b.png val/train/c.png", [0, 1], [1]),
    ("train/cat/a.png train/dog/ val/cat/b.png", "train/dog has no pictures", [0]),
    ("train/cat/a.txt val/cat/b.png", "train/cat has no pictures", [0]),
    ("train/cat/a.png val/cow/b.png", [0], "val/cow is no class of "),
    ("train/cat/a.png train/dog/b.png val/dog/c.png", [0, 1], [1]),
    ("train/cat/a.png val/", [0], "val has 0 pictures"),
    ("train/", "train has 0 class folders", "has train;"),
    ("", "has 0 class folders", "no split"),
    ("train/cat/a.png train/cat/._a.png train/cat/.b.png train/.git/c.png train/__MACOSX/cat/d.png "
     "train/cat/__MACOSX/e.png train/cat/.thumbs/f.png .old/g.png val/cat/h.png", [0], [0])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout[0][:40] for layout in LAYOUTS])
def test_layouts(tmp_path, layout):
    tree(tmp_path, layout[0])
    for train, wanted in (True, layout[1]), (False, layout[2]):
        if isinstance(wanted, list):
            assert load(tmp_path, train)[1].tolist() == wanted
        else:
            assert wanted in refusal(tmp_path, train)


@pytest.mark.parametrize("files, line", [
    ("bird/a.png cat/b.png cat/c.png dog/d.png", "3 classes (bird, ..., dog), 4 images\n"),
    ("cat/b.png dog/c.png", "2 classes (cat, dog), 2 images\n"),
    ("cat/a.png cat/.b.txt cat/x/c.txt cat/d.txt", "1 images; 2 other files are left out\n"),
    ("cat/a.png b.png c.png notes.txt", "1 classes (cat), 1 images; 2 other files are left out\n")])
def test_start_line(tmp_path, capsys, files, line):
    load(tree(tmp_path, files))
    assert capsys.readouterr().out.endswith(line)


def test_data_sets_of_known_classes(tmp_path):
    assert "0 class folders" in refusal(tmp_path / "nowhere")
    assert "no split" in refusal(tmp_path / "nowhere", True, "imagenet")
    for split in ("train", "val"):
        tree(tmp_path / "imagenet100" / split, " ".join(f"n{i:02d}/a.png" for i in range(100)))
    assert load(tmp_path, False, "imagenet100")[1].tolist() == list(range(100))
    tree(tmp_path, "imagenet100/train/n100/a.png")
    assert "has 101 class folders" in refusal(tmp_path, True, "imagenet100")


def test_links(tmp_path):
    """Followed, each real folder once: also where they lead in a circle, or to all classes. What
    only looks like a picture is passed over."""
    data, store = tmp_path / "data", tree(tmp_path / "store", "a.png b.png more/c.png")
    tree(data, "train/cat/a.png train/dog/b.png train/dog/folder.png/")
    for link, target in {"cat/more": store, "cat/more/more/again": store, "dog/gone.png": "nowhere",
                         "cat/round": data / "train/cat", "dog/all": data / "train",
                         "owl": tree(tmp_path / "owls", "a.png")}.items():
        (data / "train" / link).symlink_to(target)
    assert load(data)[1].tolist() == [0, 0, 0, 0, 1, 2]


def test_terminated_while_decoding(tmp_path):
    """No half-written copy stays: of ImageNet it may have gigabytes."""
    tree(tmp_path, " ".join(f"cat/{i}.png" for i in range(50)))
    words = ["--dataset", "folder", "--data_dir", str(tmp_path), "--device", "cpu"]
    slow = ("import runpy, sys, time; from PIL import Image\n"
            f"Image.open, sys.argv[1:] = (lambda *_, **more: time.sleep(2)), {words}\n"
            "runpy.run_path('edm_sc.py', run_name='__main__')")
    process = start(["-c", slow], cwd=ROOT)
    while not list(tmp_path.glob(".*.part")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert finish(process)[0] == 143 and not list(tmp_path.glob(".*.part"))


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    """They are told: a run on fewer pictures would go on in silence."""
    def refuse(path, scandir=os.scandir):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied: " in refusal(tree(tmp_path, "cat/a.png cat/deep/b.png"))


def palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    return image


RED, BLUE = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
CLEAR, DEEP = Image.new("RGBA", (4, 4), 0), Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
MOVES = dict(save_all=True, append_images=[BLUE])
PICTURES = [    # file, image, how it is saved, what is read
    ("icon.png", CLEAR, {}, (255, 255, 255)), ("icon.webp", CLEAR, {}, (255, 255, 255)),
    ("shadow.png", Image.new("LA", (4, 4), (0, 128)), {}, (127, 127, 127)),
    ("palette.png", palette(), {}, (200, 0, 0)), ("palette.gif", palette(), {}, (200, 0, 0)),
    ("clear.png", palette(), dict(transparency=1), (255, 255, 255)),
    ("clear.gif", palette(), dict(transparency=1), (255, 255, 255)),
    ("half.png", palette(), dict(transparency=b"\xff\x80"), (227, 127, 127)),
    ("key.png", RED, dict(transparency=(255, 0, 0)), (255, 255, 255)),
    ("deep.png", DEEP, {}, (128, 128, 128)), ("deep.tif", DEEP, {}, (128, 128, 128)),
    ("bits.png", Image.new("1", (4, 4), 1), {}, (255, 255, 255)),
    ("grey.jpg", Image.new("L", (4, 4), 77), {}, (77, 77, 77)),
    ("print.jpg", RED.convert("CMYK"), {}, (254, 0, 0)),
    ("print.tif", RED.convert("CMYK"), {}, (255, 0, 0)),
    ("moving.gif", RED, MOVES, (255, 0, 0)), ("pages.tif", RED, MOVES, (255, 0, 0)),
    ("moving.webp", RED, dict(MOVES, lossless=True), (255, 0, 0)),
    ("two.jpg", RED, dict(MOVES, format="MPO"), (254, 0, 0)),
    ("old.bmp", RED, {}, (255, 0, 0)), ("old.ppm", RED, {}, (255, 0, 0)),
    ("other.jpg", RED, dict(format="PNG"), (255, 0, 0))]        # the name says nothing


@pytest.mark.parametrize("name, image, kwargs, colour", PICTURES, ids=[p[0] for p in PICTURES])
def test_pictures(tmp_path, name, image, kwargs, colour):
    image.save(tmp_path / name, **kwargs)
    found = edm_sc.read_image(tmp_path / name)
    assert found.mode == "RGB" and found.size == image.size
    assert (abs(np.asarray(found).astype(int) - colour) <= 3).all()     # as JPEG rounds


def test_16_bits_of_grey(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535, 100, 200]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        pixels = np.asarray(edm_sc.read_image(tmp_path / name))
        assert pixels[0, :, 1].tolist() == [0, 1, 128, 255, 0, 1]


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_orientation(tmp_path, kind):
    """Taken with the phone on its side: what is stored top left is shown top right."""
    pixels, exif = np.zeros((16, 32, 3), np.uint8), Image.Exif()
    pixels[:8, :8] = 255
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif)
    image = np.asarray(edm_sc.read_image(tmp_path / f"a.{kind}"))
    assert image.shape == (32, 16, 3) and image[:8, 8:].min() > 200 and image[:, :8].max() < 55


NOISE = io.BytesIO()
Image.effect_noise((64, 64), 50).save(NOISE, "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
BAD = {     # what is in the file, and what is said of it
    "float.tif": (Image.fromarray(np.ones((8, 8), np.float32)), "32-bit numbers, mode F"),
    "int.tif": (Image.fromarray(np.ones((8, 8), np.int32)), "32-bit numbers, mode I"),
    "page.jpg": (EPS, "cannot identify"), "page.png": (b"<svg></svg>", "cannot identify"),
    "cut.jpg": (NOISE.getvalue()[:1000], "truncated"), "empty.png": (b"", "cannot identify")}


@pytest.mark.parametrize("name", BAD)
def test_refused(tmp_path, name, monkeypatch):
    """By name; and no other program is started for a file that is called a picture."""
    (content, reason), path = BAD[name], tree(tmp_path, "cat/a.png cat/b.png") / "cat" / name
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    monkeypatch.setattr("subprocess.Popen", None)
    message = refusal(tmp_path)
    assert f"1 of 3 pictures cannot be decoded, the first is {path} (" in message
    assert reason in message and not list(tmp_path.glob("*.u8"))


def test_one_in_a_hundred(tmp_path, capsys):
    """May be left out, with a note that names the first; more may not, and nothing is written."""
    tree(tmp_path, " ".join(f"{'cat' if i < 150 else 'dog'}/{i:03d}.png" for i in range(199)))
    (tmp_path / "cat/200.jpg").write_bytes(b"bad")
    for _ in range(2):      # the second time, the decoded pictures are there
        images, labels = load(tmp_path)
        assert labels.tolist() == [0] * 150 + [1] * 49
        assert images.float().mean(dim=(1, 2, 3)).tolist() == [i % 20 * 10 for i in range(199)]
    note = capsys.readouterr().err
    assert "note: 1 of 200 pictures" in note and "cat/200.jpg (cannot identify" in note
    for name in ("dog/a.png", "cat/100.jpg"):
        (tmp_path / name).write_bytes(b"bad")
    assert "3 of 202 pictures" in (message := refusal(tmp_path)) and "cat/100.jpg (" in message
    assert len(list(tmp_path.glob("*.u8"))) == 1 and not list(tmp_path.glob(".*part"))


@pytest.mark.parametrize("size", [(16, 16), (100, 40), (33, 200), (31, 32), (10, 12)])
def test_centre_crop_is_adms(size):
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)
    image = expected = Image.fromarray(pixels)
    while min(expected.size) >= 32:
        expected = expected.resize((expected.width // 2, expected.height // 2), Image.BOX)
    scale = 16 / min(expected.size)
    sides = round(expected.width * scale), round(expected.height * scale)
    expected = np.asarray(expected.resize(sides, Image.BICUBIC))
    top, left = (expected.shape[0] - 16) // 2, (expected.shape[1] - 16) // 2
    expected = expected[top:top + 16, left:left + 16].transpose(2, 0, 1)
    assert np.array_equal(edm_sc.centre_crop(image, 16), expected)


def test_decoded_once(tmp_path, monkeypatch):
    """The second run opens no picture, whatever the folder is called from here; a change in memory
    stays there; other files make another cache."""
    tree(tmp_path, "train/cat/a.png train/cat/b.png val/cat/c.png")
    first, _ = load(tmp_path)
    first += 50
    monkeypatch.setattr(edm_sc, "read_image", None)
    monkeypatch.chdir(tmp_path)
    assert load(".")[0].float().mean() == first.float().mean() - 50
    monkeypatch.undo()
    tree(tmp_path, "train/cat/d.png")
    assert len(load(tmp_path)[0]) == 3 and len(load(tmp_path, False)[0]) == 1
    Image.new("RGB", (12, 10), (77,) * 3).save(tmp_path / "train/cat/d.png")
    os.utime(tmp_path / "train/cat/d.png", (0, 0))
    assert load(tmp_path)[0][2].float().mean() == 77


@pytest.mark.parametrize("name, files, same", [
    ("copy", "cat/1.png dog/2.png dog/3.png", True), ("named", "x/1.png y/2.png y/3.png", True),
    ("grown", "cat/1.png dog/2.png dog/3.png dog/4.png", False),
    ("moved", "cat/1.png cat/2.png dog/3.png", False),
    ("other/a", "cat/0.txt cat/1.png dog/2.png dog/3.png", False)])
def test_fingerprint(tmp_path, name, files, same):
    """A copy is the same data; a grown folder, other labels, and other pictures in a folder of the
    same name are not."""
    one, two = (edm_sc.fingerprint(*load(tree(root, some))) for root, some in (
        (tmp_path / "a", "cat/1.png dog/2.png dog/3.png"), (tmp_path / name, files)))
    assert one.startswith("3 images of 2 classes, CRC ") and (one == two) == same
