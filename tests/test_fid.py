"""fid.py: numbers against closed forms and against pytorch-fid, files, names, and errors. CPU, no network."""
import concurrent.futures, http.server, importlib, json, sys, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fid
import uvit_sc
from conftest import SMALL, finish, launch

LOAD_DATA, STEPS = uvit_sc.load_data, fid.DETECTOR["steps"]


class Stub(torch.nn.Module):
    """A detector that costs nothing: the mean and the mean square of each colour."""
    kind, dim, classes, hash, resize = "inception", 6, 12, "stub", "torch"

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float() / 255
        f = torch.cat([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))], dim=1)
        return f, torch.cat([f, -9 * f], dim=1)


def fill(net):
    """Weights by a rule that needs no file: uniform numbers of a frozen stream, in the order of the sorted names."""
    rng = np.random.RandomState(0)
    for name, v in sorted(net.state_dict().items()):
        if v.dim():
            kind = name.split(".", 1)[-1].split("bn.")[-1]
            low, high = (0.5, 1.5) if "bn." in name and kind in ("weight", "running_var") else (-0.2, 0.2)
            if v.dim() > 1:
                high = (6 / v[0].numel()) ** 0.5
                low = -high
            v.copy_(torch.from_numpy(rng.uniform(low, high, tuple(v.shape)).astype(np.float32)))
    return net.eval()


@pytest.fixture(scope="module")
def inception():
    return fill(fid.Inception())


@pytest.fixture(scope="module")
def inception_file(inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Only uvit_sc, 300 glyphs, five training steps, and a folder of one's own."""
    images, labels = uvit_sc.draw_glyphs(400, seed=7)
    images, labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    part = {True: slice(0, 300), False: slice(300, 400)}
    load = lambda cfg, train: (images[part[train]].clone(), labels[part[train]].clone())
    monkeypatch.setattr(uvit_sc, "load_data", load)
    monkeypatch.setattr(fid, "SCRIPTS", ("uvit_sc",))
    monkeypatch.setitem(fid.DETECTOR, "steps", 5)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(fid, "load_inception", lambda file, folder: Stub())


def run(*argv):
    fid.main([*map(str, argv), "--json", "result.json"])
    return json.loads(Path("result.json").read_text())


def error(capsys, *argv):
    """The one line with which a run ends."""
    with pytest.raises(SystemExit) as end:
        fid.main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("fid: "), err
    return err


def folder(name, images):
    Path(name).mkdir()
    for i, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(f"{name}/{i:04d}.png")
    return name


def glyphs(n, seed=9):
    return uvit_sc.draw_glyphs(n, seed)[0]


def checkpoint(name="last.pt", script="uvit_sc"):
    torch.manual_seed(0)
    cfg = uvit_sc.make_config(data_dir="data")
    net = uvit_sc.build_net(cfg)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    uvit_sc.write_checkpoint(Path(name), script=script, config=dict(vars(cfg)), step=12, ema=state,
                             model={k: v * 0.5 for k, v in state.items()})
    return name


# ---- distance and statistics -----------------------------------------------------------------------------------------

def moments(x):
    return x.mean(axis=0), np.cov(x, rowvar=False)


def test_distance_closed_forms():
    rng = np.random.RandomState(0)
    a, b, m = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20), rng.randn(20)
    expected = (m ** 2).sum() + ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert fid.frechet_distance(m, np.diag(a), 0 * m, np.diag(b)) == pytest.approx(expected, rel=1e-10)
    q = np.linalg.qr(rng.randn(20, 20))[0]              # commuting: the same eigenvectors
    assert fid.frechet_distance(m, q * a @ q.T, 0 * m, q * b @ q.T) == pytest.approx(expected, rel=1e-10)
    assert fid.frechet_distance(m, np.diag(a), m, np.diag(a)) == pytest.approx(0, abs=1e-10)


