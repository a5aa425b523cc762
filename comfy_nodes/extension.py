"""The list of nodes, and the folders of artifacts and prompts. Node ids are permanent."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from .api import ComfyExtension, io
from .artifacts import FOLDER
from .calibration import Calibrate
from .export import Export
from .loader import Loader
from .nodes import ApplyCache, LoadArtifact, QuantizeModel
from .prompts import FOLDER as PROMPTS
from .prompts import LoadPrompt, SavePrompt
from .report import Report
from .speed import SpeedUp


class Extension(ComfyExtension):
    """What `comfy_entrypoint` returns."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node."""
        return [
            Loader, LoadArtifact, QuantizeModel, SpeedUp, ApplyCache, Report, Calibrate,
            SavePrompt, LoadPrompt, Export,
        ]  # fmt: skip


def extension() -> Extension:
    """Makes the folders known; files with a name of any other kind are not shown."""
    for name in (FOLDER, PROMPTS):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        paths, _ = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, {".safetensors"})
    return Extension()
