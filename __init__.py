"""ComfyUI entry: what `git clone` into custom_nodes/ finds.

This version has no nodes yet: ComfyUI loads the folder, finds an empty list and goes on. Nothing is
imported and no path is changed.
"""

if __package__:  # ComfyUI imports the folder as a package; pytest sees this file bare
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