def test_distance_general():
    rng = np.random.RandomState(1)
    (m1, s1), (m2, s2) = moments(rng.randn(90, 30)), moments(rng.randn(80, 30) @ rng.randn(30, 30) + 1)
    trace = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).sum().real      # eigenvalues of the plain product
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * trace
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-10)


def test_distance_with_fewer_images_than_features():
    rng = np.random.RandomState(2)
    x, y = rng.randn(12, 100), 2 * rng.randn(9, 100)
    (m1, s1), (m2, s2) = moments(x), moments(y)
    cross = (x - m1) @ (y - m2).T / np.sqrt(11 * 8)     # tr (S1 S2)^(1/2) is the nuclear norm of this 12 x 9 matrix
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.linalg.norm(cross, "nuc")
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-6)


def test_statistics_are_those_of_numpy():
    x = np.random.RandomState(3).randn(103, 17).astype(np.float32) + 5
    stats = fid.Statistics(103, 17, 17)
    for i in range(0, 103, 10):
        stats.add(torch.from_numpy(x[i:i + 10]), torch.from_numpy(x[i:i + 10]), i)
    for found, expected in zip(stats.gaussian(), moments(x.astype(np.float64))):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_inception_score_is_that_of_a_plain_loop():
    logits = 3 * np.random.RandomState(4).randn(57, 11)
    stats = fid.Statistics(57, 11, 11)
    for i in reversed(range(0, 57, 8)):                 # the part of an image goes by its index, not by its turn
        stats.add(torch.from_numpy(logits[i:i + 8]), torch.from_numpy(logits[i:i + 8]), i)
    shuffled, scores = logits[np.random.RandomState(2020).permutation(57)], []
    for k in range(10):
        part = shuffled[k * 57 // 10:(k + 1) * 57 // 10]
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert stats.inception_score() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


# ---- Inception -------------------------------------------------------------------------------------------------------

def test_inception_names_and_sizes(inception):
    state = inception.state_dict()
    assert len(state) == 566 and sum(p.numel() for p in inception.parameters()) == 23_850_960
    for name, shape in {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
                        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3), "fc.weight": (1008, 2048),
                        "Mixed_6b.branch7x7dbl_5.conv.weight": (192, 128, 1, 7),
                        "Mixed_7c.branch_pool.bn.running_var": (192,),
                        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
                        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3)}.items():
        assert state[name].shape == shape
    assert all(m.eps == 1e-3 for m in inception.modules() if isinstance(m, torch.nn.BatchNorm2d))


@torch.no_grad()
def test_inception_computes_what_pytorch_fid_computes(inception):
    """The numbers come from pytorch-fid 0.3.0's InceptionV3 on torchvision 0.29.1's blocks, filled by the same rule."""
    image = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (2, 3, 40, 48)).astype(np.uint8))[:1]
    features, logits = inception(image)
    expected = [0.0, 0.060105, 11.906756, 0.028756, 0.252625, 0.002775, 8.990755, 0.112849]
    np.testing.assert_allclose(features[0, ::256].numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([features.mean(), features.std()], [3.141093, 4.231958], rtol=1e-4)
    expected = [-8.086815, 2.422424, -7.575337, 1.971549, 5.098942, -5.816162, -11.092961]
    np.testing.assert_allclose(logits[0, ::144].numpy(), expected, rtol=1e-4, atol=1e-4)    # without fc.bias


def test_command_with_inception(inception_file, capsys):
    a, b = glyphs(10), glyphs(2, seed=8)
    result = run(folder("a", a), folder("b", b), "--inception", inception_file)
    out, err = capsys.readouterr()
    assert result["score"] == "FID-2" and out.startswith(f"FID-2 {result['value']:.4f}   Inception Score 1.")
    assert out.count("\n") == 2 and fid.digest([inception_file.read_bytes()]) in out
    assert err.count("WARNING") == 2 and "2048" in err
    run("--save-stats", folder("c", a[:2]), "a.npz", "--inception", inception_file)
    with np.load("a.npz") as file:                      # pytorch-fid reads these two
        assert file["mu"].shape == (2048,) and file["sigma"].shape == (2048, 2048)
        np.testing.assert_allclose(np.trace(file["sigma"]), file["sigma"].diagonal().sum())


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body, length = self.server.reply
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(fid, "INCEPTION_URL", f"http://127.0.0.1:{server.server_port}/x/weights.pth")

    def reply(body, length=None):
        server.reply = body, len(body) if length is None else length

    yield reply
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["404", "wrong", "truncated"])
def test_failed_download_leaves_nothing(serve, capsys, monkeypatch, fault):
    body = b"weights" * 5000
    monkeypatch.setattr(fid, "INCEPTION_SHA256", fid.digest([body])[:8])
    serve(*{"404": (b"",), "wrong": (b"x" + body,), "truncated": (body[:9999], len(body))}[fault])
    message = error(capsys, folder("a", glyphs(3)), "a", "--data_dir", "data")
    assert fid.INCEPTION_URL in message and str(Path("data/weights.pth")) in message and "--detector tiny" in message
    assert "--inception" in message and not list(Path("data").iterdir())


