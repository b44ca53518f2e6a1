"""The command line: bad input ends with one line and status 2, before anything is written."""
import dataclasses
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from conftest import ROOT, SCRIPTS, SMALL, finish, flags, launch


def ends_with_one_line(script, arguments, capsys):
    """Runs main, expects status 2 and a single line on stderr, and returns that line."""
    with pytest.raises(SystemExit) as caught:
        script.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("note: "))
    assert caught.value.code == 2 and err.count("\n") == 1 and err.startswith(f"{script.SCRIPT}: "), err
    return err


BAD = [
    (["--learning_rate", "1"], "unknown argument --learning_rate"),
    (["--epoch", "1"], "did you mean --epochs?"),
    (["words"], "unknown argument words"),
    (["--bo\ngus"], "unknown argument --bo gus"),
    (["--dataset", "mnist"], "--dataset mnist: unknown; there are glyphs, "),
    (["--dataset", "glyphs", "--batch", "many"], "--batch: invalid int value: 'many'"),
    (["--batch", "0"], "--batch 0: must lie between 1 and"),
    (["--batch"], "--batch: expected one argument"),
    (["--lr", "nan"], "--lr nan: must lie between"),
    (["--lr", "-1"], "--lr -1.0: must lie between"),
    (["--ema", "1"], "--ema 1.0: must lie between"),
    (["--seed", "-1"], "--seed -1: must lie between"),
    (["--dropout", "1"], "--dropout 1.0: must lie between"),
    (["--nfe", "2000"], "--nfe 2000: must lie between "),
    (["--t_probe", "-1"], "--t_probe -1"),
    (["--self_cond", "maybe"], "--self_cond maybe: must be one of "),
    (["--backbone", "resnet"], "--backbone resnet: must be one of "),
    (["--backbone", "batch"], "--backbone batch: must be one of "),
    (["--layer", "out_99"], "--layer out_99: must be one of "),
    (["--layer", "cls_9"], "--layer cls_9: must be one of "),
    (["--dataset", "glyphs", "--size", "64"], "--size 64: must be one of 16"),
    (["--dataset", "folder", "--size", "7"], "--size 7: must lie between 8 and 1024"),
    (["--device", "tpu"], "--device tpu: must be one of auto"),
    (["--device", "cuda"], "--device cuda: this machine has none; use --device cpu"),
    (["--amp", "int8"], "--amp int8: must be one of auto, off"),
    (["--batch", "10", "--accum", "4"], "--batch 10 does not divide by 1 processes x --accum 4; use 12"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--resume"], "last.pt: no such file"),
    (["--n", "4"], "--n goes with --sample"),
    (["--sample", "nowhere.pt"], "nowhere.pt: no such file"),
    (["--aug", "1.2"], "--aug 1.2: must lie between 0 and 1"),
    (["--cl", "-1"], "--cl -1.0: must lie between 0 and 1"),
    (["--cl", "0.01", "--cl_head", "linear"], "--cl_head linear: must be one of time, plain"),
    (["--cl", "0.01", "--cl_target", "max"], "--cl_target max: must be one of probe, min"),
    (["--cl_head", "plain"], "--cl_head plain: does nothing without --cl"),
    (["--aug", "0.1", "--cl_target", "min"], "--cl_target min: does nothing without --cl"),
]
BAD_FOR = {
    "uvit_sc": [(["--patch", "5"], "--patch 5: must be one of 1, 2, 4, 8, 16"),
                (["--dataset", "folder", "--size", "66"], "--patch 4: must be one of 1, 2, 3, 6, 11, 22, 33, 66"),
                (["--self_cond", "none", "--layer", "cls_1"], "--layer cls_1: must be one of out_1, "),
                (["--self_cond", "none", "--cl", "0.01"], "--cl_feature cls: must be one of gap"),
                (["--cl_feature", "gap"], "--cl_feature gap: does nothing without --cl"),
                (["--aug_mask", "0"], "--aug_mask 0: does nothing without --aug"),
                (["--aug", "0.1", "--aug_mask", "2"], "--aug_mask 2: must be one of 0, 1")],
    "ddpm_sc": [(["--layer", "out_6"], "--layer out_6: is the last, so it can condition none"),
                (["--dataset", "folder", "--size", "60"], "--size 60: must be a multiple of 8"),
                (["--self_cond", "cls"], "--self_cond cls: must be one of adaptive, add, none")],
    "edm_sc": [(["--t_probe", "100"], "--t_probe 100.0: must lie between 0.002 and 80")],
    "dit_latent_sc": [(["--classes", "7"], "--classes 7: goes with --dataset folder; glyphs has 10"),
                      (["--class_drop", "0"], "--class_drop 0: nothing would be learned without a class"),
                      (["--uncond", "--guidance", "2"], "--guidance 2.0: does nothing with --uncond"),
                      (["--vae", "x.pt"], "--vae x.pt: does nothing with --tokenizer unshuffle"),
                      (["--cell", "5"], "--cell 5: must be one of 1, 2, 4, 8, 16"),
                      (["--dataset", "folder", "--size", "40"], "--size 40: must be a multiple of 16 for VA-VAE")],
    "rf_sc": [(["--t_probe", "11"], "--t_probe 11.0: must lie between 0 and 1"),
              (["--tol", "0"], "--tol 0.0: must lie between 1e-06 and 1")],
}


def test_bad_input(script, capsys, tmp_path, monkeypatch):
    draw = script.draw_glyphs
    monkeypatch.setattr(script, "draw_glyphs", lambda n, seed: draw(100, seed))     # some cases are found after reading
    monkeypatch.chdir(tmp_path)
    for arguments, says in BAD + BAD_FOR.get(script.SCRIPT, []):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        line = ends_with_one_line(script, arguments, capsys)
        assert says in line, (arguments, line)
        assert [path for path in tmp_path.iterdir() if path.name != "data"] == [], arguments     # latents of glyphs may stay


def test_bad_checkpoints(small, capsys, tmp_path):
    """Files that are no checkpoint, of another script, or that carry code: refused, the code not run."""
    import uvit_sc
    cfg = uvit_sc.make_config(**small)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"script": "edm_sc", "ema": {}}, tmp_path / "other.pt")
    torch.save({"script": "uvit_sc", "ema": {}, "config": dataclasses.asdict(cfg)}, tmp_path / "good.pt")

    class Code:
        def __reduce__(self):
            return (tmp_path / "harm").touch, ()
    torch.save(Code(), tmp_path / "code.pt")
    for name, says in (("text.pt", "damaged or no checkpoint"), ("other.pt", "no checkpoint of uvit_sc"), ("code.pt", "damaged or no")):
        assert says in ends_with_one_line(uvit_sc, ["--sample", tmp_path / name], capsys)
    assert not (tmp_path / "harm").exists()
    assert "--lr does nothing with --sample" in ends_with_one_line(uvit_sc, ["--sample", tmp_path / "good.pt", "--lr", 1], capsys)
    assert "--n 0: must be at least 1" in ends_with_one_line(uvit_sc, ["--sample", tmp_path / "good.pt", "--n", 0], capsys)


