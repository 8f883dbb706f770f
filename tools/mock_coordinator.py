"""A mock coordinator to try the miner: `python tools/mock_coordinator.py --help`, in any directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.mock.main import main

if __name__ == "__main__":
    sys.exit(main())
