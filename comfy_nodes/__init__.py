"""Tenuto's ComfyUI nodes. `extension.py` is what ComfyUI asks for; this imports nothing."""
