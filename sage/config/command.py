"""The keys of every command, and those of the commands that run a model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from sage.config.groups import LoraConfig, ModelConfig, SamplingConfig, key
from sage.config.keys import because
from sage.util.errors import UserError


@dataclass
class CommandConfig:
    """The keys of every command. A command's own class adds keys, and a `check` of their combinations."""

    command: str = key(MISSING, "the command that this config is for")
    name: str = key(MISSING, "names the run's folder")

    def check(self) -> None:
        """Raise UserError if values that are valid alone cannot run together."""

    def ignored(self) -> dict[str, str]:
        """Keys and groups that have no effect on this command, each with the reason."""
        return {}


@dataclass
class RunConfig(CommandConfig):
    """The keys of the commands that run a model, in one or more ranks."""

    model: ModelConfig = field(default_factory=ModelConfig)
    seed: int = key(0, "seed of everything that is drawn: data order, dropout, selection, responses", low=0)
    world_size: int = key(1, "ranks (processes), one per GPU", low=1)
    start: bool = key(
        True, "false = check, freeze, print the commands that start the ranks on a cluster, and end there"
    )
    resume: str = key(
        "never",
        "auto = go on with the run that hydra.run.dir already holds, if there is one, as after a requeue",
        choices=("never", "auto"),
    )
    cache_dir: str = key(
        "~/.cache/sage",
        "folder for converted models, read and tokenised pairs, and reference log-probabilities",
    )
    generation: dict[str, Any] = key(
        {}, "the backend that samples responses: a class of sage.answering, or yours, by _target_"
    )
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def check(self) -> None:
        """Raise UserError if values that are valid alone cannot run together."""
        if self.model.lora is None and self.model.adapter_path is not None:
            raise UserError("model.adapter_path needs an adapter: add +model/lora=default")
        if "" in self.sampling.stop:
            raise UserError(
                "sampling.stop has an empty text, before which every response would end: leave it out"
            )

    def ignored(self) -> dict[str, str]:
        ignored = {}
        if self.model.adapter_path is not None:
            keys = (f"model.lora.{f.name}" for f in fields(LoraConfig))
            ignored |= because("since the adapter at model.adapter_path has its own", *keys)
        if self.model.path.startswith("pkg://") or Path(self.model.path).expanduser().exists():
            ignored |= because("since model.path is on this disk", "model.revision")
        if self.sampling.temperature == 0:
            ignored |= because("since sampling.temperature=0 takes the likeliest token", "sampling.top_p")
        return ignored
