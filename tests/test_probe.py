"""probe.py: heads as separate training would give, an honest choice, the same result anywhere."""
import argparse, dataclasses, importlib, json, re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import probe
import uvit_sc
from conftest import finish, launch, spy

ARGS = argparse.Namespace(seed=0, epochs=6, batch=32, lr=4e-3, device=torch.device("cpu"))
QUICK, ALL = ["--epochs", "2", "--device", "cpu"], torch.arange(200)


def blobs(seed=0):      # features (3 cells, 200, 8); cell 1 alone tells the labels of four classes
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (200,), generator=gen)
    feats = torch.randn(3, 200, 8, generator=gen)
    feats[1, :, :4] += 8 * F.one_hot(labels, 4)
    return feats.half(), labels


def reader(*draws):     # as the heads want it: draws (cells, N, D) that are used in turn
    return lambda epoch, rows: draws[epoch % len(draws)][:, rows]


def write(module, path, cfg, net, step=2):
    torch.save(dict(script=module.SCRIPT, config=dataclasses.asdict(cfg), step=step, data=None,
                    model=net.state_dict(), ema=net.state_dict()), path)


@pytest.fixture
def run(cifar, tmp_path):       # the checkpoint of an untrained U-ViT, in a folder of its own
    cfg = uvit_sc.make_config("cifar100", backbone="uvit_tiny", patch=8, layer="out_1",
                              data_dir=str(cifar), device="cpu")
    (tmp_path / "run").mkdir()
    write(uvit_sc, tmp_path / "run" / "last.pt", cfg, uvit_sc.build_net(cfg))
    return tmp_path / "run"


def result(folder, *arguments):
    probe.main([*map(str, arguments)])
    return json.loads((folder / "probe.json").read_text())


def refused(capsys, *arguments):        # the one line with which a probe ends in status 2
    with pytest.raises(SystemExit, match="^2$"):
        probe.main([*map(str, arguments)])
    return re.fullmatch("(?s).*?(probe: [^\n]*)\n", capsys.readouterr().err)[1]


def test_heads_together_equal_heads_apart():
    """Three cells, draws in turn, against nn.Linear. A step is lr; a mistake is far more."""
    (feats, labels), (other, _) = blobs(), blobs(seed=1)
    W, b = probe.fit(reader(feats, other), ALL, labels, ARGS)
    gen = torch.Generator().manual_seed(ARGS.seed)
    weight = (torch.rand(8, 4, generator=gen) * 2 - 1) / 8 ** 0.5
    bias = (torch.rand(4, generator=gen) * 2 - 1) / 8 ** 0.5
    orders = [torch.randperm(200, generator=gen) for _ in range(ARGS.epochs)]
    for cell in range(3):
        head = torch.nn.Linear(8, 4)
        head.weight.data, head.bias.data = weight.T.clone(), bias.clone()
        optimizer = torch.optim.Adam(head.parameters(), lr=ARGS.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ARGS.epochs)
        for epoch, order in enumerate(orders):
            draw = (feats, other)[epoch % 2]
            for rows in order.split(ARGS.batch):
                optimizer.zero_grad()
                F.cross_entropy(head(draw[cell, rows].float()), labels[rows]).backward()
                optimizer.step()
            schedule.step()
        parts = (W[cell].T, head.weight), (b[cell, 0], head.bias)
        assert all(torch.allclose(one, two, atol=ARGS.lr / 20) for one, two in parts)


def test_ridge_is_least_squares_of_any_scale():
    """Against lstsq in float64 (heads are float32); a scale may move one of 200 images."""
    (feats, labels), (test, test_labels) = blobs(), blobs(seed=1)
    W, b = probe.ridge(reader(feats), ALL, labels, ARGS, penalty=0)
    x = torch.cat([feats.double(), torch.ones(3, 200, 1)], dim=2)
    exact = torch.linalg.lstsq(x, F.one_hot(labels, 4).double().expand(3, -1, -1)).solution
    assert torch.allclose(torch.cat([W, b], dim=1).double(), exact, atol=1e-6)
    scale, scores = 10 ** torch.linspace(-2, 2, 8), []
    for train, check in (feats, test), (feats * scale + scale, test * scale + scale):
        heads = probe.ridge(reader(train.float()), ALL, labels, ARGS)
        scores.append(probe.accuracy(heads, reader(check.float()), test_labels, ALL))
    assert scores[0] == pytest.approx(scores[1], abs=0.51)
    assert scores[0][1] > 90 and max(scores[0][0], scores[0][2]) < 50
    feats[:, :, 4:] = 3     # dead features, and fewer images than features
    assert all(v.isfinite().all() for v in probe.ridge(reader(feats), ALL[:6], labels, ARGS))
    none = reader(feats[:0])            # of a process that has no layer, as others are more
    assert probe.ridge(none, ALL, labels, ARGS)[0].shape == (0, 8, 4)


