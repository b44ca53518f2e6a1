"""probe.py: the heads are what separate training would give, the choice is honest, the outcome is written down."""
import argparse
import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import probe
import uvit_sc
from conftest import SMALL, finish, launch

ARGS = argparse.Namespace(seed=0, epochs=6, batch=32, lr=4e-3, device=torch.device("cpu"))


def fit(draws, labels, classes, args):
    """Heads of all images, from draws [(cells, N, D)] used in turn."""
    return probe.fit(lambda epoch, rows: draws[epoch % len(draws)][:, rows], torch.arange(len(labels)), labels, classes, args)


def blobs(n=200, cells=3, D=8, classes=4, seed=0):
    """Features (cells, n, D) of which cell 1 alone tells the labels (n,)."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=gen)
    feats = torch.randn(cells, n, D, generator=gen)
    feats[1, :, :classes] += 8 * torch.nn.functional.one_hot(labels, classes)
    return feats.half(), labels


def test_heads_together_equal_heads_apart():
    """One fit of three cells against torch.nn.Linear trained alone: same start, same batches, same result."""
    feats, labels = blobs()
    W, b = fit([feats], labels, 4, ARGS)
    gen = torch.Generator().manual_seed(ARGS.seed)
    starts = [(torch.rand(*shape, generator=gen) * 2 - 1) / 8 ** 0.5 for shape in ((1, 8, 4), (1, 1, 4))]
    orders = [torch.randperm(200, generator=gen) for _ in range(ARGS.epochs)]
    for cell in range(3):
        head = torch.nn.Linear(8, 4)
        head.weight.data, head.bias.data = starts[0][0].T.clone(), starts[1][0, 0].clone()
        optimizer = torch.optim.Adam(head.parameters(), lr=ARGS.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ARGS.epochs)
        for order in orders:
            for rows in order.split(ARGS.batch):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(head(feats[cell, rows].float()), labels[rows]).backward()
                optimizer.step()
            schedule.step()
        assert torch.allclose(W[cell].T, head.weight, atol=1e-5) and torch.allclose(b[cell, 0], head.bias, atol=1e-5)


def test_accuracy_finds_the_telling_cell():
    train, test = blobs(), blobs(seed=1)
    heads = fit([train[0]], train[1], 4, argparse.Namespace(**{**vars(ARGS), "epochs": 40}))
    scores = probe.accuracy(heads, lambda epoch, rows: test[0][:, rows], torch.arange(len(test[1])), test[1])
    assert scores[1] > 90 and max(scores[0], scores[2]) < 50


def test_ridge_is_least_squares_of_any_scale():
    """Against torch.linalg.lstsq; and scales and offsets of the features, which change what Adam finds, change nothing."""
    feats, labels = blobs()
    W, b = probe.ridge(lambda epoch, rows: feats[:, rows].float(), torch.arange(200), labels, 4, ARGS, penalty=0)
    x, y = feats.double(), torch.nn.functional.one_hot(labels, 4).double()
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(3, 200, 1)], dim=2), y.expand(3, -1, -1)).solution
    assert torch.allclose(torch.cat([W, b], dim=1).double(), exact, atol=1e-5)
    scale, test = 10 ** torch.linspace(-2, 2, 8), blobs(seed=1)
    scores = []
    for change in (lambda x: x.float(), lambda x: x.float() * scale + scale):
        heads = probe.ridge(lambda epoch, rows: change(feats[:, rows]), torch.arange(200), labels, 4, ARGS)
        scores.append(probe.accuracy(heads, lambda epoch, rows: change(test[0][:, rows]), torch.arange(200), test[1]))
    assert scores[0] == scores[1] and scores[0][1] > 90 and max(scores[0][0], scores[0][2]) < 50


def test_ridge_with_dead_features_and_few_images():
    feats, labels = blobs(n=6, D=20)
    feats[:, :, 10:] = 3
    W, b = probe.ridge(lambda epoch, rows: feats[:, rows], torch.arange(6), labels, 4, ARGS)
    assert W.isfinite().all() and b.isfinite().all()


def test_draws_are_used_in_turn():
    """With two draws, epochs 0, 2, 4 see the first: a second draw of zeros leaves its epochs without signal."""
    feats, labels = blobs()
    one, two = (fit(draws, labels, 4, ARGS)[0] for draws in ([feats], [feats, torch.zeros_like(feats)]))
    assert not torch.allclose(one, two)
    assert torch.equal(one, fit([feats, feats], labels, 4, ARGS)[0])


@pytest.fixture(scope="module")
def trained(cifar, tmp_path_factory):
    torch.set_num_threads(1)
    cfg = uvit_sc.make_config(**SMALL, data_dir=str(cifar), out=str(tmp_path_factory.mktemp("trained") / "run"), steps=2)
    uvit_sc.train(cfg)
    return Path(cfg.out)


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_from_checkpoint_to_files(run, capsys):
    probe.main([str(run / "last.pt"), "--times", "1", "11", "--draws", "2", "--epochs", "2", "--device", "cpu"])
    result = json.loads((run / "probe.json").read_text())
    out = capsys.readouterr().out
    assert result["layers"] == ["out_1", "cls_1", "out_2", "cls_2"] and result["times"] == [1, 11]
    assert (result["train_images"], result["held_out_images"], result["test_images"]) == (64, 6, 32)
    table = result["held_out_accuracy"]
    best = max(max(row) for row in table)
    assert table[result["times"].index(result["t"])][result["layers"].index(result["layer"])] == best
    exact = result["held_out_ridge"][result["times"].index(result["t"])]
    assert exact[result["layers"].index(result["ridge_layer"])] == max(exact) and f"ridge {result['ridge']:.2f} % at {result['ridge_layer']}" in out
    assert f"test accuracy {result['accuracy']:.2f} % at t = " in out and "ema weights of step 2" in out and "*" in out
    assert (run / "probe.png").stat().st_size > 500


def test_probe_and_ridge_choose_their_own_layers(run, monkeypatch):
    """Each by its own held-out accuracies, here made up."""
    solved, true_ridge, true_accuracy = [], probe.ridge, probe.accuracy

    def ridge(*args):
        solved.append(true_ridge(*args))
        return solved[-1]

    def accuracy(heads, *rest):
        cells = len(heads[0])
        return true_accuracy(heads, *rest) if cells == 1 else [10, 30, 20, 5] if any(heads is h for h in solved) else [40, 10, 0, 5]
    monkeypatch.setattr(probe, "ridge", ridge)
    monkeypatch.setattr(probe, "accuracy", accuracy)
    probe.main([str(run / "last.pt"), "--draws", "1", "--epochs", "2", "--device", "cpu"])
    result = json.loads((run / "probe.json").read_text())
    assert (result["layer"], result["ridge_layer"]) == ("out_1", "cls_1") and result["held_out_ridge"] == [[10, 30, 20, 5]]


def test_one_cell_needs_no_choice(run):
    probe.main([str(run / "last.pt"), "--layers", "out_2", "--draws", "2", "--epochs", "2", "--device", "cpu"])
    result = json.loads((run / "probe.json").read_text())
    assert (result["layer"], result["t"]) == ("out_2", 11) and not (run / "probe.png").exists()


def test_few_training_images(run, monkeypatch):
    """--n takes so many at random, the same for the same seed, and no image of the rest is looked at."""
    seen, true_extract = [], probe.extract
    monkeypatch.setattr(probe, "extract", lambda module, net, images, *rest, **more: seen.append(images) or true_extract(module, net, images, *rest, **more))
    for seed in ("0", "0", "1"):
        probe.main([str(run / "last.pt"), "--layers", "out_2", "--n", "20", "--draws", "1", "--epochs", "1", "--seed", seed, "--device", "cpu"])
        result = json.loads((run / "probe.json").read_text())
        assert (result["train_images"], result["test_images"]) == (20, 32)
    train = [images for images in seen if len(images) == 20]
    assert len(train) == 3 and torch.equal(train[0], train[1]) and not torch.equal(train[0], train[2])
    everything = {image.numpy().tobytes() for image in uvit_sc.load_data(uvit_sc.load_checkpoint(run / "last.pt")[0], train=True)[0]}
    assert {image.numpy().tobytes() for image in train[0]} <= everything and not torch.equal(train[0], seen[-1][:20])


def test_test_labels_do_not_touch_the_choice(run, monkeypatch):
    """Test labels replaced by noise change the accuracy alone."""
    arguments = [str(run / "last.pt"), "--draws", "1", "--epochs", "2", "--device", "cpu", "--times", "1", "21"]
    results, true_load = [], uvit_sc.load_data
    for noise in (False, True):
        def load(cfg, train):
            images, labels = true_load(cfg, train)
            return (torch.randint_like(images, 256), torch.randint_like(labels, 2)) if noise and not train else (images, labels)
        monkeypatch.setattr(uvit_sc, "load_data", load)
        probe.main(arguments)
        results.append(json.loads((run / "probe.json").read_text()))
    for key in ("t", "layer", "held_out_accuracy", "held_out_ridge"):
        assert results[0][key] == results[1][key]
    assert any(results[0][key] != results[1][key] for key in ("accuracy", "raw_pixels"))


def test_the_choice_knows_no_held_out_image(run, monkeypatch):
    """Heads that choose are trained on the images that do not judge them; then one head on all."""
    rows, judged, fit, ridge, accuracy = [], [], probe.fit, probe.ridge, probe.accuracy
    monkeypatch.setattr(probe, "fit", lambda get, some, *rest: (rows.append(some), fit(get, some, *rest))[1])
    monkeypatch.setattr(probe, "ridge", lambda get, some, *rest: (rows.append(some), ridge(get, some, *rest))[1])
    monkeypatch.setattr(probe, "accuracy", lambda heads, get, some, labels: (judged.append(some), accuracy(heads, get, some, labels))[1])
    probe.main([str(run / "last.pt"), "--draws", "1", "--epochs", "1", "--no-raw", "--device", "cpu"])
    for some, held in zip(rows[:2], judged[:2]):
        assert not set(some.tolist()) & set(held.tolist()) and len(some) + len(held) == 64
    assert [len(some) for some in rows[2:]] == [64, 64] and [len(some) for some in judged[2:]] == [32, 32]


def test_settings_of_table_11(monkeypatch, tmp_path, cifar):
    """15 epochs on CIFAR, 30 elsewhere, and what --epochs says; batches and rates as the docstring says."""
    seen = []

    def stop(module, cfg, net, args):
        seen.append((args.epochs, args.batch, args.lr))
        raise module.UserError("enough")
    monkeypatch.setattr(probe, "probe", stop)
    for dataset in ("cifar10", "cifar100", "glyphs"):
        cfg = uvit_sc.make_config(dataset, backbone="uvit_tiny", patch=8, layer="out_1")
        uvit_sc.write_checkpoint(tmp_path / "net.pt", script="uvit_sc", config=vars(cfg), step=0, ema=uvit_sc.build_net(cfg).state_dict())
        for more in ([], ["--epochs", "7"]):
            with pytest.raises(SystemExit):
                probe.main([str(tmp_path / "net.pt"), "--device", "cpu", *more])
    assert seen == [(15, 512, 4e-3), (7, 512, 4e-3)] * 2 + [(30, 128, 4e-3), (7, 128, 4e-3)]
    args = probe.parse_command_line(["x.pt", "--device", "cpu"])
    import dit_latent_sc
    for name, batch, lr in (("imagenet", 1440, 2e-3), ("glyphs", 128, 4e-3)):
        found = probe.settle(dit_latent_sc, dit_latent_sc.make_config(name, device="cpu"), args)
        assert (found.epochs, found.batch, found.lr) == (30, batch, lr)


def test_extraction_repeats_itself(run):
    cfg, net = uvit_sc.load_checkpoint(run / "last.pt")
    images, _ = uvit_sc.load_data(cfg, train=True)
    one, two, other = (probe.extract(uvit_sc, net, images, 11, ["out_1", "cls_1"], 0, draw, flip=True) for draw in (1, 1, 2))
    assert one.shape == (2, 64, net.D) and one.dtype == torch.float16
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("arguments, says", [
    (["nowhere.pt"], "nowhere.pt is no checkpoint that can be read"),
    (["CKPT", "--layers", "out_9"], "--layers out_9: must be of out_1, token_1, cls_1"),
    (["CKPT", "--times", "2000"], "--times 2000: must lie between 1 and 1000"),
    (["CKPT", "--draws", "0"], "--draws 0: must lie between 1"),
    (["CKPT", "--draws", "16"], "--draws 16: only 15 could be used"),
    (["CKPT", "--grid", "--times", "1"], "--grid and --times"),
    (["CKPT", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    (["CKPT", "--device", "cuda"], "--device cuda: this machine has none"),
    (["CKPT", "--data_dir", "EMPTY"], "cannot download cifar-100-binary.tar.gz"),
    (["OTHER"], "is a checkpoint of os"),
    (["BARE"], "has weights, but not of which script; with official names they need --script and --init"),
    (["CKPT", "--vae", "x.pt"], "unknown field vae"),
])
def test_bad_input(run, arguments, says, capsys, tmp_path, monkeypatch):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.setattr(uvit_sc, "DOWNLOADS", {k: (md5, "http://127.0.0.1:9/") for k, (md5, *_) in uvit_sc.DOWNLOADS.items()})
    torch.save({"script": "os", "step": 1}, tmp_path / "other.pt")
    torch.save({"norm.weight": torch.ones(3)}, tmp_path / "bare.pt")
    names = {"CKPT": run / "last.pt", "OTHER": tmp_path / "other.pt", "EMPTY": tmp_path / "empty", "BARE": tmp_path / "bare.pt"}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        probe.main([str(names.get(word, word)) for word in arguments])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and err.startswith("probe: ") and says in err


@pytest.mark.parametrize("draws, where", [
    (2, ["--layers", "out_1", "token_1", "cls_2"]), pytest.param(4, ["--layers", "out_1", "--times", 1, 11], marks=pytest.mark.slow)])
def test_two_processes_find_what_one_finds(run, tmp_path, draws, where):
    """Three layers for two processes with draws kept (2 of 4 epochs), and one layer, so that a process has no head, with
    draws used once (4 of 4): the same table and accuracy."""
    for processes in (1, 2):
        out = tmp_path / f"{draws}-{processes}"
        arguments = [run / "last.pt", *where, "--draws", draws, "--epochs", 4, "--device", "cpu", "--out", out]
        if processes == 1:
            probe.main([*map(str, arguments)])
            continue
        status, _, err = finish(launch("probe", arguments, processes))
        assert status == 0, err[-2000:]
    one, two = (json.loads((tmp_path / f"{draws}-{n}" / "probe.json").read_text()) for n in (1, 2))
    for key in ("accuracy", "ridge", "ridge_layer", "held_out_ridge", "raw_pixels", "knn", "t", "layer", "held_out_accuracy"):
        assert one[key] == two[key], key


def test_several_checkpoints(run, tmp_path, capsys):
    """A row for each, the best on held-out images, the highest on the test set, and one picture of the curves."""
    probe.main([str(run / "last.pt"), str(run / "ckpt_0000.pt"), "--tokens", "--epochs", "2", "--device", "cpu", "--out", str(tmp_path)])
    many = json.loads((tmp_path / "probes.json").read_text())
    held = [r["held_out"] for r in many["results"]]
    assert many["chosen"] == many["results"][held.index(max(held))]["checkpoint"] and len(held) == 2
    assert many["highest"] == max(r["accuracy"] for r in many["results"]) and "token_2" in many["results"][0]["layers"]
    assert (tmp_path / "layers.png").stat().st_size > 500 and not (tmp_path / "probe.json").exists()
    values = torch.tensor([r["accuracy"] for r in many["results"]])
    assert f"test set: highest {values.max():.2f} %, mean {values.mean():.2f} +- {values.std():.2f} %" in capsys.readouterr().out


def test_the_best_is_chosen_on_held_out_images(run, tmp_path, capsys):
    probe.main([str(run / "last.pt"), "--epochs", "1", "--device", "cpu"])
    result = json.loads((run / "probe.json").read_text())
    pair = [result | dict(checkpoint=name, held_out=held, accuracy=test) for name, held, test in (("x/a.pt", 60.0, 50.0), ("x/b.pt", 50.0, 70.0))]
    probe.report(pair, tmp_path)
    many = json.loads((tmp_path / "probes.json").read_text())
    assert many["chosen"] == "x/a.pt" and many["highest"] == 70 and "test accuracy 50.00 %" in capsys.readouterr().out


def test_weights_of_others(run, tmp_path, cifar, capsys):
    """--script and --init: a bare state_dict gives what the checkpoint gives, and says that all of it fits."""
    cfg, net = uvit_sc.load_checkpoint(run / "last.pt")
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    common = ["--epochs", "2", "--device", "cpu", "--data_dir", str(cifar)]
    probe.main([str(run / "last.pt"), *common])
    probe.main(["--script", "uvit_sc", "--init", str(tmp_path / "weights.pth"), *common, "--dataset", "cifar100",
                "--backbone", "uvit_tiny", "--patch", "8", "--self_cond", "cls"])
    one, two = (json.loads((folder / "probe.json").read_text()) for folder in (run, tmp_path))
    assert one["accuracy"] == two["accuracy"] and one["held_out_accuracy"] == two["held_out_accuracy"]
    assert f"all {len(net.state_dict())} tensors" in capsys.readouterr().out


@pytest.mark.parametrize("fault, status, says", [
    (KeyboardInterrupt(), 130, "probe: interrupted"), (OSError("disk full"), 2, "probe: disk full")])
def test_what_ends_a_probe_is_one_line(run, monkeypatch, capsys, fault, status, says):
    def stop(*args, **kwargs):
        raise fault
    monkeypatch.setattr(probe, "extract", stop)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        probe.main([str(run / "last.pt"), "--device", "cpu"])
    err = "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("note: "))
    assert caught.value.code == status and err.count("\n") == 1 and err.startswith(says) and not (run / "probe.json").exists()


def test_out_that_is_a_file(run, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        probe.main([str(run / "last.pt"), "--layers", "out_1", "--epochs", "1", "--no-raw", "--device", "cpu", "--out", str(tmp_path / "file")])
    assert caught.value.code == 2 and "probe: --out: " in capsys.readouterr().err


def test_few_images(run, monkeypatch):
    """Nine images, of which one is held out; what was not chosen on held-out images is null in valid JSON."""
    true_load = uvit_sc.load_data
    monkeypatch.setattr(uvit_sc, "load_data", lambda cfg, train: tuple(v[:9] for v in true_load(cfg, train)))
    probe.main([str(run / "last.pt"), "--epochs", "1", "--device", "cpu"])
    assert json.loads((run / "probe.json").read_text())["held_out_images"] == 1
    probe.main([str(run / "last.pt"), "--layers", "out_1", "--epochs", "1", "--device", "cpu"])
    assert "NaN" not in (run / "probe.json").read_text() and json.loads((run / "probe.json").read_text())["held_out"] is None


def test_neighbours_and_spread():
    """Two tight clusters: every vote is right, pairs are close; a plain double loop gives the same uniformity."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    x = torch.eye(2)[labels].repeat(1, 4) + 0.05 * torch.randn(60, 8, generator=gen)
    assert probe.neighbours(x, labels, x, labels, 2, torch.device("cpu")) == 100
    assert probe.neighbours(x, labels, x, 1 - labels, 2, torch.device("cpu")) == 0
    align, uniform = probe.alignment_uniformity(x, x)
    unit = [row / row.norm() for row in x]
    plain = [math.exp(-2 * (unit[i] - unit[j]).square().sum()) for i in range(60) for j in range(i)]
    assert align == 0 and uniform == pytest.approx(math.log(sum(plain) / len(plain)), rel=1e-4)


