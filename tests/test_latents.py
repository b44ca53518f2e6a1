"""Latents of dit_latent_sc.py: the tokenizer's layout and its file, --encode, and what is refused.
Numbers of the public VA-VAE were compared once, with its code."""
import json, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_latent_sc as dit
from conftest import finish, flags, spy, start
from test_data import Host, host  # noqa: F401: a fixture

CPU = torch.device("cpu")


def test_vae_has_the_official_layout():
    with torch.device("meta"):
        net = dit.VAE()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(shapes) == 342 and sum(p.numel() for p in net.parameters()) == 69_836_067
    known = {
        "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_out.weight": (64, 512, 3, 3),
        "encoder.down.3.downsample.conv.bias": (256,), "quant_conv.weight": (64, 64, 1, 1),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1), "post_quant_conv.bias": (32,),
        "encoder.mid.block_1.norm1.weight": (512,), "decoder.mid.attn_1.q.bias": (512,),
        "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3), "decoder.norm_out.bias": (128,)}
    assert known.items() <= shapes.items()
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert "encoder.down.4.downsample.conv.weight" not in shapes


@pytest.fixture
def small_vae(monkeypatch, tmp_path):
    """A file in the official form, with another network's tensors in it, of a VAE that is fast."""
    monkeypatch.setattr(dit.VAE, "widths", (32,) * 5)
    torch.manual_seed(0)
    state = {**dit.VAE().state_dict(), "loss.weight": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "vae.pt")
    return tmp_path / "vae.pt"


def test_vae_files(small_vae, tmp_path):
    loaded, state = dit.load_vae(small_vae, CPU), torch.load(small_vae)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.save(state, tmp_path / "bare.pt")
    assert dit.load_vae(tmp_path / "bare.pt", CPU).quant_conv.bias.equal(loaded.quant_conv.bias)
    for i, value in enumerate((dict(encoder=1), {**state, "quant_conv.bias": torch.ones(3)})):
        torch.save(value, tmp_path / f"bad{i}.pt")
        with pytest.raises(dit.UserError, match=f"--vae .*bad{i}.pt is no VA-VAE f16d32"):
            dit.load_vae(tmp_path / f"bad{i}.pt", CPU)
    with pytest.raises(dit.UserError, match="--vae .*gone.pt: no such file"):
        dit.find_vae(dit.make_config("imagenet100", vae=str(tmp_path / "gone.pt")))


def test_download_of_the_vae(host, tmp_path, monkeypatch):
    """Half a file leaves nothing; what came whole is not asked for again."""
    cfg = dit.make_config("imagenet100", data_dir=str(tmp_path))
    for kind in ("missing", "cut", "hangup"):
        monkeypatch.setattr(dit, "VAVAE_URL", f"{host.url}/{kind}/")
        with pytest.raises(dit.UserError, match=f"cannot download .*/{kind}/.*unshuffle"):
            dit.find_vae(cfg)
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(dit, "VAVAE_URL", f"{host.url}/good/")
    for _ in range(2):      # the second time, the file is there
        path = dit.find_vae(cfg)
        assert path.read_bytes() == Host.BODY and len(list(tmp_path.iterdir())) == 1


