"""Contrastive self-distillation: the loss, the heads, the teacher, and the same gradients on any number of processes."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import edm_sc
import uvit_sc
from conftest import SMALL, SMALL_DIT, SMALL_UNET, finish, flags, launch, losses


def learner(script, small, **fields):
    """A learner whose every weight matters, and the inputs of its forward for a batch of 8."""
    cfg = script.make_config(**{**small, "cl": 0.01, "cl_hidden": 32, **fields})
    torch.manual_seed(0)
    made = script.Learner(script.build_net(cfg), cfg)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.02 * torch.randn_like(p))
    images, classes = script.load_data(cfg, train=True)
    x_0, labels = script.make_view(images[:8], classes[:8], script.draw_view(cfg, script.rng(3)))
    gen = script.rng(0)
    return made, (x_0, labels, made.diffusion.draw_t(8, gen), torch.randn(x_0.shape, generator=gen)), cfg


def test_info_nce_in_float64(script, monkeypatch):
    """-2 T log softmax of the right key, by NumPy; the second process's queries have the second half of the keys."""
    rng = np.random.RandomState(0)
    q, k = rng.randn(6, 32), rng.randn(12, 32)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (q, k))
    logits = a @ b.T / 0.2
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for rank in (0, 1):
        monkeypatch.setattr(script, "RANK", rank)
        expected = -2 * 0.2 * log_softmax[np.arange(6), np.arange(6) + 6 * rank].mean()
        ours = script.info_nce(torch.tensor(q).float(), torch.tensor(k).float())
        assert abs(ours.item() - expected) < 1e-6
        with torch.autocast("cpu", torch.bfloat16):         # logits stay float32
            assert abs(script.info_nce(torch.tensor(q).float(), torch.tensor(k).float()).item() - expected) < 1e-6


def test_heads_have_the_sizes_of_moco_v3():
    with torch.device("meta"):
        for D, expected in ((256, 18_890_752), (512, 19_939_328), (768, 20_987_904)):
            assert sum(p.numel() for p in edm_sc.Projector(D, 4096, None).parameters()) == expected
        assert sum(p.numel() for p in edm_sc.mlp(256, 4096, 256).parameters()) == 2_105_344


def test_batch_norm():
    """That of PyTorch in training, values and gradients."""
    ours, theirs = edm_sc.BatchNorm(16), nn.BatchNorm1d(16)
    x = torch.randn(32, 16) * 3 + 1
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for norm, inputs in ((ours, a), (theirs, b)):
        norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        (norm(inputs) ** 3).mean().backward()
    assert torch.allclose(ours(x), theirs(x), atol=1e-5) and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, rtol=1e-4)
    assert not list(edm_sc.BatchNorm(4, affine=False).parameters()) and not list(ours.buffers())


def test_projector_knows_the_time():
    f, e = torch.randn(8, 24), torch.randn(8, 40)
    time, plain = edm_sc.Projector(24, 32, 40), edm_sc.Projector(24, 32, None)
    assert not torch.allclose(time(f, e), time(f, e.flip(0))) and torch.equal(plain(f, e), plain(f, e.flip(0)))


def test_the_objective(script, small):
    """diffusion + gamma * contrast, both logged; without --cl exactly the diffusion loss and no head."""
    made, inputs, cfg = learner(script, small)
    keys = made.keys(inputs[0], inputs[1], torch.randn_like(inputs[0]))
    total, (diffusion, contrast, *times) = made(*inputs, keys)
    expected = made.diffusion.loss(lambda x, c: made.net(x, c, inputs[1]), inputs[0], *inputs[2:]).mean()
    assert diffusion == pytest.approx(expected.item(), rel=1e-5) and 0 < contrast < 4
    assert sum(times[:4]) == pytest.approx(8 * expected.item(), rel=1e-5) and sum(times[4:]) == 8
    assert total.item() == pytest.approx(diffusion.item() + 0.01 * contrast.item(), rel=1e-6)
    cfg.cl = 0
    plain = script.Learner(made.net, cfg)
    assert not list(plain.heads.parameters())
    total, (diffusion, contrast, *_) = plain(*inputs, None)
    assert total.item() == diffusion.item() == pytest.approx(expected.item(), rel=1e-5) and contrast == 0


