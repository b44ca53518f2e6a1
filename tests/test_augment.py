"""Non-leaky augmentation: what it does to images, how often, and that its labels stay where they belong."""
import math

import pytest
import torch
import torch.nn.functional as F

import ddpm_sc
import uvit_sc
from conftest import PIXEL, SMALL, SMALL_UNET

NAMES = "xflip yflip scale rotate aniso aniso_angle translate_x translate_y".split()


def params(n=1, **values):
    return {name: torch.full((n,), float(values.get(name, 0))) for name in NAMES}


def smooth(place, S):
    """A function of the plane, (2, ...) pixels from the middle of an image -> three channels, that goes on beyond the
    border as reflection does: a cosine of half periods of S - 1 pixels along each axis. Not symmetric in any way."""
    x, y = (place + (S - 1) / 2) * math.pi / (S - 1)
    waves = [(x, 0 * y), (2 * x, y), (x, 3 * y)]
    return torch.stack([(0.3 * k + 0.4) * a.cos() * b.cos() for k, (a, b) in enumerate(waves)])


def grid(S):
    axis = torch.arange(S) - (S - 1) / 2
    return torch.stack([axis.expand(S, S), axis[:, None].expand(S, S)])      # x, y of each pixel


def test_identity():
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    y, labels = ddpm_sc.apply_augment(x, params(4))
    assert torch.equal(x, y) and torch.equal(labels, torch.zeros(4, 9))
    tiny = dict(translate_x=1e-6)           # forced through the resampling, which is the identity by itself
    assert (ddpm_sc.apply_augment(x, params(4, **tiny))[0] - x).abs().max() < 1e-4


def test_mirrors_are_exact():
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(ddpm_sc.apply_augment(x, params(2, xflip=1))[0], x.flip(-1))
    assert torch.equal(ddpm_sc.apply_augment(x, params(2, yflip=1))[0], x.flip(-2))


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_quarter_turns(quarter):
    """Against rot90: counter-clockwise as one sees it. SYM6 is not quite symmetric: twice as large, an image lies
    0.1 of its pixels aside, so what is turned by 180 degrees shifts by 0.1 pixels, here by up to 0.029 of 2."""
    x = smooth(grid(32), 32)[None]
    for angle in (quarter * math.pi / 2, quarter * math.pi / 2 - 2 * math.pi):
        y, labels = ddpm_sc.apply_augment(x, params(rotate=angle))
        assert (y - torch.rot90(x, quarter, (2, 3))).abs().max() < 0.03
        assert torch.allclose(labels[0, 3:5], torch.tensor([math.cos(angle) - 1, math.sin(angle)]), atol=1e-6)


@pytest.mark.parametrize("dx, dy", [(4, 0), (0, -3), (5, 2)])
def test_integer_shifts(dx, dy):
    """Against slices of the image continued by reflection. Right and down are positive."""
    x = smooth(grid(32), 32)[None]
    y, _ = ddpm_sc.apply_augment(x, params(translate_x=dx / 4, translate_y=dy / 4))       # units of 32 / 8 pixels
    wide = F.pad(x, (8, 8, 8, 8), mode="reflect")
    assert (y - wide[..., 8 - dy:40 - dy, 8 - dx:40 - dx]).abs().max() < 1e-4


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaling(factor):
    """Twice as large, and half as large, as values of the function at other places."""
    x = smooth(grid(32), 32)[None]
    y, _ = ddpm_sc.apply_augment(x, params(scale=math.log2(factor) / 0.2))
    assert (y - smooth(grid(32) / factor, 32)).abs().max() < 0.02


def test_all_at_once():
    """Any transformation, composed step by step in float64: what the output shows at z stood in the input at G z."""
    generator = torch.Generator().manual_seed(0)
    S, p = 32, ddpm_sc.draw_augment(40, 1, generator)
    p = {name: values * 0.5 if name not in ("xflip", "yflip", "rotate", "aniso_angle") else values for name, values in p.items()}
    x = smooth(grid(S), S)
    y, _ = ddpm_sc.apply_augment(x.expand(40, -1, -1, -1), p)
    for k in range(40):
        v = {name: values[k].double() for name, values in p.items()}
        turn = lambda a: torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]])
        place = grid(S).double().flatten(1)
        place = place - S / 8 * torch.stack([v["translate_x"], v["translate_y"]])[:, None]       # undo one after another,
        place = turn(v["aniso_angle"]) @ place                                                   # the last first
        place = torch.diag(torch.stack([2 ** (-0.2 * v["aniso"]), 2 ** (0.2 * v["aniso"])])) @ place
        place = turn(-v["aniso_angle"]) @ place
        place = turn(v["rotate"]) @ place * 2 ** (-0.2 * v["scale"])
        place = place * (1 - 2 * torch.stack([v["xflip"], v["yflip"]]))[:, None]
        inside = (place.abs() < S).all(dim=0).view(S, S)                                         # one reflection reaches there
        error = (y[k] - smooth(place.view(2, S, S), S)).abs().amax(dim=0)[inside]
        assert inside.float().mean() > 0.9 and error.max() < 0.05, (k, error.max())


