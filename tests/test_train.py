"""The training loop: exact resume, the same losses on any number of processes, faults that lose
nothing. It is one text in all scripts (test_copies.py), so most of this is tried with one."""
import contextlib, dataclasses, os, resource, signal
from pathlib import Path

import pytest
import torch

from conftest import (agree, final, finish, load, log, losses, only, random_data, same,
                      small_config, small_net, spy, start, use_random_data)

one = only("uvit_sc")


@one
def test_run_folder(script, config):
    cfg = config(sample_every=1, save_every=1)
    assert script.train(cfg) == 0
    names = {path.name for path in Path(cfg.out).iterdir()}
    assert names == {"log.jsonl", "last.pt", "ckpt_0001.pt", "ckpt_0002.pt", "samples_0001.png",
                     "samples_0002.png"}
    state = final(cfg.out)
    assert set(state) == {"script", "config", "step", "data", "model", "ema", "heads", "ema_heads",
                          "optimizer", "scaler"}
    part = torch.load(Path(cfg.out, "ckpt_0001.pt"), weights_only=True)
    assert set(part) == {"script", "config", "step", "data", "ema"} and part["step"] == 8
    end = torch.load(Path(cfg.out, "ckpt_0002.pt"), weights_only=True)
    assert same(end["ema"], state["ema"]) and not same(end["ema"], state["model"])
    assert state["step"] == 16 and state["script"] == "uvit_sc"     # 2 epochs, 64 images, 8 a step
    assert script.Config(**state["config"]) == cfg
    line = log(cfg.out)[-1]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second"} <= set(line)
    assert (line["step"], line["epoch"]) == (16, 2)


@one
def test_when_files_come(script, config):
    """64 images in steps of 200: epochs 3, 6, 9 and 12 are seen. Each passes one that is due to
    be saved; the last step draws though no 14th epoch was passed. 0 means never: last.pt alone
    comes then. --steps rules over --epochs."""
    cfg = config(batch=200, epochs=10, save_every=2, sample_every=7)
    script.train(cfg)
    names = sorted(path.name for path in Path(cfg.out).glob("*_*.p*"))
    assert names == [*(f"ckpt_{epoch:04d}.pt" for epoch in (3, 6, 9, 12)),
                     "samples_0009.png", "samples_0012.png"]
    never = config(out=cfg.out + "0", steps=3)
    script.train(never)
    assert {path.name for path in Path(never.out).iterdir()} == {"log.jsonl", "last.pt"}
    assert final(never.out)["step"] == 3


@only("edm_sc", "uvit_sc", "dit_latent_sc")
def test_resume_equals_no_interruption(script, config, capsys):
    """5 + 7 steps are 12 steps, with dropout, augmentation and contrast: all tensors, bit for bit,
    and the log. This holds on one machine with the same number of processes and threads."""
    fields = dict(dropout=0.1, aug=0.5, cl=0.01)
    whole, halves = config(**fields, steps=12), config(**fields, steps=12, out=config().out + "2")
    script.train(whole)
    script.train(dataclasses.replace(halves, steps=5))
    script.train(halves)
    assert "resumed at step 5" in capsys.readouterr().out
    a, b = final(whole.out), final(halves.out)
    assert all(same(a[k], b[k]) for k in a if k != "config") and a["ema_heads"]
    assert losses(whole.out) == losses(halves.out) and len(losses(whole.out)) == 12


KILLED = """
import signal
from conftest import *
script, save, calls = load("uvit_sc"), torch.save, []
use_random_data(script)
def dying(state, file):
    calls.append(1)
    if len(calls) == 6:                     # last.pt after the third epoch
        file.write(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dying
script.train(small_config(script, **FIELDS))
"""