def test_good_download_is_kept(serve, monkeypatch, inception_file):
    body = inception_file.read_bytes()
    serve(body)
    with pytest.raises(fid.UserError, match="bytes with sha256"):
        fid.load_inception(None, "data")                # not the published file
    monkeypatch.setattr(fid, "INCEPTION_SHA256", fid.digest([body])[:8])
    assert fid.load_inception(None, "data").hash == fid.digest([body])
    assert [p.name for p in Path("data").iterdir()] == ["weights.pth"]
    serve(b"")
    assert not fid.load_inception(None, "data").training


# ---- sides -----------------------------------------------------------------------------------------------------------

def test_files_and_memory_give_the_same_score():
    images = glyphs(70)
    np.savez("a.npz", images.transpose(0, 2, 3, 1))     # as ADM does: arr_0
    values = [run(a, "glyphs", "--detector", "tiny", "--batch", 32) for a in (folder("a", images), "a.npz")]
    assert values[0]["value"] == values[1]["value"] > 0 and values[1]["B"]["cached"] and not values[0]["B"]["cached"]
    assert values[0]["score"] == "FD-tiny" and values[0]["floor"] > 0 and values[0]["floor_n"] == 70
    assert 0 <= values[0]["detector_accuracy"] <= 1 and len(list(Path("data").glob("detector-tiny-glyphs-*.pt"))) == 1


def test_grey_and_mixed_sizes(stub):
    Path("a").mkdir()
    for i, (mode, size) in enumerate([("L", (5, 7)), ("RGB", (9, 9)), ("RGB", (9, 9)), ("1", (5, 7)), ("P", (3, 4))]):
        Image.effect_noise(size, 90).convert(mode).save(f"a/{i}.png")
    Path("a/notes.txt").write_text("no image")
    side = fid.open_folder(Path("a"), 2)
    shapes = [(i, *x.shape) for i, x in side.batches(4)]
    assert side.n == 5 and shapes == [(0, 1, 3, 7, 5), (1, 2, 3, 9, 9), (3, 1, 3, 7, 5), (4, 1, 3, 4, 3)]
    assert run("a", folder("b", glyphs(20)))["A"]["n"] == 5


def test_stats_round_trip_and_cache(stub, monkeypatch):
    a, b = folder("a", glyphs(30)), folder("b", glyphs(41, seed=8))
    first = run(a, b, "--data_dir", "cache")
    run("--save_stats", a, "a.npz", "--data-dir", "cache")
    again = run(a, b, "--data_dir", "cache", "--batch", 7)
    assert again["B"]["cached"] and not first["B"]["cached"]
    assert first["value"] == pytest.approx(again["value"], rel=1e-9)
    assert run("a.npz", b, "--data_dir", "cache")["value"] == first["value"] and first["inception_score"][0] > 1
    x = Stub()(torch.from_numpy(glyphs(30)))[0].double().numpy()
    with np.load("a.npz", allow_pickle=False) as file:
        for key, expected in zip(("mu", "sigma"), moments(x)):
            np.testing.assert_allclose(file[key], expected, rtol=1e-6, atol=1e-12)
    Image.new("RGB", (16, 16)).save("b/0000.png")       # other images, or another detector: no use of the cache
    assert not run(a, b, "--data_dir", "cache")["B"]["cached"]
    monkeypatch.setattr(Stub, "hash", "other")
    assert not run(a, b, "--data_dir", "cache")["B"]["cached"]


