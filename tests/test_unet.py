"""The UNets: sizes, recipes, equality with the public network. The class is one text in three
scripts (test_copies.py)."""
import pytest
import torch

import ddpm_sc
from conftest import UNETS, load, only, rounding, small_net

pytestmark = pytest.mark.numeric


@only(*UNETS)
def test_parameters(script):
    """35,746,307 and 56,524,291, as Table 9 rounds them; self-conditioning adds 460,288
    (+0.46M)."""
    for backbone, entries, size in (("ddpm", 304, 35_746_307), ("ddpmpp", 432, 56_524_291)):
        for self_cond, names, more in (("none", 0, 0), ("add", 2, 256 * 512 + 512),
                                       ("adaptive", 6, 460_288), ("adaptive1", 6, 460_288)):
            with torch.device("meta"):
                cfg = script.make_config("cifar10", backbone=backbone, self_cond=self_cond)
                net = script.build_net(cfg)
            assert sum(p.numel() for p in net.parameters()) == size + more
            assert len(net.state_dict()) == entries + names


@pytest.mark.parametrize("name, backbone, batch, layers, t, dropout, warmup, ema, nfe", [
    ("ddpm_sc", "ddpm", 512, ("out_6", "out_6"), 11, 0.1, 13, 0.9999, 100),
    ("ddpm_sc", "ddpmpp", 256, ("out_7", "out_8"), 11, 0.1, 13, 0.9999, 100),
    ("edm_sc", "ddpm", 512, ("out_7", "out_6"), 0.06, 0.13, 200, 0.9993, 35),
    ("edm_sc", "ddpmpp", 256, ("out_9", "out_8"), 0.06, 0.13, 200, 0.9993, 35),
    ("rf_sc", "ddpm", 512, ("out_7", "out_7"), 0.06, 0.1, 13, 0.9999, 0),
    ("rf_sc", "ddpmpp", 256, ("out_8", "out_8"), 0.06, 0.1, 13, 0.9999, 0)])
def test_recipes_of_the_paper(name, backbone, batch, layers, t, dropout, warmup, ema, nfe):
    """Tables 8, 10 and 11: what `--dataset D --backbone B` sets."""
    for dataset, layer in zip(("cifar10", "cifar100"), layers):
        cfg = load(name).make_config(dataset, backbone=backbone)
        found = cfg.batch, cfg.layer, cfg.t_probe, cfg.dropout, cfg.warmup, cfg.ema, cfg.nfe
        assert found == (batch, layer, t, dropout, warmup, ema, nfe)
        rest = cfg.epochs, cfg.lr, cfg.weight_decay, cfg.flip, cfg.self_cond, cfg.lr_decay
        assert rest == (2000, 4e-4, 0, True, "adaptive", 0)
    if name == "edm_sc" and backbone == "ddpm":
        for dataset in ("tiny_imagenet", "imagenet100"):
            cfg = load(name).make_config(dataset)
            assert (cfg.layer, cfg.t_probe, cfg.size) == ("out_5", 0.2964, 64)
    cfg = load(name).make_config("cifar10", backbone="ddpmpp", layer="out_3", batch=64)
    assert (cfg.layer, cfg.batch) == ("out_3", 64)


def test_where_attention_is():
    """At 16 x 16 where a level has it (Table 9), else where it is nearest: 96 pixels are halved to
    48, 24 and 12."""
    for backbone, size, down, all_of_them in (("ddpm", 32, [3, 4], 6), ("ddpm", 64, [6, 7], 6),
                                              ("ddpm", 96, [9, 10], 6), ("ddpmpp", 64, None, 10)):
        fields = dict(backbone=backbone, size=size, layer="out_2")
        with torch.device("meta"):
            net = ddpm_sc.build_net(ddpm_sc.make_config("folder", **fields))
        kinds = [isinstance(module, ddpm_sc.SpatialAttention) for module in net.modules()]
        assert sum(kinds) == all_of_them
        where = [k for k, block in enumerate(net.down)
                 if isinstance(getattr(block, "attn", None), ddpm_sc.SpatialAttention)]
        assert where == down or down is None


