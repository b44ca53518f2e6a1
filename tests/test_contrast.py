"""Contrastive self-distillation: the loss, the heads, the teacher. The same gradients on any number
of processes: test_train.py."""
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from conftest import (final, load, log, no_statistics, only, random_data, rounding, same,
                      shake, small_config, spy)

pytestmark = pytest.mark.numeric
edm_sc = load("edm_sc")
kinds = only("edm_sc", "uvit_sc", "dit_latent_sc")


def info_nce_64(q, k, first):
    """-2 T log softmax of the right key, by NumPy in float64."""
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, k))
    logits = a @ b.T / 0.2
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -2 * 0.2 * log_softmax[np.arange(len(q)), np.arange(len(q)) + first].mean()


def test_info_nce(monkeypatch):
    """The second process's queries have the second half of the keys. A logit is a sum of 32
    products, a cosine, divided by 0.2; 12 of them are summed; the result is multiplied by 0.4."""
    rng = np.random.RandomState(0)
    q, k = rng.randn(6, 32), rng.randn(12, 32)
    for rank in (0, 1):
        monkeypatch.setattr(edm_sc, "RANK", rank)
        ours = edm_sc.info_nce(torch.tensor(q).float(), torch.tensor(k).float()).item()
        assert abs(ours - info_nce_64(q, k, 6 * rank)) < 0.4 * rounding(1 / 0.2, 32 + 12)


def test_heads_have_the_sizes_of_moco_v3():
    with torch.device("meta"):
        for D, expected in ((256, 18_890_752), (512, 19_939_328), (768, 20_987_904)):
            projector = edm_sc.Projector(D, 4096, None)
            assert sum(p.numel() for p in projector.parameters()) == expected
        predictor = edm_sc.mlp(256, 4096, 256)
        assert sum(p.numel() for p in predictor.parameters()) == 2_105_344


def test_batch_norm():
    """That of PyTorch in training, in float64: values and gradients. No running averages."""
    ours, theirs = edm_sc.BatchNorm(16), nn.BatchNorm1d(16).double()
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    for norm, inputs in ((ours, a), (theirs, b)):
        norm.weight.data.copy_(torch.linspace(0.5, 2, 16))
        norm.bias.data.fill_(0.25)
        (norm(inputs) ** 3).sum().backward()
    # Sums over 32 rows: of x, up to 12, divided by its deviation 3; of gradients 3 y^2, y up to 7.
    assert (ours(x) - theirs(x.double())).abs().max() < rounding(12, 2 * 32)
    largest = 3 * theirs(b).abs().max().item() ** 2
    assert (a.grad - b.grad).abs().max() < rounding(largest, 3 * 32)
    assert (ours.weight.grad - theirs.weight.grad).abs().max() < rounding(largest * 5, 3 * 32)
    assert not list(edm_sc.BatchNorm(4, affine=False).parameters()) and not list(ours.buffers())


def test_projector_knows_the_time():
    """On both sides: keys have one time, yet another time gives other keys; BatchNorm does not
    remove it. At first it makes no difference; a plain projector never knows; e gets no
    gradient."""
    f = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    e, later = torch.ones(8, 40, requires_grad=True), -torch.ones(8, 40)
    time, plain = edm_sc.Projector(24, 32, 40), edm_sc.Projector(24, 32, None)
    assert torch.equal(time(f, e), time(f, later)) and torch.equal(plain(f, e), plain(f, later))
    nn.init.normal_(time.time.weight, generator=torch.Generator().manual_seed(0))
    assert (time(f, e) - time(f, later)).abs().max() > 0.1
    time(f, e).square().sum().backward()
    assert e.grad is None and time.time.weight.grad.any()


def student(script, **fields):
    """A student whose every weight matters, its inputs for 8 images, and those of its keys."""
    cfg = small_config(script, cl=0.01, **fields)
    torch.manual_seed(0)
    made = shake(script.Student(script.build_net(cfg), cfg), 0.02)
    images, labels = random_data(script)
    x_0, aug = script.make_view(images[:8], script.draw_view(cfg, script.rng(3)))
    diffusion, gen = script.Diffusion(cfg), script.rng(0)
    t, eps = diffusion.draw_t(8, gen), torch.randn(x_0.shape, generator=gen)
    x_in, c_noise = diffusion.inputs(diffusion.add_noise(x_0, t, eps), t)
    return made, (x_in, c_noise, labels[:8], aug), (x_0, aug, eps)


@pytest.fixture
def make(script, monkeypatch):
    no_statistics(monkeypatch.setattr)
    return lambda **fields: student(script, **fields)


