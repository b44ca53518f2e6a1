"""Many faults, a quarter of an hour and more of them: python -m pytest -q -s tests --slow. A table of what was injected, how often
and with what outcome is printed."""
import collections
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SCRIPTS, finish, flags, launch, losses
from test_faults import files_end_at, final, flipped, fuzz, goes_on, same, wait_for, workers

pytestmark = pytest.mark.slow


def tell(what, outcomes, capsys=None):
    with getattr(capsys, "disabled", contextlib.nullcontext)():
        print(f"\n| {what} | {sum(outcomes.values())} | {', '.join(f'{n} {k}' for k, n in outcomes.items())} |")


DEADLY = """
import os, signal, sys
sys.path.insert(0, {root!r})
import {script} as script
count = 0

def deadly(call):
    def dies(*args, **kwargs):
        global count
        count += 1
        if count == {k}:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return dies

class File:     # dies in the k-th of many writes of torch.save
    def __init__(self, file): self.file = file
    def write(self, data): return deadly(self.file.write)(data)
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()

if {point!r} == "write":
    script.open = lambda path, *mode: File(open(path, *mode)) if str(path).endswith(".part") else open(path, *mode)
else:
    setattr(script.os, {point!r}, deadly(getattr(os, {point!r})))
sys.exit(script.main({argv!r}))
"""


def test_killed_in_the_middle_of_writing(script, small, tmp_path):
    """SIGKILL within torch.save, before fsync and before the renaming, of the first, second, ... file: last.pt is whole at every
    moment, and the run ends with the weights of one that was never touched."""
    small, outcomes, chance = {**small, "save_every": 1, "sample_every": 1000, "epochs": 4}, collections.Counter(), random.Random(0)
    whole = script.make_config(**{**small, "out": str(tmp_path / "whole")})
    script.train(whole)
    last = Path(small["out"], "last.pt")
    for point in ("write", "fsync", "replace"):
        for k in ([chance.randint(2, 400) for _ in range(4)] if point == "write" else (1, 3)):
            text = DEADLY.format(root=str(ROOT), script=script.SCRIPT, k=k, point=point, argv=flags(small))
            process = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
            assert process.returncode in (-signal.SIGKILL, 0), process.stderr
            outcomes[f"killed in {point}" if process.returncode else "came too late to kill"] += 1
            if last.exists():
                final(small["out"])         # raises if it is no whole file
            if process.returncode == 0:
                last.unlink()
    script.train(script.make_config(**small))
    a, b = final(tmp_path / "whole"), final(small["out"])
    assert a["step"] == b["step"] and same(a["ema"], b["ema"]) and same(a["optimizer"], b["optimizer"])
    assert losses(tmp_path / "whole") == losses(small["out"])
    assert sum(n for k, n in outcomes.items() if k.startswith("killed")) >= 5
    tell(f"SIGKILL while {script.SCRIPT} writes", outcomes)


def test_killed_at_random_moments(script, small, tmp_path):
    small = {**small, "epochs": 25, "save_every": 1, "sample_every": 1000}
    script.train(script.make_config(**{**small, "out": str(tmp_path / "whole")}))
    log, chance, outcomes = Path(small["out"], "log.jsonl"), random.Random(script.SCRIPT), collections.Counter()
    for _ in range(6):
        process, before = launch(script.SCRIPT, flags(small)), log.read_text().count("\n") if log.exists() else 0
        more = chance.uniform(3, 15)
        wait_for(lambda: process.poll() is not None or log.exists() and log.read_text().count("\n") > before + more)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        outcomes["killed" if process.wait() == -signal.SIGKILL else "had ended"] += 1
    status, out, err = finish(launch(script.SCRIPT, flags(small)))
    assert status == 0, err
    a, b = final(tmp_path / "whole"), final(small["out"])
    assert a["step"] == b["step"] and same(a["ema"], b["ema"]) and same(a["optimizer"], b["optimizer"])
    tell(f"SIGKILL of {script.SCRIPT} at a random moment", outcomes)


def test_flipped_bits_everywhere(script, small):
    script.train(script.make_config(**small, steps=1))
    path, chance, outcomes = Path(small["out"], "last.pt"), random.Random(1), collections.Counter()
    good = final(small["out"])
    for i in range(60):     # a third of them at the end, where the directory of the file lies
        size = path.stat().st_size
        found = flipped(path, chance.randrange(size) if i % 3 else size - 1 - chance.randrange(20000), chance.randrange(8))
        assert found is None or same(found, good)
        outcomes["refused" if found is None else "harmless (padding)"] += 1
    tell(f"a bit turned in last.pt of {script.SCRIPT}", outcomes)


def test_full_and_read_only_disks(script, small, tmp_path, capsys):
    """A tmpfs that is a little too small, where we may mount one, and files that cannot grow; a folder without leave to write."""
    script.train(script.make_config(**small, steps=2))
    path, outcomes = Path(small["out"], "last.pt"), collections.Counter()
    size = path.stat().st_size
    for percent in range(5, 100, 10):
        with files_end_at(size * percent // 100):
            assert "cannot be written" in goes_on(script, small, capsys)
        outcomes["one line, last.pt as before"] += 1
    tell(f"disk full at 5, 15, ... 95 % of a file, {script.SCRIPT}", outcomes, capsys)
    disk, outcomes = tmp_path / "disk", collections.Counter()
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)], capture_output=True).returncode == 0
    if not mounted:
        return tell("tmpfs: mounting is not allowed here", outcomes)
    try:
        small = {**small, "out": str(disk / "run")}
        Path(small["out"]).mkdir()
        (disk / "run" / "last.pt").write_bytes(path.read_bytes())
        line = goes_on(script, small, capsys)
        assert "cannot be written" in line
        outcomes["one line, last.pt as before"] += 1
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert "Read-only file system" in goes_on(script, small, capsys)
        outcomes["one line, last.pt as before"] += 1
        tell(f"tmpfs, full, then read-only, {script.SCRIPT}", outcomes, capsys)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("script", ["uvit_sc", "edm_sc"], indirect=True)
