"""Backbones, heads, and weights from files."""