@kinds
def test_the_step(script, config, monkeypatch):
    """diffusion + gamma * contrast, both logged: with another gamma, the same parts. The teacher's
    heads are averaged, too: after the first step they are the student's."""
    parts, step = [], script.training_step

    def checked(cfg, *args, **random):
        objective, (loss, contrast) = step(cfg, *args, **random)
        assert torch.equal(objective, loss + cfg.cl * contrast)
        return objective, torch.stack([loss, contrast])
    monkeypatch.setattr(script, "training_step", checked)
    for cl in (0.01, 0.1, 0.0):
        cfg = config(cl=cl, steps=1, out=f"{config().out}{cl}")
        script.train(cfg)
        parts.append(log(cfg.out)[0])
        assert same(final(cfg.out)["heads"], final(cfg.out)["ema_heads"])
    assert parts[0]["loss"] == parts[1]["loss"] == parts[2]["loss"]
    assert parts[0]["contrast"] == parts[1]["contrast"] and 0 < parts[0]["contrast"] < 4
    assert not parts[2].get("contrast")


@kinds
def test_gradients_reach_all_but_the_teacher(script, make):
    """Every weight of the student learns, none of the teacher; the contrast alone reaches what is
    before its layer and nothing behind it."""
    made, inputs, others = make(aug=0.5)
    teacher = copy.deepcopy(made).eval().requires_grad_(False)
    keys = teacher.keys(*others)
    assert not keys.requires_grad and keys.shape == (8, 256)
    prediction, q, u = made(*inputs)
    assert (u is None) == (script.SCRIPT != "edm_sc")
    contrast = script.info_nce(q, keys)
    contrast.backward(retain_graph=True)
    trained = [(name, p) for name, p in made.net.named_parameters() if p.grad is not None]
    reached = {name for name, p in trained if p.grad.any()}
    behind = dict(UNet=("up.3", "up.4", "final", "norm.", "sc_"),
                  UViT=("decoder_pred", "out_blocks.1", "final", "norm."),
                  DiT=("blocks.2", "final", "sc_"))[script.Network.__name__]
    assert any(name.startswith(("up.1", "out_blocks.0", "blocks.1")) for name in reached)
    assert not any(name.startswith(behind) for name in reached)
    total = prediction.square().mean() + contrast + (0 if u is None else u.sum())
    total.backward()
    assert all(p.grad.any() for p in made.parameters() if p.requires_grad)
    assert all(p.grad is None for p in teacher.parameters())


@kinds
def test_the_teacher(script, make, monkeypatch):
    """It stops at its layer, at the time of Table 10, or at the least noise (Table 7c); it is told
    how its images were transformed, and no class."""
    least = script.Diffusion.t_range[0]
    for target in ("probe", "min"):
        made, _, (x_0, aug, eps) = make(cl_target=target, aug=0.5)
        ran = []
        for block in made.net.blocks:
            block.register_forward_hook(lambda *args: ran.append(1))
        told = spy(monkeypatch, made.net, "forward")
        noised = spy(monkeypatch, script.Diffusion, "add_noise")
        made.keys(x_0, aug, eps)
        assert len(ran) == int(made.net.cfg.layer[-1])
        assert len(told[0].args) == 2 and told[0].kwargs == dict(aug=aug)
        at = noised[0].args[2].unique().tolist()
        assert at == pytest.approx([made.net.cfg.t_probe if target == "probe" else least])


@kinds
def test_two_views(script, config, monkeypatch):
    """The teacher, another network that is not trained, sees the same images in another view and
    other noise."""
    keys, views = spy(monkeypatch, script.Student, "keys"), spy(monkeypatch, script, "make_view")
    cfg = config(cl=0.01, aug=0.5, steps=1)
    script.train(cfg)
    teacher, _, _, eps = keys[0].args
    (images, view), (again, other) = [call.args for call in views]
    assert torch.equal(images, again) and not torch.equal(view, other)
    shape, device = images.shape[-3:], torch.device("cpu")
    random = script.draw_random(cfg, script.Diffusion(cfg), 0, shape, device)
    assert (random["eps"] - eps).abs().mean() > 0.5
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_edm_learns_its_weights_with_augmentation_alone():
    """loss / exp(u) + u is least where u = ln loss: u follows the mean loss at each noise. At first
    it is 0, EDM's own weights; its head is no part of what is evaluated."""
    torch.manual_seed(0)
    cfgs = [small_config(edm_sc, **fields) for fields in ({}, dict(aug=0.12), dict(cl=0.01))]
    heads = [edm_sc.Student(edm_sc.build_net(cfg), cfg).heads for cfg in cfgs]
    assert [sorted(h) for h in heads] == [[], ["uncertainty"], ["predictor", "projector"]]
    head, c = heads[1]["uncertainty"], torch.linspace(-1.5, 1.1, 200)
    loss = (2 * c).sin().exp()
    assert not head(c).any()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        u = head(c)
        (loss / u.exp() + u).mean().backward()
        optimizer.step()
    assert (head(c) - loss.log()).abs().mean() < 0.03
