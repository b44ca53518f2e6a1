"""DDPM, EDM, rectified flow, and that of latents: their identities, and their samplers against
cases with a closed form. What is random here has a seed of its own."""
import math

import numpy as np
import pytest
import torch

from conftest import load, rounding, small_config

pytestmark = pytest.mark.numeric
uvit_sc, edm_sc, rf_sc, dit_latent_sc = map(load, ("uvit_sc", "edm_sc", "rf_sc", "dit_latent_sc"))
rk45 = rf_sc.rk45


def make(script, **fields):
    return script.Diffusion(small_config(script, **fields))


def noise(n=16, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)


def orders(errors):
    """By what the error is divided where the number of steps is doubled."""
    return [a / b for a, b in zip(errors, errors[1:])]


@pytest.mark.parametrize("script, change, mean, std", [
    (uvit_sc, lambda t: t.double() - 0.5, 500, 288.7), (rf_sc, lambda t: t, 0.5, 0.2887),
    (edm_sc, torch.log, -1.2, 1.2), (dit_latent_sc, torch.logit, 0, 1)])
def test_training_times(script, change, mean, std):
    """Uniform on 1..1000 and on [0, 1], log-normal, logit-normal: within four standard errors."""
    n = 100_000
    t = change(make(script).draw_t(n, torch.Generator().manual_seed(0)))
    assert abs(t.mean().item() - mean) < 4 * std / math.sqrt(n)
    assert abs(t.std().item() - std) < 4 * std / math.sqrt(2 * n)
    if script in (uvit_sc, rf_sc):
        assert (t.min().round(decimals=3), t.max().round(decimals=3)) == (
            (0.5, 999.5) if script is uvit_sc else (0, 1))


# ---- DDPM ----------------------------------------------------------------------------------------

def test_ddpm_schedule():
    """alpha^2 + sigma^2 = 1; t = 0 is the data; alpha_bar at 1, 11, 66 and 1000 as in the authors'
    DDAE code, to the digits that are printed there."""
    ddpm = make(uvit_sc)
    assert (ddpm.alpha ** 2 + ddpm.sigma ** 2 - 1).abs().max() <= rounding(1, 6)
    assert (ddpm.alpha[0], ddpm.sigma[0], len(ddpm.alpha)) == (1, 0, 1001)
    alpha_bar = (ddpm.alpha[[1, 11, 66]] ** 2).tolist()
    assert alpha_bar == pytest.approx([0.99990, 0.997806, 0.951846], abs=1e-6)
    assert ddpm.alpha[1000].item() ** 2 == pytest.approx(4.036e-5, rel=1e-3)


def test_ddpm_noise_and_loss():
    ddpm, x, eps = make(uvit_sc), noise(4, torch.float32), noise(8, torch.float32)[4:]
    t = torch.tensor([0, 1, 500, 1000])
    x_t = ddpm.add_noise(x, t, eps)
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[2], ddpm.alpha[500] * x[2] + ddpm.sigma[500] * eps[2])
    assert (x_t[3] - eps[3]).abs().max() < ddpm.alpha[1000] * x.abs().max() + 1e-4
    # A mean of 192 squares, each 4 but for the rounding of eps + 2.
    assert ddpm.loss(eps + 2, x, eps, t).tolist() == pytest.approx([4] * 4, abs=rounding(4, 8))
    x_in, c_noise = ddpm.inputs(x_t, t)
    assert torch.equal(x_in, x_t) and torch.equal(c_noise, t.float())


def test_ddim_grid_and_clipping():
    """nfe = 5 visits 801, 601, 401, 201, 1; x_0 is clipped, and the last step returns it."""
    ddpm, times = make(uvit_sc, nfe=5), []

    def net(x, t):
        times.append(int(t[0]))
        return torch.zeros_like(x), None
    x, nfe = ddpm.sample(net, torch.full((1, 3, 4, 4), 50.0))
    assert times == [801, 601, 401, 201, 1] and nfe == 5 and (x == 1).all()


def test_ddim_on_a_gaussian():
    """Data N(0, s^2): the best eps is sigma x_t / (alpha^2 s^2 + sigma^2). DDIM makes noise s times
    smaller, with an error of first order in the number of steps."""
    s, z, errors = 0.2, noise(), []
    for nfe in (50, 100, 200):
        ddpm = make(uvit_sc, nfe=nfe)

        def net(x, t):
            a, b = ddpm.alpha[int(t[0])], ddpm.sigma[int(t[0])]
            return b * x / (a ** 2 * s ** 2 + b ** 2), None
        x, count = ddpm.sample(net, z)
        errors.append(abs(x.std().item() / z.std().item() / s - 1))
        assert count == nfe
    assert errors[2] < 0.04 and all(1.6 < q < 2.4 for q in orders(errors)), errors


