"""The command line: what users get wrong ends with one line and status 2, before anything is
written. It is one text in all scripts; what differs are the settings that each has."""
import dataclasses, inspect, re

import pytest
import torch

from conftest import (ends_with_one_line, finish, flags, launch, load, only, small_net,
                      use_random_data)

one = only("uvit_sc")
BAD = [
    ("--learning_rate 1", "--learning_rate"),
    ("words", "words"),
    ("--dataset mnist", "--dataset mnist: must be one of glyphs, "),
    ("--batch many", "invalid int value: 'many'"),
    ("--batch", "expected one argument"),
    ("--self_cond maybe", "--self_cond maybe: must be one of "),
    ("--backbone resnet", "--backbone resnet: must be one of uvit_tiny, uvit_s"),
    ("--layer out_99", "--layer out_99: must be one of out_1, "),
    ("--device tpu", "--device tpu: must be one of auto, cuda, cpu, mps"),
    ("--device cuda", "--device cuda: there is none"),
    ("--amp int8", "--amp int8: must be one of auto, off"),
    ("--batch 10 --accum 4", "--batch 10 does not divide by 1 processes x --accum 4; use 12"),
    ("--init nowhere.pt --device cpu", "nowhere.pt: no such file"),
    ("--sample nowhere.pt", "nowhere.pt: no such file"),
    ("--cl 0.01 --cl_head linear", "--cl_head linear: must be one of time, plain"),
    ("--cl 0.01 --cl_target max", "--cl_target max: must be one of probe, min"),
    ("--patch 5", "--patch 5: must be one of 1, 2, 4, 8, 16"),
    ("--dataset folder --size 66 --patch 4", "--patch 4: must be one of 1, 2, 3, 6, 11, 22"),
    ("--self_cond none --layer cls_1", "--layer cls_1: must be one of out_1"),
    ("--aug 0.1 --aug_mask 2", "--aug_mask 2: must be one of 0, 1"),
    ("--cl 0.1 --cl_feature mean", "--cl_feature mean: must be one of cls, gap"),
]
BAD_OTHERS = [
    ("ddpm_sc", "--layer out_6 --backbone unet_tiny", "--layer out_6: must be one of out_1, out_2"),
    ("edm_sc", "--dataset folder --size 60 --backbone ddpm", "--size 60: must be one of 8, 16, 24"),
    ("rf_sc", "--self_cond cls", "--self_cond cls: must be one of adaptive, adaptive1, add, none"),
    ("dit_latent_sc", "--dataset folder --size 40", "--size 40: must be one of 16, 32, 48"),
    ("dit_latent_sc", "--tokenizer vae", "--tokenizer vae: must be one of vavae, unshuffle"),
]


@one
def test_bad_input(script, capsys, tmp_path, monkeypatch):
    use_random_data(script, monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    for words, says in BAD:
        if "cuda" not in words or not torch.cuda.is_available():
            line = ends_with_one_line(script, words.split(), capsys)
            assert says in line, (words, line)
            assert not list(tmp_path.iterdir()), words
    for name, words, says in BAD_OTHERS:
        line = ends_with_one_line(load(name), words.split(), capsys)
        assert says in line, (words, line)


@one
def test_checkpoints_that_are_none(script, capsys, tmp_path):
    """Cut off, of another script, or with code in them, which is not run."""
    class Code:
        def __reduce__(self):
            return (tmp_path / "harm").touch, ()
    net = small_net(script)
    state = dict(script="uvit_sc", ema=net.state_dict(), config=dataclasses.asdict(net.cfg))
    torch.save(state, tmp_path / "good.pt")
    whole = (tmp_path / "good.pt").read_bytes()
    torch.save({**state, "script": "edm_sc"}, tmp_path / "other.pt")
    torch.save({**state, "note": Code()}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**state, "ema": {}}, tmp_path / "misfit.pt")
    (tmp_path / "text.pt").write_text("hello")
    cases = [("text.pt", "damaged or no checkpoint"), ("code.pt", "damaged or no checkpoint"),
             ("other.pt", "no checkpoint of uvit_sc"), ("list.pt", "no checkpoint of uvit_sc"),
             ("misfit.pt", "does not fit")]
    for k in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"cut{k}.pt").write_bytes(whole[:k])
        cases.append((f"cut{k}.pt", "damaged or no checkpoint"))
    for name, says in cases:
        line = ends_with_one_line(script, ["--sample", tmp_path / name], capsys)
        assert name in line and says in line
    assert not (tmp_path / "harm").exists()
    with pytest.raises(script.UserError, match="with model weights"):
        script.load_checkpoint(tmp_path / "good.pt", "model")
    line = ends_with_one_line(script, ["--sample", tmp_path / "good.pt", "--patch", 8], capsys)
    assert "good.pt does not fit this network" in line          # another network than was trained


