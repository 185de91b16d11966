"""The benchmark command measures speed and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from .test_use_model import run_all

SHORT = (
    *("benchmark", "trainer=cpu", "dataset.batch_size=4", "num_steps=2", "num_warmup_steps=1"),
    *("num_rounds=2", "model.hierarchy.max_groups_per_scale=1"),
)
PHASES = ["data", "forward", "penalties", "backward", "optimizer", "other"]

COMMANDS = {
    "train": ("trace=true",),
    "sample": ("what=sample", "temperature=[0.7,0.8]"),
    "evaluate": ("what=evaluate", "num_importance_samples=3", "images=dataset"),
    "data": ("what=data",),
    "compare": (
        "model.num_encoder_cells=2",
        "compare={trainer.precision:bf16-mixed,kl:warmup,model:{num_decoder_cells:2}}",
    ),
}

# Overrides and expected words of the error message.
BAD_SETTINGS = [
    ("what=unknown", "what", "'unknown'", "'train', 'sample'"),
    ("images=mine", "images", "'mine'", "'random' or 'dataset'"),
    ("num_steps=0", "num_steps", "at least 1", "0"),
    ("num_rounds=x", "num_rounds", "'x'", "a valid integer"),
    ("trace=1", "trace", "a valid boolean"),
    ("temperature=hot", "temperature", "'hot'"),
    ("compile=maybe", "compile", "'maybe'"),
    ("cuda_graphs=maybe", "cuda_graphs", "a valid boolean"),
    ("what=evaluate cuda_graphs=true", "cuda_graphs", "what=evaluate", "what=train or sample"),
    ("cuda_graphs=true", "cuda_graphs", "the model is on 'cpu'"),
    ("what=sample cuda_graphs=true", "cuda_graphs", "the model is on 'cpu'"),
    ("compare=3", "compare", "3"),
    ("compare={foo:1}", "foo"),
    ("compare={model:huge}", "model/huge", "tiny"),
    ("compare={dataset.batch_size:x}", "dataset.batch_size", "'x'"),
    ("compare={num_steps:9}", "compare", "num_steps=9"),
    ("compare={what:sample}", "compare", "what=sample"),
    ("trainer.precision=16-mixed", "trainer.precision", "16-mixed"),
    ("trainer.max_steps=3", "trainer.max_steps", "3", "num_steps"),
    ("+trainer.foo=1", "trainer.foo"),
    ("experiment=weights_mnist", "callbacks, a group that benchmark does not have"),
    ("find_batch=true", "find_batch", "GPU"),
    ("what=data dataset=image_folder", "dataset.root", "does not exist"),
    ("images=dataset num_steps=9999", "num_steps", "9999", "there are 900"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files of each command and, in ``said.json``, the output."""
    folder = tmp_path_factory.mktemp("benchmark")
    commands = [(*SHORT, *more, f"hydra.run.dir={name}") for name, more in COMMANDS.items()]
    bad = [(*SHORT, *setting.split(" ")) for setting, *_ in BAD_SETTINGS]
    results = run_all(folder, *commands, *bad)
    (folder / "said.json").write_text(json.dumps(results))
    return folder


def _result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "benchmark.json").read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_results_are_complete_and_consistent(folder: Path, name: str) -> None:
    found = _result(folder, name)
    assert found["what"] == {"compare": "train"}.get(name, name)
    assert (found["dataset"], found["model"]) == ("mnist_5k", "tiny")
    assert (found["num_steps"], found["num_rounds"]) == (2, 2)
    for setting in found["settings"]:
        assert setting["batch_size"] == 4
        assert setting["device"].startswith("CPU (")
        assert "1 thread" in setting["device"]
        rates = setting["images_per_second_of_rounds"]
        assert len(rates) == 2
        assert min(rates) <= setting["images_per_second"] <= max(rates)
        assert setting["ms_per_image"] == pytest.approx(1e3 / setting["images_per_second"])
        phases = setting["phases"]
        assert list(phases) == (PHASES if found["what"] == "train" else [name])
        assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1.0)
        roofline = setting["roofline"]
        least = max(
            roofline["gflop_per_image"] / roofline["gflop_per_second"],
            roofline["megabytes_per_image"] / 1e3 / roofline["gigabytes_per_second"],
        )
        assert roofline["ms_per_image"] == pytest.approx(1e3 * least)
        assert roofline["fraction"] == pytest.approx(
            roofline["ms_per_image"] / setting["ms_per_image"]
        )
        assert setting["memory"]["peak_resident_bytes"] > 1 << 20
        if name != "data":
            memory = setting["memory"]
            assert memory["peak_tensor_bytes"] > memory["kept_tensor_bytes"] > 0
    assert (folder / name / "benchmark.png").stat().st_size > 1000
    written = OmegaConf.load(folder / name / "config.yaml")
    assert written.trainer.precision == "32-true"  # resolved


