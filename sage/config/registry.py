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
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
)

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


for _word, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_word.replace('-', '_')}_schema", node=_schema)
