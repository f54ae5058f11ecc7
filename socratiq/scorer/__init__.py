"""The scorer: how strongly a question is of each type, and the reward made of it."""


def __getattr__(name: str):  # imported on first use, so that `python -m socratiq.scorer --help` need not wait for torch
    if name == "Scorer":
        from socratiq.scorer.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
