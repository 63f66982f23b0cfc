"""The schema of each command word.

The dataclasses are registered with Hydra, so composition itself rejects wrong types and most unknown keys.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from sage.config.command import CommandConfig
from sage.config.rounds import RoundsConfig
from sage.config.schema import (
    BuildPairsConfig,
    DoctorConfig,
    EvalConfig,
    InspectConfig,
    PlanConfig,
    TrainConfig,
    VerifyConfig,
)
from sage.config.scores import ScoreConfig

# Command word -> its schema. The command composes conf/WORD.yaml, which names WORD_schema (a dash becomes _).
SCHEMAS: dict[str, type[CommandConfig]] = {
    "train": TrainConfig,
    "rounds": RoundsConfig,
    "build-pairs": BuildPairsConfig,
    "score-dataset": ScoreConfig,
    "inspect": InspectConfig,
    "eval": EvalConfig,
    "verify": VerifyConfig,
    "doctor": DoctorConfig,
    "plan": PlanConfig,
}

# Hydra copies its whole store for every group that `--help` lists, which took 5 seconds. One store for all is
# safe: `ConfigStore.load` copies what it returns.
ConfigStore.__deepcopy__ = lambda self, memo: self  # pyright: ignore[reportAttributeAccessIssue]

for _word, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_word.replace('-', '_')}_schema", node=_schema)
