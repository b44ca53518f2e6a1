"""EDM and rectified flow: their identities, and their samplers against cases with a closed form. DDPM: test_uvit.py."""
import math

import pytest
import torch

import edm_sc
import rf_sc
from edm_sc import EDM
from rf_sc import RF, rk45


def edm(**fields):
    return EDM(edm_sc.make_config(**fields))


def rf(**fields):
    return RF(rf_sc.make_config(**fields))


def noise(n=64, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


# ---- EDM -----------------------------------------------------------------------------------------------------------------

def test_preconditioning_at_both_ends():
    """c_skip from 1 to 0, c_out from sigma to sigma_data, c_in from 1 / sigma_data to 1 / sigma, c_noise = ln(sigma) / 4, w = 1 / c_out^2;
    c_in makes the input, and c_out the target of the network, of unit variance at every sigma."""
    formulation, x = edm(), torch.ones(1, 1, 1, 1)
    for sigma in (0.002, 0.06, 0.5, 3.0, 80.0):
        t = torch.tensor([sigma])
        c_in, c_noise = formulation.inputs(x, t)
        c_skip = formulation.denoise(lambda x, c: torch.zeros_like(x), x, t).item()
        c_out = formulation.denoise(lambda x, c: torch.ones_like(x), x, t).item() - c_skip
        assert c_noise.item() == pytest.approx(math.log(sigma) / 4, rel=1e-6)
        assert c_in.item() ** 2 * (sigma ** 2 + 0.25) == pytest.approx(1, rel=1e-6)
        target = ((1 - c_skip) ** 2 * 0.25 + c_skip ** 2 * sigma ** 2) / c_out ** 2     # the variance of (x_0 - c_skip x_t) / c_out
        assert target == pytest.approx(1, rel=2e-3 if sigma < 0.01 else 1e-5)
        weight = formulation.loss(lambda x, c: torch.zeros_like(x), torch.zeros(1, 1, 1, 1), t, torch.ones(1, 1, 1, 1)).item()
        assert weight == pytest.approx((c_skip * sigma / c_out) ** 2, rel=2e-3 if sigma < 0.01 else 1e-4)      # w |D|^2 at x_0 = 0
    t = torch.tensor([1e-4, 1e4])
    skip = formulation.denoise(lambda x, c: torch.zeros_like(x), torch.ones(2, 1, 1, 1), t).flatten()
    out = formulation.denoise(lambda x, c: torch.ones_like(x), torch.zeros(2, 1, 1, 1), t).flatten()
    assert skip.tolist() == pytest.approx([1, 0], abs=1e-6) and out.tolist() == pytest.approx([1e-4, 0.5], rel=1e-6)


def test_training_noise_is_log_normal():
    log = edm().draw_t(100_000, torch.Generator().manual_seed(0)).log()
    assert log.mean().item() == pytest.approx(-1.2, abs=0.02) and log.std().item() == pytest.approx(1.2, abs=0.02)


def visited(nfe):
    """The noise levels at which the sampler asks the network."""
    formulation, sigmas = edm(nfe=nfe), []
    formulation.sample(lambda x, c: sigmas.append(math.exp(4 * c[0].item())) or torch.zeros_like(x), noise(1))
    assert len(sigmas) == formulation.nfe
    return sigmas


def test_schedule():
    """18 steps are 35 evaluations, from 80 to 0.002; counted from the clean end, t = 4 and 6 are the times of Table 10."""
    sigmas = visited(35)
    assert len(sigmas) == 35 and visited(36) == pytest.approx(sigmas)
    levels = [sigmas[0], *sigmas[1::2]]                # Heun asks at both ends of a step, the next one at its beginning again
    assert len(levels) == 18 and levels[0] == pytest.approx(80) and levels[-1] == pytest.approx(0.002, rel=1e-4)
    assert round(levels[-4], 4) == 0.0599 and round(levels[-6], 4) == 0.2964        # the paper rounds the first to 0.06
    assert edm_sc.make_config("cifar10").t_probe == pytest.approx(levels[-4], rel=1e-3)
    assert edm_sc.make_config("imagenet100").t_probe == pytest.approx(levels[-6], rel=1e-3)


def test_heun_on_a_gaussian():
    """Data N(0, s^2): D = s^2 x / (s^2 + sigma^2), and the flow scales by s / sqrt(s^2 + 80^2). Second order in the steps."""
    s, errors, z = 0.2, [], noise()
    for steps in (18, 36, 72):
        formulation = edm(nfe=2 * steps - 1)

        def net(x, c):
            sigma = (4 * c.double()).exp().view(-1, 1, 1, 1)
            x_t = x * (sigma ** 2 + 0.25).sqrt()
            return ((s ** 2 / (s ** 2 + sigma ** 2) - 0.25 / (0.25 + sigma ** 2)) * x_t * (sigma ** 2 + 0.25).sqrt() / sigma / 0.5)
        exact = 80 * s / math.sqrt(s ** 2 + 80 ** 2)
        errors.append(abs((formulation.sample(net, z) / z).median().item() / exact - 1))
    assert errors[0] < 0.1 and errors[2] < 0.005 and all(3.5 < a / b < 5.5 for a, b in zip(errors, errors[1:])), errors


# ---- Rectified flow ------------------------------------------------------------------------------------------------------

def test_flow_identities():
    """t = 0 is the data, t = 1 the noise, the target their difference: the time derivative of the path."""
    formulation, (x, eps) = rf(), torch.randn(2, 3, 3, 8, 8)
    assert torch.equal(formulation.add_noise(x, torch.zeros(3), eps), x)
    assert torch.equal(formulation.add_noise(x, torch.ones(3), eps), eps)
    t = torch.tensor([0.1, 0.5, 0.9])
    slope = (formulation.add_noise(x, t + 1e-3, eps) - formulation.add_noise(x, t, eps)) / 1e-3
    assert formulation.loss(lambda x_t, c: slope, x, t, eps).max() < 1e-5
    assert formulation.loss(lambda x_t, c: slope + 2, x, t, eps).tolist() == pytest.approx([4] * 3, abs=1e-2)
    times = formulation.draw_t(100_000, torch.Generator().manual_seed(0))
    assert 0 <= times.min() and times.max() <= 1 and times.mean().item() == pytest.approx(0.5, abs=0.005)


def gaussian_velocity(s):
    """E[eps - x_0 | x_t] for data N(0, s^2); its flow takes noise to s times the noise."""
    def net(x, t):
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        return (t - (1 - t) * s ** 2) / ((1 - t) ** 2 * s ** 2 + t ** 2) * x
    return net


def test_rk45_on_a_gaussian():
    """The standard deviation is right within the tolerance, and tight tolerances cost more evaluations than a loose one."""
    s, z, nfes = 0.2, noise(dtype=torch.float32), []
    for tol in (1e-3, 1e-4, 1e-5):
        formulation = rf(tol=tol)
        x = formulation.sample(gaussian_velocity(s), z)
        assert ((x - s * z).abs() / (1 + s * z.abs())).max() < 30 * tol         # the RMS of a step is held to tol
        nfes.append(formulation.nfe.mean().item())
        assert ((formulation.nfe - 1) % 6 == 0).all()           # the last stage of a step is the first of the next
    assert nfes[0] < min(nfes[1:]), nfes


def test_euler_on_a_gaussian():
    """--nfe N: first order in the steps."""
    s, z, errors = 0.2, noise(), []
    for nfe in (50, 100, 200):
        calls, net = [], gaussian_velocity(s)
        x = rf(nfe=nfe).sample(lambda x, t: calls.append(t[0].item()) or net(x, t).double(), z)
        errors.append(abs((x / z).median().item() / s - 1))
        assert len(calls) == nfe and calls[0] == 1 and calls[-1] == pytest.approx(1 / nfe)
    assert all(1.6 < a / b < 2.4 for a, b in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-8])
