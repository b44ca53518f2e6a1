"""Data sets: the same glyphs everywhere, archives of the true format, downloads that leave no bad
file behind. The pixel scripts share the text, so one of them is tested."""
import gzip, hashlib, http.server, io, socket, tarfile, threading, time, zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import edm_sc
from conftest import write_cifar


def load(tmp_path, dataset, train, **fields):
    return edm_sc.load_data(edm_sc.make_config(dataset, data_dir=str(tmp_path), **fields), train)


def test_glyphs_are_the_same_bytes_everywhere(tmp_path):
    images, labels = load(tmp_path, "glyphs", train=False)
    assert images.shape == (4000, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.tolist() == list(range(10)) * 400 and labels.dtype == torch.int64
    assert hashlib.sha256(images.numpy()).hexdigest()[:16] == "dfaae6a08f6299d2"
    odd = hashlib.sha256(edm_sc.draw_glyphs(101, seed=77)[0])
    assert odd.hexdigest()[:16] == "bbac4ff60b56b9f8"


def test_cifar_archives(tmp_path):
    """Label bytes (CIFAR-100: the fine one), then the three colour planes."""
    write_cifar(tmp_path, n=20)
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz") as tar:
        data = tar.extractfile("cifar-100-binary/train.bin").read()
    images, fine = load(tmp_path, "cifar100", train=True)
    assert images.numpy()[7].tobytes() == data[7 * 3074 + 2:8 * 3074]
    assert fine.tolist() == list(data[1::3074])
    for dataset, train, n in ("cifar100", False, 10), ("cifar10", True, 20), ("cifar10", False, 10):
        images, labels = load(tmp_path, dataset, train)
        assert images.shape == (n, 3, 32, 32) and len(labels) == n


def write_idx(path, array):
    header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_idx_files(tmp_path):
    """Files in data_dir come before Debian's; 28 x 28 pixels sit in the middle of 32 x 32."""
    pixels = np.random.RandomState(0).randint(1, 256, (5, 28, 28)).astype(np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    images, labels = load(tmp_path, "fashion_mnist", train=False)
    assert images.shape == (5, 1, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(images[:, 0, 2:30, 2:30], pixels) and (images > 0).sum() == pixels.size
    small, _ = load(tmp_path, "fashion_mnist", train=False, size=16)
    exact = torch.nn.functional.avg_pool2d(images.float(), 2)
    assert small.shape == (5, 1, 16, 16) and (small.float() - exact).abs().max() <= 0.5


def test_tiny_imagenet(tmp_path):
    """The zip is read in place; val_annotations.txt has the classes, in the order of train."""
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
        for i, name in enumerate(("train/n2/images/a", "train/n1/images/b", "train/n1/images/c",
                                  "val/images/v1", "val/images/v0", "test/images/t0")):
            file = io.BytesIO()
            Image.new("RGB" if i else "L", (64, 64), (40 * i,) * 3 if i else 0).save(file, "JPEG")
            archive.writestr(f"tiny-imagenet-200/{name}.JPEG", file.getvalue())
        lines = "v1.JPEG\tn2\t0\t0\t9\t9\nv0.JPEG\tn1\t0\t0\t9\t9\n"
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", lines)
    for train, greys, classes in (True, [40, 80, 0], [0, 0, 1]), (False, [120, 160], [1, 0]):
        for _ in range(2):      # decoded, then mapped
            images, labels = load(tmp_path, "tiny_imagenet", train)
            assert labels.tolist() == classes and images.shape[1:] == (3, 64, 64)
            assert images.float().mean(dim=(1, 2, 3)).round().tolist() == greys
    assert len(list(tmp_path.glob("*.u8"))) == 2


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
@pytest.mark.parametrize("name, dataset", [("cifar-100-binary.tar.gz", "cifar100"),
                                           ("train-labels-idx1-ubyte.gz", "fashion_mnist"),
                                           ("tiny-imagenet-200.zip", "tiny_imagenet")])
def test_damaged_archives(tmp_path, damage, name, dataset):
    write_cifar(tmp_path, n=10)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((9, 28, 28), np.uint8))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(9, np.uint8))
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
        archive.writestr("tiny-imagenet-200/train/n1/images/a.JPEG", b"")
    whole = (tmp_path / name).read_bytes()
    damaged = dict(cut=whole[:len(whole) * 2 // 3], text=b"<html>moved</html>", empty=b"")[damage]
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(edm_sc.UserError, match="--data_dir .*delete what is damaged") as caught:
        load(tmp_path, dataset, train=True)
    assert "\n" not in str(caught.value) and f"{dataset} cannot be read" in str(caught.value)


RECORD = bytes(3074)
HOSTILE = {   # what is wrong: members (name, type, link, data)
    "symlink": [("cifar-100-binary/train.bin", tarfile.SYMTYPE, "/etc/passwd", b"")],
    "hardlink": [("cifar-100-binary/train.bin", tarfile.LNKTYPE, "/etc/passwd", b"")],
    "device": [("cifar-100-binary/train.bin", tarfile.CHRTYPE, "", b"")],
    "nothing": [("cifar-100-binary/other.bin", tarfile.REGTYPE, "", RECORD)],
    "half": [("cifar-100-binary/train.bin", tarfile.REGTYPE, "", RECORD + RECORD[:1000])],
    "traversal": [("../../harm", tarfile.REGTYPE, "", b"harm"),
                  ("cifar-100-binary/train.bin", tarfile.REGTYPE, "", RECORD)],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives(tmp_path, kind):
    """They are read in place: nothing is extracted, no link is followed out of them."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "cifar-100-binary.tar.gz", "w:gz") as tar:
        for name, member, link, data in HOSTILE[kind]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = member, link, len(data)
            tar.addfile(info, io.BytesIO(data))
    if kind == "traversal":
        assert len(load(folder, "cifar100", train=True)[0]) == 1
    else:
        with pytest.raises(edm_sc.UserError):
            load(folder, "cifar100", train=True)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["cifar-100-binary.tar.gz"]


def test_size_that_a_data_set_does_not_have(tmp_path):
    write_cifar(tmp_path, n=10)
    with pytest.raises(edm_sc.UserError, match="--size 64: cifar100 has 32 pixels"):
        load(tmp_path, "cifar100", train=True, size=64)


class Host(http.server.BaseHTTPRequestHandler):
    """Serves BODY, by folder: good, missing (404), wrong bytes, cut short, not at all, too late."""
    BODY = b"the published file" * 1000

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.asked.append(kind)
        if kind == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.BODY)))
        self.end_headers()
        bodies = dict(good=self.BODY, wrong=self.BODY[::-1], cut=self.BODY[:100], hangup=b"",
                      late=self.BODY)
        time.sleep(2 * (kind == "late"))
        self.wfile.write(bodies[kind])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def host():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    socket.setdefaulttimeout(None)


def use(host, monkeypatch, *kinds):
    sha256, urls = hashlib.sha256(Host.BODY).hexdigest(), [f"{host.url}/{kind}/" for kind in kinds]
    if "nobody" in kinds:
        urls = ["http://127.0.0.1:9/nobody/"]
    monkeypatch.setattr(edm_sc, "DOWNLOADS", {"file.gz": (sha256, *urls)})


def test_download(host, monkeypatch, tmp_path):
    """The first good mirror serves; then the file is used; nothing else stays in the folder."""
    use(host, monkeypatch, "missing", "wrong", "good", "good")
    for _ in range(2):
        assert edm_sc.fetch("file.gz", tmp_path / "data").read_bytes() == Host.BODY
    assert host.asked == ["missing", "wrong", "good"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file.gz"]


@pytest.mark.parametrize("kind", ["missing", "wrong", "cut", "hangup", "late", "nobody"])
def test_bad_downloads_leave_nothing(host, monkeypatch, tmp_path, kind):
    use(host, monkeypatch, kind)
    limit = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: limit(1))      # not 30
    with pytest.raises(edm_sc.UserError, match="cannot download file.gz") as caught:
        edm_sc.fetch("file.gz", tmp_path)
    message = str(caught.value)
    assert f"/{kind}/file.gz" in message and "--data_dir" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_uint8_and_float():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(edm_sc.to_uint8(edm_sc.to_float(every)), every)
    assert edm_sc.to_float(every)[[0, 255]].tolist() == [-1, 1]
    assert edm_sc.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
