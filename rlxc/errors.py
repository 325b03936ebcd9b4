"""Every error that rlxc raises on purpose.

    RlxcError
    ├── FormatError        a file is damaged, truncated or not what its name says
    ├── UnsupportedError   a file is sound, but uses something rlxc does not implement
    ├── ModelError         tensors or metadata do not make up the model they claim to be
    ├── WeightError        the weight registry was asked for something inconsistent
    ├── GraphError         a graph is malformed
    │   ├── VerifyError    ... and the verifier names the pass, the node and its inputs
    │   └── ParseError     ... and the text cannot be read, with its line
    ├── OptionError        an option has a value outside its range
    ├── ArtifactError      an artifact cannot be written, or is not what its manifest says
    └── SessionError       a session was asked for something it cannot do
        ├── ContextError   ... because the context is full
        ├── RollbackError  ... because what it should go back to is no longer held
        ├── SnapshotError  ... with a snapshot that is damaged, or of another model or plan
        └── QueueFullError ... because too many requests wait already

An error says in one line where the problem is, what it is and what to do next. Where a file has several problems,
:class:`Problems` gathers them, so that its reader learns of all at once.
"""

from __future__ import annotations


class RlxcError(Exception):
    """Base of all rlxc errors: ``source: problem; remedy`` in one line.

    Args:
        problem: what is wrong, with the offending field and value.
        source: the file, tensor, option or pass where it is wrong.
        remedy: what the user can do about it.

    ``parts`` are the errors that it stands for: itself, unless it was made by :class:`Problems`.
    """

    def __init__(self, problem: str, *, source: object = None, remedy: str = "") -> None:
        self.problem = problem
        self.source = source
        self.remedy = remedy
        self.parts: tuple[RlxcError, ...] = (self,)
        where = "" if source is None else f"{source}: "
        then = f"; {remedy}" if remedy else ""
        super().__init__(f"{where}{problem}{then}")


class FormatError(RlxcError):
    """A file is damaged, truncated or not what its name says."""


class UnsupportedError(RlxcError):
    """A file is sound, but uses something rlxc does not implement."""


class ModelError(RlxcError):
    """Tensors or metadata do not make up the model they claim to be."""


class WeightError(RlxcError):
    """The weight registry was asked for something inconsistent."""


class GraphError(RlxcError):
    """A graph is malformed."""


class VerifyError(GraphError):
    """A graph breaks an invariant of the IR."""


class ParseError(GraphError):
    """IR text cannot be read."""


class OptionError(RlxcError):
    """An option has a value outside its range."""


class ArtifactError(RlxcError):
    """An artifact cannot be written, or is not what its manifest says."""


class SessionError(RlxcError):
    """A session was asked for something it cannot do."""


class ContextError(SessionError):
    """The context is full."""


class RollbackError(SessionError):
    """What a sequence should go back to is no longer held."""


class SnapshotError(SessionError):
    """A snapshot is damaged, or it is of another model or another plan."""


class QueueFullError(SessionError):
    """Too many requests wait already."""


class Problems:
    """Errors that are found one after the other and raised as one, whose ``parts`` they are."""

    def __init__(self) -> None:
        self.found: list[RlxcError] = []

    def add(self, error: RlxcError) -> None:
        """Take note of an error, or of all that it stands for."""
        self.found += [part for part in error.parts if part not in self.found]

    def error(self) -> RlxcError:
        """The first error, of its own kind, which says how many there are; at least one must have been found."""
        first, *others = self.found
        if not others:
            return first
        more = f"{len(others)} more problem{'s' if len(others) > 1 else ''}"
        whole = type(first)(
            f"{first.problem} (and {more}, which `rlxc inspect` lists)",
            source=first.source,
            remedy=first.remedy,
        )
        whole.parts = tuple(self.found)
        return whole
