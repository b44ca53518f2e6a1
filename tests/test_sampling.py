"""Sampling: image i is a function of seed i alone. The same on two processes: test_train.py."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import no_statistics, only, small_net, spy

pytestmark = pytest.mark.numeric
SEEDS = list(range(100, 120))


@pytest.fixture
def net(script, monkeypatch):
    no_statistics(monkeypatch.setattr)
    return small_net(script, nfe=6)


def test_images_depend_on_their_seeds_alone(script, net, monkeypatch):
    """However many are drawn, in any order, whatever was drawn before: the same pixels. This holds
    on one kind of device, as the network always sees the same number of rows: for others it has
    other kernels, which round differently."""
    calls = spy(monkeypatch, net, "forward")
    images = script.sample(net, net.cfg, SEEDS)
    assert images.shape == (20, 3, 16, 16) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 20
    rows = {len(call.args[0]) for call in calls}
    torch.manual_seed(1)
    for part in (slice(5, 6), slice(3, 20)):
        assert torch.equal(script.sample(net, net.cfg, SEEDS[part]), images[part])
    assert torch.equal(script.sample(net, net.cfg, SEEDS[::-1]), images.flip(0))
    assert {len(call.args[0]) for call in calls} == rows
    assert net.nfe == (6 if script.SCRIPT != "edm_sc" else 5)


@only("uvit_sc")
def test_command(script, net, tmp_path, monkeypatch, capsys):
    """--sample CKPT: a PNG beside it, of the averaged weights, for the seeds from --seed on;
    settings of the sampler may be given. --n and --images are one."""
    raw = {name: 2 * v for name, v in net.state_dict().items()}
    state = dict(script=script.SCRIPT, config=dataclasses.asdict(net.cfg), model=raw)
    torch.save({**state, "ema": net.state_dict()}, tmp_path / "last.pt")
    for weights, there in (("ema", net.state_dict()), ("model", raw)):
        _, loaded = script.load_checkpoint(tmp_path / "last.pt", weights)
        assert all(torch.equal(a, there[name]) for name, a in loaded.state_dict().items())
        assert not loaded.training
    words = ["--sample", str(tmp_path / "last.pt"), "--images", "3", "--seed", "5", "--nfe", "2"]
    script.main(words)
    path, = tmp_path.glob("*.png")
    assert "seeds5-7" in path.name and "nfe_2" in path.name
    out = capsys.readouterr().out
    assert f"{path}: 3 images from the ema weights, 2 network evaluations each" in out
    cfg = dataclasses.replace(net.cfg, nfe=2)
    first = script.sample(net, cfg, [5, 6, 7])[0].permute(1, 2, 0)
    picture = Image.open(path)
    assert picture.size == (10 * 66, 66)                    # enlarged by 4, a border of 1
    assert torch.equal(torch.tensor(np.array(picture)[1:65:4, 1:65:4]), first)
