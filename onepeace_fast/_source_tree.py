"""In a source tree ``kernels/`` stands beside this package; a wheel has it inside, where Python finds it by itself."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_NAME = "onepeace_fast.kernels"
_HERE = Path(__file__).resolve().parent


def import_kernels() -> None:
    """Import ``onepeace_fast.kernels`` from the folder beside this package, where none is inside."""
    inside, beside = (folder / "kernels" / "__init__.py" for folder in (_HERE, _HERE.parent))
    if _NAME in sys.modules or inside.exists() or not beside.exists():
        return
    spec = spec_from_file_location(_NAME, beside, submodule_search_locations=[str(beside.parent)])
    assert spec is not None and spec.loader is not None
    sys.modules[_NAME] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(sys.modules["onepeace_fast"])["kernels"] = module


import_kernels()
