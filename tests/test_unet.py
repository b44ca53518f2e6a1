"""The UNets: sizes, equality with the public network, self-conditioning, features. The class is the same in three scripts."""
import importlib
import math

import pytest
import torch

from conftest import SCRIPTS

UNETS = [name for name in SCRIPTS if name in ("ddpm_sc", "edm_sc", "rf_sc")]


@pytest.fixture(params=UNETS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def ddpm_sc():
    return importlib.import_module("ddpm_sc")


def fill(net, scale=0.05):
    """Weights by a fixed rule: the i-th tensor, by name, is scale * sin(i + 0.1 k) for its k-th number."""
    state = net.state_dict()
    for i, name in enumerate(sorted(state)):
        p = state[name]
        p.copy_(scale * torch.sin(i + 0.1 * torch.arange(p.numel(), dtype=torch.float64)).view(p.shape))
    return net.eval()


def test_parameters(script):
    """35,746,307 and 56,524,291, as Table 9 rounds them; self-conditioning adds 460,288 (+0.46M), `add` the projection alone."""
    for backbone, entries, size in (("ddpm", 304, 35_746_307), ("ddpmpp", 432, 56_524_291)):
        for dataset in ("cifar10", "tiny_imagenet"):
            for self_cond, more in (("none", 0), ("add", 256 * 512 + 512), ("adaptive", 460_288)):
                with torch.device("meta"):
                    net = script.build_net(script.make_config(dataset, backbone=backbone, self_cond=self_cond))
                assert sum(p.numel() for p in net.parameters()) == size + more
                assert len(net.state_dict()) == entries + dict(none=0, add=2, adaptive=6)[self_cond]


def test_recipes_of_the_paper():
    """Tables 8, 10 and 11: what `--dataset D --backbone B` sets."""
    rows = {("ddpm_sc", "ddpm"): (512, "out_6", "out_6", 11, 0.1, 13, 0.9999, 100),
            ("ddpm_sc", "ddpmpp"): (256, "out_7", "out_8", 11, 0.1, 13, 0.9999, 100),
            ("edm_sc", "ddpm"): (512, "out_7", "out_6", 0.06, 0.13, 200, 0.9993, 35),
            ("edm_sc", "ddpmpp"): (256, "out_9", "out_8", 0.06, 0.13, 200, 0.9993, 35),
            ("rf_sc", "ddpm"): (512, "out_7", "out_7", 0.06, 0.1, 13, 0.9999, 0),
            ("rf_sc", "ddpmpp"): (256, "out_8", "out_8", 0.06, 0.1, 13, 0.9999, 0)}
    for (name, backbone), (batch, cifar10, cifar100, t, dropout, warmup, ema, nfe) in rows.items():
        for dataset, layer in (("cifar10", cifar10), ("cifar100", cifar100)):
            cfg = importlib.import_module(name).make_config(dataset, backbone=backbone)
            assert (cfg.batch, cfg.layer, cfg.t_probe, cfg.dropout, cfg.warmup, cfg.ema, cfg.nfe) == (
                batch, layer, t, dropout, warmup, ema, nfe), (name, backbone, dataset)
            assert (cfg.epochs, cfg.lr, cfg.weight_decay, cfg.flip, cfg.self_cond) == (2000, 4e-4, 0, True, "adaptive")
    for dataset in ("tiny_imagenet", "imagenet100"):
        edm = importlib.import_module("edm_sc").make_config(dataset)
        assert (edm.layer, edm.t_probe, edm.size) == ("out_5", 0.2964, 64)
    assert importlib.import_module("ddpm_sc").make_config("cifar10", backbone="ddpmpp", layer="out_3", batch=64).layer == "out_3"


def test_attention_at_other_sizes(ddpm_sc):
    """At 16 x 16 where a level has it (Table 9), else where it is nearest: 96 pixels are halved to 48, 24 and 12."""
    with torch.device("meta"):
        for backbone, size, attentions in (("ddpm", 32, 6), ("ddpm", 64, 6), ("ddpm", 96, 6), ("ddpmpp", 64, 10), ("ddpmpp", 96, 10)):
            net = ddpm_sc.build_net(ddpm_sc.make_config("folder", backbone=backbone, size=size, layer="out_2"))
            assert sum(isinstance(module, ddpm_sc.SpatialAttention) for module in net.modules()) == attentions, (backbone, size)


def test_where_the_scale_begins():
    """README: entries of s(t) have a standard deviation of about 0.14 in tiny UNets at first, and less in the tiny DiT."""
    for name, low, high in (("ddpm_sc", 0.12, 0.16), ("edm_sc", 0.12, 0.16), ("rf_sc", 0.12, 0.16), ("dit_latent_sc", 0, 0.05)):
        script = importlib.import_module(name)
        torch.manual_seed(0)
        cfg = script.make_config()
        net, diffusion = script.build_net(cfg), script.Diffusion(cfg)
        c = diffusion.inputs(torch.zeros(500, 1), diffusion.draw_t(500, torch.Generator().manual_seed(0)))[1]
        assert low < net.sc_time(c.float()).std() < high, name


def test_recipes_of_transformers():
    """Tables 8 to 11 of U-ViT and DiT."""
    uvit, dit = map(importlib.import_module, ("uvit_sc", "dit_latent_sc"))
    for name, patch, layer, t in (("cifar10", 2, "out_2", 11), ("cifar100", 2, "out_2", 11), ("tiny_imagenet", 4, "out_1", 66), ("imagenet100", 4, "out_1", 66)):
        cfg = uvit.make_config(name)
        assert (cfg.patch, cfg.layer, cfg.t_probe, cfg.batch, cfg.lr, cfg.warmup, cfg.weight_decay, cfg.epochs, cfg.ema, cfg.dropout, cfg.nfe,
                cfg.beta1, cfg.beta2) == (patch, layer, t, 256, 4e-4, 13, 0.03, 2000, 0.9999, 0, 100, 0.99, 0.999), name
    for name, layer, epochs in (("imagenet100", "block_8", 1400), ("imagenet", "block_10", 90)):
        cfg = dit.make_config(name)
        assert (cfg.backbone, cfg.layer, cfg.t_probe, cfg.batch, cfg.lr, cfg.warmup, cfg.weight_decay, cfg.epochs, cfg.ema, cfg.ema_ramp, cfg.nfe,
                cfg.shift, cfg.guidance, cfg.guide_until, cfg.size, cfg.cell, cfg.beta1, cfg.beta2) == (
            "dit_b", layer, 0.25, 1024, 2e-4, 0, 0, epochs, 0.9999, False, 250, 3.3, 1.5, 0.89, 256, 16, 0.9, 0.95), name


GOLDEN = {  # outputs, and pooled features of out_5 and out_8
    "ddpm": ([-0.029962, -0.039178, 0.004759, 0.0049, -0.028517, -0.032803, -0.039159, -0.003859, 0.004759, -0.028403],
             [0.340049, 0.621036, 0.504821, 0.53922, 0.528001, 0.454015], [-0.193964, 0.565398, 0.255774, 0.317175, 0.135759, 0.357367]),
    "ddpmpp": ([0.004117, -0.019127, 0.047927, 0.048076, 0.03075, -0.005796, -0.019178, 0.039778, 0.047927, 0.030829],
               [1.66578, 1.613284, 1.48996, 1.711414, 1.581555, 1.664891], [1.153755, 1.160783, 0.784954, 1.486916, 0.826361, 1.274548]),
}


@torch.no_grad()
@pytest.mark.parametrize("backbone", GOLDEN)
def test_equals_the_public_network(ddpm_sc, backbone):
    """Outputs and features of the authors' UNet (github.com/FutureXiang/ddae, model/unet.py) with the same weights and input."""
    net = fill(ddpm_sc.build_net(ddpm_sc.make_config("cifar10", backbone=backbone, self_cond="none")))
    x, c = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32)).view(2, 3, 32, 32), torch.tensor([0.011, 0.7])
    out, out_5, out_8 = GOLDEN[backbone]
    assert net(x, c).flatten()[::617].tolist() == pytest.approx(out, abs=1e-5)
    feats = net(x, c, last="out_8")
    assert feats["out_5"].flatten()[::101].tolist() == pytest.approx(out_5, abs=1e-5)
    assert feats["out_8"].flatten()[::101].tolist() == pytest.approx(out_8, abs=1e-5)


