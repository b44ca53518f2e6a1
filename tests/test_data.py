"""Data sets: the same glyphs everywhere, archives of the true format, downloads that leave no bad
file behind. The pixel scripts share the text, so one of them is tested."""
import gzip
import hashlib
import http.server
import tarfile
import threading

import numpy as np
import pytest
import torch

import uvit_sc
from conftest import write_cifar


def load(tmp_path, dataset, train, **fields):
    return uvit_sc.load_data(uvit_sc.make_config(dataset, data_dir=str(tmp_path), **fields), train)


def test_glyphs_are_the_same_bytes_everywhere(tmp_path):
    images, labels = load(tmp_path, "glyphs", train=False)
    assert images.shape == (4000, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [400] * 10
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "dfaae6a08f6299d2"


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


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_archives(tmp_path, damage):
    write_cifar(tmp_path, n=10)
    path = tmp_path / "cifar-100-binary.tar.gz"
    whole = path.read_bytes()
    path.write_bytes(dict(cut=whole[:9000], text=b"<html>moved</html>", empty=b"")[damage])
    with pytest.raises(uvit_sc.UserError, match="--data_dir .*delete what is damaged") as caught:
        load(tmp_path, "cifar100", train=True)
    assert "\n" not in str(caught.value)


def test_size_that_a_data_set_does_not_have(tmp_path):
    write_cifar(tmp_path, n=10)
    with pytest.raises(uvit_sc.UserError, match="--size 64: cifar100 has 32 pixels"):
        load(tmp_path, "cifar100", train=True, size=64)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves BODY, by folder: good, missing (404), wrong bytes, cut short, and not at all."""
    BODY = b"the published file" * 1000

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.asked.append(kind)
        if kind == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.BODY)))
        self.end_headers()
        bodies = dict(good=self.BODY, wrong=self.BODY[::-1], cut=self.BODY[:100], hangup=b"")
        self.wfile.write(bodies[kind])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def use(*kinds):
        folders = [f"http://127.0.0.1:{server.server_port}/{kind}/" for kind in kinds]
        md5 = hashlib.md5(Mirror.BODY).hexdigest()
        monkeypatch.setattr(uvit_sc, "DOWNLOADS", {"file.gz": (md5, *folders)})
        return server

    yield use
    server.shutdown()


def test_download(mirror, tmp_path):
    """The first good mirror serves; then the file is used; nothing else stays in the folder."""
    server = mirror("missing", "wrong", "good", "good")
    for _ in range(2):
        assert uvit_sc.fetch("file.gz", tmp_path / "data").read_bytes() == Mirror.BODY
    assert server.asked == ["missing", "wrong", "good"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file.gz"]


@pytest.mark.parametrize("kind", ["missing", "wrong", "cut", "hangup"])
def test_bad_downloads_leave_nothing(mirror, tmp_path, kind):
    mirror(kind)
    with pytest.raises(uvit_sc.UserError) as caught:
        uvit_sc.fetch("file.gz", tmp_path)
    message = str(caught.value)
    assert f"/{kind}/file.gz" in message and "--data_dir" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_server_that_is_not_there(monkeypatch, tmp_path):
    address = "http://127.0.0.1:9/"
    monkeypatch.setattr(uvit_sc, "DOWNLOADS", {"file.gz": ("0" * 32, address)})
    with pytest.raises(uvit_sc.UserError, match="cannot download file.gz"):
        uvit_sc.fetch("file.gz", tmp_path)


def test_uint8_and_float():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(uvit_sc.to_uint8(uvit_sc.to_float(every)), every)
    assert uvit_sc.to_float(every)[[0, 255]].tolist() == [-1, 1]
    assert uvit_sc.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