def test_missing_data_names_the_remedy(capsys, tmp_path, monkeypatch):
    import uvit_sc
    monkeypatch.setattr(uvit_sc, "CIFAR", "")
    monkeypatch.setattr(uvit_sc, "DOWNLOADS", {"cifar-10-binary.tar.gz": ("0" * 32, "http://127.0.0.1:9/")})
    line = ends_with_one_line(uvit_sc, ["--dataset", "cifar10", "--data_dir", tmp_path / "data", "--out", tmp_path / "run"], capsys)
    assert "http://127.0.0.1:9/cifar-10-binary.tar.gz" in line and "--data_dir" in line
    assert not (tmp_path / "run").exists()


def test_make_config_lists_what_is_valid(script):
    with pytest.raises(ValueError, match=", ".join(script.RECIPES)):
        script.make_config("mnist")
    with pytest.raises(ValueError, match="unknown field learning_rate.*weight_decay"):
        script.make_config(learning_rate=1)


def test_default_run_folders_are_apart(script):
    """Whatever a run cannot be continued with, another backbone, baseline, folder of images, ablation or learning rate, is another
    run; more steps are not."""
    big = list(script.Backbone.sizes)[-1]
    outs = [script.make_config(**fields).out for fields in (
        dict(dataset="imagenet100"), dict(dataset="imagenet100", backbone=big), dict(dataset="imagenet100", self_cond="none"),
        dict(dataset="imagenet100", seed=1), dict(dataset="folder", data_dir="cats"), dict(dataset="folder", data_dir="x/dogs"))]
    assert len(set(outs)) == 6 and "cats" in outs[4] and "dogs" in outs[5] and big in outs[1]
    layer = script.Backbone.choices(script.make_config("glyphs"))["layer"][0]
    ablations = dict(), dict(cl=0.1), dict(cl=0.1, cl_head="plain"), dict(cl=0.1, cl_target="min"), dict(aug=0.2), dict(aug=0.2, cl=0.1), dict(layer=layer)
    assert len({script.make_config("glyphs", **{"cl": 0.01, **fields}).out for fields in ablations}) == 7
    assert len({script.make_config("glyphs", **fields).out for fields in (dict(), dict(lr=1e-3), dict(batch=8), dict(lr=1e-3, steps=5))}) == 3
    assert script.make_config("folder", size=32).out != script.make_config("folder").out
    if hasattr(script.Config, "patch"):
        assert script.make_config("glyphs", patch=2).out != script.make_config("glyphs").out


