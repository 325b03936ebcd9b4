"""Where the tests of the IR find the small models."""

from __future__ import annotations

import sys
from pathlib import Path

# They lie beside the folders of the tests that share them.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