def test_gradients_reach_all_but_the_teacher(script, small):
    """Every weight of the learner learns, none of the teacher's; the contrast alone reaches what is before its layer
    and nothing behind it."""
    made, inputs, cfg = learner(script, small, aug=0.5)
    teacher = copy.deepcopy(made).eval().requires_grad_(False)
    keys = teacher.keys(inputs[0], inputs[1], torch.randn_like(inputs[0]))
    assert not keys.requires_grad and keys.shape == (8, 256)
    made(*inputs, keys)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters() if p.requires_grad)
    assert all(p.grad is None for p in teacher.parameters())

    made.zero_grad()
    whole, _ = made(*inputs, keys)
    cfg.cl *= 2
    twice, _ = made(*inputs, keys)
    (twice - whole).backward()          # the contrast and nothing else
    reached = {name for name, p in made.net.named_parameters() if p.requires_grad and p.grad.abs().max() > 1e-7}
    assert any(name.startswith(dict(UNet="up.3", UViT="out_blocks.1", DiT="blocks.2")[script.Backbone.__name__]) for name in reached)
    behind = ("up.4", "up.5", "up.6", "up.7", "final", "norm.", "decoder_pred", "sc_", "blocks.3", "blocks.4", "blocks.5")
    assert not any(name.startswith(behind) for name in reached)


def test_the_average_covers_the_heads(script, small):
    made, _, _ = learner(script, small)
    mean = copy.deepcopy(made)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(1)
    script.update_ema(mean, made, 0.9, n=10**6)
    for name in ("net", "heads"):
        for old, new in zip(getattr(mean, name).parameters(), getattr(made, name).parameters()):
            assert torch.allclose(old, new - 0.9, atol=1e-6)


def test_the_teacher_stops_at_its_layer(script, small):
    made, inputs, _ = learner(script, small)
    ran = []
    for name, module in made.net.named_modules():
        module.register_forward_hook(lambda module, i, o, name=name: ran.append(name))
    made.keys(inputs[0], inputs[1], inputs[3])
    behind = [name for name in ran if name.startswith(("final", "decoder_pred", "up.6", "up.7", "blocks.3"))]
    assert ran and not behind
    if hasattr(made.net, "up"):
        assert max(int(name.split(".")[1]) for name in ran if name.startswith("up.")) == 3      # out_3; up.2 resamples


@pytest.mark.parametrize("target", ["probe", "min"])
def test_target_time(script, small, target, monkeypatch):
    """Table 7c: the time of Table 10, or the least noise there is."""
    made, inputs, cfg = learner(script, small, cl_target=target)
    seen, add_noise = [], made.diffusion.add_noise
    monkeypatch.setattr(made.diffusion, "add_noise", lambda x, t, noise: (seen.append(t), add_noise(x, t, noise))[1])
    made.keys(inputs[0], inputs[1], inputs[3])
    least = dict(DDPM=1, EDM=0.002, RF=0, LatentRF=0)[script.Diffusion.__name__]
    assert seen[0].unique().tolist() == pytest.approx([cfg.t_probe if target == "probe" else least])


@pytest.mark.parametrize("fields, tap", [({}, "cls_1"), (dict(cl_feature="gap"), "out_1"), (dict(layer="cls_2"), "cls_2"), (dict(layer="cls_2", cl_feature="gap"), "out_2"),
                                         (dict(self_cond="none", cl_feature="gap", layer="out_2"), "out_2")])
