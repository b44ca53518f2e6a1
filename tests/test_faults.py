"""Faults of disks, files, processes and users: a run goes on exactly or ends with one line, and the last good checkpoint is
never harmed. Here a few of each kind; test_faults_slow.py has many."""
import ast
import contextlib
import copy
import fcntl
import io
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, SCRIPTS, finish, flags, launch, losses
from test_cli import ends_with_one_line
from test_train import final, same


# What these test is one text in all scripts (test_copies.py): one is enough here, the others are for --slow.
each = pytest.mark.parametrize("script", ["uvit_sc", *(pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS if name != "uvit_sc")],
                               indirect=True)


@pytest.fixture
def run(script, small):
    """A run of two steps: its fields and the path of its good checkpoint."""
    script.train(script.make_config(**small, steps=2))
    return small, Path(small["out"], "last.pt")


def goes_on(script, small, capsys):
    """Whether a run goes on to step 3 (True), or ends with one line and status 2, which it then returns."""
    before = Path(small["out"], "last.pt").read_bytes()
    try:
        assert script.main(flags({**small, "steps": 3})) == 0
        capsys.readouterr()
        return True
    except SystemExit as end:
        lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.strip()]
        lines = [line for line in lines if not line.startswith("note: ") and "step/s" not in line]      # the bar of the steps
        assert end.code == 2 and len(lines) == 1 and lines[0].startswith(f"{script.SCRIPT}: "), lines
        assert Path(small["out"], "last.pt").read_bytes() == before, "the file was touched"
        return lines[0]


# ---- Checkpoints that are not what they should be --------------------------------------------------------------------

@each
def test_truncated_checkpoints(script, run, capsys):
    """At every tenth of its length, and without its last byte."""
    small, path = run
    whole = path.read_bytes()
    for size in [len(whole) * i // 10 for i in range(10)] + [len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(script.UserError, match="damaged or no checkpoint"):
            script.read_checkpoint(path)
    assert f"{path} is damaged or no checkpoint" in goes_on(script, small, capsys)
    path.write_bytes(whole)
    assert goes_on(script, small, capsys) is True


def flipped(path, place, bit):
    """What torch.load makes of a file with one bit turned: its contents, or None if it is refused."""
    import uvit_sc
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    bad = path.with_name("bad.pt")
    bad.write_bytes(data)
    with contextlib.suppress(uvit_sc.UserError):
        return uvit_sc.read_checkpoint(bad)


@pytest.mark.parametrize("script", ["uvit_sc"], indirect=True)
def test_flipped_bits(script, run):
    """A file with a turned bit is refused, unless the bit lies in padding and changes nothing."""
    _, path = run
    good, chance, refused = final(path.parent), random.Random(0), 0
    for _ in range(25):
        found = flipped(path, chance.randrange(path.stat().st_size), chance.randrange(8))
        refused += found is None
        assert found is None or same(found, good)
    assert refused > 15


class Code:
    """Carries a call into a pickle."""
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return self.target.touch, ()


@each
def test_foreign_checkpoints(script, run, capsys, tmp_path):
    """What is no state of this run is refused in one line; keys that are unknown here do no harm."""
    small, path = run
    good = final(path.parent)
    name = next(iter(good["model"]))
    other = next(s for s in SCRIPTS if s != script.SCRIPT)

    def with_(part, key, value):
        state = copy.deepcopy(good)
        (state if part is None else state[part])[key] = value
        return state
    nan = torch.full_like(good["model"][name], torch.nan)
    moments = copy.deepcopy(good)
    moments["optimizer"]["state"][0]["exp_avg"].fill_(torch.inf)
    cases = [
        (with_(None, "script", other), f"script ({other} there, {script.SCRIPT} now)"),
        (with_("config", "lr", 0.5), "lr (0.5 there"), (with_("config", "seed", 7), "seed (7 there"),
        (with_("model", name, nan), "has numbers that"), (with_("ema", name, nan), "has numbers that"), (moments, "has numbers that"),
        (with_("model", name, torch.zeros(3, 5)), "no state of this run"), (with_("model", "more", torch.zeros(2)), "no state of this run"),
        (with_("optimizer", "param_groups", []), "no state of this run"), (with_(None, "model", {}), "no state"),
        (with_(None, "optimizer", [1]), "no state of this run"), (with_(None, "step", "many"), "or no step"),
        (with_(None, "config", None), "no state"), (good["ema"], "no state"), ([1, 2], "no state"), (torch.zeros(3), "no state"),
        ({k: v for k, v in good.items() if k != "optimizer"}, "no state"), ({}, "no state"),
        (with_(None, "note", Code(tmp_path / "harm")), "damaged or no checkpoint"),
    ]
    cases += [(with_("config", "lr", torch.ones(2)), "no state"), (with_(None, "config", {1: 2}), "no state|other settings"),
              (with_(None, "more", torch.eye(2).to_sparse()), "no state|True")]
    for state, says in cases:
        torch.save(state, path)
        line = str(goes_on(script, small, capsys))
        assert re.search(says if "|" in says else re.escape(says), line), (says, line)
    assert not (tmp_path / "harm").exists()
    torch.save(with_("config", "of_the_future", 1) | {"remark": "kept by hand"}, path)
    assert goes_on(script, small, capsys) is True


@each
def test_configs_of_wrong_types(script, run, capsys):
    _, path = run
    good = final(path.parent)
    for config in ({"batch": "8"}, {"lr": None}, {"layer": 3}, {"dataset": ["cifar100"]}, {"no_field": 1}, None, [1], {1: 2}):
        torch.save({**good, "config": config}, path)
        for words in (["--sample", path], ["--resume", "--out", path.parent]):
            assert str(path) in ends_with_one_line(script, words, capsys)
    torch.save([1], path)
    assert "is no checkpoint" in ends_with_one_line(script, ["--resume", "--out", path.parent], capsys)
    with pytest.raises(script.UserError, match="--lr '1e-3': must be of type float"):
        script.make_config(lr="1e-3")


# ---- Disks -----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def files_end_at(size):
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@each
def test_full_disk(script, run, capsys):
    """In the middle of writing a checkpoint: one line, the old file stays, no part is left, and the run can go on."""
    small, path = run
    for share in (0.02, 0.5, 0.99):
        with files_end_at(int(path.stat().st_size * share)):
            line = goes_on(script, small, capsys)
        assert "cannot be written" in line and "is the disk full?" in line
        assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]
    assert goes_on(script, small, capsys) is True


