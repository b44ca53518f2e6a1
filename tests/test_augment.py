"""Non-leaky augmentation: what it does to images, how often, and that its labels stay where they
belong. One text in the four pixel scripts; latents: test_dit.py."""
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import PIXEL, load, only, rounding, small_config, small_net, spy

pytestmark = pytest.mark.numeric
script = load("uvit_sc")
COLUMNS = "flip xflip yflip scale rotate aniso aniso_angle move_x move_y".split()


def view_of(n=1, **values):
    return torch.stack([torch.full((n,), float(values.get(name, 0))) for name in COLUMNS], dim=1)


def resampled(S):
    """Rounding errors of a resampled image. It is S wide, 6 S on the canvas: places there are off
    by 8 sums' worth, and from pixel to pixel values differ by up to 2. Four matrices of 12 taps
    then."""
    return 2 * rounding(6 * S, 8) + rounding(2, 4 * 12)


def random_images(n, S):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, S, S), dtype=torch.uint8, generator=generator)


def smooth(place, S):
    """A function of the plane, (2, ...) pixels from the middle of an image -> three channels, that
    goes on beyond the border as reflection does: a cosine of half periods of S - 1 pixels along
    each axis. Not symmetric in any way."""
    x, y = (place + (S - 1) / 2) * math.pi / (S - 1)
    waves = [(x, 0 * y), (2 * x, y), (x, 3 * y)]
    return torch.stack([(0.3 * k + 0.3) * a.cos() * b.cos() for k, (a, b) in enumerate(waves)])


def grid(S):
    axis = torch.arange(S) - (S - 1) / 2
    return torch.stack([axis.expand(S, S), axis[:, None].expand(S, S)])      # x, y of each pixel


IMAGE = script.to_uint8(smooth(grid(32), 32))[None]
BYTE = 1 / 255                              # what is lost by a uint8 image in [-1, 1]


def test_identity():
    """Zeros leave an image and its labels as they are, bit for bit; resampling by a millionth of a
    pixel, in which values differ by up to 2, does so but for rounding."""
    x = random_images(4, 16)
    y, aug = script.make_view(x, torch.zeros(4, 9))
    assert y.dtype == torch.float32 and torch.equal(y, script.to_float(x)) and not aug.any()
    y, _ = script.make_view(x, view_of(4, move_x=5e-7))
    assert (y - script.to_float(x)).abs().max() < resampled(16) + 2e-6


@pytest.mark.parametrize("name, axis, told", [("flip", -1, False), ("xflip", -1, True),
                                              ("yflip", -2, True)])
def test_mirrors_are_exact(name, axis, told):
    """Bit for bit. The flip of Table 11 is no augmentation: the network is not told."""
    x = random_images(2, 16)
    y, aug = script.make_view(x, view_of(2, **{name: 1}))
    assert torch.equal(y, script.to_float(x.flip(axis))) and aug.any() == told


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_quarter_turns(quarter):
    """Against rot90: counter-clockwise as one sees it. SYM6 is not quite symmetric: what is turned
    by 180 degrees lies 0.1 pixels aside, here by up to 0.029 of 2."""
    x = script.to_float(IMAGE)
    for angle in (quarter * math.pi / 2, quarter * math.pi / 2 - 2 * math.pi):
        y, aug = script.make_view(IMAGE, view_of(rotate=angle))
        assert (y - torch.rot90(x, quarter, (2, 3))).abs().max() < 0.03 + BYTE
        expected = torch.tensor([math.cos(angle) - 1, math.sin(angle)])
        assert (aug[0, 3:5] - expected).abs().max() < 2 ** -20      # the angle is rounded to 2^-22


@pytest.mark.parametrize("dx, dy", [(4, 0), (0, -3), (5, 2)])
def test_integer_shifts(dx, dy):
    """Against slices of the image continued by reflection, but for rounding: the two filters undo
    each other. Right and down are positive; the unit is an eighth of the image."""
    x = random_images(1, 32)
    y, _ = script.make_view(x, view_of(move_x=dx / 4, move_y=dy / 4))
    wide = F.pad(script.to_float(x), (8, 8, 8, 8), mode="reflect")
    assert (y - wide[..., 8 - dy:40 - dy, 8 - dx:40 - dx]).abs().max() < resampled(32)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_scaling(factor):
    """Half or twice as large: values of the function at other places, as well as SYM6 finds
    them."""
    y, _ = script.make_view(IMAGE, view_of(scale=math.log2(factor) / 0.2))
    assert (y - smooth(grid(32) / factor, 32)).abs().max() < 0.02 + BYTE


def test_all_at_once():
    """Any transformation, composed step by step in float64: what the output shows at z stood in the
    input at G z; as well as SYM6 finds it, 0.05 of 2."""
    S, n = 32, 40
    view = script.draw_view(small_config(script, batch=n, aug=1.0), script.rng(0))
    view[:, 0] = 0
    for k in (3, 5, 7, 8):                  # half as far: most of it stays within one reflection
        view[:, k] *= 0.5
    y, _ = script.make_view(IMAGE.expand(n, -1, -1, -1), view)
    _, xflip, yflip, scale, rotate, aniso, angle, move_x, move_y = view.double().unbind(dim=1)
    for k in range(n):
        place = grid(S).double().flatten(1)
        place = place - S / 8 * torch.stack([move_x[k], move_y[k]])[:, None]    # undo one after
        stretch = 2 ** (0.2 * torch.stack([-aniso[k], aniso[k]]))               # another, the
        place = stretch[:, None] * (script.rotation(angle[k:k + 1])[0] @ place)     # last first
        place = script.rotation(-angle[k:k + 1])[0] @ place
        place = script.rotation(rotate[k:k + 1])[0] @ place * 2 ** (-0.2 * scale[k])
        place = place * (1 - 2 * torch.stack([xflip[k], yflip[k]]))[:, None]
        inside = (place.abs() < S).all(dim=0).view(S, S)            # one reflection reaches there
        error = (y[k] - smooth(place.view(2, S, S), S)).abs().amax(dim=0)[inside]
        assert inside.float().mean() > 0.9 and error.max() < 0.05 + BYTE, k


