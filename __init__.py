"""ComfyUI entry: what `git clone` into custom_nodes/ finds.

Nothing is imported before ComfyUI asks for the nodes. Then the library is made importable, where it
is not installed, as `tenuto`: the name of its folder, core, is that of other packs' packages too.

A script beside a clone called tenuto gets the library too: Python looks into that folder first.
"""

if __name__ == "tenuto":
    import importlib.util
    import sys
    from pathlib import Path

    library = Path(__file__).resolve().parent / "core" / "tenuto"
    spec = importlib.util.spec_from_file_location("tenuto", library / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["tenuto"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
elif __package__:  # ComfyUI imports the folder as a package; pytest sees this file bare
    from typing import Any

    WEB_DIRECTORY = "./comfy_nodes/web"

    async def comfy_entrypoint() -> Any:
        """The extension (V3 API)."""
        import importlib
        import importlib.util
        import sys
        from pathlib import Path

        core = str(Path(__file__).resolve().parent / "core")
        if importlib.util.find_spec("tenuto") is None:
            sys.path.insert(0, core)
        return importlib.import_module(".comfy_nodes.extension", __package__).extension()