def test_feature_of_uvit(small, fields, tap):
    """Table 7e."""
    made, inputs, _ = learner(uvit_sc, {**small, "layer": "out_1"}, **fields)
    assert made.net.tap == tap
    prediction, f = made.net(inputs[0], inputs[2], tap=True)
    assert torch.equal(prediction, made.net(inputs[0], inputs[2]))
    assert torch.equal(f, made.net(inputs[0], inputs[2], last=tap)[tap])


def test_edm_learns_its_weights_with_augmentation_alone():
    """loss / exp(u) + u: at first the loss itself, at best u = ln loss; its head is no part of what is evaluated."""
    heads = [edm_sc.Learner(edm_sc.build_net(cfg), cfg).heads for cfg in (
        edm_sc.make_config(**SMALL_UNET, **fields) for fields in ({}, dict(aug=0.12), dict(cl=0.01)))]
    assert [sorted(h) for h in heads] == [[], ["weighting"], ["predictor", "projector"]]
    weighting, c = heads[1]["weighting"], torch.linspace(-1.5, 1.1, 200)
    loss = (2 * c).sin().exp()
    assert torch.equal(weighting(loss, c), loss)
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(loss, c).mean().backward()
        optimizer.step()
    assert (weighting(loss, c) - (1 + loss.log())).abs().mean() < 0.01      # loss / loss + ln loss


@pytest.mark.parametrize("name", ["edm_sc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("uvit_sc", "dit_latent_sc"))])
def test_processes_agree(name, small, photos, cifar, tmp_path):
    """One process with 8 images and two with 4: the same losses, and the same gradients of every weight, heads included.
    After one step Adam's first moment is 0.1 times the gradient."""
    fields = dict(SMALL, data_dir=cifar) if name == "uvit_sc" else dict(SMALL_UNET, data_dir=photos)
    fields = dict(SMALL_DIT, data_dir=photos) if name == "dit_latent_sc" else fields
    fields |= dict(aug=0.5, cl=0.1, cl_hidden=32, steps=1, beta1=0.9)
    runs = [launch(name, flags({**fields, "out": tmp_path / f"{n}"}), processes=n) for n in (1, 2)]
    for run in runs:
        status, _, err = finish(run)
        assert status == 0 and "Warning" not in err, err
    one, two = (torch.load(tmp_path / f"{n}" / "last.pt", weights_only=True)["optimizer"]["state"] for n in (1, 2))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)
    assert len(one) > 50
    scale = max(10 * v["exp_avg"].abs().max().item() for v in one.values())
    for key in one:
        assert (one[key]["exp_avg"] - two[key]["exp_avg"]).abs().max() * 10 < 1e-5 * max(scale, 1), key


def test_two_views(script, small, monkeypatch):
    """The teacher, another network that is not trained, sees the same images in other views and other noise."""
    seen, who, true = [], [], script.Learner.keys
    monkeypatch.setattr(script.Learner, "keys", lambda self, x, y, noise: (
        seen.append((x, noise)), who.append(self), true(self, x, y, noise))[2])
    forward = script.Learner.forward
    monkeypatch.setattr(script.Learner, "forward", lambda self, x, y, t, noise, keys: (
        seen.append((x, noise)), who.append(self), forward(self, x, y, t, noise, keys))[2])
    script.train(script.make_config(**small, cl=0.01, cl_hidden=16, steps=1))
    assert [any(p.requires_grad for p in learner.parameters()) for learner in who] == [False, True]
    (x, noise), (y, other) = seen
    assert (noise - other).abs().min(dim=0)[0].max() > 0.1
    flips = [torch.equal(a, b.flip(-1)) for a, b in zip(x, y)]
    if script.SCRIPT == "dit_latent_sc":        # a latent is not mirrored; the mirror image has one of its own
        latents = script.load_data(script.make_config(**small), train=True)[0].float()
        flips = [any(torch.equal(a, one) and torch.equal(b, other) for two in latents for one, other in (two, two.flip(0))) for a, b in zip(x, y)]
    assert any(flips) and all(flip or torch.equal(a, b) for flip, a, b in zip(flips, x, y)) and not math.isnan(losses(small["out"])[0])