@one
def test_killed_and_resumed(script, config):
    """SIGKILL in the middle of writing a checkpoint: the one before is whole, and what goes on from
    there ends with the weights of a run that was never interrupted, bit for bit (the same machine,
    as above), and with its log: later lines, and half of one, are dropped. Without a log, a run
    goes on as well."""
    fields = dict(steps=40, save_every=1)                           # after each 8 steps
    whole, resumed = config(**fields), config(**fields, out=config().out + "2")
    script.train(whole)
    process = start(["-c", f"FIELDS = {dict(fields, out=resumed.out)}\n{KILLED}"])
    assert finish(process)[0] == -signal.SIGKILL and final(resumed.out)["step"] == 16
    assert len(log(resumed.out)) == 24
    file = Path(resumed.out, "log.jsonl")
    file.write_text(file.read_text() + '{"step": 25, "lo')
    script.train(resumed)
    a, b = final(whole.out), final(resumed.out)
    assert all(same(a[k], b[k]) for k in ("step", "model", "ema", "optimizer"))
    assert losses(whole.out) == losses(resumed.out)
    file.unlink()
    script.train(dataclasses.replace(resumed, steps=41))
    assert [line["step"] for line in log(resumed.out)] == [41]


@contextlib.contextmanager
def files_end_at(size):
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@one
def test_full_disk(script, config):
    """In the middle of writing a checkpoint: the old file stays, no part is left, the run can go
    on. What a killed run has left does no harm. A damaged file stays as it is."""
    script.train(config(steps=2))
    cfg, path = config(steps=3), Path(config().out, "last.pt")
    before = path.read_bytes()
    for share in (0.1, 0.99):
        with files_end_at(int(len(before) * share)), pytest.raises((OSError, RuntimeError)):
            script.train(cfg)
        assert path.read_bytes() == before and not list(path.parent.glob(".*"))
    path.write_bytes(before[:-1])
    with pytest.raises(script.UserError, match="last.pt is .*damaged"):
        script.train(cfg)
    assert path.read_bytes() == before[:-1]
    path.write_bytes(before)
    path.with_name(".last.pt.0-1.part").write_bytes(b"of a killed run")
    with open(path, "rb") as old:           # the new file takes the place of the old one at once
        assert script.train(cfg) == 0 and final(cfg.out)["step"] == 3
        assert old.read() == before


@one
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(script, config, monkeypatch, capsys, number):
    """A scheduler's order to leave, or Ctrl-C: the step is ended, last.pt written, the status is
    128 + n, and the handlers are given back. The same command goes on."""
    before, update_ema, calls = signal.getsignal(number), script.update_ema, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) in (3, 6):
            os.kill(os.getpid(), number)
        return update_ema(*args)
    monkeypatch.setattr(script, "update_ema", interrupted)
    cfg = config(steps=6, batch=64, sample_every=1)             # of 64 images: an epoch is a step
    drawn = []
    monkeypatch.setattr(script, "sample", lambda *args: drawn.append(1) or torch.zeros(80, 3, 1, 1))
    monkeypatch.setattr(script, "save_grid", lambda *args: None)
    monkeypatch.setattr(script, "make_config", lambda **given: cfg)
    assert script.main([]) == 128 + number and len(drawn) == 2      # then it does not stop to draw
    assert "the same command goes on" in capsys.readouterr().out
    assert final(cfg.out)["step"] == 3 and signal.getsignal(number) is before
    assert script.main([]) == 0 and final(cfg.out)["step"] == 6    # at its end a signal is late
    assert len(drawn) == 5


# ---- Processes -----------------------------------------------------------------------------------

