"""dit_latent_sc.py: network, guidance, sampler, latents. Numbers of the public networks were compared once, locally."""
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dit_latent_sc as dit
from conftest import SMALL_DIT, finish, launch


def fill(net, scale=0.05):
    """Random weights that do not depend on PyTorch's initialisation: sines of the place in each tensor."""
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            if p.requires_grad:
                p.copy_((torch.arange(p.numel()).double() * (k + 1)).sin().view(p.shape) * scale)
    return net.eval()


def tiny(**fields):
    return fill(dit.build_net(dit.make_config(**{**SMALL_DIT, **fields})))


@pytest.mark.parametrize("backbone, base, table", [("dit_b", 129_787_424, 768_768), ("dit_l", 457_127_936, 1_025_024),
                                                   ("dit_xl", 674_103_584, 1_153_152)])
def test_parameters(backbone, base, table, tmp_path):
    """To the last one, with the fixed positions: 1001 classes, none, self-conditioning."""
    def count(**fields):
        with torch.device("meta"):
            net = dit.build_net(dit.make_config("imagenet", backbone=backbone, data_dir=str(tmp_path), **fields))
        return sum(p.numel() for p in net.parameters())
    assert count(uncond=True, self_cond="none") == base
    assert count(self_cond="none") == base + table
    if backbone == "dit_b":
        assert count(uncond=True) == base + 1_378_560 and count(uncond=True, self_cond="add") == base + 590_592


def test_vae_has_the_official_layout():
    with torch.device("meta"):
        net = dit.VAE()
    names = net.state_dict()
    assert len(names) == 342 and sum(p.numel() for p in net.parameters()) == 69_836_067
    shapes = {"encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1), "encoder.down.3.downsample.conv.bias": (256,),
              "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
              "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3), "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
              "quant_conv.weight": (64, 64, 1, 1), "post_quant_conv.bias": (32,), "encoder.conv_out.weight": (64, 512, 3, 3)}
    for name, shape in shapes.items():
        assert name in names and tuple(names[name].shape) == shape, name
    assert "decoder.up.0.upsample.conv.weight" not in names and "encoder.down.4.downsample.conv.weight" not in names


def test_official_clock():
    """LightningDiT's weights, whose time is 1 - t and whose prediction is -v: the converted network is that function."""
    official = tiny(self_cond="none")
    state = {k: v for k, v in official.state_dict().items() if not k.startswith("latent_")}
    ours = tiny(self_cond="none")
    ours.load_state_dict(ours.from_official({"ema": {f"module.{k}": v for k, v in state.items()}, "model": None}))
    x, t, y = torch.randn(5, 48, 4, 4), torch.rand(5), torch.tensor([0, 1, 2, 3, 4])
    assert (ours(x, t, y) + official(x, 1 - t, y)).abs().max() < 1e-5
    assert torch.equal(ours.from_official(official.state_dict())["latent_mean"], official.latent_mean)      # ours: as it is