# ---- EDM -----------------------------------------------------------------------------------------

def test_edm_preconditioning():
    """c_in gives the input, and c_out the target of the network, unit variance at every sigma; the
    weight is 1 / c_out^2; c_noise = ln(sigma) / 4. Near both ends c_skip and c_out are known."""
    edm, one = make(edm_sc), torch.ones(1, 1, 1, 1)
    for sigma in (0.002, 0.06, 0.5, 3.0, 80.0):
        t = torch.tensor([sigma])
        c_in, c_noise = edm.inputs(one, t)
        c_skip = edm.denoise(0 * one, one, t).item()
        c_out = edm.denoise(one, one, t).item() - c_skip
        assert c_noise.item() == pytest.approx(math.log(sigma) / 4, rel=1e-6)
        assert c_in.item() ** 2 * (sigma ** 2 + 0.25) == pytest.approx(1, rel=1e-6)
        # c_skip is near 1 and known to 2^-24: at the end, 1 - c_skip = 1.6e-5 to 0.4 %.
        blur = 2 ** -24 / (1 - c_skip) + 2 ** -24 / c_out
        target = ((1 - c_skip) ** 2 * 0.25 + c_skip ** 2 * sigma ** 2) / c_out ** 2
        assert target == pytest.approx(1, rel=8 * blur)
        weight = edm.loss(0 * one, 0 * one, one, t).item()          # w |c_skip sigma|^2
        assert weight == pytest.approx((c_skip * sigma / c_out) ** 2, rel=8 * blur)
    t, both = torch.tensor([1e-4, 1e4]), torch.ones(2, 1, 1, 1)
    skip, out = edm.denoise(0 * both, both, t), edm.denoise(both, 0 * both, t)
    assert skip.flatten().tolist() == pytest.approx([1, 0], abs=1e-6)
    assert out.flatten().tolist() == pytest.approx([1e-4, 0.5], rel=1e-6)


def visited(nfe):
    """The noise levels at which the sampler asks the network. Estimates of x_0 are clipped."""
    edm, levels = make(edm_sc, nfe=nfe), []

    def net(x, c_noise):
        levels.append(math.exp(4 * c_noise[0].item()))
        return torch.full_like(x, 1e6), None
    x, count = edm.sample(net, noise(1))
    assert count == len(levels) and (x - 1).abs().max() < rounding(160, count)
    return levels


def test_edm_schedule():
    """18 steps are 35 evaluations, from 80 to 0.002; counted from the clean end, steps 4 and 6 are
    the times of Table 10 (the paper rounds the first to 0.06). An even number takes one less."""
    asked = visited(35)
    levels = [asked[0], *asked[1::2]]           # Heun asks at both ends of a step
    assert len(asked) == 35 and visited(36) == asked and len(levels) == 18
    assert levels[0] == pytest.approx(80, rel=1e-5)
    assert levels[-1] == pytest.approx(0.002, rel=1e-5)
    assert round(levels[-4], 4) == 0.0599 and round(levels[-6], 4) == 0.2964
    assert edm_sc.make_config("cifar10").t_probe == pytest.approx(levels[-4], rel=1e-3)
    assert edm_sc.make_config("imagenet100").t_probe == pytest.approx(levels[-6], rel=1e-3)


def test_heun_on_a_gaussian():
    """Data N(0, s^2): D = s^2 x / (s^2 + sigma^2), and the flow scales by s / sqrt(s^2 + 80^2).
    Second order in the steps."""
    s, errors, z = 0.2, [], noise()
    for steps in (18, 36, 72):
        def net(x, c_noise):
            sigma = (4 * c_noise.double()).exp().view(-1, 1, 1, 1)
            root = (sigma ** 2 + 0.25).sqrt()
            extra = s ** 2 / (s ** 2 + sigma ** 2) - 0.25 / (0.25 + sigma ** 2)
            return extra * x * root * root / sigma / 0.5, None
        x, _ = make(edm_sc, nfe=2 * steps - 1).sample(net, z)
        exact = 80 * s / math.sqrt(s ** 2 + 80 ** 2)
        errors.append(abs((x / z).median().item() / exact - 1))
    assert errors[0] < 0.1 and errors[2] < 0.005, errors
    assert all(3.5 < q < 5.5 for q in orders(errors)), errors


