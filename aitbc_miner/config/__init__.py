"""The operator's files.

* settings: Config: config.yaml and its overrides AITBC_MINER_…
* values: addresses and paths
* dropins: the files of a directory such as slots.d
* document: typed YAML, with every fault: file, line, key
* yaml_text, yaml_types: the subset of YAML, its line numbers, its types
* units: sizes, durations, lists of CPUs
"""

from aitbc_miner.config.settings import Config, load_config

__all__ = ["Config", "load_config"]