def test_results_are_printed(folder: Path) -> None:
    said = dict(zip(COMMANDS, json.loads((folder / "said.json").read_text()), strict=False))
    for name in COMMANDS:
        assert said[name]["status"] == 0, said[name]
        for words in ("images per second", "share of the roofline", "MiB per image", "written:"):
            assert words in said[name]["said"]
    assert "times as fast as the first" in said["compare"]["said"]


def test_second_setting_adds_its_overrides_to_the_first(folder: Path) -> None:
    found = _result(folder, "compare")
    first, second = found["settings"]
    assert second["setting"] == (
        "trainer.precision=bf16-mixed kl=warmup model.num_decoder_cells=2"
    )
    assert "compare" not in first["setting"]
    assert "model.num_encoder_cells=2" in first["setting"]
    assert (first["precision"], second["precision"]) == ("32-true", "bf16-mixed")
    # One more cell per group costs more operations, despite the shorter dtype.
    assert second["roofline"]["gflop_per_image"] > first["roofline"]["gflop_per_image"]
    own, other = (
        OmegaConf.load(folder / "compare" / f"{name}.yaml")
        for name in ("config", "config.compare")
    )
    assert (own.model.num_decoder_cells, other.model.num_decoder_cells) == (1, 2)
    assert own.model.num_encoder_cells == other.model.num_encoder_cells == 2
    assert own.kl.size_factor is not None
    assert other.kl.size_factor is None  # from another option of the group kl
    ratio = found["ratio"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert ratio["of_rounds"] == pytest.approx(
        [
            b / a
            for a, b in zip(
                *(s["images_per_second_of_rounds"] for s in (first, second)), strict=True
            )
        ]
    )
    assert _result(folder, "train")["ratio"] is None


def test_trace_lists_the_operations(folder: Path) -> None:
    events = json.loads((folder / "train" / "trace.json").read_text())["traceEvents"]
    assert any("convolution_backward" in event.get("name", "") for event in events)
    assert "convolution" in (folder / "train" / "trace.txt").read_text()
    assert not (folder / "sample" / "trace.json").exists()


@pytest.mark.parametrize("index", range(len(BAD_SETTINGS)), ids=[s for s, *_ in BAD_SETTINGS])
def test_bad_settings_give_one_line(folder: Path, index: int) -> None:
    result = json.loads((folder / "said.json").read_text())[len(COMMANDS) + index]
    _, *words = BAD_SETTINGS[index]
    line = result["status"]
    assert isinstance(line, str)
    assert line.startswith("error: ")
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.slow
def test_trace_does_not_include_compilation(tmp_path: Path) -> None:
    command = (*SHORT, "trace=true", "compute.kernels=compiled", "hydra.run.dir=train")
    (result,) = run_all(tmp_path, command)
    assert result["status"] == 0, result
    events = json.loads((tmp_path / "train" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert any("CompiledFxGraph" in name for name in names)
    assert not any("_compile.compile_inner" in name for name in names)


@pytest.mark.slow
def test_sweep_collects_its_jobs_in_one_file(tmp_path: Path) -> None:
    command = (
        *(*SHORT, "what=sample", "hydra.mode=MULTIRUN", "hydra.sweep.dir=sweep"),
        *("model.hierarchy.max_groups_per_scale=null", "model.hierarchy.num_groups=[1,1],[1,3]"),
    )
    (result,) = run_all(tmp_path, command)
    assert result["status"] == 0, result
    lines = (tmp_path / "sweep" / "benchmark.jsonl").read_text().splitlines()
    one, three = (json.loads(line)["settings"][0] for line in lines)
    assert three["roofline"]["gflop_per_image"] > one["roofline"]["gflop_per_image"]
    assert json.loads((tmp_path / "sweep" / "1" / "benchmark.json").read_text()) == json.loads(
        lines[1]
    )
