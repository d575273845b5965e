"""What each Python process of a command runs first: the launcher puts a copy on its path, `sitecustomize`.

Python imports a module of that name as it starts. The standard library alone is imported here: most processes
of a command load no model. When one imports the parts of transformers that load and train models, `switch`
takes over, which needs fastexperts in that Python.
"""

import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

HOOKED = ("transformers.modeling_utils", "transformers.trainer_callback")


class Finder:
    """Finds the modules HOOKED as Python does, and has a `Switch` patch each right after its import."""

    def __init__(self, folder: str) -> None:
        """folder: where processes say what they did."""
        self._folder = folder
        self._switch: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a module of HOOKED; None leaves any other to the finders that follow."""
        spec = PathFinder.find_spec(name, path, target) if name in HOOKED else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                self._patch(module)

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec

    def _patch(self, module: ModuleType) -> None:
        try:
            from fastexperts.run.switch import Switch
        except ImportError as error:
            note = {"state": "missing", "detail": f"{sys.executable}: {error}"}
            with open(os.path.join(self._folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:  # noqa: PTH118, PTH123 - pathlib is slow to import
                print(json.dumps(note), file=file)
            return
        self._switch = self._switch or Switch(self._folder)
        self._switch.patch(module)


def start(folder: str) -> None:
    """Watch imports, and run the `sitecustomize` that the copy in `folder` hides, if there is one."""
    sys.meta_path.insert(0, Finder(folder))
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if entry != folder])
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = hidden = module_from_spec(spec)
        spec.loader.exec_module(hidden)


if __name__ == "sitecustomize":
    start(os.path.dirname(__file__))  # noqa: PTH120 - as above
