"""Turnout: Mixture-of-Experts for PyTorch. Start at `turnout.moe.MoE`."""

__version__ = "0.1.0"
