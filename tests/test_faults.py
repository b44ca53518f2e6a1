"""Faults of disks and files: a run goes on exactly, or ends with one line, and the last good
checkpoint is never harmed."""
import contextlib
import dataclasses
import io
import resource
import tarfile
from pathlib import Path

import pytest

from conftest import ends_with_one_line, final, log, losses, only, same

pytestmark = only("uvit_sc")


@pytest.fixture
def run(script, config, monkeypatch):
    """A run of two steps, and a function that has it go on to the third by the command line."""
    script.train(config(steps=2))
    cfg = config(steps=3)
    monkeypatch.setattr(script, "make_config", lambda **given: cfg)
    return cfg, Path(cfg.out, "last.pt")


def test_damaged_checkpoints(script, run, capsys):
    """One line, and the file stays as it is; whole again, it goes on."""
    cfg, path = run
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path} is damaged or no checkpoint" in ends_with_one_line(script, [], capsys)
    assert path.read_bytes() == whole[:-1]
    path.write_bytes(whole)
    assert script.main([]) == 0 and final(cfg.out)["step"] == 3


@contextlib.contextmanager
def files_end_at(size):
    """No file can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(script, run):
    """In the middle of writing a checkpoint: the old file stays, no part is left, the run can go
    on. What a killed run has left does no harm."""
    cfg, path = run
    before = path.read_bytes()
    for share in (0.1, 0.99):
        with files_end_at(int(len(before) * share)), pytest.raises((OSError, RuntimeError)):
            script.train(cfg)
        assert path.read_bytes() == before and not list(path.parent.glob(".*"))
    path.with_name(".last.pt.0-1.part").write_bytes(b"of a killed run")
    with open(path, "rb") as old:           # the new file takes the place of the old one at once
        assert script.train(cfg) == 0 and final(cfg.out)["step"] == 3
        assert old.read() == before


def test_log_of_steps_that_are_done_again(script, run):
    """Killed after the last checkpoint: later lines, and half of one, are dropped; the log is that
    of a run which was never interrupted. Without a log, a run goes on as well."""
    cfg, path = run
    file = path.with_name("log.jsonl")
    with open(file, "a") as more:
        more.write('{"step": 3, "loss": 9}\n{"step": 4, "loss": 9}\n{"step": 5, "lo')
    script.train(cfg)
    whole = dataclasses.replace(cfg, out=cfg.out + "2")
    script.train(whole)
    assert losses(cfg.out) == losses(whole.out) and len(losses(cfg.out)) == 3
    assert same(final(cfg.out)["model"], final(whole.out)["model"])
    file.unlink()
    script.train(dataclasses.replace(cfg, steps=4))
    assert [line["step"] for line in log(cfg.out)] == [4]


RECORD = bytes(3074)
KINDS = {   # what is wrong: members (name, type, link, data)
    "symlink": [("cifar-100-binary/train.bin", tarfile.SYMTYPE, "/etc/passwd", b"")],
    "hardlink": [("cifar-100-binary/train.bin", tarfile.LNKTYPE, "/etc/passwd", b"")],
    "device": [("cifar-100-binary/train.bin", tarfile.CHRTYPE, "", b"")],
    "nothing": [("cifar-100-binary/other.bin", tarfile.REGTYPE, "", RECORD)],
    "half": [("cifar-100-binary/train.bin", tarfile.REGTYPE, "", RECORD + RECORD[:1000])],
    "traversal": [("../../harm", tarfile.REGTYPE, "", b"harm"),
                  ("cifar-100-binary/train.bin", tarfile.REGTYPE, "", RECORD)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_archives(script, tmp_path, kind):
    """They are read in place: nothing is extracted, no link is followed out of them."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    with tarfile.open(tmp_path / "a" / "b" / "cifar-100-binary.tar.gz", "w:gz") as tar:
        for name, member, link, data in KINDS[kind]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = member, link, len(data)
            tar.addfile(info, io.BytesIO(data))
    cfg = script.make_config("cifar100", data_dir=str(tmp_path / "a" / "b"))
    if kind == "traversal":
        assert len(script.load_data(cfg, train=True)[0]) == 1
    else:
        with pytest.raises(script.UserError):
            script.load_data(cfg, train=True)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["cifar-100-binary.tar.gz"]