# ---- Rectified flow ------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [rf_sc, dit_latent_sc])
def test_flow_identities(script):
    """t = 0 is the data, t = 1 the noise, the target their difference: the derivative of the
    path."""
    flow, x, eps = make(script), noise(3, torch.float32), noise(6, torch.float32)[3:]
    assert torch.equal(flow.add_noise(x, torch.zeros(3), eps), x)
    assert torch.equal(flow.add_noise(x, torch.ones(3), eps), eps)
    t = torch.tensor([0.125, 0.5, 0.75])
    h = 0.125                                   # the path is straight: any h will do
    slope = (flow.add_noise(x, t + h, eps) - flow.add_noise(x, t, eps)) / h
    # The slope is known to 2 ulps of x_t, up to 4, divided by h; losses are its squares.
    assert flow.loss(slope, x, eps, t).max() < rounding(4, 4) / h
    assert flow.loss(eps - x, x, eps, t).max() < rounding(1, 8)


def gaussian_velocity(s):
    """E[eps - x_0 | x_t] for data N(0, s^2); its flow takes noise to s times the noise."""
    def net(x, t, y=None):
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        return (t - (1 - t) * s ** 2) / ((1 - t) ** 2 * s ** 2 + t ** 2) * x, None
    return net


@pytest.mark.parametrize("script, fields", [(rf_sc, {}), (dit_latent_sc, dict(shift=1.0)),
                                            (dit_latent_sc, dict(shift=3.3))])
def test_euler_on_a_gaussian(script, fields):
    """--nfe N: an error of first order in the steps, evenly spaced or not."""
    s, z, errors = 0.2, noise(), []
    for nfe in (50, 100, 200):
        flow, net, asked = make(script, nfe=nfe, **fields), gaussian_velocity(s), []

        def spy(x, t, y=None):
            asked.append(t[0].item())
            return net(x, t)
        x, count = flow.sample(spy, z)
        errors.append(abs((x / z).median().item() / s - 1))
        times = flow.times() if hasattr(flow, "times") else [1 - k / nfe for k in range(nfe + 1)]
        assert count == nfe and asked == pytest.approx(times[:-1], rel=1e-6)
    assert all(1.6 < q < 2.4 for q in orders(errors)), errors


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
def test_rk45_on_a_gaussian(tol):
    """Each step's error is held to tol, and some 30 of them add up."""
    s, z = 0.2, noise(dtype=torch.float32)
    x, nfe = make(rf_sc, nfe=0, tol=tol).sample(gaussian_velocity(s), z)
    assert ((x - s * z).abs() / (1 + s * z.abs())).max() < 30 * tol
    assert ((nfe - 1) % 6 == 0).all()           # the last stage of a step is the first of the next


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-8])
def test_rk45_meets_its_tolerance(tol):
    """x' = x cos t, smooth; x' = -200 (x - cos t) - sin t, stiff: a transient of 1/200, then cos
    t."""
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None]

    def smooth(x, t):
        return x * t.cos()[:, None]

    def stiff(x, t):
        return -200 * (x - t.cos()[:, None]) - t.sin()[:, None]
    end, nfe = rk45(smooth, x, 0.0, 4.0, tol)
    assert (end - x * math.exp(math.sin(4))).abs().max() < 20 * tol
    back, _ = rk45(smooth, end, 4.0, 0.0, tol)
    assert (back - x).abs().max() < 100 * tol
    end, more = rk45(stiff, x, 0.0, 2.0, tol)
    assert (end - (math.cos(2) + (x - 1) * math.exp(-400))).abs().max() < 20 * tol
    assert more.min() > nfe.max()


def test_rk45_is_of_fifth_order():
    """Halving a step divides its error by 2^6. The coefficients of each stage add up to its
    time."""
    errors = []
    for h in (0.4, 0.2, 0.1):
        x, slopes = 1.0, [1.0]                  # x' = x cos t from 1
        for c, row in rf_sc.STAGES:
            new = x + h * sum(a * slope for a, slope in zip(row, slopes))
            slopes.append(new * math.cos(c * h))
            assert sum(row) == pytest.approx(c)
        errors.append(abs(new - math.exp(math.sin(h))))
    assert sum(rf_sc.ERROR) == pytest.approx(0, abs=1e-15)
    assert all(45 < q < 90 for q in orders(errors)), errors