def test_neighbours_vote():
    """As with all similarities at once, though images come in blocks; one near tie may differ."""
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(1200, 8, generator=gen), torch.randint(4, (1200,), generator=gen)
    near, who = (F.normalize(x[1100:], dim=1) @ F.normalize(x[:1100], dim=1).T).topk(20)
    votes = (F.one_hot(y[who], 4) * (near / 0.07).exp()[..., None]).sum(1)
    right = (votes.argmax(1) == y[1100:]).sum().item()
    found = probe.neighbours(reader(x[None]), y[:1100], x[1100:], y[1100:], "cpu")
    assert found == pytest.approx(right, abs=1)


def test_draws(run, monkeypatch):
    """Functions of (seed, draw), alike when repeated, in pairs that mirror opposite halves."""
    cfg, net = uvit_sc.load_checkpoint(run / "last.pt")
    images, _ = uvit_sc.load_data(cfg, train=True)
    calls = spy(monkeypatch, uvit_sc, "make_view")
    args = argparse.Namespace(**vars(ARGS), module=uvit_sc, net=net)
    feats = probe.Features(images, 11, ["cls_1"], args, range(4), flip=True)
    draws = [feats.chunk(0, draw) for draw in (0, 1, 2, 0)]
    assert draws[0].shape == (64, 1, net.D) and draws[0].dtype == "float16"
    assert (draws[0] == draws[3]).all() and (draws[0] != draws[1]).any()
    probe.Features(images, 11, ["cls_1"], args, [-1]).chunk(0, -1)      # test images: as they are
    views = torch.stack([call.args[1] for call in calls])        # (5, 64, 9); column 0: mirrored
    assert not views[:, :, 1:].any() and not views[4].any() and (views[0] != views[2]).any()
    assert torch.equal(views[0, :, 0], 1 - views[1, :, 0])


def test_a_token_is_one_position(run):
    """token_1 is one position of the map whose mean is out_1, another one for each image."""
    cfg, net = uvit_sc.load_checkpoint(run / "last.pt")
    images, _ = uvit_sc.load_data(cfg, train=True)
    args, maps = argparse.Namespace(**vars(ARGS), module=uvit_sc, net=net), []
    net.blocks[0].register_forward_hook(lambda block, inputs, h: maps.append(net.positions(h)))
    feats = probe.Features(images, 11, ["out_1", "token_1"], args, range(2)).chunk(0, 0)
    out, token = torch.from_numpy(feats).transpose(0, 1)
    h = maps[0].half()                                          # (64, 16, D)
    torch.testing.assert_close(out, maps[0].mean(dim=1).half())
    same = (h == token[:, None]).all(dim=2)
    assert (same.sum(dim=1) == 1).all() and len(same.nonzero()[:, 1].unique()) > 5


@pytest.mark.parametrize("draws", [2, 3])     # all are kept; one for each epoch
def test_disk_and_memory_give_the_same(run, draws, monkeypatch, capsys):
    arguments = [run / "last.pt", "--times", 1, 11, "--epochs", 3, "--draws", draws]
    one, files = result(run, *arguments), sorted(run.iterdir())
    monkeypatch.setattr(probe, "IN_MEMORY", 0)
    two = result(run, *arguments)
    assert capsys.readouterr().out.count("note: features take") == 4     # 2 times, final, test
    assert sorted(run.iterdir()) == files
    assert one | dict(seconds=0) == two | dict(seconds=0)
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert "GB are free: use fewer" in refused(capsys, *arguments)


