"""The page of `nvae explore`, driven in headless Chromium: one server, one browser."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from nvae_lightning import load_model
from nvae_lightning.data import MNIST5k
from nvae_lightning.explorer import between, fill_in, groups, likelihood, sample
from nvae_lightning.explorer.workspace import Workspace, picture

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
).split()
HEADER = "epoch,step,train/elbo,train/kl_group/00,train/kl_group/01\n"


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    """The Python API, with the server's model and test images."""
    digits = MNIST5k()
    digits.prepare_data()
    digits.setup("test")
    model = load_model("mnist").to(memory_format=torch.channels_last)
    return Workspace(model, digits.test_set)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one is still writing."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(f"seed: {len(name)}\nname: {name}\n")
        rows = "".join(f"0,{step},{step - 100}.5,3.0,{step}.0\n" for step in range(9))
        (folder / name / "metrics.csv").write_text(HEADER + rows)
    return folder


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[tuple[str, int]]:
    """Address and process of the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "nvae_lightning.explore", "ckpt_path=mnist", "trainer=cpu"]
    command += ["dataset=mnist_5k", f"runs={runs}", f"server_port={port}", "hydra.run.dir=out"]
    process = subprocess.Popen(
        command, cwd=runs.parent, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert f"http://127.0.0.1:{port}/" in line, line
            yield f"http://127.0.0.1:{port}/", process.pid
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


class Page:
    """A page in a browser.

    Args:
        driver: Browser.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait for something that is true; return it."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.driver.find_element(By.TAG_NAME, "body").text
            time.sleep(0.05)
        return found

    def visible(self, xpath: str) -> WebElement:
        """Wait for a visible element."""

        def find() -> list[WebElement]:
            return [e for e in self.driver.find_elements(By.XPATH, xpath) if e.is_displayed()]

        return self.until(find)[0]

    def open(self, title: str) -> None:
        """Open a tab."""
        self.visible(f"//button[@role='tab'][normalize-space()='{title}']").click()

    def box(self, label: str) -> str:
        """Return the XPath of a component."""
        text = f"normalize-space()='{label}'"
        return f"//*[{text}]/ancestor::div[contains(concat(' ', @class, ' '), ' block ')][1]"

    def shown(self, label: str, other_than: np.ndarray | None = None) -> np.ndarray:
        """Wait for a picture that differs from another; return its pixels."""
        deadline = time.monotonic() + 20
        while True:
            address = self.visible(f"{self.box(label)}//img").get_attribute("src")
            assert address is not None
            with urllib.request.urlopen(address) as answer:
                pixels = np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))
            if other_than is None or not np.array_equal(pixels, other_than):
                return pixels
            assert time.monotonic() < deadline, f"'{label}' has not changed"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def page(server: tuple[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page in headless Chromium."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_window_size(1280, 1000)
    driver.get(server[0])
    yield Page(driver)
    driver.quit()


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two pictures are equal up to the rounding of pixels."""
    return found.shape == expected.shape and bool(
        (np.abs(found.astype(int) - expected.astype(int)) <= 1).all()
    )


def test_samples_are_those_of_the_python_api_and_change_with_the_seed(
    page: Page, workspace: Workspace
) -> None:
    first = page.shown("Samples")
    assert close(first, picture(sample.draw(workspace, [1.0, 1.0], 16, 0), 4))
    seed = page.visible("//span[normalize-space()='Seed']/following::input[1]")
    seed.send_keys(Keys.BACKSPACE, "7")
    button = page.visible("//button[normalize-space()='Draw']")
    button.click()
    second = page.shown("Samples", first)
    assert close(second, picture(sample.draw(workspace, [1.0, 1.0], 16, 7), 4))


def test_redrawn_groups_follow_the_slider_and_an_upload(
    page: Page, workspace: Workspace, tmp_path: Path
) -> None:
    page.open("Groups")
    first = page.shown("Other groups redrawn")
    file = tmp_path / "test.png"
    Image.fromarray(workspace.test_picture(0)).save(file)
    with torch.no_grad():
        _, images, rates = groups.explain(workspace, str(file), [0, 1, 2, 3], 1.0, 0)
    assert np.isfinite(rates).all()
    assert close(first, picture(images, 4))
    label = "//*[normalize-space()='Groups to keep, from the coarsest']"
    keep = page.visible(f"{label}/following::input[@type='range'][1]")
    keep.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    second = page.shown("Other groups redrawn", first)
    uploaded = tmp_path / "uploaded.png"
    Image.fromarray(workspace.test_picture(700)).resize((280, 280)).save(uploaded)
    pair = page.shown("Image and reconstruction")
    page.visible(f"{page.box('Image')}//button[contains(@aria-label, 'emove')]").click()
    page.driver.find_element(By.XPATH, f"{page.box('Image')}//input[@type='file']").send_keys(
        str(uploaded)
    )
    page.shown("Image and reconstruction", pair)
    assert not np.array_equal(page.shown("Other groups redrawn"), second)


def test_painted_pixels_are_filled_in_as_by_the_python_api(
    page: Page, workspace: Workspace, tmp_path: Path
) -> None:
    page.open("Fill in")
    canvas = page.visible("//*[@id='canvas']//canvas")
    time.sleep(1)  # the editor loads its picture
    page.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    chain = ActionChains(page.driver, duration=20)
    for height in (20, 50, 80):
        chain.move_to_element_with_offset(canvas, -120, height).click_and_hold()
        chain.move_to_element_with_offset(canvas, 0, height)
        chain.move_to_element_with_offset(canvas, 120, height).release()
    chain.perform()
    time.sleep(0.5)
    page.visible("//button[normalize-space()='Fill in'][not(@role='tab')]").click()
    row = page.shown("Known pixels and four completions")
    factor, side = row.shape[0] // 30, 28
    known = row[factor : factor * (side + 1) : factor, factor : factor * (side + 1) : factor, 0]
    missing = known == 128
    assert 100 < missing.sum() < 500
    assert missing[16:20, 8:20].all()
    file = tmp_path / "test.png"
    Image.fromarray(workspace.test_picture(0)).save(file)
    mask = torch.from_numpy(~missing)
    with torch.no_grad():
        x, expected = fill_in.complete(workspace, str(file), mask, 30, 1.0, 0)
    assert close(row, picture(torch.cat([torch.where(mask, x, 0.5), expected.images]), 5))
    std = page.shown("Standard deviation of every pixel (white: 0.5)")
    assert close(std, picture(2 * expected.std[None], 1))


def test_runs_are_compared_and_follow_their_files(page: Page, runs: Path) -> None:
    page.open("Training")
    body = page.driver.find_element(By.TAG_NAME, "body")
    page.until(lambda: "runs/one: 9 steps, training" in body.text)
    assert re.search(r"name\s+one\s+two", body.text)
    first = page.shown("KL per group")
    with (runs / "one" / "metrics.csv").open("a") as file:
        file.write("0,9,-90.0,5.0,1.0\n0,10,-80.0,5")  # the last row is incomplete
    page.until(lambda: "runs/one: 10 steps, training" in body.text)
    page.shown("KL per group", first)


def test_the_page_requests_nothing_from_elsewhere(page: Page, server: tuple[str, int]) -> None:
    messages = [json.loads(e["message"])["message"] for e in page.driver.get_log("performance")]
    addresses = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert any(address.startswith(server[0]) for address in addresses)
    own = (server[0], "data:", "blob:", "chrome:")
    assert [address for address in addresses if not address.startswith(own)] == []


def test_twenty_concurrent_requests_are_answered_as_if_alone(
    server: tuple[str, int], workspace: Workspace
) -> None:
    client = Client(server[0], verbose=False)
    status = Path(f"/proc/{server[1]}/status")

    def peak() -> int:
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) >> 10

    def request(seed: int) -> np.ndarray:
        path, _ = client.predict(16, seed, False, 1.0, 0.7, api_name="/sample")
        return np.asarray(Image.open(path))

    request(0)
    before = peak()
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(request, range(20)))
    assert peak() - before < 200  # MiB
    for seed, pixels in enumerate(found):
        assert close(pixels, picture(sample.draw(workspace, [1.0, 0.7], 16, seed), 4))


def test_clients_get_the_numbers_of_the_python_api(
    server: tuple[str, int], workspace: Workspace, tmp_path: Path
) -> None:
    client = Client(server[0], verbose=False)
    info: Any = client.view_api(return_format="dict")
    names = "/sample /groups /between /likelihood /place /fill_in"
    assert {*info["named_endpoints"]} == {*names.split()}
    one, other = str(tmp_path / "one.png"), str(tmp_path / "other.png")
    Image.fromarray(workspace.test_picture(3)).save(one)
    Image.fromarray(workspace.test_picture(500)).save(other)
    first, second = handle_file(one), handle_file(other)
    found, _ = client.predict(first, second, 0.3, [1], 5, api_name="/between")
    with torch.no_grad():
        expected, _ = between.interpolate(workspace, one, other, 0.3, [1], 5)
        scores = likelihood.score(workspace, one, 5)
    assert close(np.asarray(Image.open(found)), picture(expected, 1))
    text, _ = client.predict(first, 5, api_name="/likelihood")
    assert f"{scores.log_likelihood:,.2f} nats" in text
    with pytest.raises(AppError, match="nothing is painted"):
        client.predict(first, None, 30, 1.0, 0, api_name="/fill_in")


def test_strangers_files_are_refused(server: tuple[str, int], tmp_path: Path) -> None:
    for path in ("/etc/hostname", str(Path(__file__)), "config.yaml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server[0]}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    client = Client(server[0], verbose=False)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(bomb)
    with pytest.raises(AppError, match="decoding them takes more than 400 MiB"):
        client.predict(handle_file(str(bomb)), [0], 1.0, 0, api_name="/groups")
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(AppError):
        client.predict(handle_file(str(text)), [0], 1.0, 0, api_name="/groups")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(21 << 20))
    with pytest.raises(Exception, match=r"413|size"):
        client.predict(handle_file(str(large)), [0], 1.0, 0, api_name="/groups")
