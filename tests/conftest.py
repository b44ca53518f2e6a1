"""What several tests need: the scripts as modules, a small network and small data for each, small
archives of the true format, and runs in processes of their own."""
import importlib, io, json, os, subprocess, sys, tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
UNETS = ["ddpm_sc", "edm_sc", "rf_sc"]
PIXEL = [*UNETS, "uvit_sc"]
SCRIPTS = [*PIXEL, "dit_latent_sc"]

# A network that takes a few milliseconds a step, by the name "small" in every script: 2 levels with
# out_1 to out_4; 4 blocks with out_1 and out_2; 3 blocks.
SIZES = {"UNet": (16, (1, 2), 1, False, 8), "UViT": (64, 4, 4), "DiT": (3, 64, 4)}
# Runs are the same whatever the recipes say: fields that change a loss are named here.
RUN = dict(dataset="glyphs", backbone="small", batch=8, epochs=2, warmup=0.0, lr=1e-3, lr_decay=0.0,
           beta1=0.9, beta2=0.99, weight_decay=0.03, clip=1.0, ema=0.999, ema_ramp=True, nfe=2,
           dropout=0.0, flip=True, cl_hidden=32, device="cpu", amp="off", save_every=0,
           sample_every=0)
OWN = {"UNet": dict(layer="out_2"), "UViT": dict(layer="out_1", patch=4, pos_init="sincos"),
       "DiT": dict(layer="block_2", tokenizer="unshuffle", cell=4, class_drop=0.1)}
ALONE = {"ddpm_sc": dict(time_scale=0.001, t_probe=11), "uvit_sc": dict(time_scale=1.0)}

# For tests of probe.py, fid.py and the data: networks of the first runs.
SMALL = dict(dataset="cifar100", backbone="uvit_tiny", layer="out_1", patch=8, batch=8, nfe=2,
             epochs=2, warmup=0.0, dropout=0.0, lr=4e-4, device="cpu")


def load(name):
    """A script as a module that knows the small network."""
    script = importlib.import_module(name)
    script.Network.sizes["small"] = SIZES[script.Network.__name__]
    return script


def only(*names):
    """Runs a test with these scripts instead of all."""
    return pytest.mark.parametrize("script", names, indirect=True)


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


def small_config(script, **fields):
    settings = {**RUN, **OWN[script.Network.__name__], **ALONE.get(script.SCRIPT, {}), **fields}
    return script.make_config(**settings)


@torch.no_grad()
def shake(net, scale=0.05):
    """Adds noise to all weights, so that every one matters."""
    for p in net.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p), alpha=scale)
    return net


def small_net(script, scale=0.05, **fields):
    """A small network, in eval mode, whose every weight matters."""
    torch.manual_seed(0)
    return shake(script.build_net(small_config(script, **fields)).eval(), scale)


def random_data(script):
    """64 random images of 16 x 16 pixels, or latents of such images; 10 classes."""
    rng = np.random.RandomState(0)
    labels = torch.from_numpy(rng.randint(0, 10, 64)).long()
    if script.Network.__name__ == "DiT":
        latents = rng.randint(-256, 257, (64, 2, 48, 4, 4)) / 128
        return torch.from_numpy(latents).half(), labels
    return torch.from_numpy(rng.randint(0, 256, (64, 3, 16, 16), np.uint8)), labels


def use_random_data(script, replace=setattr):
    """Training reads random_data from now on, no files."""
    replace(script, "load_data", lambda cfg, train: random_data(script))
    no_statistics(replace)


def no_statistics(replace=setattr):     # networks for latents are built without files
    dit = load("dit_latent_sc")

    def statistics(cfg):
        C = dit.latent_shape(cfg)[0]
        return torch.zeros(C), torch.ones(C)
    replace(dit, "latent_statistics", statistics)


@pytest.fixture
def config(request, tmp_path, monkeypatch):
    """A function that makes the config of a run of seconds, with changes."""
    script = request.getfixturevalue("script")
    use_random_data(script, monkeypatch.setattr)
    out = str(tmp_path / "run")
    return lambda **fields: small_config(script, **{"out": out, **fields})


