"""socratiq: SFT, preference pairs, DPO and PPO from scratch in PyTorch, on one real task: asking critical questions."""

import sys

_before = sys.excepthook


def _quiet_interrupt(kind, error, trace) -> None:
    """Ctrl-C while a script still imports, before `run.errors.main` answers signals, prints no traceback."""
    if kind is not KeyboardInterrupt:
        _before(kind, error, trace)


sys.excepthook = _quiet_interrupt
