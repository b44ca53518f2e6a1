"""U-ViT: sizes, recipes, equality with the public network, [CLS], the token of the augmentation."""
import math

import pytest
import torch

import uvit_sc
from conftest import load, rounding, small_config, small_net

pytestmark = pytest.mark.numeric
script = load("uvit_sc")
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 100, 500, 900])


def test_parameters():
    """44,255,328 as the official UViT-S (CIFAR-10); [CLS] adds a token and its position, 2 x 512;
    the augmentation its embedding with bias, and a position."""
    def count(**fields):
        with torch.device("meta"):
            net = uvit_sc.build_net(uvit_sc.make_config("cifar10", **fields))
        return sum(p.numel() for p in net.parameters())
    assert count(self_cond="none") == 44_255_328
    assert count() == 44_255_328 + 1_024
    assert count(aug=0.12) == 44_255_328 + 1_024 + 9 * 512 + 512 + 512


def test_last_convolution_of_one_channel():
    """It begins in the middle: seed 7 of PyTorch's start learned to copy the pixel below, and
    never to draw the lowest row."""
    torch.manual_seed(7)
    net = uvit_sc.build_net(uvit_sc.make_config("fashion_mnist", size=16))
    h = torch.randn(2, 1, 16, 16)
    assert torch.equal(net.final_layer(h), h + net.final_layer.bias)


@pytest.mark.parametrize("dataset, patch, layer, t", [
    ("cifar10", 2, "out_2", 11), ("cifar100", 2, "out_2", 11),
    ("tiny_imagenet", 4, "out_1", 66), ("imagenet100", 4, "out_1", 66)])
def test_recipes_of_the_paper(dataset, patch, layer, t):
    """Tables 8 to 11."""
    cfg = uvit_sc.make_config(dataset)
    assert (cfg.patch, cfg.layer, cfg.t_probe, cfg.self_cond) == (patch, layer, t, "cls")
    assert (cfg.batch, cfg.lr, cfg.warmup, cfg.weight_decay, cfg.epochs, cfg.ema, cfg.dropout) == (
        256, 4e-4, 13, 0.03, 2000, 0.9999, 0)
    assert (cfg.nfe, cfg.beta1, cfg.beta2, cfg.lr_decay) == (100, 0.99, 0.999, 0)


GOLDEN = [-0.030851, -0.121288, -0.169518, 0.027509, 0.15542, -0.096468, 0.096772, -0.050325,
          -0.169515, 0.02219]


@torch.no_grad()
def test_equals_the_public_network():
    """Outputs of the public U-ViT (github.com/baofff/U-ViT, libs/uvit.py) with weights by a fixed
    rule: the i-th tensor is 0.05 sin(i + 0.1 k) for its k-th number. Tokens are below 2, and 13
    blocks add to them 4 times each; the six decimals are rounded as well."""
    net = uvit_sc.build_net(uvit_sc.make_config("cifar10", self_cond="none")).eval()
    for i, p in enumerate(net.state_dict().values()):
        k = torch.arange(p.numel(), dtype=torch.float64)
        p.copy_(0.05 * torch.sin(i + 0.1 * k).view(p.shape))
    x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32)).view(2, 3, 32, 32)
    out = net(x, torch.tensor([11.0, 700.0]))[0].flatten()
    names = list(net.state_dict())
    assert len(names) == 164 and names[:2] == ["pos_embed", "patch_embed.proj.weight"]
    assert out[::617].tolist() == pytest.approx(GOLDEN, abs=5e-7 + rounding(2, 4 * 13))


def test_tiny_starts_alive():
    """Weights are scaled with the width, 0.02 at 512 as in the official code, so that narrow nets
    do not start with dead branches."""
    for net in (uvit_sc.build_net(uvit_sc.make_config("cifar10")),
                script.build_net(small_config(script))):
        weight = net.mid_block.mlp.fc1.weight
        std = 0.02 * math.sqrt(512 / weight.shape[1])
        assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
        assert not net.mid_block.mlp.fc1.bias.any() and net.patch_embed.proj.bias.any()


def test_cls_reads_and_is_read():
    """[CLS] changes the prediction of every pixel, gathers from the image, and gets a gradient; the
    baseline has none."""
    net = small_net(script)
    out, _ = net(X, T)
    out.square().mean().backward()
    assert net.cls_token.grad.abs().max() > 0
    with torch.no_grad():
        one, other = (script.features(net, x, 11, X)["cls_1"] for x in (X, -X))
        assert (one - other).abs().max() > 1e-3
        net.cls_token += 1
        assert ((net(X, T)[0] - out).abs().amax(dim=1) > 0).float().mean() > 0.9
    baseline = small_net(script, self_cond="none")
    assert not hasattr(baseline, "cls_token") and script.layers(baseline.cfg) == ["out_1", "out_2"]


@torch.no_grad()
@pytest.mark.parametrize("fields, name", [
    ({}, "cls_1"), (dict(cl_feature="gap"), "out_1"), (dict(layer="cls_2"), "cls_2"),
    (dict(layer="cls_2", cl_feature="gap"), "out_2"),
    (dict(self_cond="none", layer="out_2"), "out_2")])
def test_the_feature_that_is_contrasted(fields, name):
    """Table 7e: [CLS], or the mean of the patches."""
    net = small_net(script, **fields)
    x_t = script.DDPM(net.cfg).add_noise(X, torch.full((4,), 11), X)
    f = net(x_t, torch.full((4,), 11.0))[1]
    assert torch.equal(f, script.features(net, X, 11, X)[name])


@pytest.mark.parametrize("mask", [1, 0])
def test_cls_and_the_label_do_not_see_each_other(mask):
    """Fig. 2(b): neither the value of [CLS] nor its gradient depends on the augmentation's token
    within an attention layer, and the other way round; with --aug_mask 0 both do."""
    net = small_net(script, aug=0.12, aug_mask=mask)
    assert (net.mask is not None) == bool(mask)
    assert net.extras == 3 and "mask" not in net.state_dict()
    attention = net.in_blocks[0].attn
    h = torch.randn(2, 3 + 16, net.D, requires_grad=True)
    for reader, other in ((1, 2), (2, 1)):
        out = attention(h, net.mask)
        grad, = torch.autograd.grad(out[:, reader].square().sum(), h)
        changed = h.detach().clone()
        changed[:, other] += 1
        alike = torch.equal(attention(changed, net.mask)[:, reader], out[:, reader])
        assert alike == bool(mask) == bool((grad[:, other] == 0).all())
        assert all(grad[:, k].any() for k in (0, reader, 3))            # the rest is read as ever
    grad, = torch.autograd.grad(attention(h, net.mask)[:, 3:].sum(), h)
    assert grad[:, 1:3].any(dim=2).all()                                # patches read both


def test_the_token_of_the_label():
    """Zeros are no labels, and others matter; without [CLS] there is nothing to mask."""
    net = small_net(script, aug=0.12)
    out = net(X, T)[0]
    assert torch.equal(out, net(X, T, aug=torch.zeros(4, 9))[0])
    assert not torch.allclose(out, net(X, T, aug=torch.ones(4, 9))[0])
    alone = small_net(script, aug=0.12, self_cond="none")
    assert alone.mask is None and alone.extras == 2 and alone(X, T)[0].shape == X.shape
