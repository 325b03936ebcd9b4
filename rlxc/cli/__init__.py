"""The ``rlxc`` command line."""

from rlxc.cli.commands import app, main

__all__ = ["app", "main"]
