"""The pooled feature f of each network: what `features` reads, and what self-conditioning does."""
import pytest
import torch

from conftest import no_statistics, only, small_config, small_net

pytestmark = pytest.mark.numeric
C_NOISE = torch.tensor([0.1, 0.4, 0.6, 0.9])
NOISE = torch.randn(2, 4, 48, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_latents(monkeypatch):
    no_statistics(monkeypatch.setattr)


def inputs(net):        # x_0, eps
    C, S, _ = getattr(net, "shape", (3, 16, 16))
    return NOISE[:, :, :C, :S, :S]


@torch.no_grad()
def test_features(script):
    """Every layer, pooled over its positions, in U-ViT over patches alone; f is that of cfg.layer.
    Stopping early changes nothing, bit for bit, and runs nothing behind the last layer. No class is
    told."""
    net, maps = small_net(script), []
    (x, eps), k, t = inputs(net), net.f_layer, net.cfg.t_probe
    full = script.features(net, x, t, eps)
    assert list(full) == script.layers(net.cfg)
    assert all(f.dtype == torch.float32 and not f.requires_grad for f in full.values())
    diffusion, at = script.Diffusion(net.cfg), torch.full((4,), t)
    f = net(*diffusion.inputs(diffusion.add_noise(x, at, eps), at))[1]
    assert torch.equal(f, full[net.f_name])
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, h: maps.append(h))
    part = script.features(net, x, t, eps, last=net.f_name)
    assert len(maps) == k
    assert all(torch.equal(part[name], full[name]) for name in part.keys() & full.keys())
    h = maps[-1].flatten(2).transpose(1, 2) if maps[-1].dim() == 4 else maps[-1]    # (B, N, D)
    if script.SCRIPT == "uvit_sc":
        assert torch.equal(full[f"cls_{k}"], h[:, 1])
        h = h[:, net.extras:]
    torch.testing.assert_close(full[net.cfg.layer], h.mean(dim=1))
    assert torch.equal(net.positions(maps[-1]), h)


@only("edm_sc", "dit_latent_sc")
@torch.no_grad()
def test_self_conditioning_reaches_later_layers_alone(script):
    """Layers up to the second, which is chosen, are the baseline's, bit for bit; the two later ones
    change. They read e + W f with `add`, e + s(t) W f with `adaptive`, where s is 1 at first with
    `adaptive1`."""
    baseline, plain = small_net(script, self_cond="none"), []
    for way in ("none", "add", "adaptive", "adaptive1"):
        net, maps, e = small_net(script, self_cond=way), [], []
        net.load_state_dict({**net.state_dict(), **baseline.state_dict()})

        def spy(block, inputs, h):
            maps.append(h)
            e.append(inputs[1])
        for block in net.modules():
            if block in [*net.blocks, getattr(net, "final_layer", None)]:
                block.register_forward_hook(spy)
        f, plain = net(inputs(net)[0], C_NOISE)[1], plain or maps
        assert [torch.equal(a, b) for a, b in zip(maps, plain)] == [True] * 2 + [way == "none"] * 2
        s = net.sc_time(C_NOISE) if net.sc_time else 1
        later = e[0] + s * net.sc_proj(f) if way != "none" else e[0]
        assert torch.equal(e[1], e[0]) and torch.equal(e[2], later) and torch.equal(e[3], later)
    start = script.build_net(small_config(script, self_cond="adaptive1"))
    assert torch.equal(start.sc_time(C_NOISE), torch.ones(4, 64))
