"""``python -m rlxc`` is the same as ``rlxc``."""

from rlxc.cli import main

main()
