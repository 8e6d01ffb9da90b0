"""Pushes to a hub on loopback, with the real client; and what a stranger then gets from it."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, SpaceCard, constants
from loopback_hub import Fault, Hub
from stranger import code_of
from tiny import bert_tokenizer, inputs, model_type, perturb, teacher, tokenizer_for
from transformers import BertForSequenceClassification
from transformers.pipelines import SUPPORTED_TASKS

from kronecker_transformers import commands, compress
from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.cli import main
from kronecker_transformers.export.dense import to_dense
from kronecker_transformers.hub.card import MADE, auto_class, model_card
from kronecker_transformers.hub.files import published_files
from kronecker_transformers.hub.push import files_to_push, push, push_space
from kronecker_transformers.models import DENSE_CLASSES
from kronecker_transformers.models.modeling_kronecker import KroneckerPreTrainedModel

TOKEN = "hf_good"
SPACE = Path(__file__).parents[2] / "examples" / "space"
CODE = code_of("bert")
FILES = CODE | {
    "README.md", "compression.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return perturb(compress(teacher(BertForSequenceClassification), "7.7x").model, seed=3)


@pytest.fixture
def folder(model, tmp_path):
    dense = teacher(BertForSequenceClassification)
    return save_folder(tmp_path / "model", model, bert_tokenizer(tmp_path), compress(dense, "7.7x").report.to_dict())


# Loads models, some of them without trust, and lets pipelines find their tasks; writes the outputs.
STRANGER = """
    import json, sys
    sys.modules["kronecker_transformers"] = None
    import torch, transformers
    outputs = []
    for job in json.loads(sys.argv[1]):
        auto_class, name, settings = getattr(transformers, job["auto_class"]), job["name"], job["settings"]
        model = auto_class.from_pretrained(name, **settings).eval()
        assert type(model).__module__.startswith("transformers_modules.") == settings.get("trust_remote_code", False)
        with torch.no_grad():
            outputs.append(model(**torch.load(job["batch"], weights_only=True))[0])
        if job.get("pipeline_tag"):
            pipe = transformers.pipeline(model=name, **settings)
            assert pipe.task == job["pipeline_tag"]
            assert type(pipe.model).__module__ == type(model).__module__
            text = "the quick [MASK] fox" if pipe.task == "fill-mask" else "the quick brown fox"
            assert pipe(text, **({"max_new_tokens": 4} if pipe.task == "text-generation" else {}))
    torch.save(outputs, sys.argv[2])
