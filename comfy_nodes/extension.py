"""The list of nodes, and the folder that artifacts are in. Node ids are permanent."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .api import ComfyExtension, io
from .calibration import Calibrate
from .nodes import ApplyCache, LoadArtifact, QuantizeModel
from .report import Report
from .speed import SpeedUp

FOLDER = "tenuto"  # below models/


class Extension(ComfyExtension):
    """What `comfy_entrypoint` returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node."""
        return [LoadArtifact, QuantizeModel, SpeedUp, ApplyCache, Report, Calibrate]


def extension() -> Extension:
    """Makes the folder known; files with a name of any other kind are not shown."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
    return Extension()