def fill(net, scale=0.05):
    """Weights by a fixed rule: the i-th tensor, by name, is scale * sin(i + 0.1 k) for its k-th
    number."""
    state = net.state_dict()
    for i, name in enumerate(sorted(state)):
        p = state[name]
        k = torch.arange(p.numel(), dtype=torch.float64)
        p.copy_(scale * torch.sin(i + 0.1 * k).view(p.shape))
    return net.eval()


GOLDEN = {  # outputs, and pooled features of out_5 and out_8
    "ddpm": ([-0.029962, -0.039178, 0.004759, 0.0049, -0.028517, -0.032803, -0.039159, -0.003859,
              0.004759, -0.028403],
             [0.340049, 0.621036, 0.504821, 0.53922, 0.528001, 0.454015],
             [-0.193964, 0.565398, 0.255774, 0.317175, 0.135759, 0.357367]),
    "ddpmpp": ([0.004117, -0.019127, 0.047927, 0.048076, 0.03075, -0.005796, -0.019178, 0.039778,
                0.047927, 0.030829],
               [1.66578, 1.613284, 1.48996, 1.711414, 1.581555, 1.664891],
               [1.153755, 1.160783, 0.784954, 1.486916, 0.826361, 1.274548]),
}


@torch.no_grad()
@pytest.mark.parametrize("backbone", GOLDEN)
def test_equals_the_public_network(backbone):
    """Outputs and features of the authors' UNet (github.com/FutureXiang/ddae, model/unet.py) with
    the same weights and input. Maps have values up to 2, and some 60 sums, one in each convolution,
    norm and residual, lie on the way to a number; its six decimals are rounded as well."""
    cfg = ddpm_sc.make_config("cifar10", backbone=backbone, self_cond="none", layer="out_5")
    net = fill(ddpm_sc.build_net(cfg))
    x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32)).view(2, 3, 32, 32)
    found = {}
    for k in (5, 8):
        def hook(block, inputs, h, k=k):
            found[k] = h.mean(dim=(2, 3)).flatten()[::101].tolist()
        net.blocks[k - 1].register_forward_hook(hook)
    prediction, f = net(x, torch.tensor([0.011, 0.7]))
    near = dict(abs=5e-7 + rounding(2, 60))
    out, out_5, out_8 = GOLDEN[backbone]
    assert prediction.flatten()[::617].tolist() == pytest.approx(out, **near)
    assert found[5] == pytest.approx(out_5, **near) and found[8] == pytest.approx(out_8, **near)
    assert f.flatten()[::101].tolist() == pytest.approx(out_5, **near)


@torch.no_grad()
def test_checkpoints_of_the_public_code(tmp_path):
    """The averaged weights of its training checkpoints, a state_dict of its diffusion wrapper, and
    a bare one."""
    script = load("ddpm_sc")
    net = small_net(script, self_cond="none")
    state = net.state_dict()

    def wrap(prefix, factor):
        return {f"{prefix}{name}": v * factor for name, v in state.items()}
    ema = {**wrap("online_model.nn_model.", 0), **wrap("ema_model.nn_model.", 1),
           "ema_model.alpha": torch.ones(3), "step": torch.tensor([9])}
    theirs = {"MODEL": wrap("module.nn_model.", 0), "EMA": ema, "opt": {}}
    for contents in (theirs, wrap("nn_model.", 1), dict(state)):
        torch.save(contents, tmp_path / "model.pth")
        other = script.build_net(net.cfg)
        script.load_weights(other, tmp_path / "model.pth")
        assert all(torch.equal(a, state[name]) for name, a in other.state_dict().items())
    torch.save({"EMA": {"initted": torch.tensor(True)}}, tmp_path / "model.pth")
    with pytest.raises(script.UserError, match="does not fit this network"):
        script.load_weights(net, tmp_path / "model.pth")
