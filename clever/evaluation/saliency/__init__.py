"""Unsupervised saliency: TokenCut, the bilateral solver, data, metrics, pictures and results."""
