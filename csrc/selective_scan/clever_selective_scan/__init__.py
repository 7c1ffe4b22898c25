"""The compiled selective scans, as shared libraries beside this file. vmamba/extension.py loads them."""
