"""U-ViT and DDPM: sizes, equality with the public network, [CLS], and the identities of the formulation."""
import math

import pytest
import torch

import uvit_sc
from uvit_sc import DDPM, build_net, features, make_config


def fill(net, scale=0.05):
    """Weights by a fixed rule that needs no random generator: the i-th tensor is scale * sin(i + 0.1 k) for its k-th number."""
    for i, p in enumerate(net.state_dict().values()):
        p.copy_(scale * torch.sin(i + 0.1 * torch.arange(p.numel(), dtype=torch.float64)).view(p.shape))
    return net.eval()


def test_parameters():
    """44,255,328 as the official UViT-S (CIFAR-10); [CLS] adds a token and its position, 2 x 512."""
    with torch.device("meta"):
        count = {self_cond: sum(p.numel() for p in build_net(make_config("cifar10", self_cond=self_cond)).parameters())
                 for self_cond in ("none", "cls")}
    assert count == {"none": 44_255_328, "cls": 44_255_328 + 1_024}


GOLDEN = [-0.030851, -0.121288, -0.169518, 0.027509, 0.15542, -0.096468, 0.096772, -0.050325, -0.169515, 0.02219]


@torch.no_grad()
def test_equals_the_public_network():
    """Outputs of the public U-ViT (github.com/baofff/U-ViT, libs/uvit.py) with the same weights and input, at ten places."""
    net = fill(build_net(make_config("cifar10", self_cond="none")))
    x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32)).view(2, 3, 32, 32)
    out = net(x, torch.tensor([11.0, 700.0])).flatten()
    assert len(net.state_dict()) == 164 and list(net.state_dict())[:2] == ["pos_embed", "patch_embed.proj.weight"]
    assert out[::617].tolist() == pytest.approx(GOLDEN, abs=1e-5)


def test_tiny_starts_alive():
    """Weights are scaled with the width: the official 0.02 at 512, so that narrow nets do not start with dead branches."""
    for dataset, width in (("cifar10", 512), ("glyphs", None)):
        torch.manual_seed(0)
        net = build_net(make_config(dataset))
        weight = net.mid_block.mlp.fc1.weight
        assert weight.std().item() == pytest.approx(0.02 * math.sqrt(512 / weight.shape[1]), rel=0.02)
        assert net.mid_block.mlp.fc1.bias.abs().max() == 0 and net.patch_embed.proj.bias.abs().max() > 0


@pytest.fixture(params=["cls", "none"])
def net(request):
    torch.manual_seed(0)
    return build_net(make_config("glyphs", self_cond=request.param))


def test_cls_reads_and_is_read(net):
    """[CLS] changes the prediction of every pixel, gathers from the image, and gets a gradient; the baseline has none."""
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 500.0])
    if net.cfg.self_cond == "none":
        assert not hasattr(net, "cls_token") and not any("cls" in layer for layer in net.choices(net.cfg)["layer"])
        return
    out = net(x, t)
    out.square().mean().backward()
    assert net.cls_token.grad.abs().max() > 0
    last = net.choices(net.cfg)["layer"][-1]
    with torch.no_grad():
        assert (net(-x, t, last=last)["cls_1"] - net(x, t, last=last)["cls_1"]).abs().max() > 1e-3
        net.cls_token += 1
        assert ((net(x, t) - out).abs().amax(dim=1) > 0).float().mean() > 0.9


def test_features(net):
    """Every layer, pooled over patches alone; stopping early changes nothing; the net behind the last layer is not run."""
    layers, (x, noise) = net.choices(net.cfg)["layer"], torch.randn(2, 5, 3, 16, 16)
    width, _, _ = uvit_sc.UViT.sizes[net.cfg.backbone]
    full = features(net, x, 11, noise)
    assert list(full) == layers and all(f.shape == (5, width) and f.dtype == torch.float32 for f in full.values())
    outputs = []
    for block in net.out_blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    part = features(net, x, 11, noise, last=layers[0])
    assert len(outputs) == 1 and list(part) == layers[:net.extras] and torch.equal(part[layers[0]], full[layers[0]])
    assert torch.equal(full["out_1"], outputs[0][:, net.extras:].mean(dim=1))
    if net.extras == 2:
        assert torch.equal(full["cls_1"], outputs[0][:, 1])
    x_t = DDPM(net.cfg).add_noise(x, torch.full((5,), 11), noise)
    with torch.no_grad():
        assert torch.equal(net(x_t, torch.full((5,), 11.0), last="out_1")["out_1"], full["out_1"])


