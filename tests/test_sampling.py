"""Sampling: image i is a function of seed i alone."""
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import SCRIPTS, finish, launch


@pytest.fixture
def net(script):
    """A net with large random weights, so that images differ and rounding errors would show."""
    torch.manual_seed(0)
    net = script.build_net(script.make_config("glyphs", nfe=6)).eval()
    for p in net.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    return net


def test_images_do_not_depend_on_the_batch(script, net):
    """1, 7 and 40 images, in any order: the same pixels. (On AVX-512, convolutions of 8 and of 16 images round differently.)"""
    seeds = list(range(100, 140))
    images = script.sample(net, net.cfg, seeds)
    assert images.shape == (40, 3, 16, 16) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 40
    for part in (slice(5, 6), slice(3, 10), slice(10, 29)):
        assert torch.equal(script.sample(net, net.cfg, seeds[part]), images[part]), part
    assert torch.equal(script.sample(net, net.cfg, seeds[::-1]), images.flip(0))


def test_the_net_always_sees_the_same_number_of_rows(script, net):
    """For another number, kernels are chosen that round differently. (Guidance of DiT doubles them, for some times.)"""
    sizes, forward = set(), net.forward
    net.forward = lambda x, *args, **kwargs: (sizes.add(len(x)), forward(x, *args, **kwargs))[1]
    script.sample(net, net.cfg, range(16))
    full = set(sizes)
    for n in (1, 7, 19):
        script.sample(net, net.cfg, range(n))
    assert sizes == full


@pytest.mark.parametrize("script", [name if name == "rf_sc" else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
                         indirect=True)
def test_images_do_not_depend_on_the_processes(script, net, tmp_path, capsys):
    """13 images by one process and by two: the same PNG, pixel by pixel."""
    import dataclasses
    for processes in ("1", "2"):
        (tmp_path / processes).mkdir()
        script.write_checkpoint(tmp_path / processes / "net.pt", script=script.SCRIPT, config=dataclasses.asdict(net.cfg),
                                step=0, ema=net.state_dict())
    arguments = ["net.pt", "--images", "13", "--seed", "5", "--device", "cpu"]
    two = launch(script.SCRIPT, ["--sample", tmp_path / "2" / arguments[0], *arguments[1:]], 2)
    script.main(["--sample", str(tmp_path / "1" / arguments[0]), *arguments[1:]])
    status, out, err = finish(two)
    assert status == 0, err[-2000:]
    for text in (out, capsys.readouterr().out):
        assert re.search(r"net_seeds5-17.png: 13 images from the ema weights", text)
    one, two = (Image.open(tmp_path / str(processes) / "net_seeds5-17.png") for processes in (1, 2))
    assert one.size == (10 * 66, 2 * 66) and one.tobytes() == two.tobytes()


def test_training_draws_do_not_touch_sampling(script, net):
    torch.manual_seed(1)
    images = script.sample(net, net.cfg, [3, 4])
    torch.manual_seed(2)
    torch.randn(5)
    assert torch.equal(images, script.sample(net, net.cfg, [3, 4]))


def test_raw_and_averaged_weights(script, net, tmp_path):
    import dataclasses
    config = dataclasses.asdict(net.cfg)
    state = net.state_dict()
    doubled = {k: 2 * v for k, v in state.items()}
    script.write_checkpoint(tmp_path / "last.pt", script=script.SCRIPT, config=config, step=0, model=doubled, ema=state)
    for weights, there in (("ema", state), ("model", doubled)):
        here = script.load_checkpoint(tmp_path / "last.pt", weights)[1].state_dict()
        assert all(torch.equal(here[name], there[name]) for name in there)
    script.write_checkpoint(tmp_path / "ckpt.pt", script=script.SCRIPT, config=config, step=0, ema=state)
    with pytest.raises(script.UserError, match="with model weights"):
        script.load_checkpoint(tmp_path / "ckpt.pt", "model")
