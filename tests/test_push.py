"""`forgetless push`: nothing leaves the machine without --yes, what does is the export and nothing else, and every refusal of the hub is one message."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import make_model_folder, run_config, write_task
from huggingface_hub.errors import HfHubHTTPError

import forgetless as fl
from forgetless import models
from forgetless.lineage import RunFolder
from forgetless.state import model_sha256

httpx = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])  # the HTTP library that this version of the hub's stands on
SECRET = "stone river apple"  # of words that the tiny tokenizer has: text that survives whole wherever a row is kept


class Hub:
    """Stands in for HfApi: notes every call, and what the uploaded folder held while it was there."""

    endpoint = "https://hub.test"
    public = False
    error: Exception | None = None

    def __init__(self):
        self.calls: list[tuple[str, dict]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id, **options):
        if self.error is not None:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id} | options))

    def repo_info(self, repo_id, **options):
        return SimpleNamespace(private=not self.public)

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", {"repo_id": repo_id} | options))

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        self.files = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        shutil.copytree(folder_path, self.kept)
        return SimpleNamespace(commit_url="https://hub.test/me/model/commit/1")

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    found = Hub()
    found.kept = tmp_path / "uploaded"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one adapter over two tasks, its model in a folder of this machine, a secret in its rows, and rows kept."""
    folder = tmp_path_factory.mktemp("secret-place")
    base = make_model_folder(folder / "my-base")
    config = run_config(base, folder, "lora", ("colour", "animal")) | {"store": "rows"}
    for task in config["tasks"]:
        for key in ("data", "test"):
            rows = [json.loads(line) for line in Path(task[key]).read_text().splitlines()]
            rows = [row | {"sentence": f"{row['sentence']} {SECRET}"} for row in rows]
            Path(task[key]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return fl.run(config | {"watch": [write_task(folder / "watched", "mood")]}).path


def test_without_yes_it_only_says_what_would_be_uploaded(run, hub, forgetless_):
    status, out, _ = forgetless_("push", str(run), "me/model", "--private")
    assert status == 0 and hub.calls == [] and out.endswith("nothing was uploaded: add --yes to upload exactly this\n")
    assert "to      https://hub.test/me/model, branch main; private" in out
    status, listed, _ = forgetless_("push", str(run), "me/model", "--json")
    plan = json.loads(listed)
    assert status == 0 and hub.calls == [] and not plan["uploaded"] and not plan["private"]
    status, listed, _ = forgetless_("push", str(run), "me/model", "--json", "--yes")
    done = json.loads(listed)
    assert status == 0 and done == plan | {"uploaded": True, "commit": "https://hub.test/me/model/commit/1"}
    assert {path: len(content) for path, content in hub.files.items()} == plan["files"] and plan["bytes"] == sum(plan["files"].values())
    assert all(f"{size:,} {path}" in out for path, size in plan["files"].items())


def test_what_is_uploaded_is_the_committed_model_and_its_card(run, hub, forgetless_):
    status, out, _ = forgetless_("push", str(run), "me/model", "--yes", "--private", "--revision", "march")
    sha = RunFolder(run, lock=False).lines()[-1]["model_sha256"]
    assert status == 0 and "done    https://hub.test/me/model/commit/1" in out
    assert hub.calls == [
        ("create_repo", {"repo_id": "me/model", "repo_type": "model", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "me/model", "branch": "march", "repo_type": "model", "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/model", "repo_type": "model", "revision": "march", "commit_message": f"forgetless: animal as plain, model_sha256 {sha}"}),
    ]  # fmt: skip
    assert model_sha256(models.load(str(hub.kept))[0]) == sha and "README.md" in hub.files


def test_an_earlier_task_may_be_pushed(run, hub, forgetless_):
    assert forgetless_("push", str(run), "me/model", "--yes", "--task", "colour")[0] == 0
    sha = RunFolder(run, lock=False).lines()[0]["model_sha256"]
    assert hub.calls[-1][1]["commit_message"] == f"forgetless: colour as plain, model_sha256 {sha}"
    assert model_sha256(models.load(str(hub.kept))[0]) == sha


@pytest.mark.parametrize("form", ["plain", "lora"])
def test_nothing_of_the_data_or_of_this_machine_is_uploaded(run, hub, forgetless_, form):
    assert any(SECRET in p.read_text() for p in run.rglob("predictions.jsonl")) or any(
        SECRET in p.read_text() for p in run.parent.rglob("*.jsonl")
    )  # the data has it
    assert forgetless_("push", str(run), "me/model", "--yes", "--as", form)[0] == 0
    names = {"plain": {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}}
    names |= {"lora": {"adapter_model.safetensors", "adapter_config.json", "export.json"}}
    assert hub.files.keys() - {"chat_template.jinja"} == names[form] | {"README.md"}
    for content in hub.files.values():
        assert SECRET.encode() not in content and b"secret-place" not in content
    if form == "lora":
        assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "my-base" == json.loads(hub.files["export.json"])["base"]


def test_private_is_refused_where_the_repository_is_public_already(run, hub, forgetless_):
    hub.public = True
    status, _, err = forgetless_("push", str(run), "me/model", "--yes", "--private")
    assert status == 2 and "is there already and public, and --private was asked for; nothing was uploaded" in err
    assert hub.names == ["create_repo"]
    assert forgetless_("push", str(run), "me/model", "--yes")[0] == 0


def answered(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"{status} Client Error", response=httpx.Response(status, request=httpx.Request("POST", "https://hub.test")))


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (httpx.ConnectError("name or service not known"), 4, "https://hub.test/me/model cannot be reached (name or service not known)"),
        (httpx.ReadTimeout(""), 4, "cannot be reached (ReadTimeout)"),
        (ConnectionResetError("reset by peer"), 4, "cannot be reached (reset by peer)"),
        (answered(500), 4, "the hub answered status 500"),
        (answered(401), 2, "does not let this token write to me/model (status 401)"),
        (answered(403), 2, "does not let this token write to me/model (status 403)"),
    ],
)
def test_what_the_hub_or_the_way_to_it_says_is_one_message(run, hub, forgetless_, error, status, said):
    hub.error = error
    code, out, err = forgetless_("push", str(run), "me/model", "--yes")
    message = err[err.index("error: ") :]
    assert code == status and out == "" and said in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("me/model", ["--yes"], "there is no token for the hub. Run `hf auth login`, or set HF_TOKEN"),
        ("model", [], "'model': whose repository? Write OWNER/NAME"),
        ("me/my/model", [], "'me/my/model' is no name of a repository"),
        ("me/model", ["--task", "color"], "did you mean 'colour'?"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(run, hub, monkeypatch, forgetless_, name, arguments, said):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    status, out, err = forgetless_("push", str(run), name, *arguments)
    assert status == 2 and out == "" and said in err and hub.calls == []


def test_offline_is_offline(run, hub, monkeypatch, forgetless_):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, _, err = forgetless_("push", str(run), "me/model", "--yes")
    assert status == 2 and "HF_HUB_OFFLINE is set, so nothing is sent" in err and hub.calls == []
    assert forgetless_("push", str(run), "me/model")[0] == 0  # to look at what would go takes no hub


def test_only_a_run_is_pushed(tiny, hub, forgetless_):
    status, _, err = forgetless_("push", tiny, "me/model", "--yes")
    assert status == 2 and "not the folder of a run that has learned a task" in err and hub.calls == []
    status, _, err = forgetless_("push", tiny, "me/model", "--yes", "--as", "lora")
    assert status == 2 and hub.calls == []
