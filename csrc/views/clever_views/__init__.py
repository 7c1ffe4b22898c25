"""The compiled renderer of views, a shared library beside this file. views_cpp.py loads it."""
