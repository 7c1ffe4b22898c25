"""The compiled renderer of views, a shared library beside this file. clever.data.rendering_cpp loads it."""