def test_checkpoint(stub, capsys):
    path = checkpoint()
    result = run(path, "--n", 10, "--seed", 3, "--nfe", 2, "--batch", 4, "--device", "cpu")
    assert dict(result["A"], seeds=[3, 12], nfe=2, weights="ema", step=12) == result["A"]
    assert result["score"] == "FID-10" and result["B"]["name"] == "glyphs" and result["B"]["n"] == 300
    cfg, net = uvit_sc.load_checkpoint(path)
    cfg.nfe = 2
    images = uvit_sc.sample(net, cfg, range(3, 13)).numpy()
    assert run(folder("a", images), "glyphs")["value"] == pytest.approx(result["value"], rel=1e-6)
    raw = run(path, "--n", 10, "--seed", 3, "--nfe", 2, "--weights", "model")
    assert raw["A"]["weights"] == "raw" and raw["value"] != result["value"]
    assert "uvit_sc at step 12, ema weights, 2 NFE, seeds 3-12" in capsys.readouterr().out


def test_checkpoint_of_a_folder(stub, monkeypatch, photos, capsys):
    """The reference has the size of the samples, and the protocol tells what RK45 took."""
    rf_sc = importlib.import_module("rf_sc")
    monkeypatch.setattr(fid, "SCRIPTS", ("rf_sc", "uvit_sc"))
    torch.manual_seed(0)
    net = rf_sc.build_net(rf_sc.make_config("folder", size=16, backbone="unet_tiny", tol=0.1, data_dir=str(photos)))
    rf_sc.write_checkpoint(Path("rf.pt"), script="rf_sc", config=dict(vars(net.cfg)), step=1, ema=net.state_dict())
    seen = []
    monkeypatch.setattr(Stub, "forward", lambda self, x, old=Stub.forward: seen.append(tuple(x.shape[1:])) or old(self, x))
    result = run("rf.pt", "--n", 8, "--data_dir", photos)
    assert set(seen) == {(3, 16, 16)} and result["B"]["n"] == 64
    rf_sc.sample(net.eval(), net.cfg, range(8))
    out = capsys.readouterr().out
    assert result["A"]["nfe"] == round(net.nfe, 1) > 7 and f"{result['A']['nfe']:g} NFE" in out and "float32, RK45 to 0.1" in out
    assert "RK45" not in run("rf.pt", "--n", 8, "--data_dir", photos, "--nfe", 3)["A"] and "RK45" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["drawn", "drawn.npz"])
def test_save(stub, capsys, target):
    """What is kept is what was measured, and it can be read again."""
    path = checkpoint()
    result = run(path, "--images", 70, "--seed", 3, "--nfe", 1, "--save", target)
    cfg, net = uvit_sc.load_checkpoint(path)
    cfg.nfe = 1
    images = uvit_sc.sample(net, cfg, range(3, 73)).permute(0, 2, 3, 1).numpy()
    if target.endswith(".npz"):
        with np.load(target, allow_pickle=False) as file:
            assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
            np.testing.assert_array_equal(file["arr_0"], images)
    else:
        files = sorted(Path(target).iterdir())
        assert [f.name for f in files] == [f"{seed:06d}.png" for seed in range(3, 73)]
        np.testing.assert_array_equal([np.array(Image.open(f)) for f in files], images)
    assert run(target, "glyphs")["value"] == pytest.approx(result["value"], rel=1e-9) and not [*Path().glob(".*.part")]
    capsys.readouterr()
    assert "exists" in error(capsys, path, "--save", target)