TWICE = {   # a run's name: script, fields; on one process here, and on two
    "uvit": ("uvit_sc", dict(steps=20)),
    "ddpm": ("ddpm_sc", dict(steps=20)),
    "dit": ("dit_latent_sc", dict(steps=20, aug=0.5)),
    "accum": ("uvit_sc", dict(steps=20, accum=2)),
    "contrast": ("edm_sc", dict(steps=1, aug=0.5, cl=0.1)),
}
ON_TWO = """
import os, signal, sys, time
from conftest import *
out = Path(sys.argv[1])
for run, (name, fields) in RUNS.items():
    script = load(name)
    use_random_data(script)
    script.train(small_config(script, out=str(out / run), **fields))

script = load("uvit_sc")                    # an order to leave that only the second process gets
update_ema = script.update_ema
def interrupted(*args):
    if script.RANK == 1 and args[3] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return update_ema(*args)
script.update_ema = interrupted
status = script.train(small_config(script, out=str(out / "left"), steps=9))

clock, late = time.time, [0]                # ten minutes pass for the second process alone
def late_after_53(*args):
    late[0] = 700 * (script.RANK == 1 and args[3] >= 53)
    return update_ema(*args)
script.update_ema, time.time = late_after_53, lambda: clock() + late[0]
script.train(small_config(script, out=str(out / "late"), steps=56))
time.time = clock
try:
    script.train(small_config(script, out=str(out / "odd"), batch=9))
except script.UserError as error:
    said = str(error)

script = load("rf_sc")
net = small_net(script, nfe=4)
images = script.sample(net, net.cfg, range(5, 18))
torch.save((status, said, images, net.nfe), out / f"process{script.RANK}.pt")
script.leave(0)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes, started by torchrun, have done."""
    out = tmp_path_factory.mktemp("two")
    (out / "work.py").write_text(f"RUNS = {TWICE!r}\n{ON_TWO}")
    status, _, err = finish(start([str(out / "work.py"), str(out)], processes=2))
    assert status == 0, err[-3000:]
    return out


@pytest.mark.parametrize("run", ["uvit", "ddpm", "dit", "accum"])
def test_processes_and_accumulation_give_the_same_losses(run, two, tmp_path, monkeypatch):
    """1 x 8, 2 x 4, 1 x 2 x 4 and 2 x 2 x 2 images a step: but for rounding, as a mean of means is
    no mean."""
    script = load(TWICE[run][0])
    use_random_data(script, monkeypatch.setattr)
    script.train(small_config(script, out=str(tmp_path / "one"), **{**TWICE[run][1], "accum": 1}))
    one = losses(tmp_path / "one")
    assert len(one) == 20 and agree(losses(two / run), one)
    if run == "accum":
        script.train(small_config(script, out=str(tmp_path / "accum"), **TWICE[run][1]))
        assert agree(losses(tmp_path / "accum"), one)


def test_processes_agree_on_gradients(two, tmp_path, monkeypatch):
    """Of every weight, heads included, with BatchNorm and keys over the whole batch: after one
    step, Adam's first moment is 0.1 times the gradient. Sums over 8 images of numbers that cancel:
    1e-5, 80 ulps, of the whole gradient; a factor or a row that is missing would be a tenth of
    it."""
    script = load("edm_sc")
    use_random_data(script, monkeypatch.setattr)
    script.train(small_config(script, out=str(tmp_path / "one"), **TWICE["contrast"][1]))
    one, both = (final(out)["optimizer"]["state"] for out in (tmp_path / "one", two / "contrast"))
    a, b = (torch.cat([v["exp_avg"].flatten() for v in state.values()]) for state in (one, both))
    assert len(one) > 50 and (a - b).norm() < 1e-5 * a.norm()
    first, second = log(tmp_path / "one")[0], log(two / "contrast")[0]
    for name in ("loss", "contrast"):
        assert first[name] == pytest.approx(second[name], rel=1e-5)


def test_processes_act_as_one(two):
    """Images are those of one process, pixel by pixel, and each process has them all; they leave
    together, and log together though their clocks differ; a batch that does not divide is refused.
    The files are written once."""
    script = load("rf_sc")
    net = small_net(script, nfe=4)
    images = script.sample(net, net.cfg, range(5, 18))
    for rank in (0, 1):
        status, said, drawn, nfe = torch.load(two / f"process{rank}.pt", weights_only=True)
        assert torch.equal(drawn, images) and nfe == net.nfe == 4
        assert status == signal.SIGTERM and "--batch 9 does not divide by 2 processes" in said
    assert final(two / "left")["step"] == len(log(two / "left")) == 3
    assert [line["step"] for line in log(two / "late")] == [*range(1, 51), 56]
    assert not list(two.rglob("*.part"))


