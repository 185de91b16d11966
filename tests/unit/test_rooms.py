"""What each room of the package may import, so that the model stays free of the rest."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvae_lightning

ROOT = Path(nvae_lightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CONFIGURATION = ("hydra", "omegaconf")


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            if node.module == "nvae_lightning":
                yield from (f"nvae_lightning.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _offences(folder: str, allowed: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in _imports(path)
        if name.partition(".")[0] not in sys.stdlib_module_names and not _is_within(name, allowed)
    ]


@pytest.mark.parametrize(
    "folder", ["model", "backends", "objective", "data", "training", "inference", "cli"]
)
def test_room_has_files(folder: str) -> None:
    assert len(list((ROOT / folder).glob("*.py"))) > 1


def test_model_knows_torch_and_itself_only() -> None:
    own = ("torch", "jaxtyping", "nvae_lightning.model", "nvae_lightning.utilities")
    hub = ("huggingface_hub", "safetensors")
    offences = _offences("model", own)
    assert offences  # of the one file that reads and writes models
    assert all(found.startswith("model/hub.py: ") for found in offences)
    assert _offences("model", (*own, *hub)) == []


def test_backends_know_torch_triton_the_model_and_themselves_only() -> None:
    own = ("torch", "jaxtyping", "triton", "nvae_lightning.model", "nvae_lightning.backends")
    assert _offences("backends", own) == []


def test_inference_does_not_know_the_training() -> None:
    for path in (ROOT / "inference").rglob("*.py"):
        assert [n for n in _imports(path) if _is_within(n, ("nvae_lightning.training",))] == []


def test_loading_a_model_imports_neither_lightning_nor_matplotlib_wandb_or_hydra() -> None:
    code = """
import sys
import nvae_lightning
assert "torch" not in sys.modules
nvae_lightning.NVAE, nvae_lightning.load_model, nvae_lightning.__version__
from nvae_lightning.inference.loading import load_model
assert {"lightning", "matplotlib", "wandb", "hydra"} & sys.modules.keys() == set()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchs_compiler_is_imported_by_what_uses_it_only() -> None:
    code = """
import sys
import nvae_lightning.train
sys.exit("torch._inductor.compile_fx" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_objective_knows_torch_the_model_and_itself_only() -> None:
    allowed = ("torch", "jaxtyping", "nvae_lightning.model", "nvae_lightning.objective")
    assert _offences("objective", allowed) == []


def test_data_does_not_know_the_model() -> None:
    forbidden = (
        "nvae_lightning.model",
        "nvae_lightning.objective",
        "nvae_lightning.training.module",
    )
    for path in (ROOT / "data").rglob("*.py"):
        assert [name for name in _imports(path) if _is_within(name, forbidden)] == []


def test_only_the_commands_know_the_configuration() -> None:
    allowed = {path for path in FILES if path.relative_to(ROOT).parts[0] == "cli"}
    allowed |= set(ROOT.glob("*.py"))
    users = {p for p in FILES if any(_is_within(n, CONFIGURATION) for n in _imports(p))}
    assert users <= allowed


def test_only_training_knows_wandb() -> None:
    names = ("wandb", "wandb_workspaces")
    users = [p for p in FILES if any(_is_within(n, names) for n in _imports(p))]
    assert users
    assert [p for p in users if p.relative_to(ROOT).parts[0] != "training"] == []


def test_no_module_hides_the_standard_librarys_when_a_command_is_run_as_a_file() -> None:
    modules = [path.stem for path in ROOT.glob("*.py")]
    packages = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert "train" in modules
    assert set(modules + packages) & sys.stdlib_module_names == set()
    # Python puts the folder of the file first on the path.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inspect; inspect.signature(id)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)