def test_patches_go_back_where_they_came_from():
    """With an identity in place of the Transformer, patch embedding and unpatchify are inverse to each other."""
    cfg = make_config("glyphs", self_cond="none")
    net = build_net(cfg)
    p, C = cfg.patch, 3
    for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
        block.forward = lambda x, mask, skip=None: x
    net.norm = torch.nn.Identity()
    with torch.no_grad():
        for q in net.parameters():
            q.zero_()
        for channel in range(C):
            net.final_layer.weight[channel, channel, 1, 1] = 1
            for row in range(p):
                for column in range(p):
                    k = (row * p + column) * C + channel      # channel fastest, as in the official code
                    net.patch_embed.proj.weight[k, channel, row, column] = 1
                    net.decoder_pred.weight[k, k] = 1
        x = torch.randn(2, 3, 16, 16)
        assert torch.allclose(net(x, torch.ones(2)), x, atol=1e-6)


def test_time_token():
    token = uvit_sc.time_token(torch.tensor([0.0, 7.0]), 8)
    expected = [f(7 * 10000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)]
    assert token[0].tolist() == [1] * 4 + [0] * 4 and token[1].tolist() == pytest.approx(expected, abs=1e-6)


# ---- DDPM ----------------------------------------------------------------------------------------------------------------

def test_schedule():
    """alpha^2 + sigma^2 = 1; t = 0 is the data; alpha_bar at 1, 11, 66 and 1000 as in the authors' DDAE code (facts)."""
    ddpm = DDPM(make_config())
    assert torch.allclose(ddpm.alpha ** 2 + ddpm.sigma ** 2, torch.ones(1001))
    assert (ddpm.alpha[0], ddpm.sigma[0]) == (1, 0)
    assert (ddpm.alpha[[1, 11, 66]] ** 2).tolist() == pytest.approx([0.99990, 0.997806, 0.951846], abs=1e-6)
    assert ddpm.alpha[1000].item() ** 2 == pytest.approx(4.036e-5, rel=1e-3)


def test_add_noise_and_loss():
    ddpm, (x, noise) = DDPM(make_config()), torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([0, 1, 500, 1000])
    x_t = ddpm.add_noise(x, t, noise)
    assert torch.equal(x_t[0], x[0]) and torch.allclose(x_t[3], noise[3], atol=0.05)
    assert torch.allclose(x_t[2], ddpm.alpha[500] * x[2] + ddpm.sigma[500] * noise[2])
    seen = []
    loss = ddpm.loss(lambda x, c: seen.append((x, c)) or noise + 2, x, t, noise)
    assert loss.tolist() == pytest.approx([4] * 4) and torch.equal(seen[0][0], x_t) and torch.equal(seen[0][1], t)


def test_times_are_uniform():
    t = DDPM(make_config()).draw_t(200_000, torch.Generator().manual_seed(0))
    assert (t.min(), t.max()) == (1, 1000) and abs(t.double().mean() - 500.5) < 3 * 288.7 / math.sqrt(200_000)


def test_ddim_on_a_gaussian():
    """Data N(0, s^2): the optimal eps is sigma x_t / (alpha^2 s^2 + sigma^2). DDIM maps noise to the right standard deviation
    with an error of first order in the number of steps."""
    s, errors = 0.2, []
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for nfe in (50, 100, 200):
        ddpm, times = DDPM(make_config(nfe=nfe)), []

        def net(x, t):
            times.append(int(t[0]))
            a, b = ddpm.alpha[times[-1]], ddpm.sigma[times[-1]]
            return b * x / (a ** 2 * s ** 2 + b ** 2)
        errors.append(abs(ddpm.sample(net, noise).std().item() / noise.std().item() / s - 1))
        assert len(times) == nfe and times[-1] == 1 and times[0] == 1 + (nfe - 1) * 1000 // nfe
    assert errors[2] < 0.04 and all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:])), errors


def test_ddim_grid_and_clipping():
    """nfe = 5 visits 801, 601, 401, 201, 1; the last step returns the clipped x_0 itself."""
    ddpm, times = DDPM(make_config(nfe=5)), []
    out = ddpm.sample(lambda x, t: times.append(int(t[0])) or torch.zeros_like(x), torch.full((1, 3, 4, 4), 50.0))
    assert times == [801, 601, 401, 201, 1] and out.max() <= 1.001


def test_features_at_a_time_of_another_formulation():
    net = build_net(make_config())
    x = torch.zeros(2, 3, 16, 16)
    for t in (0.06, 1001):
        with pytest.raises(ValueError, match=rf"t = {t}: must lie between 1 and 1000; net.cfg.t_probe is 11"):
            features(net, x, t, x)