@pytest.mark.parametrize("target", ["a", "a.npz"])
def test_save_that_fails_leaves_nothing(stub, monkeypatch, capsys, target):
    def fails(self, *args, add=fid.Statistics.add):
        if self.n == 300:       # the reference comes first
            return add(self, *args)
        assert [*Path().glob(".*.part")]
        raise fid.UserError("no more")

    monkeypatch.setattr(fid.Statistics, "add", fails)
    assert "no more" in error(capsys, checkpoint(), "--n", 4, "--nfe", 1, "--save", target)
    assert sorted(p.name for p in Path().iterdir() if p.name != "data") == ["last.pt"]


def test_score_does_not_depend_on_the_batch(stub):
    """Images that arrive in chunks larger than the batch keep their places in the parts of the Inception Score."""
    path, scores = checkpoint(), []
    for batch in (7, 64):
        scores.append(run(path, "--n", 70, "--nfe", 1, "--batch", batch)["inception_score"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-9) and scores[0][1] > 0


def test_saved_images_sort_by_seed():
    """IS and hash go by the order of names, also where seeds have more digits than usual."""
    seeds = range(999_998, 1_000_002)
    with fid.image_writer("a", seeds, 2) as write:
        write(0, torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 2, 2))
    images = next(iter(fid.open_folder(Path("a"), 1).batches(4)))[1]
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3] and images.shape == (4, 3, 2, 2)


def test_in_the_place_of_pytorch_fid(stub, monkeypatch, capsys):
    workers = []
    monkeypatch.setattr(fid, "ThreadPoolExecutor", lambda n: workers.append(n) or concurrent.futures.ThreadPoolExecutor(n))
    a, b = folder("a", glyphs(20)), folder("b", glyphs(14, seed=8))
    words = "--batch-size", 5, "--num-workers", 3, "--device", "cpu", "--dims", 2048
    result = run(a, b, *words)
    assert workers == [3, 3] and result == dict(run(a, b, "--batch", 5), seconds=result["seconds"], B=result["B"])
    capsys.readouterr()
    saved = run("--save-stats", a, "a.npz", *words)
    assert "score" not in saved and "B" not in saved and "a.npz: mean and covariance" in capsys.readouterr().out
    before = Path("a.npz").read_bytes()
    assert "exists" in error(capsys, "--save-stats", b, "a.npz") and Path("a.npz").read_bytes() == before
    assert run("a.npz", b)["value"] == result["value"]


def test_npz_is_read_in_pieces():
    images = glyphs(23).transpose(0, 2, 3, 1)
    np.savez("a.npz", images)
    np.savez_compressed("b.npz", images)
    for name in ("a.npz", "b.npz"):
        side = fid.open_npz(Path(name))
        pieces = {i: x.permute(0, 2, 3, 1).numpy() for i, x in side.batches(7)}
        assert [*pieces] == [0, 7, 14, 21] and side.n == 23
        np.testing.assert_array_equal(np.concatenate([*pieces.values()]), images)
        assert side.hash == fid.digest([str(images.shape).encode(), np.ascontiguousarray(images)])
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:-300])
    with pytest.raises(fid.UserError, match="cut.npz"):
        fid.open_npz(Path("cut.npz"))


# ---- TensorFlow's resize ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, size", [(5, 7, 9), (8, 8, 3), (4, 6, 6)])
def test_resize_tensorflow_is_a_plain_loop(height, width, size):
    x = np.random.RandomState(0).randint(0, 256, (2, 3, height, width))
    expected = np.empty((2, 3, size, size))
    for i in range(size):
        for j in range(size):
            y, z = i * height / size, j * width / size
            (y0, dy), (z0, dz) = ((int(v), v - int(v)) for v in (y, z))
            y1, z1 = min(y0 + 1, height - 1), min(z0 + 1, width - 1)
            top, bottom = (x[..., k, z0] * (1 - dz) + x[..., k, z1] * dz for k in (y0, y1))
            expected[..., i, j] = top * (1 - dy) + bottom * dy
    found = fid.resize_tensorflow(torch.from_numpy(x).float(), size)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_resize_reaches_the_network(inception, monkeypatch):
    class Seen(Exception):
        pass

    def look(self, x):
        raise Seen(x)

    monkeypatch.setattr(fid.Unit, "forward", look)
    image, inputs = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), {}
    for resize in ("torch", "tensorflow"):
        monkeypatch.setattr(inception, "resize", resize, raising=False)
        with pytest.raises(Seen) as seen:
            inception(image)
        inputs[resize] = seen.value.args[0]
    torch.testing.assert_close(inputs["tensorflow"], (fid.resize_tensorflow(image.expand(1, 3, 16, 16).float()) - 128) / 128)
    assert inputs["torch"].shape == (1, 3, 299, 299) and (inputs["torch"] - inputs["tensorflow"]).abs().max() > 0.05