def test_deaths_and_orders_to_leave_then_other_numbers_of_processes(script, small, tmp_path):
    """Two processes, one killed; on four, told to end by a scheduler; on one, then two, to the end: the losses are those of a
    run on one process that nothing befell."""
    small = {**small, "save_every": 1, "sample_every": 1000, "epochs": 16, "batch": 8}
    script.train(script.make_config(**{**small, "out": str(tmp_path / "whole")}))
    log, outcomes = Path(small["out"], "log.jsonl"), collections.Counter()
    lines = lambda: log.read_text().count("\n") if log.exists() else 0
    for processes, victim in ((2, 1), (2, 0), (4, 2)):
        before, process = lines(), launch(script.SCRIPT, flags(small), processes)
        wait_for(lambda: lines() > max(before, 8) + 3 or process.poll() is not None)
        os.kill(workers(process)[victim], signal.SIGKILL)
        began = time.time()
        status, out, err = finish(process)
        assert status != 0 and time.time() - began < 60 and "has lost another one" in err
        outcomes["the others ended within a minute"] += 1
    before, process = lines(), launch(script.SCRIPT, flags(small), 2)
    wait_for(lambda: lines() > before + 3)
    process.send_signal(signal.SIGTERM)         # as a scheduler: torchrun hands it on
    status, out, err = finish(process)
    assert status != 0 and "goes on from there" in out
    outcomes["saved and left"] += 1
    for processes, steps in ((1, 100), (2, 128)):
        status, out, err = finish(launch(script.SCRIPT, flags({**small, "steps": steps}), processes))
        assert status == 0 and "resumed at step" in out, err
        outcomes[f"resumed on {processes}"] += 1
    a, b = losses(tmp_path / "whole"), losses(small["out"])
    shown = [(x, y) for x, y in zip(a, b)]
    assert len(a) == len(b) and max(abs(x - y) for x, y in shown) < 2e-5
    tell(f"processes killed, told to end, resumed on others, {script.SCRIPT}", outcomes)


def test_two_machines(small, tmp_path):
    """torchrun --nnodes=2, two agents that meet over the loopback address: the losses of one process, one set of files."""
    port = str(random.randint(20000, 40000))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d",
               f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=7", str(ROOT / "uvit_sc.py"), *flags({**small, "steps": 12})]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1")) for _ in range(2)]
    ends = [finish(agent) for agent in agents]
    assert [status for status, *_ in ends] == [0, 0], ends
    assert sum("4 x cpu" in out for _, out, _ in ends) == 1
    import uvit_sc
    uvit_sc.train(uvit_sc.make_config(**{**small, "steps": 12, "out": str(tmp_path / "one")}))
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(small["out"]))) < 1e-5


def test_many_fuzzed_command_lines(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused = fuzz(script, random.Random(f"slow {script.SCRIPT}"), capsys, monkeypatch, 400)
    tell(f"random command lines of {script.SCRIPT}", dict(refused=refused, valid=400 - refused), capsys)


def test_fuzzed_runs(script, small, capsys, tmp_path):
    """Random settings that pass for valid really train a step, or end with one line."""
    chance, outcomes = random.Random(script.SCRIPT), collections.Counter()
    values = dict(batch=[1, 2, 3, 7, 16], accum=[1, 2, 3], lr=[0, 1e-3, 1], warmup=[0, 0.01, 50], dropout=[0, 0.9], ema=[0, 0.999999],
                  aug=[0, 0.5, 1], cl=[0, 0.01, 1], cl_hidden=[1, 8], cl_head=["time", "plain"], cl_target=["probe", "min"],
                  cl_feature=["gap", "cls"], aug_mask=[0, 1], amp=["off", "auto", "bf16", "fp16"], weight_decay=[0, 1], nfe=[1, 2, 3],
                  self_cond=["none", "add", "adaptive", "cls"], layer=["out_1", "out_2", "cls_1", "block_1", "block_4"], beta1=[0, 0.99],
                  beta2=[0, 0.999], save_every=[1, 9], sample_every=[1, 9], seed=[0, 2**32 - 1], uncond=[None], guidance=[0, 1, 3],
                  pos_init=["normal", "sincos"], patch=[4, 8, 16], cell=[2, 4, 8], tol=[1e-3, 1], time_scale=[1e-3, 1], tokenizer=["unshuffle"])
    known = [name for name in values if hasattr(script.Config, name)]
    for i in range(25):
        fields = {**small, "steps": 2, "out": str(tmp_path / f"run{i}")}
        fields |= {name: chance.choice(values[name]) for name in chance.sample(known, chance.randint(1, 4))}
        argv = [word for name, value in fields.items() for word in ([f"--{name}"] if value is None else [f"--{name}", str(value)])]
        try:
            assert script.main(argv) == 0
            assert final(fields["out"])["step"] == 2
            outcomes["trained"] += 1
        except SystemExit as end:
            err = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith(script.SCRIPT)]
            assert end.code == 2 and len(err) == 1 and not Path(fields["out"]).exists(), (argv, err)
            outcomes["refused"] += 1
    assert outcomes["trained"] >= 5
    tell(f"random settings, two steps, {script.SCRIPT}", outcomes, capsys)
