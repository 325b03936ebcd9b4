"""The targets whose code this machine can run."""

from __future__ import annotations

import pytest

from rlxc.artifact.cpu import cpu_features, machine
from rlxc.backends.tvm.targets import TARGETS

HERE = [
    target for target in TARGETS if target.machine == machine() and cpu_features().issuperset(target.needs)
]
"""Best first."""

each_target = pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