def test_from_checkpoint_to_files(run, capsys):
    r = result(run, run / "last.pt", "--times", 1, 11, *QUICK)
    out, row = capsys.readouterr().out, r["times"].index(r["t"])
    assert r["layers"] == ["out_1", "cls_1"]
    assert (r["train_images"], r["held_out_images"], r["test_images"]) == (64, 6, 32)
    assert r["held_out"] == max(map(max, r["held_out_accuracy"]))
    assert r["held_out_accuracy"][row][r["layers"].index(r["layer"])] == r["held_out"]
    solved = r["held_out_ridge"][row]
    assert solved[r["layers"].index(r["ridge_layer"])] == max(solved)
    assert f"test accuracy {r['accuracy']:.2f} % at t = {r['t']:g}, {r['layer']} (ridge" in out
    assert "protocol: ema weights of step 2, cifar100, 64 training and 32 test images, 2 d" in out
    assert all((run / name).stat().st_size > 500 for name in ("probe.png", "layers.png"))
    words = ["--layers", "token_1", "--no-raw", *QUICK, "--amp", "bf16"]    # no choice; a setting
    r = result(run, run / "last.pt", *words)
    assert (r["layer"], r["t"], r["held_out"], r["raw_pixels"]) == ("token_1", 11, None, None)
    assert r["amp"] == "bf16"
    text = Path(probe.__file__).read_text()     # idle threads sleep, if it is set in time
    assert text.index('setdefault("GOMP_SPINCOUNT"') < text.index("\nimport torch\n")


def test_the_choice_is_honest(run, monkeypatch):
    """Heads that choose never see what judges them, and test labels change the accuracy alone."""
    fit, accuracy = spy(monkeypatch, probe, "fit"), spy(monkeypatch, probe, "accuracy")
    one = result(run, run / "last.pt", *QUICK)
    trained, judged = set(fit[0].args[1].tolist()), set(accuracy[0].args[3].tolist())
    assert not trained & judged and trained | judged == set(range(64)) and len(judged) == 6
    cfg, _ = uvit_sc.load_checkpoint(run / "last.pt")
    data = [uvit_sc.load_data(cfg, train) for train in (False, True)]
    data[0][1].fill_(-1)        # test labels that nothing can tell
    monkeypatch.setattr(uvit_sc, "load_data", lambda cfg, train: data[train])
    two = result(run, run / "last.pt", *QUICK)
    keys = "t", "layer", "ridge_layer", "held_out_accuracy", "held_out_ridge"
    assert [one[key] for key in keys] == [two[key] for key in keys]
    assert two["accuracy"] == two["ridge"] == two["raw_pixels"] == two["knn"] == 0


def test_few_images_drawn_by_the_seed(run, monkeypatch):
    calls = spy(monkeypatch, probe, "Features")
    for seed in 0, 0, 1:
        r = result(run, run / "last.pt", "--n", 9, "--seed", seed, *QUICK)
        assert (r["train_images"], r["held_out_images"], r["test_images"]) == (9, 1, 32)
    one, again, other = [call.args[0] for call in calls][::3]
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("name, dataset, epochs, batch, lr, n", [
    ("uvit_sc", "cifar10", 15, 512, 4e-3, 0), ("edm_sc", "imagenet100", 30, 512, 4e-3, 0),
    ("edm_sc", "glyphs", 30, 32, 4e-3, 10000),
    ("dit_latent_sc", "glyphs", 30, 32, 4e-3, 10000),
    ("dit_latent_sc", "imagenet", 30, 1440, 2e-3, 0)])
def test_settings_of_table_11(name, dataset, epochs, batch, lr, n, tmp_path, monkeypatch):
    module, seen = importlib.import_module(name), []
    cfg = module.make_config(dataset, device="cpu")
    monkeypatch.setattr(probe, "load", lambda *args: (module, cfg, torch.nn.Identity(), 0))
    monkeypatch.setattr(probe, "probe", lambda cfg, args: seen.append(args) or {})
    monkeypatch.setattr(probe, "report", lambda *args: None)
    for more in [], ["--epochs", "1", "--n", "7"]:
        probe.main([str(tmp_path / "last.pt"), *more])
    found = [(args.epochs, args.batch, args.lr, args.n, args.draws) for args in seen]
    assert found == [(epochs, batch, lr, n, 2), (1, batch, lr, 7, 1)]


