"""The extension of A1111, Forge, Neo and reForge; hosts load it as `tenuto_webui` (Python 3.10)."""
