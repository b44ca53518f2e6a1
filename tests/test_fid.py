"""fid.py: numbers against closed forms and against pytorch-fid, files, names, processes, errors."""
import functools, json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_latent_sc, fid, rf_sc, uvit_sc
from conftest import ROOT, SMALL, finish, launch

LOAD_DATA = uvit_sc.load_data


class Stub(torch.nn.Module):
    """A detector that costs nothing: the mean and the mean square of each colour."""
    kind, dim, classes, hash = "inception", 6, 12, "stub"

    def forward(self, images):
        assert torch.backends.cudnn.enabled and not torch.backends.cudnn.allow_tf32
        x = images.expand(-1, 3, -1, -1).float() / 255
        f = torch.cat([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))], dim=1)
        return f, torch.cat([f, -9 * f], dim=1)


def pictures(n, seed=9):
    rng = np.random.RandomState(seed)
    return (rng.randint(0, 256, (n, 3, 16, 16)) // rng.randint(1, 9, (n, 1, 1, 1))).astype(np.uint8)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """One script, 300 random images of 10 classes, five training steps, a folder of one's own."""
    def load_data(cfg, train):
        n = 300 if train else 100
        return torch.from_numpy(pictures(n, seed=n)), torch.arange(n) % 10

    monkeypatch.setattr(uvit_sc, "load_data", load_data)
    monkeypatch.setattr(fid, "SCRIPTS", dict(uvit_sc=uvit_sc))
    monkeypatch.setattr(fid, "train_detector", functools.partial(fid.train_detector, steps=5))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stub(monkeypatch):
    def load(file, folder, resize):
        Stub.resize = resize
        return Stub()
    monkeypatch.setattr(fid, "load_inception", load)


def run(*words):
    fid.main([*map(str, words), "--device", "cpu", "--json", "result.json"])
    return json.loads(Path("result.json").read_text())


def error(capsys, *words):
    """The one line with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fid.main([*map(str, words)])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n"), err[:5]) == (2, "", 1, "fid: "), err
    return err


def folder(name, images):
    Path(name).mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0).copy()).save(f"{name}/{i:04d}.png")
    return name


def checkpoint(name="last.pt", script=uvit_sc, **fields):
    torch.manual_seed(0)
    cfg = script.make_config(**{"data_dir": "data", **fields})
    ema = script.build_net(cfg).state_dict()
    raw = {key: value * 0.5 for key, value in ema.items()}
    config = dict(vars(cfg))
    torch.save(dict(script=script.SCRIPT, config=config, step=12, ema=ema, model=raw), name)
    return name


# ---- Distance and statistics: in float64, 1e-9 is thousands of roundings -------------------------

def moments(x):
    return x.mean(axis=0), np.cov(x, rowvar=False)


def test_distance():
    rng = np.random.RandomState(0)
    a, b, m = rng.uniform(0.1, 3, 20), rng.uniform(0.1, 3, 20), rng.randn(20)
    q = np.linalg.qr(rng.randn(20, 20))[0]              # covariances that commute
    expected = (m ** 2).sum() + ((a ** 0.5 - b ** 0.5) ** 2).sum()
    found = fid.frechet_distance(m, q * a @ q.T, 0 * m, q * b @ q.T)
    assert found == pytest.approx(expected, rel=1e-9)
    (m1, s1), (m2, s2) = moments(rng.randn(90, 30)), moments(rng.randn(80, 30) @ rng.randn(30, 30))
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).sum().real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * root
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9)
    x, y = rng.randn(12, 100), 2 * rng.randn(9, 100)    # fewer images than features
    (m1, s1), (m2, s2) = moments(x), moments(y)
    cross = (x - m1) @ (y - m2).T / np.sqrt(11 * 8)     # tr (S1 S2)^(1/2) is its nuclear norm
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.linalg.norm(cross, "nuc")
    assert fid.frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-6)


def test_statistics_are_those_of_plain_code():
    rng = np.random.RandomState(3)
    x, logits = rng.randn(103, 17).astype(np.float32) + 5, 3 * rng.randn(103, 11)
    stats = fid.Statistics(103, 17, 11)
    for i in reversed(range(0, 103, 10)):       # an image's part goes by its index, not its turn
        stats.add(torch.from_numpy(x[i:i + 10]), torch.from_numpy(logits[i:i + 10]), i)
    for found, expected in zip(stats.gaussian(), moments(x.astype(np.float64))):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    shuffled, scores = logits[np.random.RandomState(2020).permutation(103)], []
    for k in range(10):
        part = shuffled[k * 103 // 10:(k + 1) * 103 // 10]
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert stats.inception_score() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


# ---- Inception -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """Weights by a rule that needs no file: numbers of a frozen stream, by the sorted names."""
    net, rng = fid.Inception(), np.random.RandomState(0)
    for name, v in sorted(net.state_dict().items()):
        positive = name.endswith(("bn.weight", "bn.running_var"))
        low, high = (0.5, 1.5) if positive else (-0.2, 0.2)
        if v.dim() > 1:
            high = (6 / v[0].numel()) ** 0.5
            low = -high
        if v.dim():
            v.copy_(torch.from_numpy(rng.uniform(low, high, tuple(v.shape)).astype(np.float32)))
    net.file = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(net.state_dict(), net.file)
    return net.eval()


def test_inception_has_the_official_names(inception):
    state = inception.state_dict()
    assert len(state) == 566 and sum(p.numel() for p in inception.parameters()) == 23_850_960
    assert state["Mixed_7b.branch3x3_2a.conv.weight"].shape == (384, 384, 1, 3)
    assert state["Mixed_7c.branch_pool.bn.running_var"].shape == (192,)


@torch.no_grad()
def test_inception_computes_what_pytorch_fid_computes(inception):
    """The numbers come from pytorch-fid 0.3.0's InceptionV3 on torchvision 0.29.1's blocks, filled
    by the same rule. 94 layers round by 2^-24 each, sums of up to 4,032 terms by their root."""
    rng = np.random.RandomState(1)
    images = torch.from_numpy(rng.randint(0, 256, (2, 3, 40, 48)).astype(np.uint8))
    features, logits = inception(images[:1])
    close = dict(rtol=94 * 4032 ** 0.5 * 2 ** -24, atol=1e-4)
    expected = [0.0, 0.060105, 11.906756, 0.028756, 0.252625, 0.002775, 8.990755, 0.112849]
    np.testing.assert_allclose(features[0, ::256].numpy(), expected, **close)
    np.testing.assert_allclose([features.mean(), features.std()], [3.141093, 4.231958], **close)
    expected = [-8.086815, 2.422424, -7.575337, 1.971549, 5.098942, -5.816162, -11.092961]
    np.testing.assert_allclose(logits[0, ::144].numpy(), expected, **close)     # without fc.bias
    grey, inception.resize = images[:1, :1], "tensorflow"
    found = inception(grey)[0]
    inception.resize = "torch"
    x = (fid.resize_tensorflow(grey.expand(1, 3, 40, 48).float()) - 128) / 128
    for layer in list(inception)[:-1]:
        x = layer(x)
    assert torch.equal(found, x.mean(dim=(2, 3)))


def test_command_with_inception(inception, capsys):
    a, b = folder("a", pictures(10)), folder("b", pictures(2, seed=8))
    result = run(a, b, "--inception", inception.file)
    out, err = capsys.readouterr()
    assert out.startswith(f"FID-2 {result['value']:.4f}   Inception Score 1.")
    assert fid.digest(inception.file.read_bytes()) in out
    assert "A a, n 10, sha256" in out and "pixels 16 x 16; B b, n 2" in out
    assert out.count("\n") == 2 and err.count("WARNING") == 2 and "note" not in err


def test_resize_tensorflow():
    """Pixel i lies at i * old / new, and the last one is all there is beyond it."""
    for height, width, size in ((5, 7, 9), (8, 8, 3), (4, 6, 6)):
        x = np.random.RandomState(0).randint(0, 256, (2, 3, height, width))
        found, expected = fid.resize_tensorflow(torch.from_numpy(x).float(), size), x
        for dim, old in ((3, width), (2, height)):
            place = np.arange(size) * old / size
            expected = np.apply_along_axis(
                lambda line: np.interp(place, np.arange(len(line)), line), dim, expected)
        np.testing.assert_allclose(found.numpy(), expected, atol=255 * 8 * 2 ** -23)


def test_weights(monkeypatch, inception, capsys):
    """A download that is not the published file leaves nothing; that file is kept and not fetched
    again."""
    body, a = inception.file.read_bytes(), folder("a", pictures(3))
    monkeypatch.setattr(fid, "INCEPTION_URL", (Path.cwd() / "w.pth").as_uri())
    monkeypatch.setattr(fid, "INCEPTION_SHA256", fid.digest(body)[:8])
    for published in (None, body[:9999]):
        if published:
            Path("w.pth").write_bytes(published)
        message = error(capsys, a, a)
        for word in (fid.INCEPTION_URL, "data/w.pth", "--inception", "--detector tiny"):
            assert word in message and not any(Path("data").iterdir())
    Path("w.pth").write_bytes(body)
    assert fid.load_inception(None, "data", "torch").hash == fid.digest(body)
    Path("w.pth").unlink()
    assert [p.name for p in Path("data").iterdir()] == ["w.pth"]
    assert not fid.load_inception(None, "data", "torch").training
    Path("text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(3)}, "other.pth")
    for file in ("missing.pth", "text.pth", "other.pth"):
        assert file in error(capsys, a, a, "--inception", file)


# ---- Sides ---------------------------------------------------------------------------------------

def test_folders_are_read_by_read_image(stub, capsys):
    Path("a").mkdir()
    Image.new("RGBA", (5, 7), (0, 0, 0, 0)).save("a/0.png")             # transparent: white
    for i, size in enumerate([(9, 9), (9, 9), (7, 5)], 1):
        Image.new("L", size, i).save(f"a/{i}.png")
    Path("a/._1.png").write_bytes(b"left by a Mac")
    Path("a/notes.txt").write_text("no image")
    side = fid.open_folder(Path("a"))
    found = [(start, tuple(x.shape), x.unique().tolist()) for start, x in side.batches(4)]
    assert found == [(0, (1, 3, 7, 5), [255]), (1, (2, 3, 9, 9), [1, 2]), (3, (1, 3, 5, 7), [3])]
    assert run("a", "glyphs")["A"]["n"] == 4
    assert "note: A has of 3 sizes pixels, B 16 x 16: the score sees" in capsys.readouterr().err


def test_statistics_are_kept(stub, monkeypatch):
    """Of the reference, for next time and as a file for us and for pytorch-fid."""
    a, b = folder("a", pictures(30)), folder("b", pictures(41, seed=8))
    first = run(a, b, "--data_dir", "cache")
    again = run(a, b, "--data_dir", "cache", "--batch", 7)
    assert again["B"]["cached"] and again["B"]["pixels"] == "16 x 16" and "cached" not in first["B"]
    assert first["value"] == pytest.approx(again["value"], rel=1e-9)
    kept, = Path("cache").glob("stats2-inception-torch-stub-*.npz")
    assert run(a, kept)["value"] == again["value"]
    x = pictures(41, seed=8) / 255
    x = np.concatenate([x.mean(axis=(2, 3)), (x ** 2).mean(axis=(2, 3))], axis=1)
    with np.load(kept, allow_pickle=False) as file:             # features are float32
        np.testing.assert_allclose(file["mu"], moments(x)[0], rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], moments(x)[1], rtol=1e-4, atol=1e-6)
    Image.new("RGB", (16, 16)).save("b/0000.png")               # other images: no use of the cache
    monkeypatch.setattr(np, "savez", lambda *args, **arrays: os.listdir("nowhere"))
    for _ in range(2):                                          # nor where it cannot be written
        assert "cached" not in run(a, b, "--data_dir", "cache")["B"]
    assert len(list(Path("cache").iterdir())) == 1


def test_statistics_know_their_resize(stub, capsys):
    a, b = folder("a", pictures(12)), folder("b", pictures(12, seed=8))
    tensorflow = "--resize", "tensorflow"
    results = [run(a, b), run(a, b, *tensorflow), run(a, b, *tensorflow)]
    assert ["cached" in result["B"] for result in results] == [False, False, True]
    kept, = Path("data").glob("stats2-inception-tensorflow-*.npz")
    np.savez("adm.npz", mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(3), sigma_s=np.eye(3))
    for file in (kept, "adm.npz"):
        assert "--resize tensorflow" in error(capsys, b, file)
    assert run(b, "adm.npz", *tensorflow)["score"] == "FID-?"


def test_checkpoint(stub, capsys):
    path = checkpoint()
    words = path, "--n", 10, "--seed", 3, "--nfe", 2
    result = run(*words, "--batch", 4)
    facts = dict(seeds="3-12", nfe=2, weights="ema", step=12, n=10, precision="float32")
    assert facts.items() <= result["A"].items() and result["score"] == "FID-10"
    out = capsys.readouterr().out
    assert result["B"]["n"] == 300 and "script uvit_sc, step 12, weights ema, nfe 2" in out
    cfg, net = uvit_sc.load_checkpoint(path)
    cfg.nfe = 2
    again = run(folder("a", uvit_sc.sample(net, cfg, range(3, 13)).numpy()), "glyphs")
    for key in ("value", "inception_score"):
        assert again[key] == pytest.approx(result[key], rel=1e-4)
    raw, half = run(*words, "--weights", "model"), run(*words, "--amp", "bf16")
    assert raw["A"]["weights"] == "model" and half["A"]["precision"] == "bfloat16"
    assert len({result["value"], raw["value"], half["value"]}) == 3
    names = [fid.score_name(n) for n in (None, 512, 10000, 49999, 50000, 60000)]
    assert names == ["FID-?", "FID-512", "FID-10k", "FID-49999", "FID", "FID"]


def test_checkpoint_of_a_folder(stub, monkeypatch, photos):
    """The reference has the size of the samples, and the protocol tells what RK45 took."""
    monkeypatch.setattr(fid, "SCRIPTS", dict(rf_sc=rf_sc, uvit_sc=uvit_sc))
    fields = dict(dataset="folder", size=16, backbone="unet_tiny", tol=0.1, nfe=0)
    result = run(checkpoint("rf.pt", rf_sc, data_dir=str(photos), **fields), "--n", 8)
    assert result["B"]["pixels"] == "16 x 16" and result["B"]["n"] == 64
    assert result["A"]["nfe"] > 7


def test_reference_of_latents(stub, photos, monkeypatch):
    """The training pictures, cropped as for the latents."""
    monkeypatch.setattr(fid, "SCRIPTS", dict(dit_latent_sc=dit_latent_sc))
    cfg = dit_latent_sc.make_config("folder", data_dir=str(photos), size=12, cell=4, nfe=1,
                                    tokenizer="unshuffle", backbone="dit_tiny")
    found = torch.cat([x for _, x in fid.open_dataset("folder", str(photos), cfg).batches(7)])
    files = dit_latent_sc.list_folders(cfg, train=True)[0]
    cropped = [dit_latent_sc.centre_crop(dit_latent_sc.read_image(file), 12) for file in files]
    assert len(files) == 64 and np.array_equal(found, np.stack(cropped))
    result = run(checkpoint("dit.pt", dit_latent_sc, **vars(cfg)), "--n", 70)
    assert (result["score"], result["B"]["n"]) == ("FID-70", 64)    # of all images that there are
    dit_latent_sc.write_facts(dit_latent_sc.latents_path(cfg, True), dict(bad={"3": "", "60": ""}))
    side = fid.open_dataset("folder", str(photos), cfg)
    found = [image for _, images in side.batches(7) for image in images]
    assert side.n == 62 and np.array_equal(found[-1], cropped[63])  # but what --encode left out


def test_save(capsys):
    """What is kept is what was measured; files and memory give the same score, also as an array."""
    words = checkpoint(), "--images", 70, "--seed", 3, "--nfe", 1
    tiny = "--detector", "tiny"
    results = [run(*words, *tiny, "--save", "drawn"), run("drawn", "glyphs", *tiny)]
    assert "exists" in error(capsys, *words, *tiny, "--save", "drawn", "--device", "cpu")
    files = sorted(Path("drawn").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(3, 73)]
    np.savez("drawn.npz", np.stack([np.asarray(Image.open(file)) for file in files]))
    results.append(run("drawn.npz", "glyphs", *tiny))
    assert len({result["value"] for result in results}) == 1 and results[0]["value"] > 0
    assert ["cached" in result["B"] for result in results] == [False, True, True]
    assert results[0]["score"] == "FD-tiny" and results[0]["floor"] > 0
    assert results[0]["floor_n"] == 70 and 0 <= results[0]["detector_accuracy"] <= 1


def test_tiny_detector_repeats_itself(capsys, monkeypatch):
    images, labels = uvit_sc.load_data(None, True)
    side = fid.open_dataset("glyphs", "data", None)
    state = torch.random.get_rng_state()
    one, two = [fid.load_detector(side, folder) for folder in ("one", "two")]
    assert fid.load_detector(side, "one").hash == one.hash == two.hash      # of all weights
    assert torch.equal(state, torch.random.get_rng_state())
    monkeypatch.setattr(uvit_sc, "load_data", lambda cfg, train: (images, 0 * labels))
    assert "only one" in error(capsys, folder("a", pictures(3)), "glyphs", "--detector", "tiny")


def test_two_processes_give_the_numbers_of_one(cifar, monkeypatch):
    monkeypatch.setattr(uvit_sc, "load_data", LOAD_DATA)
    path = checkpoint(**{**SMALL, "data_dir": str(cifar)})
    words = path, "--detector", "tiny", "--images", 133     # none of the last for the second
    one = run(*words, "--save", "1")
    for cache in cifar.glob("stats2-*"):
        cache.unlink()
    words = [*words, "--save", "2", "--json", "2.json", "--device", "cpu"]
    status, out, err = finish(launch("fid", words, 2))
    assert status == 0 and out.count("FD-tiny") == 2 and out.count("protocol") == 1, err
    two = json.loads(Path("2.json").read_text())
    for key in ("value", "floor"):      # float32 features, in batches of another size
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    assert two["processes"] == 2 and (two["A"], two["B"]) == (one["A"], one["B"])
    one, two = [[f.read_bytes() for f in sorted(Path(name).iterdir())] for name in "12"]
    assert one == two and len(one) == 133


def test_fault_of_one_process_ends_all(cifar):
    folder("a", np.zeros((8, 3, 32, 32), np.uint8))
    Path("a/0005.png").write_bytes(b"no image")         # only the second process meets it
    words = "a cifar100 --detector tiny --batch 4 --device cpu --data_dir".split()
    status, out, err = finish(launch("fid", [*words, cifar], 2))
    assert status and err.count("fid: ") == 1 and "a/0005.png cannot be read" in err


def test_world_size_left_over_by_a_launcher():
    environment = dict(os.environ, WORLD_SIZE="2", PYTHONPATH=str(ROOT))
    environment.pop("GOMP_SPINCOUNT", None)
    code = "import fid; print(fid.os.environ['GOMP_SPINCOUNT']); fid.main(['a', 'b'])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "2000\n" and "torchrun" in done.stderr


def test_errors(stub, capsys):
    a = folder("a", pictures(3))
    Path("empty").mkdir()
    Path("bad").mkdir()
    for name in ("bad/x.png", "note.txt", "text.npz", "text.pt"):
        Path(name).write_text("?")
    np.savez("neither.npz", x=np.zeros(3))
    np.savez("pickled.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    np.savez("wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez("cut.npz", np.zeros((9, 8, 8, 3), np.uint8))
    Path("cut.npz").write_bytes(Path("cut.npz").read_bytes()[:-300])
    torch.save(dict(script="json", config={}, step=1), "evil.pt")       # is not imported
    checkpoint("good.pt")
    for words in ("missing.pt", "missing.npz a", "note.txt a", "empty a", "bad a", "neither.npz a",
                  "pickled.npz a", "text.npz a", "cut.npz a", "text.pt a", "evil.pt"):
        assert words.split()[0] in error(capsys, *words.split())
    for words, part in {
            "a cifar11": "glyphs", "wide.npz a": "2048 features",
            "a": "with what", "": "required", "good.pt --guidance 2": "guidance",
            "a a --detector tiny": "data set", "a a --detector big": "tiny",
            "a a --unknown": "--unknown", "a a --device gpu": "--device"}.items():
        assert part in error(capsys, *words.split()), words
    if not torch.cuda.is_available():
        assert "--device cuda" in error(capsys, a, a, "--device", "cuda")