def test_rk45_steps_are_per_row():
    """Easy and hard rows together: each has the solution and the cost that it has alone, bit for
    bit, as one element after another is computed."""
    x, rate = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0.1, 5.0, 80.0]).double()
    together, nfe = rk45(lambda x, t: -rate[:, None] * x, x, 0.0, 1.0, 1e-6)
    assert nfe[0] < nfe[1] < nfe[2]
    for i in range(3):
        alone, cost = rk45(lambda x, t: -rate[i] * x, x[i:i + 1], 0.0, 1.0, 1e-6)
        assert torch.equal(alone[0], together[i]) and cost[0] == nfe[i]


def test_rk45_notices_a_broken_network():
    """At the first step, not after 10,000."""
    calls = []

    def broken(x, t):
        calls.append(1)
        return x * torch.nan
    with pytest.raises(rf_sc.UserError, match="not finite"):
        rk45(broken, torch.ones(1, 1), 0.0, 1.0, 1e-5)
    assert len(calls) == 7


def test_rk45_runs_in_float32():
    """bf16 rounds by more than the tolerance: autocast would more than double the evaluations."""
    seen, weight = [], torch.eye(8)

    def net(x, t):
        seen.append((x @ weight).dtype)
        return -x, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make(rf_sc, nfe=0).sample(net, noise(1, torch.float32))
    assert set(seen) == {torch.float32}


# ---- Rectified flow on latents -------------------------------------------------------------------

def test_latent_loss():
    """|| v - (eps - x_0) ||^2 + 1 - cos, by NumPy in float64: means of 32 numbers below 40. At v =
    0, where a run starts, the gradient of the cosine is no larger than fp16 can hold."""
    x, eps, v = torch.randn(3, 3, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    loss = make(dit_latent_sc).loss(v, x, eps, torch.tensor([0.1, 0.5, 0.9]))
    a, b = v.numpy().astype(float), (eps - x).numpy().astype(float)
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    expected = ((a - b) ** 2).mean((1, 2, 3)) + (1 - cosine).mean((1, 2))
    np.testing.assert_allclose(loss, expected, rtol=0, atol=rounding(40, 32))
    v = torch.zeros_like(v).requires_grad_()
    make(dit_latent_sc).loss(v, x, eps, torch.ones(3)).sum().backward()
    assert v.grad.abs().max() < 10


def test_shifted_times():
    """t = 3.3 s / (1 + 2.3 s): LightningDiT's grid in the other clock, where its shift is 1 /
    3.3."""
    times = np.array(make(dit_latent_sc, nfe=250, shift=3.3).times())
    s = np.linspace(1, 0, 251)
    theirs = (1 / 3.3) * (1 - s) / (1 + (1 / 3.3 - 1) * (1 - s))
    np.testing.assert_allclose(times, 3.3 * s / (1 + 2.3 * s), rtol=0, atol=1e-15)
    np.testing.assert_allclose(1 - times, theirs, rtol=0, atol=1e-15)
    assert make(dit_latent_sc, nfe=4, shift=1.0).times() == [1, 0.75, 0.5, 0.25, 0]


def test_guidance_by_its_formula():
    """All channels: v_null + w (v_y - v_null) for t <= 0.89, v_y above, the null class once more in
    a batch; w = 1 and no classes ask once. Float64, so that the order of sums does not matter."""
    flow, z = make(dit_latent_sc, nfe=20, guidance=2.5, guide_until=0.89), noise(4)
    y, calls = torch.tensor([0, 1, 2, 3]), []

    def v(x, t, y):
        return x * (y + 1).view(-1, 1, 1, 1) * 0.1 * t.view(-1, 1, 1, 1)

    def net(x, t, y):
        calls.append((len(x), t[0].item(), y))
        return v(x, t, y).float(), None
    net.null = 10
    ours, nfe = flow.sample(net, z, y)
    x, null = z, torch.full((4,), 10)
    for t, s in zip(flow.times(), flow.times()[1:]):
        at = torch.full((4,), t)
        v_y, v_null = v(x, at, y).float(), v(x, at, null).float()
        x = x + (s - t) * (v_null + 2.5 * (v_y - v_null) if t <= 0.89 else v_y)
    assert nfe == 20 and (ours - x).abs().max() < rounding(x.abs().max().item(), 20 * 4)
    for n, t, labels in calls:
        assert n == (8 if t <= 0.89 else 4) and (n == 4 or labels[4:].eq(10).all())
    assert {n for n, _, _ in calls} == {4, 8}
    calls.clear()
    make(dit_latent_sc, nfe=5, guidance=1.0).sample(net, z, y)
    assert [n for n, _, _ in calls] == [4] * 5