def test_a_folder_of_folders(capsys):
    Path("a").mkdir()
    folder("a/b", glyphs(3))
    assert "its folders are not looked into: name one" in error(capsys, "a", "a/b")


def test_statistics_that_cannot_be_kept(stub, monkeypatch, capsys):
    """The data may lie in a folder where nobody may write."""
    def denied(*args):
        raise PermissionError("read-only")
    a, b = folder("a", glyphs(30)), folder("b", glyphs(41, seed=8))
    value = run(a, b)["value"]
    monkeypatch.setattr(fid, "save_stats", denied)
    assert run(a, b, "--data_dir", "other")["value"] == value and "cannot be kept for next time (read-only)" in capsys.readouterr().err


def test_samples_come_in_whole_groups(stub, monkeypatch):
    """sample() works on 64 at a time; what is drawn in vain costs as much."""
    seen, sample = [], uvit_sc.sample
    monkeypatch.setattr(uvit_sc, "sample", lambda net, cfg, seeds, **more: (seen.append(len(seeds)), sample(net, cfg, seeds, **more))[1])
    run(checkpoint(), "--n", 150, "--nfe", 1, "--batch", 80)
    assert seen == [128, 22]


def test_every_process_can_say_what_is_wrong(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(fid.time, "sleep", waited.append)
    for rank in (0, 1):
        monkeypatch.setattr(fid, "LOCAL_RANK", rank)
        assert "nowhere.pt" in error(capsys, "nowhere.pt") and len(waited) == rank


def test_cudnn_stays_on(monkeypatch):
    """Without TF32, and otherwise as it was: flags() alone would switch it off."""
    class Look(Stub):
        def forward(self, images):
            seen.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
            return super().forward(images)
    seen = []
    monkeypatch.setattr(fid, "load_inception", lambda file, folder: Look())
    folder("a", glyphs(12))
    run("a", "glyphs")
    assert set(seen) == {(True, False)}


def test_resize_and_statistics(stub, capsys):
    """Each resize has its own cache, and statistics for one are not compared with images for the other."""
    a, b = folder("a", glyphs(12)), folder("b", glyphs(12, seed=8))
    assert not run(a, b)["B"]["cached"]
    one, two = (run(a, b, "--resize", "tensorflow") for _ in range(2))
    assert not one["B"]["cached"] and two["B"]["cached"] and one["resize"] == "tensorflow" and run(a, b)["resize"] == "torch"
    out = capsys.readouterr().out
    assert "stub, resize tensorflow;" in out and "stub, resize torch;" in out and len([*Path("data").glob("*.npz")]) == 2
    run("--save-stats", a, "a.npz", "--resize", "tensorflow")
    capsys.readouterr()
    assert "--resize tensorflow" in error(capsys, b, "a.npz")
    np.savez("adm.npz", mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(3), sigma_s=np.eye(3))
    assert "--resize tensorflow" in error(capsys, b, "adm.npz") and run(b, "adm.npz", "--resize", "tensorflow")["value"] > 0


# ---- processes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("n, batch", [(13, 4), (3, 8), (16, 4)])
def test_processes_share_each_image_once(monkeypatch, world, n, batch):
    images = glyphs(n)
    np.savez("a.npz", images.transpose(0, 2, 3, 1))
    folder("a", images)
    monkeypatch.setattr(fid, "WORLD", world)
    for side in (fid.open_npz(Path("a.npz")), fid.open_folder(Path("a"), 1)):
        seen = {}
        for rank in range(world):
            monkeypatch.setattr(fid, "RANK", rank)
            for start, part in side.batches(batch):
                for i, image in enumerate(part.numpy(), start):
                    assert i not in seen and i // batch % world == rank
                    seen[i] = image
        assert len(seen) == n and all((seen[i] == images[i]).all() for i in seen)
        monkeypatch.setattr(fid, "RANK", 0)


def test_two_processes_give_the_numbers_of_one(cifar, monkeypatch):
    """133 samples: 64 for each process, then 5 for the first and none for the second."""
    monkeypatch.setattr(uvit_sc, "load_data", LOAD_DATA)
    monkeypatch.setitem(fid.DETECTOR, "steps", STEPS)   # the name of its file tells the steps, and there are none here
    monkeypatch.setattr(fid, "train_detector", lambda images, labels: fid.TinyDetector(32, 20).eval())
    torch.manual_seed(0)
    net = uvit_sc.build_net(uvit_sc.make_config(**{**SMALL, "data_dir": str(cifar), "nfe": 1}))
    uvit_sc.write_checkpoint(Path("a.pt"), script="uvit_sc", config=dict(vars(net.cfg)), step=1, ema=net.state_dict())
    words = "a.pt", "--detector", "tiny", "--images", 133, "--batch", 8, "--device", "cpu", "--save"
    one = run(*words, "1.npz")
    for cache in cifar.glob("stats-*"):
        cache.unlink()
    status, out, err = finish(launch("fid", [*words, "2.npz", "--json", "2.json"], 2))
    two = json.loads(Path("2.json").read_text())
    assert status == 0 and out.count("FD-tiny") == 2 and out.count("protocol") == 1 and two["processes"] == 2, err
    assert [two[k] for k in ("value", "floor")] == pytest.approx([one[k] for k in ("value", "floor")], rel=1e-6)
    assert (two["A"], two["B"]) == (one["A"], one["B"]) and Path("1.npz").stat().st_size == Path("2.npz").stat().st_size
    assert (np.load("1.npz")["arr_0"] == np.load("2.npz")["arr_0"]).all()


def test_fault_of_one_process_ends_all(cifar):
    """The second process alone meets the damaged image."""
    folder("a", np.zeros((8, 3, 32, 32), np.uint8))
    Path("a/0005.png").write_bytes(b"no image")
    words = "a", "cifar100", "--detector", "tiny", "--batch", 4, "--device", "cpu", "--data_dir", cifar
    status, out, err = finish(launch("fid", words, 2))
    assert status and out == "" and err.count("fid: ") == 1 and "a/0005.png cannot be read" in err and "exitcode  : 2" in err
    status, out, err = finish(launch("fid", [*words, "--nonsense", 1], 2))      # and what all find, one of them tells
    assert status and out == "" and err.count("fid: ") == 1 and "--nonsense" in err and "exitcode  : 2" in err


def test_detector_files_that_do_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "train_detector", lambda images, labels: fid.TinyDetector(32, 20).eval())
    images, labels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20)
    side = fid.Side("photos", 20, None, load=lambda train: (images, labels), hash="1234")
    assert fid.load_detector(side, tmp_path).classes == 20
    path, = tmp_path.glob("detector-*.pt")
    good = fid.TinyDetector(32, 20).state_dict()
    for contents in (dict(model=fid.TinyDetector(32, 7).state_dict(), accuracy=1.0), dict(model=[1], accuracy=1.0), dict(accuracy=1.0), [1],
                     dict(model=good), dict(model={1: 2}, accuracy=1.0), dict(model=good, accuracy="high")):
        torch.save(contents, path)
        with pytest.raises(fid.UserError, match="is no detector of these images; delete it"):
            fid.load_detector(side, tmp_path)


