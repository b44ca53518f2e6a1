"""Data: the same glyphs everywhere, archives of the true format, downloads that never leave a bad file behind."""
import gzip
import hashlib
import http.server
import threading

import numpy as np
import pytest
import torch

from conftest import write_cifar

PIXEL = ["uvit_sc"]


@pytest.fixture
def uvit_sc():
    import uvit_sc
    return uvit_sc


def test_glyphs_are_the_same_bytes_everywhere(uvit_sc):
    images, labels = uvit_sc.load_data(uvit_sc.make_config("glyphs"), train=False)
    assert images.shape == (4000, 3, 16, 16) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [400] * 10
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "dfaae6a08f6299d2"
    again, _ = uvit_sc.draw_glyphs(100, seed=1)
    assert not np.array_equal(again, uvit_sc.draw_glyphs(100, seed=2)[0])


def test_cifar_archives(uvit_sc, tmp_path, capsys):
    """Bytes land in the right places: label bytes (CIFAR-100: the fine one), then the three colour planes."""
    write_cifar(tmp_path, n=20)
    rng = np.random.RandomState(0)
    labels, pixels = rng.randint(0, 20, (20, 2)), rng.randint(0, 256, (20, 3072), np.uint8)
    images, fine = uvit_sc.load_data(uvit_sc.make_config("cifar100", data_dir=str(tmp_path)), train=True)
    assert torch.equal(images, torch.from_numpy(pixels.reshape(20, 3, 32, 32))) and fine.tolist() == labels[:, 1].tolist()
    assert "not the published file" in capsys.readouterr().err
    for dataset, train, n in (("cifar100", False, 10), ("cifar10", True, 20), ("cifar10", False, 10)):
        images, labels = uvit_sc.load_data(uvit_sc.make_config(dataset, data_dir=str(tmp_path)), train)
        assert images.shape == (n, 3, 32, 32) and len(labels) == n and labels.max() < uvit_sc.DATASETS[dataset][2]


def write_idx(path, array):
    header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_idx_files(uvit_sc, tmp_path):
    """Files in data_dir come before Debian's; 28 x 28 images sit in the middle of 32 x 32 zeros."""
    pixels = np.random.RandomState(0).randint(1, 256, (5, 28, 28)).astype(np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    images, labels = uvit_sc.load_data(uvit_sc.make_config("fashion_mnist", data_dir=str(tmp_path)), train=False)
    assert images.shape == (5, 1, 32, 32) and labels.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(images[:, 0, 2:30, 2:30], pixels)
    assert (images > 0).sum() == pixels.size
    small, _ = uvit_sc.load_data(uvit_sc.make_config("fashion_mnist", data_dir=str(tmp_path), size=16), train=False)
    assert small.shape == (5, 1, 16, 16) and not small[:, :, 0].any()
    assert (small.float() - torch.nn.functional.avg_pool2d(images.float(), 2)).abs().max() <= 0.5


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "record", "label"])
def test_damaged_archives(uvit_sc, tmp_path, damage):
    """A user's own file that is cut short, no archive at all, or holds impossible records: one line with the remedy."""
    write_cifar(tmp_path, n=10)
    path = tmp_path / "cifar-100-binary.tar.gz"
    if damage in ("record", "label"):
        import io
        import tarfile
        data = bytes(3074) + b"\0" if damage == "record" else b"\0\xff" + bytes(3072)
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo("cifar-100-binary/train.bin")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    else:
        path.write_bytes({"cut": path.read_bytes()[:9000], "text": b"<html>moved</html>", "empty": b""}[damage])
    with pytest.raises(uvit_sc.UserError, match="cannot be read.*delete what is damaged") as caught:
        uvit_sc.load_data(uvit_sc.make_config("cifar100", data_dir=str(tmp_path)), train=True)
    assert "\n" not in str(caught.value)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves BODY in several ways, by folder: good, missing (404), wrong bytes, cut short, and an early end of the line."""
    BODY = b"the published file" * 1000

    def do_GET(self):
        kind, body = self.path.split("/")[1], self.BODY
        self.server.asked.append(kind)
        if kind == "missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write({"good": body, "wrong": body[::-1], "cut": body[:100], "hangup": b""}[kind])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(uvit_sc, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"

    def use(*kinds):
        md5 = hashlib.md5(Mirror.BODY).hexdigest()
        monkeypatch.setattr(uvit_sc, "DOWNLOADS", {"file.gz": (md5, *(f"{url}{kind}/" for kind in kinds))})
        return server
    yield use
    server.shutdown()


def test_download(uvit_sc, mirror, tmp_path):
    """The first good mirror serves; the file is then used without asking again; nothing else stays in the folder."""
    server = mirror("missing", "wrong", "good", "good")
    for _ in range(2):
        assert uvit_sc.fetch("file.gz", tmp_path / "data").read_bytes() == Mirror.BODY
    assert server.asked == ["missing", "wrong", "good"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["file.gz"]


@pytest.mark.parametrize("kind", ["missing", "wrong", "cut", "hangup"])
def test_bad_downloads_leave_nothing(uvit_sc, mirror, tmp_path, kind):
    mirror(kind)
    with pytest.raises(uvit_sc.UserError) as caught:
        uvit_sc.fetch("file.gz", tmp_path)
    message = str(caught.value)
    assert f"/{kind}/file.gz" in message and "--data_dir" in message and str(tmp_path) in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_server_that_is_not_there(uvit_sc, monkeypatch, tmp_path):
    monkeypatch.setattr(uvit_sc, "DOWNLOADS", {"file.gz": ("0" * 32, "http://127.0.0.1:9/")})
    with pytest.raises(uvit_sc.UserError, match="cannot download file.gz"):
        uvit_sc.fetch("file.gz", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_download_leaves_nothing(uvit_sc, mirror, tmp_path, monkeypatch):
    """Ctrl-C in the middle: the part is removed; a part that a SIGKILL leaves behind is never taken for the file."""
    mirror("good")
    (tmp_path / ".file.gz.1.part").write_bytes(b"left by a killed run")

    def interrupt(reply, *args, **kwargs):
        reply.read(10)
        raise KeyboardInterrupt
    monkeypatch.setattr(uvit_sc.tqdm, "wrapattr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        uvit_sc.fetch("file.gz", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".file.gz.1.part"]
    monkeypatch.undo()
    mirror("good")
    assert uvit_sc.fetch("file.gz", tmp_path).read_bytes() == Mirror.BODY


def test_downloads_are_https_with_a_hash(uvit_sc):
    for name, (md5, *mirrors) in uvit_sc.DOWNLOADS.items():
        assert len(md5) == 32 and mirrors and all(url.startswith("https://") and url.endswith("/") for url in mirrors)


def test_uint8_and_float(uvit_sc):
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(uvit_sc.to_uint8(uvit_sc.to_float(bytes_)), bytes_)
    assert uvit_sc.to_float(bytes_)[[0, 255]].tolist() == [-1, 1]
    assert uvit_sc.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
