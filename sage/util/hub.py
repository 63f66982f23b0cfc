"""The model hub: is it there? Its libraries retry for half a minute before they look into their caches."""

from __future__ import annotations

import os

import huggingface_hub
from datasets import config as datasets_config

from sage.util.errors import first_line
from sage.util.progress import console

TIMEOUT = 5.0  # seconds


def reach_hub() -> None:
    """If the hub does not answer, everything that asks it later uses what is cached, at once."""
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as e:  # of the HTTP library, which differs between versions of huggingface_hub
        console.print(f"the model hub does not answer ({first_line(e)}): using what is cached", markup=False)
        constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that this one starts