def test_the_first_process_may_take_hours(monkeypatch):
    """It decodes while the others wait, also under NCCL, whose barriers give up after minutes."""
    script, groups, waits = load("uvit_sc"), [], []
    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.setattr(script.dist, "new_group", lambda **how: groups.append(how) or "group")
    monkeypatch.setattr(script.dist, "barrier", waits.append)
    for rank, order in ((0, ["work", "group"]), (1, ["group", "work"])):
        monkeypatch.setattr(script, "LOCAL_RANK", rank)
        waits.clear()
        with script.one_process_first():
            waits.append("work")
        assert waits == order
    assert groups[0]["backend"] == "gloo" and groups[0]["timeout"].total_seconds() >= 6 * 3600


# ---- Settings of a run ---------------------------------------------------------------------------

@one
def test_another_run_is_refused_by_name(script, config, monkeypatch):
    """What bends a curve may not change, nor the data; what does not, may."""
    cfg = config(steps=1)
    script.train(cfg)
    with pytest.raises(script.UserError, match="seed: 0 there, 3 now.*lr: 0.001 there, 0.01 now"):
        script.train(config(lr=1e-2, seed=3, steps=2))
    with pytest.raises(script.UserError, match=r"; --init .*last.pt starts one anew"):
        script.train(config(lr=1e-2, steps=2))
    images, labels = random_data(script)
    monkeypatch.setattr(script, "load_data", lambda cfg, train: (255 - images, labels))
    with pytest.raises(script.UserError, match="data"):
        script.train(config(steps=2))
    use_random_data(script, monkeypatch.setattr)
    script.train(config(accum=2, save_every=7, steps=2))
    assert final(cfg.out)["step"] == 2


@one
def test_learning_rate_and_clipping(script, config, monkeypatch):
    """The rate rises over --warmup epochs of 8 steps and falls to 0 over the last --lr_decay of the
    run; gradients have a norm of --clip at most."""
    calls = spy(monkeypatch, script.nn.utils, "clip_grad_norm_")
    cfg = config(warmup=1.5, lr_decay=0.25, steps=20)
    script.train(cfg)
    expected = [1e-3 * min(1, (step + 1) / 12, (20 - step) / 5) for step in range(20)]
    assert [line["lr"] for line in log(cfg.out)] == pytest.approx(expected)
    script.train(config(clip=0.0, steps=1, out=cfg.out + "2"))
    assert [call.args[1] for call in calls] == [1] * 20 + [float("inf")]


@one
def test_a_loss_that_is_not_finite_ends_the_run(script, config, monkeypatch):
    """At the next line of the log, which is before the next checkpoint; the last good one stays."""
    script.train(config(steps=4))
    saved = Path(config().out, "last.pt").read_bytes()
    loss, calls = script.Diffusion.loss, []

    def once(*args):
        calls.append(1)
        return loss(*args) * (torch.nan if len(calls) == 49 else 1)
    monkeypatch.setattr(script.Diffusion, "loss", once)
    with pytest.raises(script.UserError, match="not finite at step 60"):
        script.train(config(steps=100))
    assert Path(config().out, "last.pt").read_bytes() == saved


@pytest.mark.parametrize("script, amp", [("edm_sc", "bf16"), ("uvit_sc", "fp16"),
                                         ("dit_latent_sc", "bf16")], indirect=["script"])