@only(*PIXEL)
def test_views(script):
    """An image depends on its own row alone, so that views are the same for any division of a
    batch: labels and mirrors bit for bit, resampled images but for rounding. The images that are
    given stay as they are."""
    cfg = small_config(script, batch=16, aug=0.3)
    x, view = random_images(16, 16), script.draw_view(cfg, script.rng(1))
    before = x.clone()
    whole, labels = script.make_view(x, view)
    plain = (labels[:, 2:] == 0).all(dim=1)
    assert labels.shape == (16, 9) and plain.any() and not plain.all()
    for rows in (*(slice(k, k + 1) for k in range(16)), slice(0, 8), slice(8, 16)):
        part, label = script.make_view(x[rows], view[rows])
        assert (part - whole[rows]).abs().max() < resampled(16) and torch.equal(label, labels[rows])
        assert torch.equal(part[plain[rows]], whole[rows][plain[rows]])
    assert torch.equal(x, before)
    view = script.draw_view(small_config(script, batch=16), script.rng(1))
    assert not view[:, 1:].any() and 0 < view[:, 0].sum() < 16
    view = script.draw_view(small_config(script, batch=64, aug=1.0, flip=False), script.rng(1))
    assert not view[:, :3].any() and view[:, 3].all()       # digits have no mirror image


@pytest.mark.parametrize("p", [0.12, 1.0])
def test_distributions(p):
    """Shares and moments of 40,000 draws against their expectations, within four standard
    errors."""
    n = 40_000
    view = script.draw_view(small_config(script, batch=n, aug=p), script.rng(1))
    _, label = script.make_view(torch.zeros(n, 1, 1, 1, dtype=torch.uint8),
                                torch.cat([view[:, :3], torch.zeros(n, 6)], dim=1))
    assert torch.equal(label[:, :2], view[:, 1:3])

    def near(values, mean, std):
        assert abs(values.double().mean().item() - mean) < 4 * std / n ** 0.5 + 1e-9
    shares = dict(flip=0.5, xflip=0.5, yflip=p / 2, scale=p, rotate=p, aniso=p, aniso_angle=0.5,
                  move_x=p, move_y=p)
    drawn = dict(zip(COLUMNS, view.unbind(dim=1)))
    for name, share in shares.items():
        near(drawn[name] != 0, share, (share * (1 - share)) ** 0.5)
    assert torch.equal(drawn["move_x"] != 0, drawn["move_y"] != 0)
    for name in ("scale", "aniso", "move_x", "move_y"):
        near(drawn[name], 0, p ** 0.5)
        near(drawn[name].square(), p, (3 * p - p * p) ** 0.5)
    near(drawn["rotate"].abs(), p * math.pi / 2, math.pi)
    untouched = (view[:, 1:] == 0).all(dim=1)
    near(untouched, 0.5 * (1 - p / 2) * 0.5 * (1 - p) ** 4, 0.5)


@only("edm_sc", "uvit_sc")
def test_training_augments_in_float32(script, config, monkeypatch):
    """Views are made outside autocast: else a GPU would resample images in bf16."""
    seen, make_view = [], script.make_view

    def spy(images, view):
        seen.append(torch.is_autocast_enabled("cpu"))
        return make_view(images, view)
    monkeypatch.setattr(script, "make_view", spy)
    script.train(config(aug=0.5, cl=0.01, amp="bf16", steps=1))
    assert seen == [False, False]


@only("edm_sc")
def test_labels_enter_the_time_embedding(script):
    """One matrix, as in the public network, and none in s(t)."""
    with torch.device("meta"):
        net = script.build_net(script.make_config("cifar10", aug=0.12))
    assert sum(p.numel() for p in net.parameters()) == 35_746_307 + 460_288 + 9 * 128
    names = [name for name in net.state_dict() if "aug_emb" in name]
    assert names == ["time_emb.aug_emb.weight"]
    net = small_net(script, aug=0.12)
    x, c = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.5])
    assert torch.equal(net(x, c)[0], net(x, c, aug=torch.zeros(2, 9))[0])
    assert not torch.allclose(net(x, c)[0], net(x, c, aug=torch.ones(2, 9))[0])


@only("edm_sc", "uvit_sc")
def test_sampling_and_probing_tell_of_no_transformation(script, monkeypatch):
    net, x = small_net(script, aug=0.5), torch.zeros(2, 3, 16, 16)
    calls = spy(monkeypatch, net, "forward")
    script.sample(net, net.cfg, range(4))
    script.features(net, x, net.cfg.t_probe, x)
    assert len(calls) > 1 and all(call.kwargs.get("aug") is None for call in calls)
    assert all(len(call.args) < 4 for call in calls)
