"""What several tests need: the scripts as modules, small archives of the true format, and runs as a user starts them."""
import importlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = [name for name in ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc") if (ROOT / f"{name}.py").exists()]
PIXEL = [name for name in SCRIPTS if name != "dit_latent_sc"]
RUN = dict(batch=8, nfe=2, epochs=2, warmup=0.0, dropout=0.0, lr=4e-4, device="cpu")
SMALL = dict(RUN, dataset="cifar100", backbone="uvit_tiny", patch=8)            # uvit_sc.py: 16 patches
SMALL_UNET = dict(RUN, dataset="folder", size=8, backbone="unet_tiny", layer="out_3")
SMALL_DIT = dict(RUN, dataset="folder", size=16, tokenizer="unshuffle", cell=4, classes=4, backbone="dit_tiny", layer="block_3")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="only what is marked slow: hundreds of faults, a quarter of an hour")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: not run unless --slow is given, and then alone")


def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if "slow" in item.keywords]
    chosen = slow if config.getoption("--slow") else [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)    # two processes side by side must not fight for the cores, and small nets gain nothing


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


def write_cifar(folder, n=64):
    """Both CIFAR archives in their true binary format, with n random training and n // 2 test images each (n / 5 a batch)."""
    rng = np.random.RandomState(0)

    def records(count, head, classes):
        labels = rng.randint(0, classes, (count, head)).astype(np.uint8)
        return np.concatenate([labels, rng.randint(0, 256, (count, 3072), np.uint8)], axis=1).tobytes()

    layout = {"cifar-100-binary.tar.gz": {"cifar-100-binary/train.bin": records(n, 2, 20), "cifar-100-binary/test.bin": records(n // 2, 2, 20)},
              "cifar-10-binary.tar.gz": {"cifar-10-batches-bin/test_batch.bin": records(n // 2, 1, 10), **{
                  f"cifar-10-batches-bin/data_batch_{i}.bin": records(n // 5, 1, 10) for i in range(1, 6)}}}
    folder.mkdir(parents=True, exist_ok=True)
    for archive, members in layout.items():
        with tarfile.open(folder / archive, "w:gz") as tar:
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
    """A folder of class folders: 64 images of 12 x 10 pixels for training, 32 for testing."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for split, n in (("train", 16), ("val", 8)):
        for name in "abcd":
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.randint(0, 256, (10, 12, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def small(request, cifar, photos, tmp_path):
    """Fields of a run that takes a second: few images, few pixels or patches, two network evaluations per image."""
    script = request.getfixturevalue("script") if "script" in request.fixturenames else None
    if script and script.Backbone.__name__ == "UNet":
        return dict(SMALL_UNET, data_dir=str(photos), out=str(tmp_path / "run"))
    if script and script.Backbone.__name__ == "DiT":
        return dict(SMALL_DIT, data_dir=str(photos), out=str(tmp_path / "run"))
    return dict(SMALL, data_dir=str(cifar), out=str(tmp_path / "run"))


def flags(fields):
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def launch(script, arguments, processes=1, **kwargs):
    """Starts a script as a user does, with python or torchrun, one thread each."""
    command = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
        "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [str(ROOT / f"{script}.py"), *map(str, arguments)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **kwargs)


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def losses(run):
    import json
    return [json.loads(line)["loss"] for line in (Path(run) / "log.jsonl").read_text().splitlines()]
