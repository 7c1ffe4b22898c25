"""The compiled selective scans, as shared libraries beside this file. compiled.py loads them."""
