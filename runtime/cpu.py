"""Which of an artifact's libraries this CPU can run."""

from __future__ import annotations

from rlxc.artifact import Artifact, Library
from rlxc.artifact.cpu import cpu_features, machine
from rlxc.errors import SessionError


def choose_library(artifact: Artifact) -> Library:
    """The first of the artifact's libraries that this CPU can run: they are written best first.

    Raises:
        SessionError: it can run none; says what each needs that this CPU lacks.
    """
    here, have = machine(), cpu_features()
    refused = []
    for library in artifact.manifest.target.libraries:
        missing = [feature for feature in library.needs if feature not in have]
        if library.machine == here and not missing:
            return library
        needed = missing if library.machine == here else [f"a CPU of {library.machine}"]
        refused.append(f"{library.target} needs {', '.join(needed)}")
    raise SessionError(
        f"no library for this {here} CPU ({'; '.join(refused) or 'there are none'})",
        source=artifact.path,
        remedy="compile the model for it: `--target native` on this machine, or `--target` with the CPU's family",
    )