@each
def test_leftover_parts_do_no_harm(script, run, capsys):
    small, path = run
    left = path.with_name(".last.pt.elsewhere.1.part")
    left.write_bytes(b"of a killed run")
    assert goes_on(script, small, capsys) is True and not left.exists()


@each
def test_broken_log(script, run, capsys):
    """The log of a machine that lost power: what is whole before the damage stays, and the run goes on."""
    small, path = run
    log = path.with_name("log.jsonl")
    first = log.read_bytes().splitlines(keepends=True)[0]
    for rest in (b"\0\0\0\0", b"\xff\xfe{}\n", b"[1]\n", b"{\"step\": \"x\"}\n", b"null\n{", b"{\"loss\": 1}\n", b"{\"step\": 2, \"loss\": 1}"):
        torch.save(final(path.parent) | {"step": 2}, path)
        log.write_bytes(first + rest)
        script.train(script.make_config(**small, steps=3))
        assert len(losses(path.parent)) == 2 and log.read_bytes().startswith(first)


@each
def test_a_second_run_in_the_same_folder_is_refused(script, run, capsys):
    small, path = run
    with open(path.with_name("log.jsonl"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another run" in goes_on(script, small, capsys)
    assert goes_on(script, small, capsys) is True


# ---- Numbers and processes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", ["uvit_sc"], indirect=True)
def test_loss_scale_collapse(script, run, capsys, monkeypatch):
    """fp16 whose gradients overflow at any scale: ten steps are skipped, then the run ends and the checkpoint stands."""
    small, path = run
    small = {**small, "amp": "fp16", "out": small["out"] + "16"}
    script.train(script.make_config(**small, steps=2))
    true_loss = script.Diffusion.loss
    monkeypatch.setattr(script.Diffusion, "loss", lambda *args: true_loss(*args) * 1e36)
    saved = Path(small["out"], "last.pt").read_bytes()
    with pytest.raises(script.UserError, match="no finite gradient in 10 steps in a row, up to step 12; .*--amp off"):
        script.train(script.make_config(**{**small, "steps": 60}))
    assert Path(small["out"], "last.pt").read_bytes() == saved


@pytest.mark.parametrize("script", ["uvit_sc"], indirect=True)
def test_weights_that_are_not_finite_are_never_saved(script, run, capsys, monkeypatch):
    small, path = run
    ema = script.update_ema
    monkeypatch.setattr(script, "update_ema", lambda mean, net, *rest: (ema(mean, net, *rest), next(mean.parameters()).fill_(torch.nan)))
    assert "not finite at step 3" in goes_on(script, small, capsys)


@pytest.mark.parametrize("script", ["uvit_sc"], indirect=True)
def test_out_of_memory_is_one_line(script, small, capsys, monkeypatch):
    def greedy(cfg):
        raise error
    monkeypatch.setattr(script, "train", greedy)
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")):
        assert "training needs less with a larger --accum or a smaller --batch" in ends_with_one_line(script, flags(small), capsys)
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="of ours"):
        script.main(flags(small))


@pytest.mark.parametrize("script", ["uvit_sc"], indirect=True)
def test_after_an_exception_the_folder_and_the_signals_are_free(script, run, monkeypatch):
    """In a notebook that keeps the exception: the next run may start, and Ctrl-C works."""
    small, path = run
    before, sample = signal.getsignal(signal.SIGINT), script.sample
    monkeypatch.setattr(script, "sample", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        script.train(script.make_config(**small, steps=3))
    assert kept and signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(script, "sample", sample)
    assert script.train(script.make_config(**small, steps=4)) == 0


def test_machines_that_do_not_share_the_folder(small, tmp_path):
    """Two processes that see different states: both end at once, and neither file is touched."""
    import uvit_sc
    for name, steps in (("a", 2), ("b", 3)):
        uvit_sc.train(uvit_sc.make_config(**{**small, "out": str(tmp_path / name)}, steps=steps))
    before = [(tmp_path / name / "last.pt").read_bytes() for name in "ab"]
    (tmp_path / "two.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport uvit_sc\n"
        f"sys.exit(uvit_sc.main({flags({**small, 'steps': 9})!r} + ['--out', {str(tmp_path)!r} + '/' + 'ab'[uvit_sc.RANK]]))")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
                           "--rdzv_endpoint=localhost:0", str(tmp_path / "two.py")], capture_output=True, text=True, timeout=60)
    assert done.returncode and "processes find states of steps 2 and 3" in done.stderr and "one folder that all machines see" in done.stderr
    assert before == [(tmp_path / name / "last.pt").read_bytes() for name in "ab"]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)