def test_mixed_precision(script, config, amp):
    """On the CPU as well; weights stay float32. bf16 keeps 8 bits, so that terms of a loss are
    wrong by up to 2^-8 of them, in either direction."""
    cfg, plain = config(steps=8, amp=amp), config(steps=8, out=config().out + "32")
    script.train(cfg)
    script.train(plain)
    state, pairs = final(cfg.out), list(zip(losses(cfg.out), losses(plain.out)))
    assert all(p.dtype == torch.float32 for p in state["model"].values())
    assert bool(state["scaler"]) == (amp == "fp16")
    assert 0 < max(abs(a / b - 1) for a, b in pairs) < 2 ** -6
    norm, exact = (log(run.out)[0]["grad_norm"] for run in (cfg, plain))
    assert norm == pytest.approx(exact, rel=2 ** -6)            # of gradients without fp16's scale


@pytest.mark.slow
@only("ddpm_sc", "uvit_sc", "dit_latent_sc")
def test_compiled_network(script, config):
    """--compile, where there is a compiler, gives the same losses but for rounding."""
    plain, compiled = config(steps=8), config(steps=8, compile=True, out=config().out + "c")
    script.train(plain)
    script.train(compiled)
    assert agree(losses(compiled.out), losses(plain.out))


# ---- Starting from weights -----------------------------------------------------------------------

@one
def test_init(script, config, tmp_path):
    """A state_dict or a checkpoint's averaged weights; at rate 0 they stay what they are. What does
    not fit is named; when the run goes on, the file need not be there, but is not another."""
    weights = small_net(script).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    torch.save(dict(ema=weights, model={}), tmp_path / "last.pt")
    for name in ("weights.pt", "last.pt"):
        cfg = config(init=str(tmp_path / name), lr=0.0, steps=1, out=str(tmp_path / f"from_{name}"))
        script.train(cfg)
        assert same(dict(final(cfg.out)["model"]), dict(weights))
    (tmp_path / "last.pt").unlink()
    script.train(dataclasses.replace(cfg, steps=2))
    with pytest.raises(script.UserError, match="init: .*last.pt there, .*weights.pt now"):
        script.train(dataclasses.replace(cfg, init=str(tmp_path / "weights.pt"), steps=3))
    del weights["mid_block.norm1.weight"]
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(script.UserError, match="does not fit.*mid_block.norm1.weight"):
        script.train(config(init=str(tmp_path / "weights.pt")))


@torch.no_grad()
def test_retrofit(script, tmp_path, capsys):
    """Weights of a network without self-conditioning start one with it. At first its output is the
    same: bit for bit, as W f is 0; with [CLS], a token that says nothing yet, nearly."""
    methods = {"UViT": ["cls"]}.get(script.Network.__name__, ["adaptive", "add"])
    baseline = small_net(script, self_cond="none")
    torch.save(dict(baseline.state_dict()), tmp_path / "baseline.pt")
    x, _ = random_data(script)
    x = x[:4, 0].float() if script.SCRIPT == "dit_latent_sc" else script.to_float(x[:4])
    c_noise = torch.tensor([0.1, 0.4, 0.6, 0.9])
    for method in methods:
        net = small_net(script, self_cond=method)
        script.load_weights(net, tmp_path / "baseline.pt")
        assert "cls_token" in capsys.readouterr().out or method != "cls"
        a, b = baseline(x, c_noise)[0], net(x, c_noise)[0]
        assert torch.equal(a, b) if method != "cls" else (a - b).norm() < 0.1 * a.norm()
        assert all(torch.equal(p, dict(net.named_parameters())[name])
                   for name, p in baseline.named_parameters() if name != "pos_embed")
    if methods != ["cls"]:              # half of what is added: a new s would scale a trained W
        torch.save(dict(net.state_dict()), tmp_path / "add.pt")
        with pytest.raises(script.UserError, match="add.pt does not fit this network.*sc_time"):
            script.load_weights(small_net(script, self_cond="adaptive"), tmp_path / "add.pt")


@only("dit_latent_sc")
def test_init_from_other_classes(script, config, tmp_path):
    """Is refused: the run could not be resumed. To be evaluated, a network keeps its classes."""
    net = small_net(script)
    table = net.y_embedder.embedding_table
    net.y_embedder.embedding_table = torch.nn.Embedding(4, table.embedding_dim)
    torch.save(dict(ema=net.state_dict()), tmp_path / "other.pt")
    with pytest.raises(script.UserError, match="does not fit this network.*embedding_table"):
        script.train(config(steps=1, init=str(tmp_path / "other.pt")))
    net = small_net(script)
    script.load_weights(net, tmp_path / "other.pt")
    assert net.null == 3


