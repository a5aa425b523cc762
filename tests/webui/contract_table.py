"""contract_table.py CONTRACT NEO: writes contract.json, signatures of what the extension calls.

CONTRACT has all signatures of three hosts, {file: {host: {function: signature, "class X": {method:
signature, "__fields__": [...]}}}}; NEO is a folder of Forge Neo, which is read and not run. These
are facts; of the hosts' code there is nothing.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

HOSTS = ("a1111-1.10.1", "forge-dfdcbab", "reforge-3b56b26")
NEO = "neo-2.26"
SCRIPT = (
    "title", "show", "ui", "elem_id", "before_process", "process", "process_before_every_sampling",
    "post_sample", "postprocess",
)  # fmt: skip
CALLBACKS = ("ui_settings", "before_ui", "app_started", "cfg_denoiser", "model_loaded",
             "script_unloaded")  # fmt: skip
USED: dict[str, tuple[str, ...]] = {
    "modules/scripts.py": tuple(f"Script.{name}" for name in SCRIPT),
    "modules/script_callbacks.py": (
        *(f"on_{name}" for name in CALLBACKS), "CFGDenoiserParams.__init__",
        "CFGDenoiserParams.__fields__",
    ),
    "modules/options.py": ("OptionInfo.__init__", "OptionInfo.info", "Options.add_option"),
    "modules/ui_components.py": ("InputAccordion", "ToolButton.__init__"),
    "modules/infotext_utils.py": ("PasteField.__init__",),
    "scripts/xyz_grid.py": ("AxisOption.__init__", "AxisOption.__fields__", "apply_field"),
    "modules/sd_samplers_cfg_denoiser.py": ("CFGDenoiser.__fields__",),
    "modules/sd_samplers_common.py": ("Sampler.__fields__",),
    "extensions-builtin/Lora/networks.py": ("network_apply_weights",),
    "backend/operations.py": ("get_weight_and_bias",),
    "backend/patcher/base.py": ("ModelPatcher.__fields__",),
    "ldm_patched/modules/model_patcher.py": ("ModelPatcher.__fields__",),
}  # fmt: skip


FIELDS = {  # that are looked at
    "CFGDenoiserParams": ("denoiser", "sampling_step", "total_sampling_steps", "x"),
    "CFGDenoiser": ("p", "sampler", "step", "steps", "total_steps"),
    "Sampler": ("func", "model_wrap_cfg"),
    "AxisOption": ("label",),
    "ModelPatcher": ("model", "lora_loader", "backup", "patches_uuid"),
}
# Of a file that CONTRACT has not: what the class has in each of the three hosts, by their sources.
MORE = {
    "modules/sd_samplers_common.py": {
        host: {"class Sampler": {"__fields__": list(FIELDS["Sampler"])}} for host in HOSTS
    }
}


def found(functions: dict[str, Any], name: str) -> Any:
    """A signature, or a list of fields; a class without methods of its own is its __init__."""
    holder, _, method = name.rpartition(".")
    if not holder:
        known = functions.get(name)
        return known if known is not None else functions.get(f"class {name}", {}).get("__init__")
    known = functions.get(f"class {holder}", {}).get(method)
    return [f for f in known if f in FIELDS[holder]] if method == "__fields__" else known


def read(file: Path) -> dict[str, Any]:
    """What CONTRACT has of one file, from its source: signatures, and what a class assigns."""
    made: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            made[node.name] = f"({ast.unparse(node.args)})"
        elif isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            known: dict[str, Any] = {n.name: f"({ast.unparse(n.args)})" for n in methods}
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Attribute)]
            known["__fields__"] = list(dict.fromkeys(
                n.attr for n in inside if ast.unparse(n.value) == "self"
                and isinstance(n.ctx, ast.Store)
            ))  # fmt: skip
            made[f"class {node.name}"] = known
    return made


def table(contract: dict[str, Any], neo: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{file: {symbol: {host: signature or fields}}}, for the hosts that have the file."""
    made: dict[str, dict[str, dict[str, Any]]] = {}
    contract = MORE | contract
    for file, names in USED.items():
        known = {host: contract[file][host] for host in HOSTS if host in contract[file]}
        if (neo / file).is_file():
            known[NEO] = read(neo / file)
        made[file] = {n: {h: found(has, n) for h, has in known.items()} for n in names}
    return made


if __name__ == "__main__":
    whole = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    text = json.dumps(table(whole, Path(sys.argv[2])), indent=1)
    Path(__file__).with_name("contract.json").write_text(text + "\n", encoding="utf-8")
