"""Weights & Biases: one run there for each run directory. It never goes back in steps or stops training."""

from __future__ import annotations

import dataclasses
import secrets
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sage.config import TrackingConfig, TrainConfig
from sage.util.errors import UserError, first_line
from sage.util.files import write_text
from sage.util.progress import console

ID_FILE = "wandb_id.txt"  # in the run directory
ANSWER, START, FINISH = 5.0, 20.0, 60.0  # seconds to wait for the server
FORBIDDEN = "\\#?%:"  # in the name of a project


def check_wandb(tracking: TrackingConfig) -> None:
    """Refuse a project that cannot be, and `online` where there is no login or no server.

    Raises:
        UserError: says which.
    """
    entity, _, project = tracking.project.rpartition("/")
    if not project or "/" in entity or any(c in FORBIDDEN for c in tracking.project):
        raise UserError(
            f"tracking.project={tracking.project}: write PROJECT or ENTITY/PROJECT, with none of {FORBIDDEN}"
        )
    if tracking.mode == "online" and (reason := absent()):
        raise UserError(
            f"tracking.mode=online: {reason}. With tracking.mode=auto the run is logged offline, and "
            "`wandb sync` uploads it later"
        )


def absent() -> str | None:
    """Why Weights & Biases cannot be online, if it cannot."""
    import wandb

    try:
        if not wandb.login(prompt=False, verify=False):
            return "you are not logged in: run `wandb login`, or set WANDB_API_KEY"
    except wandb.Error as e:
        return first_line(e).rstrip(".")
    server = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(server, timeout=ANSWER).close()
    except urllib.error.HTTPError:
        pass  # an answer, if not to this question
    except (OSError, ValueError) as e:
        return f"{server} does not answer ({first_line(e)})"
    return None


class WandbLog:
    """Logs to the W&B run whose id RUN_DIR keeps.

    The steps that a resumed run repeats are not logged again: they give the same metrics.
    """

    def __init__(self, cfg: TrainConfig, run_dir: Path, logged: int):
        """`logged` is the last step that an interrupted run has logged; -1 if there is none."""
        self.folder = run_dir / "wandb"
        self.run = self.start(cfg, run_dir)
        offline = self.run is not None and self.run.settings.mode != "online"
        self.first = logged + 1 if offline or self.run is None else max(self.run.step, 0)

    def start(self, cfg: TrainConfig, run_dir: Path) -> Any:
        """Open the run: online if that can be, else offline, with one line.

        Raises:
            UserError: it must be online, and cannot be.
        """
        import wandb

        mode: Any = cfg.tracking.mode
        if mode == "auto":
            chosen = wandb.setup().settings.mode  # by WANDB_MODE
            mode = chosen if chosen in ("offline", "disabled") else "online"
            if mode == "online" and (reason := absent()):
                mode = self.offline(reason)
        entity, _, project = cfg.tracking.project.rpartition("/")
        options: dict[str, Any] = {
            "entity": entity or None,
            "project": project,
            "name": f"{cfg.name}/{run_dir.name}",
            "id": wandb_id(run_dir),
            "resume": "allow",
            "dir": run_dir,
            "config": dataclasses.asdict(cfg),
            "settings": wandb.Settings(quiet=True, init_timeout=START, finish_timeout=FINISH),
        }
        try:
            return wandb.init(mode=mode, **options)
        except Exception as e:  # of the server, the network or wandb's own process
            if cfg.tracking.mode == "online":
                raise UserError(
                    f"tracking.mode=online: Weights & Biases refuses the run: {first_line(e)}"
                ) from e
            wandb.teardown()  # its process still holds the id
            return wandb.init(mode=self.offline(first_line(e)), **options)

    def offline(self, reason: str) -> Any:
        console.print(
            f"Weights & Biases logs offline: {reason.rstrip('.')}. To upload the run later: wandb sync "
            f"{self.folder}/offline-*",
            markup=False,
        )
        return "offline"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self.run is None or step < self.first:
            return
        try:
            self.run.log(metrics, step=step)
        except Exception as e:  # wandb's own process has died
            self.give_up(e)

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as e:
                self.give_up(e)

    def give_up(self, error: Exception) -> None:
        self.run = None
        console.print(
            f"Weights & Biases logs nothing more ({first_line(error)}); metrics.jsonl goes on", markup=False
        )


def wandb_id(run_dir: Path) -> str:
    """The id of this run at Weights & Biases: drawn when the run begins, kept in its folder."""
    file = run_dir / ID_FILE
    if not file.exists():
        write_text(file, secrets.token_hex(6) + "\n")
    return file.read_text().strip()
