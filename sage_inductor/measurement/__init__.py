"""Rulers: error metrics, ground truth in float64, timers, the self-test of kernels, and how a long measurement reports."""
