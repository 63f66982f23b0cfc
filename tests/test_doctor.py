"""`sage doctor`: what works is said to work, and what fails, crashes or hangs is a row and exit status 1."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
from forks import Started

from sage.commands import doctor
from sage.commands.doctor import FAILED, NOTE, OK, Finding


def wrong(folder, device):
    from sage.commands import doctor_checks

    raise doctor_checks.Wrong("3 is not 4")


BROKEN = {
    "device": lambda folder, device: "fine",
    "exchange": lambda folder, device: time.sleep(60),
    "head": lambda folder, device: os.abort(),
    "attention": wrong,
    "zero0": lambda folder, device: "still fine",
}


def try_out(*words: str) -> None:
    """What a rank of `sage doctor` does."""
    from sage.commands import doctor_checks

    sys.argv = ["doctor_checks", *words]
    doctor_checks.main()


def try_out_broken(*words: str) -> None:
    from sage.commands import doctor_checks

    doctor_checks.LIMIT = 2.0
    doctor_checks.init_distributed = lambda: "cpu"  # pyright: ignore
    doctor_checks.CHECKS = BROKEN
    try_out(*words)


def run_broken(world: int, command: list[str], *_: object) -> int:
    status = Started(try_out_broken, *command[2:]).end()[0]
    return status if status >= 0 else 128 - status


@pytest.mark.slow
def test_a_check_that_hangs_crashes_or_fails_is_a_row_and_the_others_still_run(tmp_path, monkeypatch):
    """Protects the table from the very faults that it is to show: a hanging NCCL, a kernel that crashes."""
    monkeypatch.setattr(doctor, "CHECKS", {name: (name, "advice") for name in BROKEN})
    monkeypatch.setattr(doctor, "run_ranks", run_broken)
    doctor.run_checks(tmp_path, 1)
    rows = {name: doctor.row_of(name, tmp_path, 1) for name in BROKEN}
    assert [row.state for row in rows.values()] == [OK, FAILED, FAILED, FAILED, OK]
    assert rows["attention"].detail == "rank 0: 3 is not 4" and rows["attention"].advice == "advice"
    assert (
        "sleep" in (tmp_path / "rank_0.log").read_text() or "Timeout" in (tmp_path / "rank_0.log").read_text()
    )


@pytest.mark.slow
def test_everything_works_on_the_cpu(tmp_path):
    """The checks themselves, by one rank: they pass where sage works, so a failure means something."""
    status, said = Started(try_out, str(tmp_path), *doctor.CHECKS).end()
    rows = [doctor.row_of(name, tmp_path, 1) for name in doctor.CHECKS]
    assert status == 0 and {row.state for row in rows} == {OK}, (rows, said)


def test_the_exit_status_and_the_json_name_what_failed(sage, monkeypatch, tmp_path):
    file = tmp_path / "doctor.json"
    words = ("doctor", f"json={file}", f"cache_dir={tmp_path / 'cache'}")
    monkeypatch.setattr(doctor, "absent", lambda: "you are not logged in")
    monkeypatch.setattr(doctor, "tried", lambda gpus: [Finding("head", OK, "0 nats [bold]")])
    status, out, _ = sage(*words)
    assert status == 0 and "all is well" in out and "[bold]" in out
    monkeypatch.setattr(
        doctor, "tried", lambda gpus: [Finding("head", FAILED, "2 nats", "set model.head=tiled")]
    )
    status, out, _ = sage(*words)
    assert status == 1 and "1 of" in out and "set model.head=tiled" in out
    written = json.loads(file.read_text())
    assert written["failed"] == ["head"] and written["rows"][-1]["detail"] == "2 nats"


def test_packages_that_do_not_fit_are_named_with_what_fits(monkeypatch):
    installed = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.1" if name == "torch" else installed(name))
    row = doctor.packages()
    assert row.state == FAILED and "'torch<3,>=2.8'" in row.advice and "transformers" not in row.advice
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "peft" else installed(name))
    assert "lora" in doctor.optional_packages().advice
    monkeypatch.undo()
    assert doctor.packages().state == OK


def test_a_gpu_that_torch_does_not_see_fails(monkeypatch, tmp_path):
    """A build of torch for CPUs would otherwise train on the CPU without a word."""
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.gpus().state == OK or doctor.Path("/proc/driver/nvidia").exists()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.gpus().state == FAILED


def test_disks_that_cannot_be_written_or_are_nearly_full(tmp_path, monkeypatch):
    assert doctor.disk("disk", tmp_path / "new", "cache_dir").state == OK
    (tmp_path / "file").write_text("")
    row = doctor.disk("disk", tmp_path / "file" / "below", "cache_dir")
    assert row.state == FAILED and "cache_dir" in row.advice
    monkeypatch.setattr(doctor, "ROOM", 1 << 62)
    assert doctor.disk("disk", tmp_path, "cache_dir").state == NOTE