@one
def test_a_scaler_may_be_new(script, config):
    """A run in float32 or bf16 goes on where the GPU has fp16 alone."""
    cfg = config()
    off, on = (torch.amp.GradScaler("cpu", enabled=fp16) for fp16 in (False, True))
    script.save(cfg, "data", "last.pt", 3, dict(scaler=off))
    assert script.resume(cfg, "data", dict(scaler=on)) == 3


@only("dit_latent_sc")
def test_init_keeps_what_these_latents_are_normalised_by(script, config, tmp_path):
    """Weights may come from a run on other latents."""
    net = small_net(script)
    net.latent_mean += 3
    torch.save(dict(ema=net.state_dict()), tmp_path / "other.pt")
    cfg = config(steps=1, init=str(tmp_path / "other.pt"))
    script.train(cfg)
    assert not final(cfg.out)["model"]["latent_mean"].any()


# ---- Parts ---------------------------------------------------------------------------------------

def test_ema_rate():
    """min(rate, 1 - n^(-2/3)): the first call copies. Without the ramp, which LightningDiT does not
    have: the rate itself."""
    script = load("dit_latent_sc")
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False)
    for n, value, ramp in ((1, 3.0, True), (8, 5.0, True), (10**9, 7.0, True), (1, 9.0, False)):
        net.weight.data.fill_(value)
        before = ema.weight.item()
        script.update_ema(ema, net, 0.9, n, ramp)
        rate = min(0.9, 1 - n ** (-2 / 3)) if ramp else 0.9
        assert ema.weight.item() == pytest.approx(rate * before + (1 - rate) * value, rel=1e-6)
    ramps = [script.make_config(name).ema_ramp for name in ("glyphs", "folder", "imagenet")]
    assert ramps == [True, True, False]


@one
def test_batches_and_random_keys(script):
    """A batch has the next images of shuffled epochs. Keys that agree in their low 32 bits, or in
    their sum, give different streams."""
    order = torch.cat([script.batch_indices(10, 4, seed=1, step=step) for step in range(5)])
    assert order[:10].sort()[0].tolist() == order[10:].sort()[0].tolist() == list(range(10))
    other = torch.cat([script.batch_indices(10, 4, seed=2, step=step) for step in range(3)])
    assert not torch.equal(order[:10], order[10:]) and not torch.equal(order[:10], other[:10])
    keys = (0, 1), (1, 0), (0, 1, 0), (2**32, 1), (0, 2**32 + 1)
    assert len({script.rng(*key).initial_seed() for key in keys}) == 5


@only("uvit_sc", "dit_latent_sc")
def test_reading_batches(script, config):
    """From any step on, and each process its own rows."""
    images, labels = torch.arange(64).view(-1, 1), torch.arange(64)
    batches = script.read_batches(images, labels, config(), 3, slice(2, 6), torch.device("cpu"))
    for step in (3, 4):
        x, y = next(batches)
        assert y.tolist() == x[:, 0].tolist() == script.batch_indices(64, 8, 0, step)[2:6].tolist()
    batches.close()


def test_weight_decay_groups(script):
    """Appendix A: none on biases and positions, some on [CLS] and the rest; UNets have no decay, so
    that AdamW is Adam (Table 11)."""
    net = small_net(script)
    groups = script.make_optimizer(net, net.cfg).param_groups
    assert [group["weight_decay"] for group in groups] == [0.03, 0]
    free = {id(p) for p in groups[1]["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in free}
    assert all(name.endswith("bias") or name == "pos_embed" for name in names)
    assert len(groups[0]["params"]) + len(names) == len(list(net.parameters()))
