"""The wheel: built, installed into a venv of its own, run from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import REPO

pytestmark = pytest.mark.slow


def call(*words: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_installs_and_trains_from_another_folder(tmp_path, tiny_model, pair_file):
    # A copy, so that the build leaves nothing in the repository and takes nothing from an older build.
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("sage", "conf"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet")
    call(
        *pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source, cwd=tmp_path
    )
    (wheel,) = tmp_path.glob("sage_align-*.whl")

    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    call(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # A .pth adds this environment's dependencies. The .pth of an editable sage in that folder is not read.
    packages = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    where = call(
        python, "-c", "import sage, sage.conf; print(sage.__file__, sage.conf.__file__)", cwd=elsewhere
    )
    assert all(Path(file).is_relative_to(packages) for file in where.split())

    sage = home / "bin" / "sage"
    assert "experiment: arithmetic, demo, gsm8k" in call(sage, "train", "--help", cwd=elsewhere)
    assert "gsm8k_demo/train.jsonl" in call(sage, "train", "--cfg", "job", "+experiment=demo", cwd=elsewhere)
    call(
        sage,
        "train",
        "model=hf",
        f"model.path={tiny_model}",
        f"data.path={pair_file}",
        "steps=2",
        "batch_size=4",
        "data.max_length=256",
        "micro_batch_tokens=1024",
        f"cache_dir={tmp_path / 'cache'}",
        "hydra.run.dir=run",
        cwd=elsewhere,
    )
    assert json.loads((elsewhere / "run" / "summary.json").read_text())["steps"] == 2
    assert list((elsewhere / "run" / "final").glob("*.safetensors"))
    # The demo's pairs and licence travel along.
    assert {"train.jsonl", "heldout.jsonl", "LICENSE"} <= {
        p.name for p in (packages / "sage/assets/gsm8k_demo").iterdir()
    }