def tiny(script, **fields):
    torch.manual_seed(0)
    return script.build_net(script.make_config("glyphs", **fields)).eval()


@torch.no_grad()
def test_checkpoints_of_the_public_code(script, tmp_path):
    """--init takes the averaged weights of its training checkpoints, a state_dict of its diffusion wrapper, and a bare one."""
    cfg = script.make_config("folder", size=8, backbone="unet_tiny", layer="out_3", self_cond="none")
    state = fill(script.build_net(cfg)).state_dict()
    wrap = lambda prefix, value: {f"{prefix}{k}": v * value for k, v in state.items()}
    ema = {**wrap("online_model.nn_model.", 0), **wrap("ema_model.nn_model.", 1), "ema_model.alpha": torch.ones(3), "step": torch.tensor([9])}
    for contents in ({"MODEL": wrap("module.nn_model.", 0), "EMA": ema, "opt": {}}, wrap("nn_model.", 1), state):
        torch.save(contents, tmp_path / "model.pth")
        net = script.build_net(cfg)
        script.load_weights(net, tmp_path / "model.pth")
        assert all(torch.equal(a, state[k]) for k, a in net.state_dict().items())
    torch.save({"EMA": {"initted": torch.tensor(True)}}, tmp_path / "model.pth")
    with pytest.raises(script.UserError, match="does not fit this network"):
        script.load_weights(net, tmp_path / "model.pth")


