"""`make gpu` goes on where it stopped, fails where a part fails, and is no failure without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import REPO


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, REPO / "benchmarks" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Runs it with parts of ours; returns its exit status and what it wrote."""
    module = load("gpu")

    def run(parts: dict[str, list[str]], *flags: str) -> tuple[int, dict]:
        monkeypatch.setattr(module, "parts", lambda *_: parts)
        monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "gpu"), *flags])
        status = 0
        try:
            module.main()
        except SystemExit as e:
            status = e.code
        return status, json.loads((tmp_path / "gpu" / "gpu.json").read_text())

    run.module = module
    return run


def test_a_second_call_repeats_only_what_failed(gpu, tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    fine = [sys.executable, "-c", count]
    status, found = gpu({"a": fine, "b c": [sys.executable, "-c", "raise SystemExit(3)"]})
    assert status == 1 and found["parts"]["b c"]["outcome"] == "failed, status 3"
    status, found = gpu({"a": fine, "b c": fine})
    assert status == 0 and {p["outcome"] for p in found["parts"].values()} == {"ok"}
    assert (tmp_path / "count").read_text() == "xx"
    gpu({"a": fine, "b c": fine}, "--again")
    assert (tmp_path / "count").read_text() == "xxxx"


def test_a_part_that_takes_too_long_fails(gpu, monkeypatch):
    monkeypatch.setattr(gpu.module, "LIMIT", 0.2)
    status, found = gpu({"slow": [sys.executable, "-c", "import time; time.sleep(30)"]})
    assert status == 1 and "not done" in found["parts"]["slow"]["outcome"]


def test_without_a_gpu_and_triton_there_is_nothing_to_do(gpu, capsys):
    status, found = gpu({})
    assert status == 0 and found["parts"] == {}
    assert "nothing" in capsys.readouterr().out


def test_names_of_contenders_are_checked(gpu, tmp_path):
    """A name that nobody has would otherwise measure nothing, and say nothing."""
    command = [sys.executable, str(REPO / "benchmarks" / "dpo_step.py"), "--only", "sagee", "--model", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and "no contender ['sagee']" in done.stderr
    source = (REPO / "benchmarks" / "dpo_step.py").read_text()
    for name in gpu.module.SAGE:
        assert f'"{name}"' in source