def test_an_image_depends_on_its_own_parameters_alone():
    generator = torch.Generator().manual_seed(0)
    x, p = torch.rand(12, 3, 16, 16), ddpm_sc.draw_augment(12, 0.5, generator)
    before = x.clone()
    together, labels = ddpm_sc.apply_augment(x, p)
    assert torch.equal(x, before)           # the caller's images stay as they are
    for k in range(12):
        alone, label = ddpm_sc.apply_augment(x[k:k + 1], {name: values[k:k + 1] for name, values in p.items()})
        assert (alone[0] - together[k]).abs().max() < 1e-5 and torch.equal(label[0], labels[k])


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_distributions(p):
    """Shares and moments of 40,000 draws against their expectations, within four standard errors."""
    n, q = 40000, ddpm_sc.draw_augment(40000, p, torch.Generator().manual_seed(1))
    label = ddpm_sc.augment_label(q)

    def near(values, mean, std):
        assert abs(values.double().mean().item() - mean) < 4 * std / n ** 0.5 + 1e-9
    shares = dict(xflip=0.5, yflip=p / 2, scale=p, rotate=p, aniso=p, aniso_angle=0.5, translate_x=p, translate_y=p)
    for name, share in shares.items():
        near((q[name] != 0).float(), share, (share * (1 - share)) ** 0.5)
    assert torch.equal(q["translate_x"] != 0, q["translate_y"] != 0)
    for name in ("scale", "aniso", "translate_x", "translate_y"):
        near(q[name], 0, p ** 0.5)
        near(q[name].square(), p, (3 * p - p * p) ** 0.5)
    near(q["rotate"].abs(), p * math.pi / 2, math.pi)
    near(label[:, 3], -p, 1)                                    # E cos a - 1 over the circle
    near(label[:, 4].square(), p / 2, 1)
    near((label[:, 6] != 0).float(), p / 2, 0.5)                # sin of the angle 0, half of the time
    untouched = (label == 0).all(dim=1).float()
    near(untouched, 0.5 * (1 - p / 2) * (1 - p) ** 4, 0.5)
    print(f"p = {p}: {100 * untouched.mean():.1f} % untouched, moments {label.mean(0).tolist()}, {label.square().mean(0).tolist()}")


def test_no_mirrors_for_digits():
    q = ddpm_sc.draw_augment(1000, 1, torch.Generator().manual_seed(1), mirror=False)
    assert not q["xflip"].any() and not q["yflip"].any() and q["scale"].all()


@pytest.mark.parametrize("script", PIXEL, indirect=True)
def test_views(script):
    """Views of the uint8 images of a step: the same for any division of the batch, flips included; float32 whatever the
    precision of the network, as a photograph in bf16 has 8 bits less."""
    cfg = script.make_config(**{**(SMALL if script is uvit_sc else SMALL_UNET), "batch": 16, "aug": 0.9})
    x = torch.randint(0, 256, (16, 3, cfg.size, cfg.size), dtype=torch.uint8)
    view = script.draw_view(cfg, script.rng(1))
    whole, labels = script.make_view(x, torch.zeros(16), view)
    assert whole.dtype == torch.float32 and labels.shape == (16, 9)
    for rows in (slice(0, 8), slice(8, 16)):
        part, label = script.make_view(x[rows], torch.zeros(8), {name: values[rows] for name, values in view.items()})
        assert (part - whole[rows]).abs().max() < 1e-5 and torch.equal(label, labels[rows])
    cfg.aug = 0
    plain, nothing = script.make_view(x, torch.zeros(16), {"flip": view["flip"]})
    assert nothing is None and torch.equal(plain, script.to_float(torch.where(view["flip"].view(-1, 1, 1, 1), x.flip(-1), x)))
    assert 0 < view["flip"].sum() < 16
    cfg.flip = False
    assert not script.draw_view(cfg, script.rng(1))["flip"].any()


def test_training_augments_in_float32(script, small, monkeypatch):
    """The views are made outside autocast: else a GPU would resample images in bf16."""
    seen, make_view = [], script.make_view
    monkeypatch.setattr(script, "make_view", lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), make_view(*args))[1])
    script.train(script.make_config(**small, aug=0.5, cl=0.01, cl_hidden=16, amp="bf16", steps=1))
    assert seen == [False, False]