def workers(process):
    """The processes that torchrun has started."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]


def test_a_process_of_two_dies(small):
    """SIGKILL of either: the other says so and ends within a minute, and the run goes on where it was saved."""
    log = Path(small["out"], "log.jsonl")
    process = launch("uvit_sc", flags({**small, "epochs": 10000, "save_every": 1}), 2)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 20)
    os.kill(workers(process)[1], signal.SIGKILL)
    began = time.time()
    status, out, err = finish(process)
    assert status != 0 and time.time() - began < 60 and "process 0 has lost another one" in err and not re.search(r"File .*uvit_sc\.py", err)
    step = final(small["out"])["step"]
    status, out, err = finish(launch("uvit_sc", flags({**small, "steps": step + 3})))
    assert status == 0 and f"resumed at step {step}" in out


# ---- Data from elsewhere ---------------------------------------------------------------------------------------------

def hostile_archive(path, kind, outside):
    """cifar-100-binary.tar.gz, of the right name and with something wrong in it."""
    record = bytes(3074)
    with tarfile.open(path, "w:gz") as tar:
        def add(name, data=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
        inside = "cifar-100-binary/train.bin"
        if kind == "traversal":
            add(f"../../{outside.name}", b"harm")
            add(str(outside), b"harm")
            add(inside, record)
        elif kind in ("symlink", "hardlink"):
            add(inside, type=tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE, linkname="/etc/passwd")
        elif kind == "loop":
            add(inside, type=tarfile.SYMTYPE, linkname="train.bin")
        elif kind == "device":
            add(inside, type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        elif kind == "folder":
            add(inside, type=tarfile.DIRTYPE)
        elif kind == "bomb":
            add(inside, bytes(3074 * 4000))
        elif kind == "half":
            add(inside, record + record[:1000])
        elif kind == "label":
            add(inside, b"\0\xff" + record[2:])
        elif kind == "nothing":
            add(inside)


@pytest.mark.parametrize("kind", "traversal symlink hardlink loop device folder bomb half label nothing".split())
def test_hostile_archives(tmp_path, kind, monkeypatch):
    """Nothing is extracted, no link followed out of the archive, no more read than the data set has."""
    import uvit_sc
    monkeypatch.setattr(uvit_sc, "MOST", 10**6)
    (tmp_path / "a" / "b").mkdir(parents=True)
    hostile_archive(tmp_path / "a" / "b" / "cifar-100-binary.tar.gz", kind, tmp_path / "harm")
    cfg = uvit_sc.make_config("cifar100", data_dir=str(tmp_path / "a" / "b"))
    if kind == "traversal":
        assert len(uvit_sc.load_data(cfg, train=True)[0]) == 1
    else:
        with pytest.raises(uvit_sc.UserError, match="cifar100 cannot be read"):
            uvit_sc.load_data(cfg, train=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "cifar-100-binary.tar.gz"]


def test_gzip_bomb(tmp_path, monkeypatch):
    import gzip
    import tracemalloc
    import uvit_sc
    monkeypatch.setattr(uvit_sc, "MOST", 10**6)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(gzip.compress(np.array([0x800 + int(name[-10]), 10**9, 28, 28], ">i4").tobytes() + bytes(10**8)))
    tracemalloc.start()
    with pytest.raises(uvit_sc.UserError, match="fashion_mnist cannot be read"):
        uvit_sc.load_data(uvit_sc.make_config("fashion_mnist", data_dir=str(tmp_path)), train=True)
    assert tracemalloc.get_traced_memory()[1] < 10**7       # of 10**8 bytes, unpacked
    tracemalloc.stop()


def test_odd_names_and_bombs_among_images(tmp_path, capsys):
    """Spaces, letters of any alphabet and bytes that are none in names; a picture that claims 10 gigapixels."""
    import struct
    import zlib
    import uvit_sc
    names = ["with space.png", "été.png", "図.png", "-rf.png", "a;b&c.png", "new\nline.png"]
    names += [os.fsdecode(b"byte\xff.png")] * (sys.platform == "linux")
    for split in ("train", "val"):
        folder = tmp_path / split / "Ünï çødé"
        folder.mkdir(parents=True)
        for name in names:
            Image.new("RGB", (9, 9), "red").save(folder / name, "PNG")
    images, labels = uvit_sc.load_data(uvit_sc.make_config("folder", data_dir=str(tmp_path), size=8, patch=8), train=True)
    assert len(images) == len(names) and labels.tolist() == [0] * len(names)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (folder.parent.parent / "train" / "Ünï çødé" / "z.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""))
    line = ends_with_one_line(uvit_sc, ["--dataset", "folder", "--data_dir", tmp_path, "--size", 8, "--patch", 8, "--out", tmp_path / "run"], capsys)
    assert "cannot be decoded" in line and "exceeds limit" in line


def test_folders_that_cannot_be_listed_are_told(photos, monkeypatch):
    """They are not passed over in silence: training would go on with fewer images."""
    import uvit_sc
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(os.sep + "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(uvit_sc.UserError, match="Permission denied: .*train/b"):
        uvit_sc.load_data(uvit_sc.make_config("folder", data_dir=str(photos), size=8, patch=8), train=True)


def test_decoded_images_that_another_machine_has_written_stay(photos, tmp_path, monkeypatch):
    """It may have mapped them: to replace the file would pull it from under its feet."""
    import shutil
    import uvit_sc
    root = Path(shutil.copytree(photos, tmp_path / "photos"))
    for left in root.glob("*.u8"):
        left.unlink()
    cfg, crop, theirs = uvit_sc.make_config("folder", data_dir=str(root), size=8, patch=8), uvit_sc.centre_crop, []
    uvit_sc.load_data(cfg, train=True)
    file, = root.glob("*.u8")
    file.rename(tmp_path / "saved")

    def meanwhile(image, size):
        if not file.exists():
            shutil.copy(tmp_path / "saved", file)
            theirs.append(file.stat().st_ino)
        return crop(image, size)
    monkeypatch.setattr(uvit_sc, "centre_crop", meanwhile)
    uvit_sc.load_data(cfg, train=True)
    assert file.stat().st_ino in theirs and not list(root.glob(".*.part"))


@pytest.mark.parametrize("kind", ["hang", "html", "endless", "loop", "elsewhere"])
def test_mirrors_that_misbehave(tmp_path, monkeypatch, kind):
    """A server that accepts and never answers, serves a page, never ends, redirects to itself or, rightly, elsewhere."""
    import hashlib
    import http.server
    import threading
    import urllib.request
    import uvit_sc
    body, sent = b"the published file", []

    class Mirror(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if kind == "hang":
                return time.sleep(3)
            if kind == "loop" or kind == "elsewhere" and "/there/" not in self.path:
                self.send_response(302)
                self.send_header("Location", self.path if kind == "loop" else "/there/file.gz")
                return self.end_headers()
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000 if kind == "endless" else 1):
                    sent.append(1)
                    self.wfile.write(dict(html=b"<html>log in first</html>", endless=bytes(10**5)).get(kind, body))

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    urlopen = urllib.request.urlopen
    monkeypatch.setattr(uvit_sc.urllib.request, "urlopen", lambda url, timeout: urlopen(url, timeout=min(timeout, 0.5)))
    monkeypatch.setattr(uvit_sc, "MOST", 10**7)
    monkeypatch.setattr(uvit_sc, "DOWNLOADS", {"file.gz": (hashlib.md5(body).hexdigest(), f"http://127.0.0.1:{server.server_port}/here/")})
    try:
        if kind == "elsewhere":
            assert uvit_sc.fetch("file.gz", tmp_path).read_bytes() == body
        else:
            with pytest.raises(uvit_sc.UserError, match="cannot download file.gz"):
                uvit_sc.fetch("file.gz", tmp_path)
            assert list(tmp_path.iterdir()) == [] and len(sent) < 500       # of 100 MB, after 10 MB
    finally:
        server.shutdown()


# ---- The command line, and what no file may do -----------------------------------------------------------------------

VALUES = ["", " ", "-1", "0", "1", "2", "3", "8", "0.5", "1e-9", "1e999", "-1e999", "nan", "inf", "None", "True", "0x10", "1_0", "٣",
          "none", "cls", "adaptive", "out_1", "block_3", "cifar10", "glyphs", "a" * 5000, "../..", "/dev/null", "~", "%s", "{}", "\n",
          "=", "--", "-", "é", "9" * 400, "1,2", "[1]", "None;rm"]


def fuzz(script, chance, capsys, monkeypatch, times):
    """Random flags and values: a valid config, or one line and status 2. Returns how many were refused."""
    import dataclasses
    fields, seen, refused = [f.name for f in dataclasses.fields(script.Config)], [], 0
    monkeypatch.setattr(script, "train", lambda cfg: seen.append(cfg) or 0)
    for _ in range(times):
        argv = []
        for _ in range(chance.randint(1, 4)):
            name = chance.choice(fields + ["resume", "sample", "n", "images", "verbose", "", "help_me"])
            argv += [chance.choice(["--", "--", "--", "-", "--no-"]) + name]
            argv += [chance.choice(VALUES)] * (chance.random() < 0.9)
        if chance.random() < 0.2:
            argv[0] = argv[0] + "=" + chance.choice(VALUES)
        seen.clear()
        try:
            assert script.main(argv) == 0 and len(seen) == 1, argv
            cfg = seen[0]       # what is accepted lies within all limits and is a fixed point
            assert script.make_config(**dataclasses.asdict(cfg)) == cfg, argv
            assert all(low <= getattr(cfg, k) <= high for k, (low, high) in (script.LIMITS | script.Diffusion.limits).items())
            script.Backbone.choices(cfg)
        except SystemExit as end:
            err = capsys.readouterr().err
            assert end.code == 2 and err.count("\n") == 1 and "Traceback" not in err, (argv, err)
            refused += 1
        capsys.readouterr()
    return refused


def test_fuzzed_command_lines(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert fuzz(script, random.Random(script.SCRIPT), capsys, monkeypatch, 25) > 8
    assert not [p for p in tmp_path.rglob("*") if p.name != "data"], "something was written"     # a folder for latents


def test_no_code_from_files_and_no_shell():
    """torch.load with weights_only alone, no eval, exec, pickle or shell; what is downloaded comes by https."""
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                name, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), (path.name, node.lineno)
                assert name != "torch.load" or options.get("weights_only") == "True", (path.name, node.lineno)
                assert options.get("allow_pickle", "False") == "False" and "shell" not in options, (path.name, node.lineno)
        assert not re.search(r"^\s*(import|from) .*\b(pickle|subprocess|shelve|marshal)\b", text, re.M), path.name
        assert not re.search(r"[\"']http://", text), path.name