@pytest.mark.parametrize("arguments, says", [
    ("nowhere.pt", "No such file"), ("--grid", "give one or more checkpoints first"),
    ("RUN --layers out_9", "out_9: layers are out_1, token_1, cls_1"),
    ("RUN --times 2000", "t = 2000: layers are out_1"), ("RUN --out OS", "File exists"),
    ("RUN --frobnicate", "unrecognized arguments: --frobnicate"),
    ("RUN --init RUN", "or --script and --init"), ("OS", "is no checkpoint of ddpm_sc"),
    ("BARE", "official names need --script and --init"),
    ("--script uvit_sc --init BARE", "does not fit this network"),
    # Another script's network may have the same names, and would give an accuracy.
    ("--script edm_sc --init RUN", "is a checkpoint of uvit_sc: leave out --script")])
def test_bad_input(run, arguments, says, capsys, tmp_path):
    torch.save({"script": "os", "step": 1}, tmp_path / "os.pt")
    torch.save({"norm.weight": torch.ones(3)}, tmp_path / "bare.pt")
    names = dict(RUN=run / "last.pt", OS=tmp_path / "os.pt", BARE=tmp_path / "bare.pt")
    assert says in refused(capsys, *[names.get(word, word) for word in arguments.split()])
    assert len(list(run.iterdir())) == 1


def test_one_class_is_refused(run, monkeypatch, capsys):
    images, labels = torch.zeros(9, 3, 32, 32, dtype=torch.uint8), torch.zeros(9).long()
    monkeypatch.setattr(uvit_sc, "load_data", lambda cfg, train: (images, labels))
    assert "cifar100 has images of one class only" in refused(capsys, run / "last.pt", *QUICK)


def test_weights_of_others(run, tmp_path, cifar):
    torch.save(uvit_sc.load_checkpoint(run / "last.pt")[1].state_dict(), tmp_path / "bare.pth")
    one = result(run, run / "last.pt", *QUICK)
    flags = "--dataset cifar100 --backbone uvit_tiny --patch 8 --layer out_1 --self_cond cls"
    script = "--script", "uvit_sc", "--init", tmp_path / "bare.pth"
    two = result(tmp_path, *script, *flags.split(), "--data_dir", cifar, *QUICK)
    for key in "accuracy", "ridge", "knn", "held_out_accuracy", "self_cond":
        assert one[key] == two[key]


def test_several_checkpoints(run, capsys):
    write(uvit_sc, run / "ckpt_0001.pt", *uvit_sc.load_checkpoint(run / "last.pt"), step=1)
    probe.main([str(run / "last.pt"), str(run / "ckpt_0001.pt"), "--tokens", *QUICK])
    many = json.loads((run / "probes.json").read_text())["results"]
    assert [r["step"] for r in many] == [2, 1] and "token_1" in many[0]["layers"]
    assert (run / "layers.png").exists() and not (run / "probe.json").exists()
    probe.report([many[0] | dict(held_out=60.0, accuracy=50.0),
                  many[1] | dict(held_out=50.0, accuracy=70.0)], run)
    assert json.loads((run / "probes.json").read_text())["chosen"] == str(run / "last.pt")
    assert "the highest is 70.00 %, the mean 60.00 +- 14.14 %" in capsys.readouterr().out


def test_two_processes_find_what_one_finds(run, tmp_path):
    arguments = [run / "last.pt", "--layers", "out_1", "token_1", "cls_1", "--epochs", 4]
    one = result(run, *arguments)
    status, _, err = finish(launch("probe", [*arguments, "--out", tmp_path / "two"], 2))
    assert status == 0, err
    two = json.loads((tmp_path / "two" / "probe.json").read_text())
    assert one | dict(seconds=0, processes=2) == two | dict(seconds=0)


def test_every_script(script, config, tmp_path):
    cfg = config()
    write(script, tmp_path / "last.pt", cfg, script.build_net(cfg))
    r = result(tmp_path, tmp_path / "last.pt", "--tokens", "--epochs", 1)
    layers = [layer for layer in r["layers"] if not layer.startswith("token")]
    assert layers == script.layers(cfg) and "token_1" in r["layers"]
