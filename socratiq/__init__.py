"""socratiq: SFT, preference pairs, DPO and PPO from scratch in PyTorch, on one real task: asking critical questions."""
