"""The place of the ComfyUI nodes. This version has none yet."""