def test_self_conditioning_reaches_the_decoder_alone(script):
    """f is pooled at out_3; layers up to it equal the baseline's, all later ones change. `add` is e + W f, adaptive s(t) W f."""
    x, c = torch.randn(4, 3, 16, 16), torch.tensor([0.1, 0.2, 0.5, 0.9])
    nets = {self_cond: tiny(script, self_cond=self_cond, layer="out_3") for self_cond in ("none", "add", "adaptive")}
    for net in (nets["add"], nets["adaptive"]):
        net.load_state_dict({**net.state_dict(), **nets["none"].state_dict()})
    feats = {name: net(x, c, last="out_6") for name, net in nets.items()}
    for name in ("add", "adaptive"):
        for k in range(1, 7):
            assert torch.equal(feats[name][f"out_{k}"], feats["none"][f"out_{k}"]) == (k <= 3), (name, k)
    net, seen = nets["adaptive"], []
    net.up[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    f = net.sc_proj(feats["adaptive"]["out_3"])
    net(x, c)
    assert torch.allclose(seen[0], net.time_emb(c) + net.sc_time(c) * f, atol=1e-6)
    net.sc_time = None
    net(x, c)
    assert torch.allclose(seen[1], net.time_emb(c) + f, atol=1e-6)


def test_gradients_flow_through_the_feature(script):
    """The decoder's wish for a better feature reaches the encoder: f is not detached."""
    net = tiny(script, layer="out_3")
    x, c = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.5])
    calls = []
    net.sc_proj.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    net(x, c).square().mean().backward()
    assert calls[0].requires_grad and net.sc_proj.weight.grad.abs().max() > 0 and net.sc_time.lin1.weight.grad.abs().max() > 0


@torch.no_grad()
def test_features(script):
    """Every output layer pooled; stopping early changes nothing and runs nothing behind the last layer."""
    net = tiny(script, layer="out_3")
    layers, t = net.choices(net.cfg)["layer"], net.cfg.t_probe
    x, noise = torch.randn(2, 5, 3, 16, 16)
    full = script.features(net, x, t, noise)
    assert list(full) == layers == [f"out_{k}" for k in range(1, 7)]
    assert [f.shape[1] for f in full.values()] == [128, 128, 64, 64, 32, 32] and all(f.dtype == torch.float32 for f in full.values())
    ran = []
    net.up[-1].register_forward_hook(lambda *args: ran.append(1))
    part = script.features(net, x, t, noise, last="out_2")
    assert not ran and list(part) == ["out_1", "out_2"] and torch.equal(part["out_2"], full["out_2"])


def test_attention_is_chosen_by_resolution(ddpm_sc):
    """At 16 x 16, whatever the size of the image (Table 9)."""
    for dataset, level in (("cifar10", 1), ("tiny_imagenet", 2)):
        with torch.device("meta"):
            net = ddpm_sc.build_net(ddpm_sc.make_config(dataset, self_cond="none"))
        where = [i for i, block in enumerate(net.down) if not isinstance(getattr(block, "attn", torch.nn.Identity()), torch.nn.Identity)]
        assert where == [3 * level, 3 * level + 1]


def test_time_embedding(ddpm_sc):
    """Sines first; frequencies from 1 to 1e-4 with divisor half - 1."""
    net = ddpm_sc.TimeEmbedding(8, 8)
    torch.nn.init.eye_(net.lin1.weight), torch.nn.init.zeros_(net.lin1.bias)
    net.lin2 = torch.nn.Identity()
    expected = [f(7 * 10000 ** (-i / 3)) for f in (math.sin, math.cos) for i in range(4)]
    expected = [v / (1 + math.exp(-v)) for v in expected]
    assert net(torch.tensor([7.0]))[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_one_optimizer_for_all(script):
    """Table 11: Adam for UNets, that is AdamW without decay."""
    net = tiny(script)
    assert [group["weight_decay"] for group in script.make_optimizer(net, net.cfg).param_groups] == [0, 0]
    assert script.make_optimizer(net, net.cfg).param_groups[0]["betas"] == (0.9, 0.999)