def test_draws_from_the_posterior(small_vae):
    """The noise of a latent depends on its seed alone, not on the images beside it."""
    cfg = dit.make_config("folder", size=32, vae=str(small_vae))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    seeds = [(7, 0, 5), (8, 0, 5), (8, 1, 5)]
    x = dit.to_latents(cfg, images, seeds, CPU)
    assert x.shape == (3, *dit.latent_shape(cfg)) == (3, 32, 2, 2)
    mean, logvar = dit.load_vae(small_vae, CPU).encode(dit.to_float(images))
    noise = [torch.randn(32, 2, 2, generator=dit.rng(*seed)) for seed in seeds]
    torch.testing.assert_close(x, mean + (logvar / 2).exp() * torch.stack(noise))
    torch.testing.assert_close(dit.to_latents(cfg, images[1:2], seeds[1:2], CPU), x[1:2])
    assert dit.to_images(cfg, x).shape == images.shape


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """1100 training images of three classes, ten of which cannot be read, and 9 test images."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.RandomState(0)
    for split, n in ("train", 1100), ("val", 9):
        for i in range(n):
            path = root / split / "abc"[i % 3] / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (4, 5, 3), np.uint8)).save(path)
            if split == "train" and i % 120 == 10:
                path.write_bytes(b"bad")
    return root


@pytest.fixture
def cfg(pictures, tmp_path):
    """Of a folder with links to these pictures: latents come in batches of 500, so in three."""
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(pictures / split)
    return dit.make_config("folder", data_dir=str(tmp_path), size=4, tokenizer="unshuffle", cell=2)


def encoded(cfg):
    """All that encoding has written, after it has been done or finished."""
    for train in (True, False):
        if not dit.latents_path(cfg, train).exists():
            dit.encode(cfg, train, CPU)
    return {path: path.read_bytes() for path in sorted(Path(cfg.data_dir).glob("*.*"))}


def test_encoding(cfg, capsys):
    """Both mirrors of what can be read, normalised by the training images' statistics; labels and
    the number of classes are those of the folders."""
    assert [path.name for path in encoded(cfg)] == [
        f"folder4-unshuffle2-{name}" for name in ("test.latents", "test.latents.json",
                                                  "train.latents", "train.latents.json")]
    out, err = capsys.readouterr()
    assert "3 classes (a, ..., c), 1100 images" in out and "0.00 GB to write" in out
    assert "note: 10 of 1100 pictures cannot be decoded" in err and "b/0010.png (cannot" in err
    latents, labels = dit.load_data(cfg, train=True)
    assert latents.shape == (1090, 2, 12, 2, 2) and latents.dtype == torch.float16
    expected = [i % 3 for i in range(1100) if i % 120 != 10]
    assert labels.tolist() == sorted(expected) and dit.count_classes(cfg) == 3
    mean, std = (value.view(-1, 1, 1) for value in dit.latent_statistics(cfg))
    first = latents[:, 0].float()
    assert first.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (first.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    back = dit.to_images(cfg, latents[-1].float() * std + mean).numpy().astype(int)
    image = dit.centre_crop(dit.read_image(dit.list_folders(cfg, True)[0][-1]), 4)
    assert np.abs(back - [image, image[..., ::-1]]).max() <= 1              # float16 rounds
    cfg = dit.dataclasses.replace(cfg, data_dir=f"{cfg.data_dir}/val", size=8)
    picture = Path(cfg.data_dir, "b/bad.png")
    picture.write_bytes(b"bad")
    with pytest.raises(dit.UserError, match="1 of 10 pictures cannot be decoded.*b/bad.png"):
        dit.encode(cfg, True, CPU)
    picture.unlink()


KILLED = """import os, signal, dit_latent_sc as dit
def to_latents(*args, work=dit.to_latents, calls=[]):
    calls.append(1)
    return work(*args) if len(calls) < 5 else os.kill(os.getpid(), signal.SIGKILL)