def test_tiny_detector_repeats_itself():
    images, labels = uvit_sc.load_data(None, True)
    state = torch.random.get_rng_state()
    one, two = (fid.train_detector(images, labels).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one) and torch.equal(state, torch.random.get_rng_state())


def test_names():
    names = [fid.score_name("inception", n) for n in (None, 512, 1000, 10000, 49999, 50000, 60000)]
    assert names == ["FID-?", "FID-512", "FID-1k", "FID-10k", "FID-49999", "FID", "FID"]
    assert fid.score_name("tiny", 50000) == "FD-tiny"


# ---- errors ----------------------------------------------------------------------------------------------------------

def test_errors(stub, capsys):
    a = folder("a", glyphs(3))
    Path("empty").mkdir()
    Path("bad").mkdir()
    Image.new("RGB", (8, 8)).save("bad/a.png")
    Path("bad/x.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    Path("note.txt").write_text("?")
    np.savez("neither.npz", x=np.zeros(3))
    np.savez("pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez("wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    Path("text.npz").write_text("no zip")
    Path("text.pt").write_text("no checkpoint")
    checkpoint("evil.pt", script="fid")           # such a file exists, and must not be imported all the same
    checkpoint("good.pt")
    for words, part in {
            ("missing.pt", a): "missing.pt: no such file", ("missing.npz", a): "no such file",
            (a, "cifar11"): "glyphs", ("note.txt", a): "note.txt", ("empty", a): "empty holds no images",
            ("bad", a): "bad/x.png", ("neither.npz", a): "neither", ("pickled.npz", a): "pickled.npz",
            ("wide.npz", a): "2048 features", ("text.npz", a): "text.npz", ("text.pt", a): "text.pt",
            ("evil.pt",): "of fid", (a,): "with what", (a, "glyphs", "--n", "5"): "--n", (): "required",
            (a, a, "--detector", "tiny"): "data set", (a, a, "--batch", "0"): "--batch",
            (a, a, "--unknown"): "--unknown", ("good.pt", "--nfe", "0"): "nfe", ("good.pt", "--vae", "x"): "draws pixels", (a, a, "--vae", "x"): "without", (a, "x", "--save_stats"): ".npz",
            (a, "wide.npz", "--save-stats"): "exists", (a, a, "--save", "x"): "--save", (a, "--save-stats"): ".npz",
            (a, a, "--device", "cuda:99"): "--device cuda:99", (a, a, "--device", "gpu"): "--device gpu",
            (a, a, "--dims", "192"): "--dims",
            ("good.pt", "--save", a): "not empty", ("good.pt", "--save", "wide.npz"): "exists",
            ("good.pt", "--save", "no/x"): "no such folder", (a, a, "--num-workers", "-1"): "--num_workers",
            (a, "glyphs", "--detector", "tiny", "--resize", "torch"): "--resize",
            (a, a, "--json", "no/x"): "no such folder",
            ("good.pt", "--n", "1"): "at least 2", (a, a, "--detector", "big"): "tiny"}.items():
        assert part in error(capsys, *words), words


def test_errors_of_weights(capsys, tmp_path):
    a = folder("a", glyphs(3))
    Path("text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(3)}, "other.pth")
    for file in ("missing.pth", "text.pth", "other.pth"):
        assert file in error(capsys, a, a, "--inception", file)
    np.savez("a.npz", np.zeros((70, 8, 8, 3), np.uint8))
    assert "16 x 16" in error(capsys, "a.npz", "glyphs", "--detector", "tiny")


def test_interrupted(stub, monkeypatch, capsys):
    """Ctrl-C while images are measured: one line, no half file."""
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(Stub, "forward", interrupt)
    with pytest.raises(SystemExit) as end:
        fid.main([checkpoint(), "--n", "20", "--nfe", "2", "--save", "s.npz", "--device", "cpu"])
    assert end.value.code == 130 and capsys.readouterr().err.endswith("fid: interrupted\n") and not list(Path().glob("*s.npz*"))
