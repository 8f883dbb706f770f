"""Jobs as a coordinator hands them out, and the configuration of a node that takes them."""

from typing import Any

import msgspec

from aitbc_miner.config.settings import Config, CoordinatorSection
from aitbc_miner.coordinator.interface import PulledJob
from aitbc_miner.jobs import decode_manifest

PLAIN: dict[str, Any] = {"job_id": "j1", "runner": "cli", "command": "true"}
CONFIG = Config(coordinator=CoordinatorSection("http://127.0.0.1:1", "env:X", allow_private_inputs=True))


def pulled(**more: Any) -> PulledJob:
    value = {**PLAIN, **more}
    return PulledJob(msgspec.json.encode(value), decode_manifest(value))
