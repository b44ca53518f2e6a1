"""The latent DiT: sizes, recipes, LightningDiT's clock, positions, classes, views. Its formulation:
test_formulations.py; how latents are made: test_latents.py."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import load, no_statistics, rounding, small_config, small_net, spy

pytestmark = pytest.mark.numeric
dit = load("dit_latent_sc")
GEN = torch.Generator().manual_seed(0)
X = torch.randn(4, 48, 4, 4, generator=GEN)
T = torch.tensor([0.1, 0.4, 0.6, 0.9])
Y = torch.tensor([0, 1, 2, 3])


@pytest.fixture(autouse=True)
def no_latents(monkeypatch):
    """Networks are built without latents on a disk."""
    no_statistics(monkeypatch.setattr)


@pytest.mark.parametrize("backbone, base, table", [
    ("dit_b", 129_787_424, 768_768), ("dit_l", 457_127_936, 1_025_024),
    ("dit_xl", 674_103_584, 1_153_152)])
def test_parameters(backbone, base, table):
    """To the last one, with the fixed positions: 1001 classes, none, self-conditioning."""
    def count(**fields):
        with torch.device("meta"):
            net = dit.build_net(dit.make_config("imagenet", backbone=backbone, **fields))
        return sum(p.numel() for p in net.parameters())
    assert count(uncond=True, self_cond="none") == base
    assert count(self_cond="none") == base + table
    if backbone == "dit_b":
        assert count(uncond=True) == base + 1_378_560
        assert count(uncond=True, self_cond="add") == base + 590_592


@pytest.mark.parametrize("dataset, uncond, layer, epochs", [
    ("imagenet100", False, "block_8", 1000), ("imagenet100", True, "block_8", 1400),
    ("imagenet", False, "block_10", 90), ("imagenet", True, "block_9", 90)])
def test_recipes_of_the_paper(dataset, uncond, layer, epochs):
    """Tables 8 to 11; --uncond chooses its own layer and length."""
    cfg = dit.make_config(dataset, uncond=uncond)
    assert (cfg.layer, cfg.epochs, cfg.backbone, cfg.t_probe) == (layer, epochs, "dit_b", 0.25)
    assert (cfg.batch, cfg.lr, cfg.warmup, cfg.weight_decay, cfg.ema, cfg.ema_ramp) == (
        1024, 2e-4, 0, 0, 0.9999, False)
    assert (cfg.nfe, cfg.shift, cfg.guidance, cfg.guide_until) == (250, 3.3, 1.5, 0.89)
    assert (cfg.size, cfg.cell, cfg.beta1, cfg.beta2, cfg.lr_decay) == (256, 16, 0.9, 0.95, 0)


@torch.no_grad()
def test_official_weights(tmp_path):
    """LightningDiT's averaged weights, {model, ema, opt, config}: its time is 1 - t and its
    prediction -v, and the converted network is that function. The 256 sinusoids of t are turned
    into those of 1 - t by sums of two, then summed; 10 more sums in each of 3 blocks. Ours load as
    they are."""
    official, ours = small_net(dit, self_cond="none"), small_net(dit, self_cond="none", scale=0)
    own = official.state_dict()
    state = {f"module.{k}": v for k, v in own.items() if not k.startswith("latent_")}
    raw = {k: 0 * v for k, v in state.items()}
    torch.save(dict(ema=state, model=raw, opt={}, config=None), tmp_path / "theirs.pt")
    dit.load_weights(ours, tmp_path / "theirs.pt")
    a, b = ours(X, T, Y)[0], official(X, 1 - T, Y)[0]
    assert b.std() > 0.1 and (a + b).abs().max() < rounding(b.abs().max().item(), 256 + 3 * 10)
    torch.save(dict(ema=own), tmp_path / "ours.pt")
    dit.load_weights(ours, tmp_path / "ours.pt")
    assert torch.equal(ours(X, T, Y)[0], official(X, T, Y)[0])


def test_positions_and_rotations():
    """The fixed embedding: column first, sines before cosines; RoPE: rows first, neighbouring
    channels in pairs. Angles up to 3 are rounded to 2^-23, and the sines of them to 2^-24."""
    near = dict(rtol=0, atol=2 ** -22)
    net = small_net(dit)
    D, d, S = 64, 16, 4
    cos, sin = net.feat_rope.freqs_cos, net.feat_rope.freqs_sin
    for row, column in ((0, 0), (1, 3), (2, 1)):
        w = 10000 ** -(np.arange(D // 4) / (D // 4))
        both = [f(place * w) for place in (column, row) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(net.pos_embed[0, row * S + column], np.concatenate(both), **near)
        w = 10000 ** -(4 * np.arange(d // 4) / d)
        angles = np.repeat(np.concatenate([row * w, column * w]), 2)
        np.testing.assert_allclose(cos[row * S + column], np.cos(angles), **near)
        np.testing.assert_allclose(sin[row * S + column], np.sin(angles), **near)
    x = torch.randn(1, 1, 16, d, generator=GEN)
    turned = dit.rotate(x, torch.complex(cos, sin)[:, ::2])
    a, b = x[..., ::2], x[..., 1::2]
    near = dict(rtol=0, atol=rounding(x.abs().max().item(), 4))
    torch.testing.assert_close(turned[..., ::2], a * cos[:, ::2] - b * sin[:, ::2], **near)
    torch.testing.assert_close(turned[..., 1::2], a * sin[:, ::2] + b * cos[:, ::2], **near)
    assert not net.pos_embed.requires_grad


@torch.no_grad()
def test_classes():
    """Not told is the last row of the table, for None, and where the view hides the class; another
    class gives another prediction; --uncond has no table."""
    net = small_net(dit)
    nothing, told = net(X, T, torch.full((4,), 10))[0], net(X, T, Y)[0]
    assert net.null == 10 and net.y_embedder.embedding_table.weight.shape == (11, 64)
    hide = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    assert torch.equal(net(X, T)[0], nothing) and not torch.allclose(told, nothing)
    hidden = net(X, T, Y, hide)[0]
    assert torch.equal(hidden[::2], nothing[::2]) and torch.equal(hidden[1::2], told[1::2])
    plain = small_net(dit, uncond=True)
    assert not hasattr(plain, "y_embedder") and torch.equal(plain(X, T)[0], plain(X, T, Y)[0])


def test_views_of_latents():
    """The mirror image has latents of its own; a crop is shifted by whole cells, reflected at the
    border, and told to the network; classes may be hidden."""
    cfg = small_config(dit, batch=400, aug=0.5, size=64)
    view = dit.draw_view(cfg, dit.rng(0))
    flip, _, dy, dx = view.long().unbind(dim=1)
    shifted = (view[:, 2:] != 0).any(dim=1).float().mean()
    # Shares of 400 draws, within four standard errors.
    for share, p in ((shifted, 0.5 * 24 / 25), (view[:, 1].mean(), 0.1), (view[:, 0].mean(), 0.5)):
        assert abs(share - p) < 4 * (p * (1 - p) / 400) ** 0.5
    assert dy.abs().max() == dx.abs().max() == 2
    latents = torch.randn(400, 2, 3, 16, 16, generator=GEN).half()
    x, aug = dit.make_view(latents, view)
    assert x.dtype == torch.float32 and torch.equal(aug, view[:, 1:])
    wide = F.pad(latents.float().flatten(0, 1), (2, 2, 2, 2), mode="reflect").unflatten(0, (400, 2))
    for k in range(400):
        rows, columns = slice(2 - dy[k], 18 - dy[k]), slice(2 - dx[k], 18 - dx[k])
        assert torch.equal(x[k], wide[k, flip[k], :, rows, columns])
    plain = torch.zeros(400, 9)             # as of a pixel script: the mirror alone
    plain[::2, 0] = 1
    x, _ = dit.make_view(latents, plain)
    assert torch.equal(x[::2], latents[::2, 1].float())
    assert torch.equal(x[1::2], latents[1::2, 0].float())


def test_samples_by_class(monkeypatch):
    """Classes in turn, so that N images have N / classes of each; the checkpoint carries what
    latents are normalised by."""
    net = small_net(dit)
    net.latent_mean.fill_(0.25)
    calls = spy(monkeypatch, net, "forward")
    images = dit.sample(net, net.cfg, range(16))
    assert images.shape == (16, 3, 16, 16)
    assert calls[0].args[2][:16].tolist() == [k % 10 for k in range(16)]
    assert (net.state_dict()["latent_mean"] == 0.25).all()