def test_labels_enter_the_time_embedding():
    """One matrix without bias, as in the public network: zeros are the same as no labels."""
    cfg = ddpm_sc.make_config("cifar10", aug=0.12)
    with torch.device("meta"):
        net = ddpm_sc.build_net(cfg)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307 + 460_288 + 1_152
    assert "time_emb.aug_emb.weight" in net.state_dict() and "sc_time.aug_emb.weight" not in net.state_dict()
    net = ddpm_sc.build_net(ddpm_sc.make_config(**SMALL_UNET, aug=0.12))
    x, c = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.5])
    assert torch.equal(net(x, c), net(x, c, torch.zeros(2, 9))) and not torch.allclose(net(x, c), net(x, c, torch.ones(2, 9)))
    e = net.time_emb
    angles = c[:, None] * torch.exp(-math.log(10000) * torch.arange(16) / 15)
    waves = torch.cat([angles.sin(), angles.cos()], 1) + 0.5 * e.aug_emb.weight.sum(1)
    assert torch.allclose(e(c, torch.full((2, 9), 0.5)), e.lin2(F.silu(e.lin1(waves))), atol=1e-6)


@pytest.mark.parametrize("script", PIXEL, indirect=True)
def test_sampling_and_probing_see_no_labels(script, small):
    """Features and samples are those of a network that is told of no transformation."""
    cfg = script.make_config(**small, aug=0.5)
    net = script.build_net(cfg).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
    C, S = script.DATASETS[cfg.dataset][0], cfg.size
    told, forward = [], net.forward
    net.forward = lambda x, c, aug=None, **more: (told.append(aug), forward(x, c, torch.zeros(len(x), 9), **more))[1]
    zeros = script.sample(net, cfg, range(4)), script.features(net, torch.zeros(2, C, S, S), cfg.t_probe, torch.ones(2, C, S, S))
    net.forward = forward
    plain = script.sample(net, cfg, range(4)), script.features(net, torch.zeros(2, C, S, S), cfg.t_probe, torch.ones(2, C, S, S))
    assert all(aug is None for aug in told) and len(told) > 1
    assert torch.equal(zeros[0], plain[0]) and all(torch.equal(zeros[1][k], plain[1][k]) for k in plain[1])


@pytest.mark.parametrize("mask", [1, 0])
def test_cls_and_the_label_do_not_see_each_other(mask):
    """Fig. 2(b): within an attention layer neither the value of [CLS] nor its gradient depends on the augmentation's
    token, and the other way round; with --aug_mask 0 both do."""
    cfg = uvit_sc.make_config(**SMALL, aug=0.12, aug_mask=mask)
    net = uvit_sc.build_net(cfg)
    assert (net.mask is not None) == bool(mask) and net.extras == 3 and "mask" not in net.state_dict()
    attention = net.in_blocks[0].attn
    torch.nn.init.normal_(attention.qkv.weight, std=0.2)
    h = torch.randn(2, net.extras + 16, net.D, requires_grad=True)
    for reader, other in ((1, 2), (2, 1)):
        out = attention(h, net.mask)
        grad, = torch.autograd.grad(out[:, reader].square().sum(), h)
        changed = h.detach().clone()
        changed[:, other] += 1
        same = torch.equal(attention(changed, net.mask)[:, reader], out[:, reader])
        assert same == bool(mask) and (grad[:, other] == 0).all() == bool(mask)
        assert all((grad[:, k] != 0).any() for k in (0, reader, 3))                     # the rest is read as ever
    patches = attention(h, net.mask)[:, 3:]
    assert (torch.autograd.grad(patches.sum(), h)[0][:, 1:3] != 0).any(dim=(0, 2)).all()      # patches read both


def test_the_token_of_the_label():
    """One more token, and its label matters to patches; time, [CLS], label, patches is the order."""
    plain, told = (uvit_sc.build_net(uvit_sc.make_config(**SMALL, aug=aug)) for aug in (0, 0.12))
    extra = sum(p.numel() for p in told.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 9 * 160 + 160 + 160         # the embedding with its bias, and one position
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([5, 500])
    assert torch.equal(told(x, t), told(x, t, torch.zeros(2, 9))) and not torch.allclose(told(x, t), told(x, t, torch.ones(2, 9)), atol=1e-6)
    alone = uvit_sc.build_net(uvit_sc.make_config(**SMALL, aug=0.12, self_cond="none"))
    assert alone.mask is None and alone.extras == 2 and alone(x, t).shape == x.shape
