"""The training loop: exact resume, the same losses on any number of processes, faults that lose nothing."""
import dataclasses
import importlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from conftest import SCRIPTS, finish, flags, launch, losses


# The loop is one text in all scripts (test_copies.py): what follows it is tried with one, or one of each kind, and with the others by --slow.
one, kinds = (pytest.mark.parametrize("script", [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS],
                                      indirect=True) for fast in (["uvit_sc"], ["edm_sc", "uvit_sc", "dit_latent_sc"]))


def final(run):
    return torch.load(Path(run) / "last.pt", weights_only=True)


def same(a, b):
    """Bit-identical nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_run_folder(script, small):
    cfg = script.make_config(**small, sample_every=1, save_every=1)
    assert script.train(cfg) == 0
    names = {path.name for path in Path(cfg.out).iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "loss.png", "ckpt_0001.pt", "ckpt_0002.pt", "samples_0001.png",
                     "samples_0002.png"}
    state = final(cfg.out)
    assert set(state) == {"script", "config", "step", "model", "ema", "heads", "ema_heads", "optimizer", "scaler"}
    assert state["step"] == 16 and state["script"] == script.SCRIPT     # 2 epochs of 64 images in batches of 8
    assert script.Config(**state["config"]) == cfg == script.Config(**json.loads((Path(cfg.out) / "config.json").read_text()))
    line = json.loads((Path(cfg.out) / "log.jsonl").read_text().splitlines()[-1])
    assert set(line) == {"step", "epoch", "loss", "loss_by_time", "lr", "grad_norm", "images_per_second"} and line["epoch"] == 2


@one
def test_files_come_where_a_step_is_several_epochs(script, small):
    """64 images in steps of 200: epochs 3, 6, 9 and 12 are seen, and each step passes one that is due."""
    script.train(script.make_config(**{**small, "batch": 200, "epochs": 10, "save_every": 2, "sample_every": 5}))
    names = sorted(path.name for path in Path(small["out"]).glob("*_*.p*"))
    assert names == [f"ckpt_{epoch:04d}.pt" for epoch in (3, 6, 9, 12)] + ["samples_0006.png", "samples_0012.png"]


@one
def test_steps_rule_over_epochs(script, small):
    cfg = script.make_config(**small, steps=3)
    script.train(cfg)
    assert final(cfg.out)["step"] == 3


@kinds
def test_resume_equals_no_interruption(script, small, tmp_path, capsys):
    """N + N steps are 2N steps, bit for bit, with dropout, augmentation and contrast; the log as well."""
    small = {**small, "dropout": 0.1, "aug": 0.5, "cl": 0.01, "cl_hidden": 32}
    whole = script.make_config(**{**small, "out": str(tmp_path / "whole"), "steps": 12})
    script.train(whole)
    for steps in (5, 12):
        halves = script.make_config(**small, steps=steps)
        script.train(halves)
    assert "resumed at step 5" in capsys.readouterr().out
    a, b = final(whole.out), final(halves.out)
    assert all(same(a[k], b[k]) for k in a if k != "config") and a["ema_heads"]
    assert losses(whole.out) == losses(halves.out) and len(losses(whole.out)) == 12


@pytest.mark.slow
def test_kills(small, tmp_path):
    """SIGKILL at random moments, twice; the run that ends at last has the weights of one that was never interrupted.
    The loop is the same text in every script; once is enough. (test_faults_slow.py kills each of them six times.)"""
    script = importlib.import_module("uvit_sc")
    small = {**small, "epochs": 12, "save_every": 1, "sample_every": 1000}      # 96 steps, a save after each 8
    whole = launch(script.SCRIPT, flags({**small, "out": tmp_path / "whole"}))
    chance, log = random.Random(0), Path(small["out"]) / "log.jsonl"
    lines = lambda: log.read_text().count("\n") if log.exists() else 0
    for _ in range(2):
        process, seen, more = launch(script.SCRIPT, flags(small)), 0, chance.uniform(10, 30)
        while (now := lines()) < seen + more and process.poll() is None:
            seen = min(seen, now) if now else seen
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    status, out, err = finish(launch(script.SCRIPT, flags(small)))
    assert status == 0 and "resumed at step" in out, err
    assert finish(whole)[0] == 0
    a, b = final(tmp_path / "whole"), final(small["out"])
    assert a["step"] == b["step"] == 96 and same(a["ema"], b["ema"]) and same(a["optimizer"], b["optimizer"])


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_and_leave(small, number):
    process = launch("uvit_sc", flags({**small, "epochs": 100000}))
    log = Path(small["out"]) / "log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.1)
    process.send_signal(number)
    status, out, err = finish(process)
    assert status == 128 + number and "goes on from there" in out and "Traceback" not in err
    assert final(small["out"])["step"] >= 5


@one
def test_other_config_is_refused_by_name(script, small):
    script.train(script.make_config(**small, steps=1))
    with pytest.raises(script.UserError, match=r"lr \(0.0004 there, 0.001 now\).*seed \(0 there, 3 now\)|"
                                               r"seed \(0 there, 3 now\).*lr \(.* there, 0.001 now\)"):
        script.train(script.make_config(**{**small, "lr": 1e-3, "seed": 3}, steps=2))
    with pytest.raises(script.UserError, match=r"; --init .*last.pt starts one anew from its averaged weights"):
        script.train(script.make_config(**{**small, "lr": 1e-3}, steps=2))
    script.train(script.make_config(**{**small, "accum": 2, "save_every": 7}, steps=2))     # these bend no curve
    assert final(small["out"])["step"] == 2


@one
def test_a_run_from_before_a_field_was_there_goes_on(script, small):
    """A field of the config that is newer than the run has had its default."""
    script.train(script.make_config(**small, steps=1))
    state = final(small["out"])
    del state["config"]["ema_ramp"]
    torch.save(state, Path(small["out"]) / "last.pt")
    with pytest.raises(script.UserError, match=r"ema_ramp \(True there, False now\)"):
        script.train(script.make_config(**small, ema_ramp=False, steps=2))
    script.train(script.make_config(**small, steps=2))
    assert final(small["out"])["step"] == 2


@pytest.mark.parametrize("script", [pytest.param("ddpm_sc", marks=pytest.mark.slow), "uvit_sc"], indirect=True)
def test_processes_and_accumulation_give_the_same_losses(script, small, tmp_path):
    """1 x 8, 2 x 4 and 2 x 2 x 2 images: the same losses to 1e-5 over 20 steps, the same weights to 1e-4: Adam turns the
    rounding errors of gradients near zero into whole steps, and more so in UNets, whose norms hide the scale of some weights."""
    runs = {"one": (1, 1), "accum": (1, 2), "two": (2, 1), "both": (2, 2)}
    started = {name: launch(script.SCRIPT, flags({**small, "steps": 20, "accum": accum, "out": tmp_path / name}), processes)
               for name, (processes, accum) in runs.items()}
    for name, process in started.items():
        status, _, err = finish(process, timeout=200)
        assert status == 0, f"{name}: {err[-2000:]}"
    for name in set(runs) - {"one"}:
        difference = torch.tensor(losses(tmp_path / "one")) - torch.tensor(losses(tmp_path / name))
        assert len(difference) == 20 and difference.abs().max() < 1e-5, name
        for a, b in zip(final(tmp_path / "one")["ema"].values(), final(tmp_path / name)["ema"].values()):
            assert (a - b).abs().max() < 1e-4, name


@one
def test_warm_up_and_clipping(script, small, monkeypatch):
    """The learning rate rises in equal steps over --warmup epochs, 8 steps each; gradients have a norm of 1 at most."""
    limits, clip = [], script.nn.utils.clip_grad_norm_
    monkeypatch.setattr(script.nn.utils, "clip_grad_norm_", lambda parameters, norm: (limits.append(norm), clip(parameters, norm))[1])
    script.train(script.make_config(**{**small, "warmup": 1.5}, steps=16))
    lines = map(json.loads, (Path(small["out"]) / "log.jsonl").read_text().splitlines())
    lr = small.get("lr", script.Config.lr)
    assert [line["lr"] for line in lines] == pytest.approx([lr * min(1, step / 12) for step in range(1, 17)])
    assert limits == [1] * 16


@one
def test_nonfinite_gradients_are_skipped(script, small, monkeypatch):
    """A NaN step changes no weight and the run goes on; ten in a row end it with the last good checkpoint untouched."""
    script.train(script.make_config(**small, steps=4))
    good = final(small["out"])
    true_loss, calls = script.Diffusion.loss, []

    def poisoned(self, *args):
        calls.append(1)
        return true_loss(self, *args) * (torch.nan if len(calls) in nan_calls else 1)

    monkeypatch.setattr(script.Diffusion, "loss", poisoned)
    nan_calls = {1}
    script.train(script.make_config(**small, steps=5))
    assert same(final(small["out"])["model"], good["model"])
    assert losses(small["out"])[-1] is None
    saved = (Path(small["out"]) / "last.pt").read_bytes()
    nan_calls = set(range(1000))
    with pytest.raises(script.UserError, match="no finite gradient in 10 steps"):
        script.train(script.make_config(**small, steps=60))
    assert (Path(small["out"]) / "last.pt").read_bytes() == saved


@pytest.mark.parametrize("script, amp", [("edm_sc", "bf16"), ("dit_latent_sc", "fp16"), *(pytest.param(*both, marks=pytest.mark.slow) for both in (
    ("ddpm_sc", "bf16"), ("rf_sc", "bf16"), ("uvit_sc", "bf16"), ("dit_latent_sc", "bf16"), ("edm_sc", "fp16")))], indirect=["script"])
def test_mixed_precision(script, small, amp):
    """Both run on the CPU as well; weights stay float32 and the losses stay near those of float32."""
    script.train(script.make_config(**small, steps=8, amp=amp))
    mixed, state = losses(small["out"]), final(small["out"])
    assert all(p.dtype == torch.float32 for p in state["model"].values())
    assert bool(state["scaler"]) == (amp == "fp16")
    script.train(script.make_config(**{**small, "out": small["out"] + "32"}, steps=8))
    pairs = [(a, b) for a, b in zip(mixed, losses(small["out"] + "32")) if a is not None]       # fp16 may skip the first steps
    assert len(pairs) > 4 and 0 < max(abs(a - b) for a, b in pairs) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ddpm_sc", "uvit_sc", "dit_latent_sc"], indirect=True)
def test_compiled_network(script, small, monkeypatch):
    """--compile gives the losses of the eager network, where there is a compiler."""
    compiled, true = [], script.Backbone.compile
    monkeypatch.setattr(script.Backbone, "compile", lambda self, *args, **more: (compiled.append(1), true(self, *args, **more))[1])
    script.train(script.make_config(**small, steps=8))
    assert not compiled
    script.train(script.make_config(**{**small, "out": small["out"] + "c"}, steps=8, compile=True))
    assert compiled
    assert max(abs(a - b) for a, b in zip(losses(small["out"]), losses(small["out"] + "c"))) < 1e-5


def test_ema_rate():
    """min(rate, 1 - n^(-2/3)): the first call copies; buffers are copied, never averaged. Without the ramp, which the latents of
    ImageNet do not have in LightningDiT: the rate itself."""
    import uvit_sc
    net, ema = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1).requires_grad_(False)
    for n, value in ((1, 3.0), (8, 5.0), (10**9, 7.0)):
        net.weight.data.fill_(value)
        net.running_mean.fill_(value)
        before = ema.weight.item()
        uvit_sc.update_ema(ema, net, 0.9, n)
        rate = min(0.9, 1 - n ** (-2 / 3))
        assert ema.weight.item() == pytest.approx(rate * before + (1 - rate) * value, rel=1e-6)
        assert ema.running_mean.item() == value
    before = ema.weight.item()
    uvit_sc.update_ema(ema, net, 0.9, 1, ramp=False)
    assert ema.weight.item() == pytest.approx(0.9 * before + 0.1 * 7)
    import dit_latent_sc
    assert [dit_latent_sc.make_config(name).ema_ramp for name in ("glyphs", "folder", "imagenet", "imagenet100")] == [True, True, False, False]


def test_batches_see_every_image_once_an_epoch(script):
    n, batch = 10, 4
    order = torch.cat([script.batch_indices(n, batch, seed=1, step=step) for step in range(5)])
    assert order[:10].sort()[0].tolist() == order[10:].sort()[0].tolist() == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert not torch.equal(order[:10], torch.cat([script.batch_indices(n, batch, seed=2, step=s) for s in range(3)])[:10])


def test_random_keys_do_not_collide(script):
    """Keys that agree in their low 32 bits, or in their sum, still give different streams."""
    first = {script.rng(*key).initial_seed() for key in ((0, 1), (1, 0), (0, 1, 0), (2**32, 1), (0, 2**32 + 1))}
    assert len(first) == 5


def test_reading_ahead(script):
    """A thread reads what has to come from elsewhere; where the images lie on the device, none touches it."""
    images, classes = torch.arange(64).view(-1, 1), torch.arange(64)
    cfg, here, there = script.make_config(batch=8), torch.device("cpu"), torch.device("meta")
    for data, device, threads in ((images, here, 0), (images.to(there), there, 0), (images, there, 1)):
        before, batches = threading.active_count(), script.read_batches(data, classes, cfg, 3, slice(2, 6), device)
        for step in (3, 4):
            x, y = next(batches)
            assert x.shape == (4, 1) and x.device == y.device == device and threading.active_count() == before + threads
            assert device == there or y.tolist() == x[:, 0].tolist() == script.batch_indices(64, 8, 0, step)[2:6].tolist()
        batches.close()


def test_the_first_process_may_take_hours(script, monkeypatch):
    """Also under NCCL, whose barriers do not wait as long as they are told."""
    groups, waits = [], []
    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.setattr(script.dist, "new_group", lambda **how: groups.append(how) or "group")
    monkeypatch.setattr(script.dist, "barrier", waits.append)
    with script.one_process_first():
        waits.append("work")
    assert groups[0]["backend"] == "gloo" and groups[0]["timeout"].total_seconds() >= 6 * 3600 and waits == ["work", "group"]
    monkeypatch.setattr(script, "LOCAL_RANK", 1)
    with script.one_process_first():
        waits.append("work")
    assert waits[2:] == ["group", "work"]


def test_an_error_is_shown_before_others_are_waited_for(script, monkeypatch, tmp_path):
    """The group is left in peace where an error is under way: NCCL would wait for processes that wait for this one."""
    left, result = [], [0, ZeroDivisionError("a fault of ours")]

    def train(cfg):
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(script.dist, "destroy_process_group", lambda: left.append(1))
    assert script.main(["--out", str(tmp_path)]) == 0 and left == [1]
    result.pop(0)
    with pytest.raises(ZeroDivisionError):
        script.main(["--out", str(tmp_path)])
    assert left == [1]


def test_weight_decay_groups():
    """Appendix A: none on biases and positional embedding, some on [CLS] and the rest."""
    import uvit_sc
    net = uvit_sc.build_net(uvit_sc.make_config("cifar10", backbone="uvit_tiny"))
    decayed = {id(p) for p in uvit_sc.make_optimizer(net, net.cfg).param_groups[0]["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in decayed}
    assert {"cls_token", "patch_embed.proj.weight", "norm.weight", "mid_block.attn.qkv.weight"} <= names
    assert "pos_embed" not in names and not any(name.endswith("bias") for name in names)


@one
def test_resume_without_log_or_loss_scale(script, small):
    """last.pt alone is enough; a run begun without loss scaling goes on where fp16 needs it, and --init is not read again."""
    script.train(script.make_config(**small, steps=2))
    (Path(small["out"]) / "log.jsonl").unlink()
    script.train(script.make_config(**{**small, "init": "gone.pt"}, steps=3))
    assert len(losses(small["out"])) == 1
    cfg = script.make_config(**small)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    script.restore(Path(small["out"]) / "last.pt", cfg, dict(scaler=scaler))
    assert scaler.is_enabled() and not final(small["out"])["scaler"]


def test_init_starts_from_given_weights(script, small, tmp_path):
    script.train(script.make_config(**small, steps=2))
    weights = final(small["out"])["ema"]
    torch.save(weights, tmp_path / "weights.pt")
    for source in (tmp_path / "weights.pt", Path(small["out"]) / "last.pt"):
        net = script.build_net(script.make_config(**small))
        script.load_weights(net, source)
        assert same(dict(net.state_dict()), dict(weights))
    gone = next(name for name in weights if name.endswith("norm1.weight"))
    del weights[gone]
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(script.UserError, match=f"does not fit.*{gone}"):
        script.load_weights(net, tmp_path / "weights.pt")
