"""Pretraining: step, optimizer, log."""