def test_draws_mirror_opposite_halves(run, monkeypatch):
    """Draws 0 and 1 show each image both ways, 2 and 3 again with other halves."""
    cfg, net = uvit_sc.load_checkpoint(run / "last.pt")
    seen, make = [], uvit_sc.make_view
    monkeypatch.setattr(uvit_sc, "make_view", lambda x, y, view: (seen.append(view["flip"]), make(x, y, view))[1])
    images, _ = uvit_sc.load_data(cfg, train=True)
    for draw in range(4):
        probe.extract(uvit_sc, net, images, 11, ["out_1"], 0, draw, flip=True)
    probe.extract(uvit_sc, net, images, 11, ["out_1"], 0, 1, flip=False)
    assert torch.equal(seen[0], ~seen[1]) and torch.equal(seen[2], ~seen[3]) and not torch.equal(seen[0], seen[2])
    assert not seen[4].any()


def test_every_process_can_say_what_is_wrong(monkeypatch, capsys):
    """But the first comes first: torchrun ends all with the first to go."""
    waited = []
    monkeypatch.setattr(probe.time, "sleep", waited.append)
    for rank in (0, 1):
        monkeypatch.setattr(probe, "RANK", rank)
        with pytest.raises(SystemExit) as caught:
            probe.main(["nowhere.pt"])
        assert caught.value.code == 2 and "nowhere.pt is no checkpoint" in capsys.readouterr().err and len(waited) == rank


