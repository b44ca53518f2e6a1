"""What runs on a GPU is what runs on a CPU. Collected only where there is a GPU (conftest.py):

    python -m pytest -q -s tests/test_cuda.py           # -s shows the peak of memory of each test

Small networks on random data; two processes over NCCL where there are two GPUs.
"""
import dataclasses, json

import pytest
import torch

import fid
import probe
from conftest import final, finish, launch, log, losses, only, random_data, shake, small_net

DEVICE = "cuda"
gpus = torch.cuda.device_count()
HALF = ["bf16", "fp16"] if torch.cuda.is_bf16_supported(including_emulation=False) else ["fp16"]


@pytest.fixture(autouse=True)
def exact_and_measured(request):
    """Float32 products with all their bits; after the test, the peak of memory."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    yield
    torch.backends.cudnn.allow_tf32 = True
    print(f" {request.node.name}: {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")


@pytest.fixture
def on_gpu(script, config, monkeypatch):
    """Trains on a device, by default the GPU, with random numbers of the CPU, and returns the
    losses. A GPU's generator has another stream: `real=True` leaves it."""
    draw_random, build_net = script.draw_random, script.build_net

    def drawn(cfg, diffusion, step, shape, device):
        numbers = draw_random(cfg, diffusion, step, shape, torch.device("cpu"))
        return {k: v if k.endswith("view") else v.to(device) for k, v in numbers.items()}

    def train(out, device=DEVICE, real=False, **fields):
        monkeypatch.setattr(script, "draw_random", draw_random if real else drawn)
        monkeypatch.setattr(script, "build_net", lambda cfg: shake(build_net(cfg)))
        cfg = config(device=device, **fields)
        cfg.out = f"{cfg.out}-{out}"
        assert script.train(cfg) == 0
        return losses(cfg.out), cfg
    return train


@pytest.mark.parametrize("fields", [{}, dict(aug=0.5, cl=0.1)], ids=["plain", "aug-cl"])
def test_losses_are_those_of_a_cpu(on_gpu, fields):
    (_, here), (_, there) = (on_gpu(device, device=device, steps=20, **fields)
                             for device in ("cpu", DEVICE))
    for key, tolerance in ("loss", 1e-3), ("contrast", 1e-2), ("grad_norm", 1e-2):
        expected = [line[key] for line in log(here.out)]
        assert [line[key] for line in log(there.out)] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("amp", HALF)
@pytest.mark.parametrize("fields", [{}, dict(aug=0.5, cl=0.1)], ids=["plain", "aug-cl"])
def test_half_precision_learns(on_gpu, amp, fields):
    found, cfg = on_gpu(amp, real=True, amp=amp, steps=80, **fields)
    assert sum(found[-10:]) < 0.99 * sum(found[:10])
    overflows = [line["step"] for line in log(cfg.out) if not line["grad_norm"] < 1e4]
    assert len(overflows) <= (20 if amp == "fp16" else 0)       # its scale comes down from 65,536


@pytest.mark.slow           # it needs a C compiler and Python's headers
@only("edm_sc", "uvit_sc", "dit_latent_sc")
def test_compiled_equals_eager(on_gpu):
    eager, _ = on_gpu("eager", steps=5, cl=0.1)
    compiled, cfg = on_gpu("compiled", steps=5, cl=0.1, compile=True)
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert not any("_orig_mod" in name for name in final(cfg.out)["model"])


@pytest.mark.parametrize("amp", ["off", *HALF])
def test_training_waits_for_nothing(script, config, monkeypatch, amp):
    """Between log lines the CPU only hands out work: in steps 51 to 58 a copy from the GPU, or one
    to it for which the CPU waits, would be an error."""
    draw_random = script.draw_random

    def drawn(cfg, diffusion, step, shape, device):
        torch.cuda.set_sync_debug_mode("error" if 51 <= step < 59 else "default")
        return draw_random(cfg, diffusion, step, shape, device)

    monkeypatch.setattr(script, "draw_random", drawn)
    try:
        assert script.train(config(device=DEVICE, aug=0.5, cl=0.1, amp=amp, steps=60)) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_from_memory_and_from_the_card(script, config):
    """What does not fit the card comes from the CPU, in pinned memory."""
    images, labels = random_data(script)
    device, cfg = torch.device(DEVICE), config()
    for own in slice(0, 8), slice(4, 8):
        there = script.read_batches(images.to(device), labels, cfg, 3, own, device)
        here = script.read_batches(images, labels, cfg, 3, own, device)
        for _ in range(3):
            for a, b in zip(next(here), next(there)):
                assert a.device == b.device and torch.equal(a, b)


