"""The compiled selective scan, as shared libraries beside this file. clever.compiled loads them."""