def test_rk45_meets_its_tolerance(tol):
    """Against closed forms: x' = x cos t, smooth; x' = -200 (x - cos t) - sin t, stiff: a transient of 1/200, then cos t."""
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None]
    end, nfe = rk45(lambda x, t: x * t.cos()[:, None], x, 0.0, 4.0, tol)
    assert (end - x * math.exp(math.sin(4))).abs().max() < 20 * tol
    stiff, more = rk45(lambda x, t: -200 * (x - t.cos()[:, None]) - t.sin()[:, None], x, 0.0, 2.0, tol)
    assert (stiff - (math.cos(2) + (x - 1) * math.exp(-400))).abs().max() < 20 * tol
    assert more.min() > nfe.max()
    back, _ = rk45(lambda x, t: x * t.cos()[:, None], end, 4.0, 0.0, tol)
    assert (back - x).abs().max() < 100 * tol


def test_rk45_is_of_fifth_order():
    """One step with its 5th-order weights: halving the step divides the error by 2^5 a unit of time, by 2^6 a step."""
    errors = []
    for h in (0.4, 0.2, 0.1):
        # A tolerance that accepts everything and a first step that covers the interval: 0.01 of it, then the rest.
        x, t = torch.ones(1, 1, dtype=torch.float64), 0.0
        k = [x * math.cos(t)]
        for c, row in rf_sc.STAGES:
            new = x + h * sum(a * s for a, s in zip(row, k))
            k.append(new * math.cos(t + c * h))
        errors.append(abs(new.item() - math.exp(math.sin(h))))
        assert sum(rf_sc.ERROR) == pytest.approx(0, abs=1e-15) and all(sum(row) == pytest.approx(c) for c, row in rf_sc.STAGES)
    assert all(45 < a / b < 90 for a, b in zip(errors, errors[1:])), errors