def test_images_depend_on_their_seeds_alone(script):
    """Bit for bit on the same GPU; and but for rounding those of a CPU, as noise is the CPU's."""
    net = small_net(script, nfe=5)
    here = script.sample(net, net.cfg, range(4, 9)).int()
    net = net.to(DEVICE)
    some, one = script.sample(net, net.cfg, range(4, 9)), script.sample(net, net.cfg, [6])
    assert torch.equal(some[2], one[0])
    off = (some.int() - here).abs()
    assert off.max() <= 3 and (off > 0).float().mean() < 0.05


@only("edm_sc", "uvit_sc", "dit_latent_sc")
def test_resume(on_gpu, script):
    """5 + 5 steps are 10; to rounding, as sums by atomic additions come in any order."""
    whole, _ = on_gpu("whole", real=True, steps=10, dropout=0.1, aug=0.5, cl=0.01)
    _, cfg = on_gpu("halves", real=True, steps=5, dropout=0.1, aug=0.5, cl=0.01)
    script.train(dataclasses.replace(cfg, steps=10))
    assert losses(cfg.out) == pytest.approx(whole, rel=1e-3)


def test_probe_and_fid(on_gpu, script, tmp_path, monkeypatch):
    """Of a checkpoint, on the GPU: features are a CPU's, both commands end, and FD-tiny is a CPU's
    but for the rounding of images. (The probe's noise is a GPU's own.)"""
    _, cfg = on_gpu("run", steps=5)
    path, found = f"{cfg.out}/last.pt", []
    _, net = script.load_checkpoint(path)
    x_0 = torch.rand(2, *getattr(net, "shape", (3, 16, 16))) * 2 - 1
    eps = torch.randn_like(x_0)
    here = script.features(net, x_0, cfg.t_probe, eps)
    there = script.features(net.to(DEVICE), x_0.to(DEVICE), cfg.t_probe, eps.to(DEVICE))
    for name, f in here.items():
        assert (there[name].cpu() - f).abs().max() <= 1e-4 * f.abs().max()
    probe.main([path, "--device", DEVICE, "--epochs", "2"])
    for device in ("cpu", DEVICE):
        (tmp_path / device).mkdir()
        monkeypatch.chdir(tmp_path / device)            # detector and statistics are in data/
        words = ["--detector", "tiny", "--n", "40", "--json", "fid.json"]
        fid.main([path, "--device", device, *words])
        found.append(json.loads((tmp_path / device / "fid.json").read_text())["value"])
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def test_distance_is_that_of_a_cpu():
    """FID of the same images in Inception's features, with weights at random."""
    torch.manual_seed(0)
    net, found = fid.Inception().eval(), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)        # else nothing reaches the end
    images = torch.randint(0, 256, (2, 24, 3, 32, 32), dtype=torch.uint8)
    images[1] //= 2
    for device in (torch.device("cpu"), torch.device(DEVICE)):
        sides = [fid.Side("images", 24, {}, lambda batch, x=x: [(0, x)]) for x in images]
        (a, _), (b, _) = (fid.measure(side, net.to(device), device, 24) for side in sides)
        found.append(fid.frechet_distance(*a, *b))
    assert found[0] > 0.1 and found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.skipif(gpus < 2, reason="two GPUs")
@only("edm_sc", "uvit_sc")
def test_two_processes(script, tmp_path):
    """Over NCCL, what one process computes. To 1e-2, as convolutions use TF32 there."""
    fields = ["--steps", "20", "--aug", "0.5", "--cl", "0.01", "--amp", "off", "--batch", "16",
              "--sample_every", "0", "--save_every", "0"]
    for n in (1, 2):
        out = tmp_path / str(n)
        status, _, err = finish(launch(script.SCRIPT, [*fields, "--out", out], processes=n), 300)
        assert status == 0, err[-2000:]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-2)
