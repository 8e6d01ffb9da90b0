"""The Space in a real browser; needs gradio, selenium, Chromium and its driver.

    python tests/browser.py MODEL TEACHER picture.png "text to type" ["second text"]

shows a model and its teacher, types, clicks, waits for the answers and takes a picture.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
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
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


def ask(driver, address, texts):
    """Type, click, and wait; returns what stands in the fields of answers and times, side by side."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(address)
    wait = WebDriverWait(driver, SECONDS)
    button = wait.until(lambda page: next(iter(page.find_elements(By.XPATH, "//button[text()='Compare']")), None))
    for field, text in zip(driver.find_elements(By.CSS_SELECTOR, "textarea"), texts, strict=False):
        field.clear()
        field.send_keys(text)
    button.click()

    def times(page):
        found = [field.get_attribute("value") for field in page.find_elements(By.CSS_SELECTOR, "textarea, input")]
        found = [value for value in found if value and value.endswith(" ms")]
        return found if len(found) == 2 else None

    measured = wait.until(times)
    return [element.text for element in driver.find_elements(By.CSS_SELECTOR, ".column")], measured


if __name__ == "__main__":
    with served(*sys.argv[1:3]) as address, chromium() as driver:
        print(ask(driver, address, sys.argv[4:]))
        driver.save_screenshot(sys.argv[3])
