"""The schema of every command, its checks, and the frozen config of a run."""

from sage.config.checks import build, check
from sage.config.command import CommandConfig, RunConfig
from sage.config.data import ChatConfig, DataConfig, PairColumns, ProblemsConfig, SourceConfig
from sage.config.frozen import (
    CONFIG_FILE,
    SUMMARY_FILE,
    differences,
    freeze,
    keep_budget,
    load,
    read_frozen,
    read_written,
    write,
)
from sage.config.groups import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PairingConfig,
    SamplingConfig,
    TrackingConfig,
    key,
)
from sage.config.keys import flatten, groups, known_keys, nearest, refusal, refuse_hidden, unknown_keys
from sage.config.registry import SCHEMAS
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

__all__ = [
    "CONFIG_FILE",
    "SCHEMAS",
    "SUMMARY_FILE",
    "BuildPairsConfig",
    "ChatConfig",
    "CommandConfig",
    "DataConfig",
    "DoctorConfig",
    "EngineConfig",
    "EvalConfig",
    "InspectConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairColumns",
    "PairingConfig",
    "PlanConfig",
    "ProblemsConfig",
    "RoundsConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainConfig",
    "VerifyConfig",
    "build",
    "check",
    "differences",
    "flatten",
    "freeze",
    "groups",
    "keep_budget",
    "key",
    "known_keys",
    "load",
    "nearest",
    "read_frozen",
    "read_written",
    "refusal",
    "refuse_hidden",
    "unknown_keys",
    "write",
]