def test_positions_and_rotations():
    """The fixed embedding: column first, sines before cosines; RoPE: rows first, neighbouring channels in pairs."""
    net = tiny()
    D, S = 160, 4
    for row, column in ((0, 0), (1, 3), (2, 1)):
        w = 10000 ** -(np.arange(D // 4) / (D // 4))
        expected = np.concatenate([f(place * w) for place in (column, row) for f in (np.sin, np.cos)])
        assert np.allclose(net.pos_embed[0, row * S + column], expected, atol=1e-6)
        w = 10000 ** -(4 * np.arange(10) / 40)
        angles = np.repeat(np.concatenate([row * w, column * w]), 2)
        assert np.allclose(net.feat_rope.freqs_cos[row * S + column], np.cos(angles), atol=1e-6)
    x = torch.randn(1, 1, 16, 40)
    cos, sin = net.feat_rope.freqs_cos, net.feat_rope.freqs_sin
    turned, a, b = dit.rotate(x, torch.complex(cos, sin)[:, ::2]), x[..., ::2], x[..., 1::2]
    assert torch.allclose(turned[..., ::2], a * cos[:, ::2] - b * sin[:, ::2], atol=1e-6)
    assert torch.allclose(turned[..., 1::2], a * sin[:, ::2] + b * cos[:, ::2], atol=1e-6)
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    net(torch.randn(1, *net.shape), torch.tensor([0.5]))
    assert torch.equal(torch.view_as_real(seen[0]), torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1))
    assert not net.pos_embed.requires_grad


def test_starts_as_zero_and_lets_gradients_through():
    net = dit.build_net(dit.make_config(**SMALL_DIT))
    x, t = torch.randn(2, 48, 4, 4), torch.rand(2)
    assert net(x, t).abs().max() == 0
    net(x, t).sum().backward()
    assert net.final_layer.linear.weight.grad.abs().sum() > 0


def test_self_conditioning_reaches_later_blocks_alone():
    """Blocks up to the chosen one do not see f; all later ones do."""
    net = tiny(layer="block_3")
    x, t = torch.randn(2, 48, 4, 4), torch.rand(2)
    before = net(x, t, last="block_6")
    with torch.no_grad():
        net.sc_proj.bias.add_(1)
    after = net(x, t, last="block_6")
    assert list(after) == [f"block_{k}" for k in range(1, 7)]
    for k in range(1, 7):
        assert torch.equal(before[f"block_{k}"], after[f"block_{k}"]) == (k <= 3)
    assert list(net(x, t, last="block_2")) == ["block_1", "block_2"]


def test_classes():
    """Unknown is the last row of the table, for None and for -1; another class gives another prediction."""
    net = tiny()
    x, t = torch.randn(2, 48, 4, 4), torch.rand(2)
    null = net(x, t, torch.tensor([4, 4]))
    assert torch.equal(net(x, t), null) and torch.equal(net(x, t, torch.tensor([-1, -1])), null)
    assert not torch.allclose(net(x, t, torch.tensor([0, 1])), null)
    assert net.null == 4 and net.y_embedder.embedding_table.weight.shape == (5, 160)
    plain = tiny(uncond=True)
    assert not hasattr(plain, "y_embedder") and torch.equal(plain(x, t), plain(x, t, torch.tensor([0, 1])))


def test_loss():
    """|| v - (eps - x_0) ||^2 + 1 - cos, by NumPy."""
    x, noise, t = torch.randn(3, 32, 4, 4), torch.randn(3, 32, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    v = torch.randn(3, 32, 4, 4)
    diffusion = dit.LatentRF(dit.make_config(**SMALL_DIT))
    seen = []
    loss = diffusion.loss(lambda x_t, c: (seen.append((x_t, c)), v)[1], x, t, noise)
    a, b = v.numpy().astype(float), (noise - x).numpy().astype(float)
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    assert np.allclose(loss, ((a - b) ** 2).mean((1, 2, 3)) + (1 - cosine).mean((1, 2)), atol=1e-5)
    assert torch.allclose(seen[0][0], (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise) and torch.equal(seen[0][1], t)


def test_times_are_log_normal():
    t = dit.LatentRF(dit.make_config(**SMALL_DIT)).draw_t(100000, torch.Generator().manual_seed(0))
    z = (t / (1 - t)).log()
    assert abs(z.mean()) < 0.015 and abs(z.std() - 1) < 0.01
    assert torch.allclose(t.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor(dit.LatentRF.quartiles), atol=0.005)


def test_shifted_times():
    """t = 3.3 s / (1 + 2.3 s): LightningDiT's grid in the other clock, where its shift is 1 / 3.3."""
    times = np.array(dit.LatentRF(dit.make_config(**{**SMALL_DIT, "nfe": 250})).times())
    s = np.linspace(1, 0, 251)
    assert np.allclose(times, 3.3 * s / (1 + 2.3 * s)) and times[0] == 1 and times[-1] == 0
    theirs = (1 / 3.3) * (1 - s) / (1 + (1 / 3.3 - 1) * (1 - s))
    assert np.allclose(1 - times, theirs)
    even = dit.LatentRF(dit.make_config(**{**SMALL_DIT, "nfe": 4, "shift": 1.0})).times()
    assert np.allclose(even, [1, 0.75, 0.5, 0.25, 0])


def test_euler_on_a_gaussian():
    """Data N(0, s^2): v = x (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2). The error of the standard deviation halves when
    the steps double."""
    std, errors = 0.5, []
    for nfe in (50, 100, 200):
        diffusion = dit.LatentRF(dit.make_config(**{**SMALL_DIT, "nfe": nfe}))
        net = lambda x, t: x * ((t - (1 - t) * std ** 2) / ((1 - t) ** 2 * std ** 2 + t ** 2)).view(-1, 1, 1, 1)
        noise = torch.randn(4, 4, 8, 8, dtype=torch.float64)
        errors.append(((diffusion.sample(net, noise) / noise).mean() - std).abs().item())
    assert errors[0] < 0.04 and all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


def test_guidance_by_its_formula():
    """All channels, all images: v_null + w (v_y - v_null) for t <= 0.89, v_y above, the null class once more in a batch."""
    cfg = dit.make_config(**{**SMALL_DIT, "nfe": 20, "guidance": 2.5})
    diffusion, net, calls = dit.LatentRF(cfg), tiny(), []
    noise, y = torch.randn(4, 48, 4, 4), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        x = noise
        for t, s in zip(diffusion.times(), diffusion.times()[1:]):
            at = torch.full((4,), t)
            v, v_null = net(x, at, y), net(x, at)
            x = x + (s - t) * (v_null + 2.5 * (v - v_null) if t <= 0.89 else v)
    ours = diffusion.sample(lambda x, t, y: (calls.append((len(x), t[0].item(), y)), net(x, t, y))[1], noise, y, net.null)
    assert (ours - x).abs().max() < 1e-4
    for n, t, labels in calls:
        assert n == (8 if t <= 0.89 + 1e-6 else 4) and (n == 4 or labels[4:].eq(4).all())
    assert {n for n, _, _ in calls} == {4, 8}
    one = dit.LatentRF(dit.make_config(**{**SMALL_DIT, "nfe": 5, "guidance": 1.0}))
    calls.clear()
    one.sample(lambda x, t, y: (calls.append((len(x), 0, y)), net(x, t, y))[1], noise, y, net.null)
    assert {n for n, _, _ in calls} == {4}


def test_views_of_latents():
    """The mirror image has latents of its own; a crop is shifted by whole cells and reflected; classes may be dropped."""
    cfg = dit.make_config(**{**SMALL_DIT, "batch": 400, "aug": 0.5, "size": 64})
    view = dit.draw_view(cfg, dit.rng(0))
    assert view["shift"].abs().max() == 2 and abs((view["shift"] != 0).any(1).float().mean() - 0.5 * 24 / 25) < 0.1
    assert abs(view["told"].float().mean() - 0.9) < 0.06 and abs(view["flip"].float().mean() - 0.5) < 0.1
    latents, classes = torch.randn(400, 2, 3, 16, 16).half(), torch.arange(400)
    x, (y, shift) = dit.make_view(latents, classes, view)
    assert torch.equal(y, torch.where(view["told"], classes, -1)) and torch.equal(shift, view["shift"].float())
    for k in range(400):
        a = latents[k, int(view["flip"][k])].float()
        dy, dx = view["shift"][k].tolist()
        wide = F.pad(a[None], (2, 2, 2, 2), mode="reflect")[0]
        assert torch.equal(x[k], wide[:, 2 - dy:18 - dy, 2 - dx:18 - dx])
    del view["shift"]
    x, y = dit.make_view(latents, None, view)
    assert y is None and torch.equal(x[0], latents[0, int(view["flip"][0])].float())


def test_unshuffle_is_lossless(tmp_path):
    """Glyphs to latents and back: the same bytes but for float16's rounding; normalised by channel; samples go back."""
    cfg = dit.make_config(data_dir=str(tmp_path))
    latents, labels = dit.load_data(cfg, train=False)
    images, classes = dit.draw_glyphs(4000, seed=1)
    assert latents.shape == (4000, 2, 48, 4, 4) and labels.tolist() == classes.tolist()
    mean, std = dit.latent_statistics(cfg)
    back = latents.float() * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    for mirror, there in ((0, images), (1, images[..., ::-1])):
        assert np.abs(dit.to_images(cfg, back[:, mirror]).numpy().astype(int) - there).max() <= 1
    train, _ = dit.load_data(cfg, train=True)
    assert train[:, 0].float().mean(dim=(0, 2, 3)).abs().max() < 0.02 and (train[:, 0].float().std(dim=(0, 2, 3)) - 1).abs().max() < 0.02


@pytest.fixture
def pictures(tmp_path):
    """Class folders of 37 + 5 pictures, and a tiny file of VA-VAE's layout would be 280 MB: the tokenizer is the stand-in."""
    rng = np.random.RandomState(0)
    for split, n in (("train", 37), ("val", 5)):
        for i in range(n):
            folder = tmp_path / "pics" / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (40, 36, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return dit.make_config("folder", data_dir=str(tmp_path / "pics"), size=32, tokenizer="unshuffle", cell=8, classes=2)


def files(cfg):
    return {path.name: path.read_bytes() for path in sorted(dit.Path(cfg.data_dir).glob("*latents*"))}


def test_encoding_goes_on_where_it_was_killed(pictures, monkeypatch, capsys):
    """Interrupted after any batch, even with a half-written one behind it, it ends with the same bytes."""
    cfg = pictures
    for train in (True, False):
        dit.encode(cfg, train, torch.device("cpu"), batch=4)
    whole, work = files(cfg), dit.to_latents
    assert sorted(whole) == [f"folder32-unshuffle8-{s}.latents{e}" for s in ("test", "train") for e in ("", ".json")]
    for after in (3, 12, 16):       # ten batches for the statistics come first
        for name in whole:
            dit.Path(cfg.data_dir, name).unlink()
        calls = []

        def stop(*args):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return work(*args)
        monkeypatch.setattr(dit, "to_latents", stop)
        with pytest.raises(KeyboardInterrupt):
            dit.encode(cfg, True, torch.device("cpu"), batch=4)
        assert not dit.latents_path(cfg, True).exists()
        part = dit.latents_path(cfg, True).with_name(dit.latents_path(cfg, True).name + ".part")
        if part.exists():
            part.write_bytes(part.read_bytes() + b"half a batch")
        monkeypatch.setattr(dit, "to_latents", work)
        for train in (True, False):
            dit.encode(cfg, train, torch.device("cpu"), batch=4)
        assert files(cfg) == whole, after
    assert "GB to write" in capsys.readouterr().out


def test_encoding_after_a_crash(pictures, monkeypatch, capsys):
    """A note that the machine left empty, beside latents that were begun: all is made anew, and room is what there is without."""
    cfg, path, seen, usage = pictures, dit.latents_path(pictures, True), [], shutil.disk_usage
    part = path.with_name(path.name + ".part")
    part.write_bytes(b"begun")
    path.with_name(path.name + ".part.json").touch()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (seen.append(part.exists()), usage(folder))[1])
    dit.encode(cfg, True, torch.device("cpu"))
    assert seen == [False] and "is made anew" in capsys.readouterr().err and len(dit.load_data(cfg, True)[0]) == 37


def test_encoding_from_the_shell_survives_sigkill(pictures):
    cfg = pictures
    arguments = ["--encode", "--dataset", "folder", "--data_dir", cfg.data_dir, "--size", 32, "--tokenizer", "unshuffle", "--cell", 8]
    process = launch("dit_latent_sc", arguments)
    folder = dit.Path(cfg.data_dir)
    for _ in range(3000):
        if list(folder.glob("*.part")) or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    status, _, err = finish(launch("dit_latent_sc", arguments))
    assert status == 0, err
    ended = files(cfg)
    shutil.rmtree(folder / "x", ignore_errors=True)
    for name in ended:
        (folder / name).unlink()
    for train in (True, False):
        dit.encode(cfg, train, torch.device("cpu"))
    assert files(cfg) == ended
    status, out, _ = finish(launch("dit_latent_sc", arguments))
    assert status == 0 and out.count("is there already") == 2


def test_what_does_not_belong_together_is_refused(pictures, monkeypatch):
    cfg = pictures
    with pytest.raises(dit.UserError, match="no latents .*--encode --dataset folder .*--size 256 --tokenizer vavae --cell 16"):
        dit.load_data(dit.make_config("folder", data_dir=cfg.data_dir, classes=2), True)
    dit.load_data(cfg, True)
    with pytest.raises(dit.UserError, match="--classes 1: .* has 2"):
        dit.load_data(dit.dataclasses.replace(cfg, classes=1), True)
    dit.load_data(cfg, False)
    dit.latents_path(cfg, True).unlink()            # encoded anew from other images, the test latents are of another scale
    facts = json.loads(dit.latents_path(cfg, False).with_name("folder32-unshuffle8-test.latents.json").read_text())
    beside = dit.latents_path(cfg, False).with_name("folder32-unshuffle8-test.latents.json")
    beside.write_text(json.dumps(dict(facts, std=[2 * v for v in facts["std"]])))
    dit.load_data(cfg, True)
    with pytest.raises(dit.UserError, match="normalised otherwise than"):
        dit.load_data(cfg, False)
    path = dit.latents_path(cfg, True)
    good = path.read_bytes()
    path.write_bytes(good[:-2])
    with pytest.raises(dit.UserError, match=rf"truncated: {len(good) - 2} of {len(good)} bytes"):
        dit.load_data(cfg, True)
    path.write_bytes(good)
    monkeypatch.setattr(dit, "tokenizer_hash", lambda cfg: "other")
    with pytest.raises(dit.UserError, match="made by another tokenizer .unshuffle8, now other"):
        dit.load_data(cfg, True)
    monkeypatch.undo()
    picture = next(dit.Path(cfg.data_dir, "train", "a").iterdir())
    Image.new("RGB", (50, 50)).save(picture)
    with pytest.raises(dit.UserError, match="made of other images"):
        dit.load_data(cfg, True)
    picture.write_bytes(b"no picture")
    os.remove(path)
    with pytest.raises(dit.UserError, match=f"{picture.name}.*cannot be decoded.*--skip_bad"):
        dit.load_data(cfg, True)
    cfg.skip_bad = True
    latents, labels = dit.load_data(cfg, True)
    assert len(latents) == len(labels) == 36
    for folder in ("train", "val"):         # the images may go once the latents are there
        shutil.rmtree(dit.Path(cfg.data_dir, folder))
    assert len(dit.load_data(cfg, True)[0]) == 36


def test_vae_files(tmp_path, monkeypatch):
    """A bare state_dict or one under `state_dict`, with other networks' tensors; what is missing is named."""
    monkeypatch.setattr(dit.VAE, "widths", (32, 32, 32, 32, 512))
    net = dit.VAE()
    torch.save({"state_dict": {**net.state_dict(), "loss.weight": torch.ones(3)}}, tmp_path / "vae.pt")
    loaded = dit.load_vae(tmp_path / "vae.pt", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    torch.save({"encoder.conv_in.weight": torch.ones(3)}, tmp_path / "bad.pt")
    with pytest.raises(dit.UserError, match="are not in it"):
        dit.load_vae(tmp_path / "bad.pt", torch.device("cpu"))
    with pytest.raises(dit.UserError, match="--vae .*gone.pt: no such file"):
        dit.find_vae(dit.make_config("imagenet100", vae=str(tmp_path / "gone.pt")))
    monkeypatch.setattr(dit, "VAVAE_URL", "http://127.0.0.1:9/")
    with pytest.raises(dit.UserError, match="cannot download http://127.0.0.1:9/vavae.*--tokenizer unshuffle"):
        dit.find_vae(dit.make_config("imagenet100", data_dir=str(tmp_path)))


def test_samples_by_class(tmp_path):
    """Classes in turn, so that N images have N / classes of each; the checkpoint carries what latents are normalised by."""
    cfg = dit.make_config(**{**SMALL_DIT, "data_dir": str(tmp_path)})
    net, seen = tiny(data_dir=str(tmp_path)), []
    net.latent_mean.fill_(0.25)
    forward = net.forward
    net.forward = lambda x, t, y=None, **more: (seen.append(y), forward(x, t, y, **more))[1]
    images = dit.sample(net, cfg, range(16))
    assert images.shape == (16, 3, 16, 16) and seen[0][:16].tolist() == [0, 1, 2, 3] * 4
    assert math.isclose(net.state_dict()["latent_mean"][0].item(), 0.25)


def test_loss_by_time_is_logged(tmp_path, photos):
    cfg = dit.make_config(**SMALL_DIT, data_dir=str(photos), out=str(tmp_path / "run"), steps=20)
    dit.train(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines[0]["loss_by_time"]) == 4 and any(line["loss_by_time"][0] for line in lines)


def test_init_keeps_what_these_latents_are_normalised_by(tmp_path, photos):
    """Weights may come from a run on other latents."""
    cfg = dit.make_config(**SMALL_DIT, data_dir=str(photos), out=str(tmp_path / "run"), steps=1)
    dit.train(cfg)
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    own = state["ema"]["latent_mean"].clone()
    state["ema"]["latent_mean"] += 3
    torch.save(state, tmp_path / "other.pt")
    dit.train(dit.dataclasses.replace(cfg, out=str(tmp_path / "new"), init=str(tmp_path / "other.pt")))
    state = torch.load(tmp_path / "new" / "last.pt", weights_only=True)
    assert torch.equal(state["model"]["latent_mean"], own) and torch.equal(state["ema"]["latent_mean"], own)
