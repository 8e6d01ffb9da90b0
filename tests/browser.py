"""The Space in a real browser; needs gradio, selenium, Chromium and its driver.

    python tests/browser.py MODEL TEACHER picture.png "text to type" ["second text"]

shows a model and its teacher, types, clicks, waits for the answers and takes a picture.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SPACE = Path(__file__).parent.parent / "examples" / "space" / "app.py"
SECONDS = 120


@contextmanager
def served(model, teacher):
    """The address of the app."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SPACE, "--model", model, "--teacher", teacher, "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    with subprocess.Popen(list(map(str, command)), env=environment) as server:
        try:
            for _ in range(SECONDS):
                if server.poll() is not None:
                    raise RuntimeError(f"the app has ended with status {server.returncode}")
                with socket.socket() as line:
                    if line.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@contextmanager
def chromium(width=1000, height=800):
    """A browser without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", f"--window-size={width},{height}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@dataclass(frozen=True)
class Side:
    """What stands below one model."""

    name: str
    parameters: int
    answer: str
    milliseconds: float


def ask(driver, address, texts):
    """Type, click, and wait; returns both sides."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def inputs(element):
        return element.find_elements(By.CSS_SELECTOR, "textarea, input[type=text]")

    def button(page):
        return next(iter(page.find_elements(By.XPATH, "//button[normalize-space()='Compare']")), None)

    def finished(page):
        found = page.find_elements(By.CSS_SELECTOR, ".side")
        return found if all(inputs(side)[-1].get_attribute("value") for side in found) else None

    def read(side):
        labels = side.find_elements(By.CSS_SELECTOR, "[data-testid=label-output-value]")
        answer, time = inputs(side)[0].get_attribute("value"), inputs(side)[-1].get_attribute("value")
        parameters = re.search(r"([\d,]+) parameters", side.text)[1]
        return Side(
            side.find_element(By.TAG_NAME, "h3").text,
            int(parameters.replace(",", "")),
            labels[0].text if labels else answer,
            float(time.removesuffix(" ms")),
        )

    driver.get(address)
    wait = WebDriverWait(driver, SECONDS)
    wait.until(button)
    for field, text in zip(inputs(driver), texts, strict=False):
        field.clear()
        field.send_keys(text)
    button(driver).click()
    return [read(side) for side in wait.until(finished)]


if __name__ == "__main__":
    with served(*sys.argv[1:3]) as address, chromium() as driver:
        print(ask(driver, address, sys.argv[4:]))
        driver.save_screenshot(sys.argv[3])
