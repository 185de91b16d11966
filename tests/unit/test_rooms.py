"""Import order of the rooms: each can be read and used without the later ones."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvae_lightning

ROOT = Path(nvae_lightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
COMMANDS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")

#: Third-party libraries of each room, which may also import the rooms listed before it.
LIBRARIES = {
    "utilities": "torch torchvision matplotlib pydantic",
    "model": "torch jaxtyping",
    "serialization": "torch safetensors huggingface_hub",
    "objective": "torch jaxtyping",
    "backends": "torch jaxtyping triton",
    "data": "torch torchvision lightning jaxtyping numpy PIL pydantic tqdm filelock mlxtend",
    "published": "torch pydantic",
    "inference": "torch torchmetrics lightning jaxtyping numpy safetensors tqdm",
    "training": "torch torchvision torchmetrics lightning jaxtyping numpy PIL tqdm rich "
    "safetensors wandb wandb_workspaces",
    "reporting": "scipy",
    "benchmarking": "torch lightning jaxtyping numpy rich tqdm",
    "explorer": "torch gradio matplotlib numpy",
    "cli": "torch lightning hydra omegaconf tqdm yaml",
}
ROOMS = tuple(LIBRARIES)
#: Earlier rooms that a room must not import.
UNUSED = {
    "data": {"model", "serialization", "objective", "backends"},
    "benchmarking": {"reporting"},
}
#: Imports inside methods that only delegate to a later room.
LATER_IMPORTS = {("model/nvae.py", "serialization"), ("model/cells.py", "serialization")}


def _imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the modules that a file imports, also inside functions, and the names from each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names = tuple(alias.name for alias in node.names)
            if node.module == "nvae_lightning":
                yield from ((f"nvae_lightning.{name}", ()) for name in names)
            else:
                yield node.module, names


def _room(path: Path) -> str:
    """Return the room of a file; each command is its own room."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_every_folder_is_a_listed_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it_and_its_libraries(room: str) -> None:
    before = {*ROOMS[: ROOMS.index(room) + 1]} - UNUSED.get(room, set())
    offences = []
    for path in sorted((ROOT / room).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for module, _ in _imports(path):
            package, _, rest = module.partition(".")
            target = rest.partition(".")[0]
            if package == "nvae_lightning":
                is_allowed = target in before or (file, target) in LATER_IMPORTS
            else:
                is_allowed = (
                    package in sys.stdlib_module_names or package in LIBRARIES[room].split()
                )
            if not is_allowed:
                offences.append(f"{file}: {module}")
    assert offences == []


def test_no_command_imports_another() -> None:
    offences = [
        f"{path.name}: {module}"
        for path in FILES
        for module, _ in _imports(path)
        if module.startswith("nvae_lightning.") and module.split(".")[1] in COMMANDS
        if _room(path) != module.split(".")[1]
    ]
    assert offences == []


def test_no_room_imports_a_private_name_of_another() -> None:
    offences = [
        f"{path.relative_to(ROOT)}: {module} {name}"
        for path in FILES
        for module, names in _imports(path)
        if module.startswith("nvae_lightning.") and module.split(".")[1] != _room(path)
        for name in (*module.split("."), *names)
        if name.startswith("_") and not name.endswith("__")
    ]
    assert offences == []


def test_only_training_imports_wandb() -> None:
    users = {
        _room(path)
        for path in FILES
        for module, _ in _imports(path)
        if module.partition(".")[0] in ("wandb", "wandb_workspaces")
    }
    assert users == {"training"}


def test_no_module_shadows_the_standard_library_or_a_dependency() -> None:
    # Python searches the folder of a command that is run as a file first.
    dependencies = {name.lower() for name in importlib.metadata.packages_distributions()}
    taken = (sys.stdlib_module_names | dependencies) - {"nvae_lightning"}
    assert {*COMMANDS, *ROOMS} & taken == set()


LIGHT_IMPORTS = {
    "nvae_lightning.model": "huggingface_hub safetensors lightning matplotlib wandb hydra",
    "nvae_lightning.train": "torch._inductor.compile_fx",
    "nvae_lightning.explore": "gradio",
}


@pytest.mark.parametrize("module", LIGHT_IMPORTS)
def test_an_import_loads_only_the_libraries_it_uses(module: str) -> None:
    unwanted = LIGHT_IMPORTS[module].split()
    code = f"import sys, {module}; print(*(name for name in {unwanted} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.returncode) == ("", 0), result.stderr