def test_what_the_system_refuses_is_one_line(script, small, capsys):
    Path(small["out"]).write_text("a file, not a folder")
    assert "run" in ends_with_one_line(script, flags({**small, "steps": 1}), capsys)


def test_interrupted_before_the_first_step(script, small, capsys, monkeypatch):
    """Ctrl-C while data are read: one line, no traceback, nothing written."""
    def interrupt(cfg, train):
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "load_data", interrupt)
    assert script.main(flags(small)) == 130
    assert capsys.readouterr().err == f"{script.SCRIPT}: interrupted\n" and not Path(small["out"]).exists()


def test_more_processes_than_devices(script, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(script.UserError, match="--device cuda: 2 processes for 1; .*--nproc_per_node"):
        script.start(script.make_config(device="cuda"))


def test_every_recipe_is_valid(script):
    for dataset in script.RECIPES:
        cfg = script.make_config(dataset)
        assert cfg == script.make_config(**dataclasses.asdict(cfg))


def test_help_has_every_field(script, capsys):
    with pytest.raises(SystemExit) as caught:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"--{field.name}\b.*\s", text), field.name


def test_from_the_shell(cifar, tmp_path):
    """A real process: status 2 and one line without traceback; under torchrun a batch that does not divide says so once."""
    status, out, err = finish(launch("uvit_sc", ["--bogus"]))
    assert status == 2 and err == "uvit_sc: unknown argument --bogus; --help lists all\n" and out == ""
    status, out, err = finish(launch("uvit_sc", flags({**SMALL, "batch": 9, "data_dir": cifar, "out": tmp_path / "run"}), 2))
    assert status != 0 and err.count("--batch 9 does not divide by 2 processes") == 1 and "Traceback" not in err.split("torch")[0]


def test_resume_flag_takes_the_settings_of_the_run(small, tmp_path, capsys):
    import uvit_sc
    assert uvit_sc.main(flags({**small, "steps": 2})) == 0
    assert uvit_sc.main(["--resume", "--out", small["out"], "--steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "resumed at step 2" in out and f"python probe.py {small['out']}/last.pt" in out
    assert "other settings: batch" in ends_with_one_line(uvit_sc, ["--resume", "--out", small["out"], "--batch", 16], capsys)


@pytest.mark.parametrize("name", [*SCRIPTS, "probe", "fid"])
def test_one_of_several_processes_leaves_at_once(name, monkeypatch, capsys):
    """Threads of gloo, if they are still there, abort a Python that takes itself apart: a finished run would fail."""
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(Left, match="^0$"):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert "usage: " in capsys.readouterr().out