dit.to_latents = to_latents
cfg = dit.make_config("folder", data_dir={!r}, size=4, tokenizer="unshuffle", cell=2)
dit.encode(cfg, True, dit.torch.device("cpu"))
"""


@pytest.mark.parametrize("end", ["kill", "other", "lost", 2, 3, 5])
def test_encoding_goes_on(cfg, tmp_path, monkeypatch, end):
    """Killed after three batches for the statistics and one for the file, with half a batch behind
    it; begun with other pictures; its file lost, then interrupted before the next batch; or
    interrupted: the files end up the same, byte by byte."""
    whole, work, calls = encoded(cfg), dit.to_latents, []
    origin = json.loads(whole[dit.latents_path(cfg, True).with_suffix(".latents.json")])["origin"]
    for path in whole:
        path.unlink()
    part = Path(f"{dit.latents_path(cfg, True)}.part")
    if end == "kill":
        assert finish(start(["-c", KILLED.format(str(tmp_path))]))[0] == -9
        assert dit.read_facts(part)["done"] == 500
        part.write_bytes(part.read_bytes() + b"half a batch")
    elif end == "other":
        part.write_bytes(b"begun")
        dit.write_facts(part, dict(origin=dict(images="other"), done=9, bad={}))
    else:
        if end == "lost":       # the facts of a part that is gone must not survive it
            dit.write_facts(part, dict(origin=origin, done=1000, bad={}, mean=[0], std=[1]))
            end = 3

        def to_latents(*args):
            calls.append(1)
            if len(calls) > end:
                raise KeyboardInterrupt
            return work(*args)
        monkeypatch.setattr(dit, "to_latents", to_latents)
        with pytest.raises(KeyboardInterrupt):
            dit.encode(cfg, True, CPU)
        monkeypatch.setattr(dit, "to_latents", work)
    assert not dit.latents_path(cfg, True).exists() and encoded(cfg) == whole


def test_what_does_not_belong_together_is_refused(cfg, tmp_path, monkeypatch):
    with pytest.raises(dit.UserError, match="no latents .*: dit_latent_sc.py --encode --dataset "
                       "folder --data_dir .* --size 32 --tokenizer vavae --cell 16$"):
        dit.load_data(dit.make_config("folder", data_dir=str(tmp_path), size=32), True)
    path, whole = dit.latents_path(cfg, False), encoded(cfg)
    facts = json.loads(Path(f"{path}.json").read_text())

    def refused(what):
        with pytest.raises(dit.UserError, match=f"has other {what} than .*; delete"):
            dit.load_data(cfg, False)
        path.write_bytes(whole[path])
        dit.write_facts(path, facts)
        monkeypatch.undo()
        assert len(dit.load_data(cfg, False)[0]) == 9

    dit.write_facts(path, dict(facts, std=[2 * v for v in facts["std"]]))
    refused("std")
    dit.write_facts(path, dict(facts, origin={}))       # as of another version
    refused("tokenizer, images")
    path.write_bytes(whole[path][:-2])
    refused("bytes")
    monkeypatch.setattr(dit, "tokenizer_hash", lambda cfg: "another")
    refused("tokenizer")
    (tmp_path / "val").unlink()                 # the images may go once the latents are there
    assert len(dit.load_data(cfg, False)[0]) == 9
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(dit.UserError, match="has other images than"):
        dit.load_data(cfg, False)


def test_folder_without_test_images(pictures, capsys):
    """Class folders alone are enough to train."""
    words = ["--size", "4", "--tokenizer", "unshuffle", "--cell", "2"]
    words = ["--encode", "--dataset", "folder", "--data_dir", str(pictures / "val"), *words]
    assert dit.encode_command(words) == 0
    out = capsys.readouterr().out
    assert "train.latents is complete" in out and "no test latents, which probe.py needs" in out


def test_test_images_of_no_class(cfg, tmp_path, capsys):
    (tmp_path / "val").unlink()
    (tmp_path / "val/owl").mkdir(parents=True)
    words = ["--encode", *flags({name: getattr(cfg, name) for name in (
        "dataset", "data_dir", "size", "tokenizer", "cell")})]
    with pytest.raises(SystemExit):
        dit.encode_command(words)
    assert "owl is no class of" in capsys.readouterr().err


def test_latents_may_be_larger_than_memory(cfg, monkeypatch):
    """They are mapped as what is only read: a system may refuse room for a copy of ImageNet's."""
    encoded(cfg)
    calls = spy(monkeypatch, np, "memmap")
    assert len(dit.load_data(cfg, True)[0]) == 1090
    assert [call.args[2] for call in calls] == ["r"]


def test_vavae_on_a_cpu(pictures, small_vae):
    """The whole way, with a small tokenizer: two images at a time."""
    cfg = dit.make_config("folder", data_dir=str(pictures / "val"), size=32, vae=str(small_vae))
    dit.encode(cfg, True, CPU)
    latents, labels = dit.load_data(cfg, True)
    assert latents.shape == (9, 2, 32, 2, 2) and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert dit.fingerprint(latents, labels).startswith("9 images of 3 classes, CRC ")


def test_on_a_cpu_no_thread_reads_ahead(cfg):
    """A second thread that computes would take OpenMP's threads from training."""
    images, labels = dit.load_latents(cfg, train=True)
    batches = dit.read_ahead(images, labels, cfg, 3, slice(2, 4), CPU)
    before = threading.active_count()
    next(batches)
    assert threading.active_count() == before