def spy(monkeypatch, owner, name):
    """Watches a function or method: its calls from now on, with .args (and self) and .kwargs."""
    calls, function = [], getattr(owner, name)

    def watched(*args, **kwargs):
        calls.append(mock.call(*args, **kwargs))
        return function(*args, **kwargs)
    monkeypatch.setattr(owner, name, watched)
    return calls


def rounding(largest, additions):
    """The error of a float32 result that needs so many additions, one after another, of terms up to
    `largest`: half an ulp each, all in one direction. Any order, on any CPU, stays within it."""
    return largest * additions * 2.0 ** -24


def agree(found, expected):
    """Whether losses of the first steps are the same but for rounding. A loss is a mean of
    thousands of squares, whose errors cancel: 2e-6, 16 ulps, is more than another order of addition
    makes of it. Each step carries them on, and Adam divides by the size of gradients: 2e-6 more for
    each."""
    pairs = list(zip(found, expected, strict=True))
    return all(abs(a / b - 1) < 2e-6 * step for step, (a, b) in enumerate(pairs, 1))


# ---- Runs ----------------------------------------------------------------------------------------

def final(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [line["loss"] for line in log(out)]


def same(a, b):
    """Whether nested containers of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def flags(fields):
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def start(words, processes=1, **kwargs):
    """Starts python, or torchrun with so many processes, one thread each."""
    command = [sys.executable, *words]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                        "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0",
                        "--local_addr=localhost"]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    environment = dict(os.environ, OMP_NUM_THREADS="1",
                       PYTHONPATH=os.pathsep.join(filter(None, paths)))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, **kwargs)


def launch(script, arguments, processes=1, **kwargs):
    """Starts a script as a user does."""
    return start([str(ROOT / f"{script}.py"), *map(str, arguments)], processes, **kwargs)


def finish(process, timeout=1200):
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()                          # if it hangs
    return process.returncode, out, err


def ends_with_one_line(script, arguments, capsys):
    """Runs main, expects status 2 and a single line on stderr, and returns that line."""
    with pytest.raises(SystemExit) as caught:
        script.main(list(map(str, arguments)))
    err = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in err if line.strip() and not line.startswith("note: ")]
    assert caught.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{script.SCRIPT}: ")
    return lines[0]


# ---- Data ----------------------------------------------------------------------------------------

def write_cifar(folder, n=64):
    """Both CIFAR archives in their true binary format, with n random training images (n / 5 a file)
    and n // 2 test images each."""
    rng = np.random.RandomState(0)

    def records(count, head, classes):
        labels = rng.randint(0, classes, (count, head)).astype(np.uint8)
        pixels = rng.randint(0, 256, (count, 3072), np.uint8)
        return np.concatenate([labels, pixels], axis=1).tobytes()

    ten = {f"cifar-10-batches-bin/data_batch_{i}.bin": records(n // 5, 1, 10) for i in range(1, 6)}
    ten["cifar-10-batches-bin/test_batch.bin"] = records(n // 2, 1, 10)
    hundred = {"cifar-100-binary/train.bin": records(n, 2, 20),
               "cifar-100-binary/test.bin": records(n // 2, 2, 20)}
    folder.mkdir(parents=True, exist_ok=True)
    for archive, members in (("cifar-10-binary", ten), ("cifar-100-binary", hundred)):
        with tarfile.open(folder / f"{archive}.tar.gz", "w:gz") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Class folders: 64 images of 12 x 10 pixels for training, 32 for testing."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for split, n in (("train", 16), ("val", 8)):
        for name in "abcd":
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.randint(0, 256, (10, 12, 3), np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


# ---- pytest --------------------------------------------------------------------------------------

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="only what is marked slow")


def pytest_configure(config):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)              # what a launcher has left there
    os.environ["no_proxy"] = "127.0.0.1"
    config.addinivalue_line("markers", "slow: not run unless --slow is given, and then alone")
    config.addinivalue_line("markers", "numeric: results that depend on how a CPU rounds; .ci/run "
                            "runs them once more without AVX-512")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--slow")
    chosen = [item for item in items if ("slow" in item.keywords) == wanted]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)    # small networks gain nothing from more, and the bits are the same