"""


def stranger(hub, jobs, tmp_path, offline=False):
    """Outputs of a process without this package, with a cache of its own."""
    outputs = tmp_path / "outputs.pt"
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STRANGER), json.dumps(jobs), outputs],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(outputs, weights_only=True)


def job(model, name, tmp_path, **more):
    """Of a stranger, for a model of any class."""
    batch = tmp_path / f"{name.replace('/', '-')}.pt"
    torch.save(inputs(model), batch)
    trusted = {"trust_remote_code": True} if isinstance(model, KroneckerPreTrainedModel) else {}
    return {"name": name, "auto_class": auto_class(model), "batch": str(batch), "settings": trusted, **more}


def first_output(model):
    with torch.no_grad():
        return model(**inputs(model))[0]


def test_what_is_pushed_loads_without_the_package(hub, model, folder, tmp_path):
    done = push(folder, "org/tiny", token=TOKEN)
    repo = hub.repo("org/tiny")
    assert done.is_new
    assert done.commit == repo.revisions["main"]
    assert [branch for _, branch, _ in repo.log] == ["main", "main"]  # made, and filled in one commit
    assert repo.files().keys() == FILES | {".gitattributes"}
    assert all(repo.files()[name] == (folder / name).read_bytes() for name in FILES - {"README.md", "compression.json"})
    assert (
        json.loads(repo.files()["compression.json"])["layers"]
        == json.loads((folder / "compression.json").read_text())["layers"]
    )
    assert repo.files()["README.md"].decode() == str(model_card(folder, "org/tiny"))
    expected, asked = first_output(model), job(model, "org/tiny", tmp_path)
    pinned = {**asked, "settings": {**asked["settings"], "revision": done.commit, "code_revision": done.commit}}
    for output in (*stranger(hub, [asked, pinned], tmp_path), *stranger(hub, [asked, pinned], tmp_path, offline=True)):
        assert torch.equal(output, expected)


@pytest.mark.slow
def test_every_class_and_its_twin_by_their_names(hub, tmp_path):
    jobs, expected = [], []
    for student_class, dense_class in DENSE_CLASSES.items():
        family = model_type(student_class)
        place, name = tmp_path / dense_class.__name__, f"org/{dense_class.__name__}"
        place.mkdir()
        student = perturb(compress(teacher(dense_class), "kngpt2" if family == "gpt2" else "7.7x").model, seed=3)
        tokenizer = tokenizer_for(family, place)
        for model, repository in ((student, name), (to_dense(student), f"{name}-dense")):
            folder = save_folder(place / repository, model, tokenizer)
            card = model_card(folder, repository, twin_of=None if model is student else name)
            push(folder, repository, token=TOKEN, card=card)
            tag = card.data.pipeline_tag
            jobs.append(job(model, repository, tmp_path, pipeline_tag=tag if tag in SUPPORTED_TASKS else None))
            expected.append(first_output(model))
    without = [cls for cls in DENSE_CLASSES if cls.__name__.endswith(("ForQuestionAnswering", "ForMultipleChoice"))]
    assert sum(asked["pipeline_tag"] is None for asked in jobs) == 2 * len(without) == 26
    for asked, output, wanted in zip(jobs, stranger(hub, jobs, tmp_path), expected, strict=True):
        torch.testing.assert_close(
            output, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, asked=asked: f"{asked['name']}: {text}"
        )
    for output, twin in zip(expected[::2], expected[1::2], strict=True):
        torch.testing.assert_close(output, twin, rtol=1e-4, atol=1e-4)


def test_the_licence_comes_from_the_teacher_on_the_hub(hub, folder, caplog):
    (folder / "results.json").write_text(json.dumps({"options": {"teacher": "org/teacher"}}))
    push(folder, "org/tiny", token=TOKEN)
    assert "the card of 'org/teacher' cannot be read (RepositoryNotFoundError)" in caplog.text
    sent = ModelCard(hub.repo("org/tiny").files()["README.md"].decode()).data
    assert (sent.base_model, sent.license, sent.language) == ("org/teacher", None, None)

    hub.repos["models/org/teacher"] = repo = Hub.empty_repo()
    repo.commit("main", {"README.md": b"---\nlicense: mit\nlanguage: [en, fr]\ntags: [x]\n---\n# Teacher\n"}, "card")
    push(folder, "org/tiny", token=TOKEN)
    sent = ModelCard(hub.repo("org/tiny").files()["README.md"].decode()).data
    assert (sent.license, sent.language) == ("mit", ["en", "fr"])
    assert "x" not in sent.tags


def test_a_card_of_ones_own_is_sent_as_it_is_and_one_that_was_made_is_made_anew(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = str(model_card(folder, "your-name/x", license="mit"))
    (folder / "README.md").write_text(made)
    assert main(["push", str(folder), "org/tiny", "--language", "fr"]) == 0
    sent = hub.repo("org/tiny").files()["README.md"].decode()
    assert sent == str(model_card(folder, "org/tiny", license="mit", language="fr"))
    assert "your-name" not in sent

    own = made.replace(MADE, "My own words.")
    (folder / "README.md").write_text(own)
    (folder / "results.json").write_text(json.dumps({"options": {"teacher": "org/teacher"}}))
    capsys.readouterr()
    assert main(["push", str(folder), "org/tiny", "--license", "mit"]) == 1
    assert "--license: README.md in" in capsys.readouterr().err
    assert main(["push", str(folder), "org/tiny", "--with-dense-twin"]) == 0
    assert hub.repo("org/tiny").files()["README.md"].decode() == own
    assert ModelCard(hub.repo("org/tiny-dense").files()["README.md"].decode()).data.license == "mit"


def test_pushing_the_same_again_makes_no_commit(hub, folder):
    first, second = push(folder, "org/tiny", token=TOKEN), push(folder, "org/tiny", token=TOKEN)
    assert (second.is_new, second.commit) == (False, first.commit)
    assert len(hub.repo("org/tiny").log) == 2
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    third = push(folder, "org/tiny", token=TOKEN, message="A card")
    assert third.is_new
    assert hub.repo("org/tiny").log[-1] == (third.commit, "main", "A card")


def test_nothing_else_travels(hub, folder):
    for name in ("pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json",
                 "events.out.tfevents.1", "notes.txt", "evil.py", ".env", "x.safetensors"):  # fmt: skip
        (folder / name).write_bytes(b"private")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"private")
    push(folder, "org/tiny", token=TOKEN)
    assert hub.repo("org/tiny").files().keys() == FILES | {".gitattributes"}


def test_local_paths_stay_here(hub, folder, tmp_path):
    record = {"options": {"teacher": "/home/ada/bert", "text": ["/data/a.txt"], "seed": 3}, "rows": {"a/b": [1.5]}}
    (folder / "results.json").write_text(json.dumps(record))
    push(folder, "org/tiny", token=TOKEN)
    files = hub.repo("org/tiny").files()
    sent = {"options": {"teacher": "./bert", "text": ["./a.txt"], "seed": 3}, "rows": {"a/b": [1.5]}}
    assert json.loads(files["results.json"]) == sent
    assert "base_model" not in ModelCard(files["README.md"].decode()).data.to_dict()
    assert not [name for name, content in files.items() if b"/home/ada" in content or str(tmp_path).encode() in content]


def test_weights_and_code_of_an_older_version_go_in_the_same_commit(hub, model, folder, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    push(tmp_path / "shards", "org/tiny", token=TOKEN)
    repo = hub.repo("org/tiny")
    assert "model.safetensors.index.json" in repo.files()
    commit = repo.commit("main", {**repo.files(), "kronecker_export.py": b"own", "examples.md": b"own",
                                  "configuration_kronecker_gpt2.py": b"old"}, "by hand")  # fmt: skip
    push(folder, "org/tiny", token=TOKEN)
    assert repo.files().keys() == FILES | {".gitattributes", "kronecker_export.py", "examples.md"}
    assert [name for name, _, _ in repo.log].index(commit) == len(repo.log) - 2


def test_branch_and_pull_request(hub, folder):
    push(folder, "org/tiny", token=TOKEN, revision="trial")
    repo = hub.repo("org/tiny")
    assert repo.files("main").keys() == {".gitattributes"}
    assert repo.files("trial").keys() > FILES
    done = push(folder, "org/tiny", token=TOKEN, create_pr=True)
    assert done.url.endswith("/org/tiny/discussions/1")
    assert repo.files("main").keys() == {".gitattributes"}
    assert repo.files("refs/pr/1").keys() > FILES


@pytest.mark.parametrize("private", [True, False])
def test_private(hub, folder, private):
    push(folder, "org/tiny", token=TOKEN, private=private)
    assert hub.repo("org/tiny").private is private


def test_what_is_to_be_private_is_not_pushed_to_a_public_repository(hub, folder):
    hub.repos["models/org/tiny"] = Hub.empty_repo()
    with pytest.raises(ValueError, match="repository 'org/tiny' is public, and private=True makes only a new one"):
        push(folder, "org/tiny", token=TOKEN, private=True)
    assert hub.repo("org/tiny").files().keys() == {".gitattributes"}
    hub.repos["models/org/tiny"] = Hub.empty_repo(private=True)
    push(folder, "org/tiny", token=TOKEN, private=True)
    assert hub.repo("org/tiny").files().keys() > FILES


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault("POST", "/repos/create", 503), [2]),
        (Fault("GET", "/revision/", 504), [2]),
        (Fault("POST", "/preupload/", 500, times=2), [1, 2]),  # the client's own waits
        (Fault("PUT", "/lfs/", 503), [1]),
        (Fault("PUT", "/lfs/", None, after=5000), [1]),
        (Fault("POST", "/commit/", 500, times=4), [2, 4, 8, 16]),
        (Fault("POST", "/commit/", 429, {"Retry-After": "7"}), [7]),
        (Fault("POST", "/commit/", None), [2]),
        (Fault("POST", "/commit/", None, done=True), [2]),
    ],
    ids=lambda value: f"{value.path}-{value.status}-{value.done}" if isinstance(value, Fault) else "",
)
def test_what_passes_is_tried_again(hub, folder, waits, fault, waited):
    hub.faults = [dataclasses.replace(fault)]
    done = push(folder, "org/tiny", token=TOKEN)
    assert done.is_new
    assert waits == waited
    assert [branch for _, branch, _ in hub.repo("org/tiny").log] == ["main", "main"]
    assert hub.repo("org/tiny").files().keys() > FILES


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/commit/", 401, "does not accept the token; log in with `hf auth login`"),
        ("/commit/", 403, "the token may not write to 'org/tiny'; use one with write access"),
        ("/preupload/", 404, "'org/tiny' is not found, or hidden from this token"),
        ("/commit/", 409, r"answered 409 \(injected\)"),
        ("/commit/", 412, "has been changed by somebody else in the meantime; push again"),
        ("/commit/", 429, "asks for fewer requests; push again later"),
        ("/commit/", 500, r"answered 500 \(injected\); push again later"),
        ("/commit/", None, r"cannot be reached \(RemoteProtocolError\); look at the network"),
        ("/lfs/", None, "cannot be reached"),
    ],
)
def test_refusals_leave_the_old_state_and_can_be_made_again(hub, folder, path, status, message):
    hub.repos["models/org/tiny"] = repo = Hub.empty_repo()
    before = dict(repo.files())
    hub.faults = [Fault("PUT" if path == "/lfs/" else "POST", path, status, times=99)]
    with pytest.raises(OSError, match=f"push failed; nothing of it is visible: .*{message}") as error:
        push(folder, "org/tiny", token=TOKEN)
    assert TOKEN not in str(error.value)
    assert repo.files() == before
    hub.faults = []
    assert push(folder, "org/tiny", token=TOKEN).is_new
    assert repo.files().keys() > FILES


def test_a_pull_request_is_not_tried_twice(hub, folder):
    hub.faults = [Fault("POST", "/commit/", None, done=True)]
    with pytest.raises(OSError, match=r"look whether the pull request exists: .* cannot be reached"):
        push(folder, "org/tiny", token=TOKEN, create_pr=True)
    assert [branch for branch in hub.repo("org/tiny").revisions if "pr" in branch] == ["refs/pr/1"]


def test_no_network(folder, monkeypatch, waits):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=r"http://127.0.0.1:9 cannot be reached \(ConnectError\); look at the network"):
        push(folder, "org/tiny", token=TOKEN)


@pytest.mark.parametrize(("token", "name"), [("hf_wrong", "org/tiny"), (False, "org/tiny")])
def test_wrong_or_no_token(hub, folder, token, name, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(OSError, match="does not accept the token"):
        push(folder, name, token=token)
    assert not hub.repos
    assert "hf_wrong" not in caplog.text


def test_foreign_name(hub, folder):
    with pytest.raises(OSError, match="the token may not write to 'other/tiny'"):
        push(folder, "other/tiny", token=TOKEN)


def test_a_name_of_ones_own(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr("kronecker_transformers.hub.push.get_token", lambda: None)
    with pytest.raises(ValueError, match="'tiny' names no owner, and nobody is logged in; write owner/tiny, or log in"):
        push(folder, "tiny")
    assert main(["push", str(folder), "tiny", "--dry-run"]) == 1
    assert "names no owner" in capsys.readouterr().err
    push(folder, "tiny", token=TOKEN)
    assert 'from_pretrained("org/tiny", trust_remote_code=True)' in hub.repo("org/tiny").files()["README.md"].decode()


def test_both_names_are_looked_at_before_the_work(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(commands, "model_card", lambda *a, **k: pytest.fail("work began"))
    for name in ("org/bad name", f"org/{'x' * 91}"):
        assert main(["push", str(folder), name, "--with-dense-twin", "--dry-run"]) == 1
        assert "is no name that the Hub allows" in capsys.readouterr().err
    assert main(["push", str(folder), "org/tiny", "--create-pr", "--revision", "dev", "--dry-run"]) == 1
    assert "revision='dev' cannot be combined with a pull request" in capsys.readouterr().err
    assert not hub.requests


def test_the_token_is_in_no_log(hub, folder, caplog):
    caplog.set_level(logging.DEBUG)
    hub.faults = [Fault("POST", "/commit/", 503)]
    push(folder, "org/tiny", token=TOKEN)
    assert caplog.text
    assert TOKEN not in caplog.text


def test_files(folder):
    files = published_files(folder)
    assert [file.name for file in files] == sorted(FILES - {"README.md"})
    assert [file.name for file in files_to_push(folder, "org/tiny")] == sorted(FILES)
    assert {file.name for file in files if file.is_code} == CODE
    assert all(file.size == len((folder / file.name).read_bytes()) for file in files)


@pytest.mark.parametrize("name", ["bpe.codes", "spiece.model", "sentencepiece.bpe.model", "spm.model"])
def test_every_kind_of_vocabulary_is_published(folder, name):
    (folder / name).write_bytes(b"vocabulary")
    assert {file.name: file.content() for file in published_files(folder)}[name] == b"vocabulary"


def test_command_line(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["push", str(folder), "org/tiny", "--with-dense-twin"]
    (folder / "results.json").write_text(json.dumps({"options": {"teacher": "org/teacher"}}))
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was sent" in shown
    assert hub.requests == [("GET", "/api/models/org/teacher")]
    assert "README.md" in shown
    for file in published_files(folder):
        row = next(line for line in shown.splitlines() if line.split()[:1] == [file.name])
        assert row.split()[1:] == [f"{file.size:,}", *([file.sha256()] if file.is_code else [])]

    assert main([*arguments, "--private"]) == 0
    shown = capsys.readouterr().out
    assert hub.repo("org/tiny").private
    assert f"/org/tiny/commit/{hub.repo('org/tiny').revisions['main']}" in shown
    twin = hub.repo("org/tiny-dense").files()
    assert "base_model: org/teacher" in twin["README.md"].decode()  # as recorded with the factored model
    assert json.loads(twin["config.json"])["architectures"] == ["BertForSequenceClassification"]
    assert not [name for name in twin if name.endswith(".py")]
    assert "https://huggingface.co/org/tiny-dense" in hub.repo("org/tiny").files()["README.md"].decode()
    assert "The dense twin of [org/tiny](https://huggingface.co/org/tiny)" in twin["README.md"].decode()

    assert main(arguments) == 0
    assert capsys.readouterr().out.count("holds all of this already") == 2
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(arguments) == 1
    assert "error: push failed; nothing of it is visible" in capsys.readouterr().err


def test_space(hub, folder, monkeypatch, capsys):
    commit = push(folder, "org/tiny", token=TOKEN).commit
    done = push_space(SPACE, "org/show", "org/tiny", "org/bert", token=TOKEN)
    files = hub.repo("org/show", "spaces").files()
    assert done.is_new
    assert files.keys() == {"README.md", "app.py", "requirements.txt", "space.json", ".gitattributes"}
    assert files["app.py"] == (SPACE / "app.py").read_bytes()
    assert json.loads(files["space.json"]) == {"model": "org/tiny", "teacher": "org/bert", "revision": commit}
    settings = SpaceCard(files["README.md"].decode()).data
    python = tuple(map(int, settings.python_version.split(".")))
    assert python >= (3, 11)  # which the code of a model asks for
    assert (settings.sdk, settings.app_file, settings.models) == ("gradio", "app.py", ["org/tiny", "org/bert"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = ["push-space", "org/show", "--model", "org/tiny", "--teacher", "org/bert", "--folder", str(SPACE)]
    assert main(arguments) == 0
    assert "holds all of this already" in capsys.readouterr().out
    assert main([*arguments, "--folder", str(folder)]) == 1
    assert "holds no app.py; give examples/space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json; give the folder"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds list, not an object"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "kronecker_layers.py").unlink(), "kronecker_layers.py"),
        (lambda f: (f / "modeling_kronecker_bert.py").unlink(), "modeling_kronecker_bert.py, which is missing"),
    ],
)
def test_bad_folders(folder, spoil, message):
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=message):
        published_files(folder)


@pytest.mark.parametrize("reference", ["../evil.Model", "os.path.Model", "/etc/passwd", "org/repo--modeling.Model", ""])
def test_code_outside_the_folder_is_refused(folder, reference):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = reference
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"auto_map in the config of .* names .*, not module.Class"):
        published_files(folder)


@pytest.mark.parametrize("shard", ["../model-00001-of-00002.safetensors", "optimizer.pt", "model-9-of-9.safetensors"])
def test_shards_outside_the_folder_are_refused(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FileNotFoundError, match=r"names .*, which is no weights file there"):
        published_files(folder)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/a/b", {}, "repository 'org/a/b' is no name that the Hub allows"),
        ("../x", {}, "repository '../x' is no name"),
        ("org/tiny", {"create_pr": True, "revision": "dev"}, "revision='dev' cannot be combined with a pull request"),
    ],
)
def test_bad_arguments(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        push(folder, name, **options)