@one
def test_a_download_that_fails(script, capsys, tmp_path, monkeypatch):
    """The line names the file, where it was sought, and the remedy; nothing is left."""
    def no_network(url, *args, **more):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    words = flags(dict(dataset="cifar100", data_dir=tmp_path / "data", out=tmp_path / "run"))
    line = ends_with_one_line(script, words, capsys)
    for part in ("cifar-100-binary.tar.gz", "https://", "no route to host", "--data_dir"):
        assert part in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@one
def test_processes_that_torchrun_did_not_start(script, monkeypatch):
    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(script.UserError, match="WORLD_SIZE=2 .*torchrun"):
        script.start(script.make_config(device="cpu"))
    # One of several leaves at once: threads of gloo abort a Python that takes itself apart.
    left = []
    monkeypatch.setattr(script.os, "_exit", left.append)
    script.leave(3)
    assert left == [3]


@one
def test_more_processes_than_devices(script, monkeypatch):
    monkeypatch.setattr(script, "LOCAL_RANK", 1)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(script.UserError, match="--device cuda: there is none for process 1"):
        script.start(script.make_config(device="cuda"))


def first_layer(script):
    return "block_1" if script.Network.__name__ == "DiT" else "out_1"


def test_make_config(script):
    """Unknown names: the valid ones are listed. Every recipe is valid, and a fixed point, so that a
    checkpoint's config gives itself. What is given rules over the recipe."""
    with pytest.raises(ValueError, match=", ".join(script.RECIPES)):
        script.make_config("mnist")
    with pytest.raises(ValueError, match="unknown field learning_rate.*weight_decay"):
        script.make_config(learning_rate=1)
    for dataset in script.RECIPES:
        for backbone in script.Network.sizes:
            layer = first_layer(script)
            cfg = script.make_config(dataset, backbone=backbone, layer=layer, lr=0.5)
            assert (cfg.backbone, cfg.layer, cfg.lr) == (backbone, layer, 0.5)
        cfg = script.make_config(dataset)
        assert cfg == script.make_config(**dataclasses.asdict(cfg)), dataset
    first = script.make_config()
    cfg = script.make_config("folder", backbone=first.backbone)     # on pictures of one's own
    assert (cfg.batch, cfg.lr, cfg.warmup) == (first.batch, first.lr, first.warmup)


def test_default_run_folders_are_apart(script):
    """What a run cannot be continued with, another network, baseline, seed, folder, ablation or
    rate, is another run; more steps are not."""
    def folder(**fields):
        return script.make_config(**fields).out
    big = list(script.Network.sizes)[-2]
    runs = [dict(), dict(dataset="imagenet100"), dict(dataset="imagenet100", backbone=big),
            dict(self_cond="none"), dict(seed=1), dict(lr=0.5), dict(batch=8), dict(aug=0.2),
            dict(aug=0.2, cl=0.1), dict(cl=0.1), dict(cl=0.1, cl_head="plain"),
            dict(cl=0.1, cl_target="min"), dict(layer=first_layer(script)),
            dict(dataset="folder", data_dir="cats"), dict(dataset="folder", data_dir="x/dogs")]
    outs = [folder(**fields) for fields in runs]
    assert len(set(outs)) == len(runs) and "cats" in outs[-2] and "dogs" in outs[-1]
    assert folder(lr=0.5, steps=5) == folder(lr=0.5, device="cpu", accum=2) == folder(lr=0.5)
    assert folder(lr=0.5, batch=8) == folder(batch=8, lr=0.5)
    starts = [folder(init=path) for path in ("", "a/x/last.pt", "b/x/last.pt", "b/x/ckpt_0001.pt")]
    assert len(set(starts)) == 4 and all(out.count("/") == 1 for out in starts)


def test_help_has_every_field(script, capsys):
    """The comment of each field is its help, and the docstring stands above."""
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    text = "".join(capsys.readouterr().out.split())             # lines are broken in many places
    assert caught.value.code == 0 and "".join(script.__doc__.split()) in text
    comments = re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(script.Config), re.M)
    assert [name for name, _ in comments] == [f.name for f in dataclasses.fields(script.Config)]
    for name, comment in comments:
        assert f"--{name}" in text and "".join(comment.split()) in text, name


@one
def test_next_commands(script, config, monkeypatch, capsys):
    """A run that has ended prints what comes next."""
    cfg = config(steps=1)
    monkeypatch.setattr(script, "make_config", lambda **given: cfg)
    assert script.main([]) == 0
    out = capsys.readouterr().out
    assert f"python probe.py {cfg.out}/last.pt" in out and f"python fid.py {cfg.out}/last.pt" in out


def test_from_the_shell():
    """A real process: status 2 and one line, no traceback."""
    status, out, err = finish(launch("uvit_sc", ["--bogus"]))
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("uvit_sc: ") and "--bogus" in err
