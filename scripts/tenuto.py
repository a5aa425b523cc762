"""A1111, Forge and reForge entry: they load every file of an extension's scripts/ folder.

This version has no WebUI extension yet: the file defines no script, and the host goes on without
one. What it will load has its place in webui_ext/.
"""