def test_one_process_reads_first(run, monkeypatch):
    """The test images as well: they may have to be downloaded or decoded."""
    inside, seen, load = [], [], uvit_sc.load_data

    @contextlib.contextmanager
    def first():
        inside.append(1)
        yield
        inside.pop()
    monkeypatch.setattr(uvit_sc, "one_process_first", first)
    monkeypatch.setattr(uvit_sc, "load_data", lambda cfg, train: (seen.append((train, len(inside))), load(cfg, train))[1])
    probe.main([str(run / "last.pt"), "--layers", "out_1", "--epochs", "1", "--no-raw", "--device", "cpu"])
    assert seen == [(True, 1), (False, 1)]


def test_spread_is_that_of_images_drawn_at_random(run, monkeypatch):
    """Test images may lie class by class. Pairs are of the same image all the same."""
    seen, extract = {}, probe.extract
    monkeypatch.setattr(probe, "extract", lambda *args, **more: seen.setdefault(args[6], (args[2], extract(*args, **more)))[1])
    probe.main([str(run / "last.pt"), "--layers", "out_1", "--epochs", "1", "--no-raw", "--device", "cpu"])
    (images, one), (some, two) = seen[-1], seen[-2]
    order = [next(i for i in range(32) if torch.equal(images[i], image)) for image in some]
    assert sorted(order) == list(range(32)) != order
    result = json.loads((run / "probe.json").read_text())
    assert result["alignment"] == pytest.approx(probe.alignment_uniformity(one[0][order], two[0])[0])


def test_features_beyond_float16(run, monkeypatch, capsys):
    true = uvit_sc.features
    monkeypatch.setattr(uvit_sc, "features", lambda *args, **more: {
        name: f + 1e5 * (name == "cls_1") for name, f in true(*args, **more).items()})
    with pytest.raises(SystemExit):
        probe.main([str(run / "last.pt"), "--epochs", "1", "--no-raw", "--device", "cpu"])
    assert "features of cls_1 at t = 11 exceed float16; leave it out with --layers" in capsys.readouterr().err