def test_rk45_steps_are_per_row():
    """Easy and hard rows together: each has the solution and the cost that it has alone, bit for bit."""
    x, rate = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0.1, 5.0, 80.0], dtype=torch.float64)
    together, nfe = rk45(lambda x, t: -rate[:, None] * x, x, 0.0, 1.0, 1e-6)
    assert nfe[0] < nfe[1] < nfe[2]
    for i in range(3):
        alone, cost = rk45(lambda x, t: -rate[i] * x, x[i:i + 1], 0.0, 1.0, 1e-6)
        assert torch.equal(alone[0], together[i]) and cost[0] == nfe[i]


def test_rk45_gives_up_with_advice():
    """A broken network is noticed at once; a tolerance below the rounding of the velocity is never met."""
    calls = []
    with pytest.raises(rf_sc.UserError, match="not finite; try --amp off"):
        rk45(lambda x, t: calls.append(1) or x * torch.nan, torch.ones(1, 1), 0.0, 1.0, 1e-5)
    assert len(calls) == 7
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(rf_sc.UserError, match="--tol 1e-12.*--nfe"):
        rk45(lambda x, t: torch.randn(1, 1, generator=generator) * 1e3, torch.ones(1, 1), 0.0, 1.0, 1e-12)


def test_rk45_runs_in_float32():
    """bf16 rounds by more than the tolerance, so that autocast would more than double the evaluations."""
    seen, formulation = [], rf()
    weight = torch.eye(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        formulation.sample(lambda x, t: seen.append((x @ weight).dtype) or -x, noise(1, torch.float32))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("name", ["ddpm_sc", "edm_sc", "rf_sc"])
def test_quarters_of_the_training_times(name):
    """As many of each are drawn, and they are in the order of their noise."""
    import importlib
    script = importlib.import_module(name)
    diffusion = script.Diffusion(script.make_config())
    t = diffusion.draw_t(40000, torch.Generator().manual_seed(0))
    quarter = sum((t > limit).long() for limit in diffusion.quartiles)
    assert all(abs((quarter == k).float().mean() - 0.25) < 0.01 for k in range(4))
    one = torch.ones(4, 1, 1, 1)
    times = torch.stack([t[quarter == k][:1] for k in range(4)]).flatten()
    signal, noise = diffusion.add_noise(one, times, 0 * one).flatten(), diffusion.add_noise(0 * one, times, one).flatten()
    assert ((noise / signal).diff() > 0).all()
