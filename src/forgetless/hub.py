"""`forgetless push`: an export, uploaded to the Hugging Face hub as one commit, and only where --yes says so.

What goes up is a folder that export.py has just written and nothing else: the model or adapter, its tokenizer, the model card. state/, predictions.jsonl, spaces and data are
never in it. Paths of this machine are taken out of an adapter's configuration.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from .errors import ConfigError, DataError
from .export import export
from .progress import Progress
from .report.card import base_model

BASE_KEYS = ("base", "base_model_name_or_path")  # of adapter_config.json and export.json


def push(
    source: str | Path, repo_id: str, yes: bool = False, *, private: bool = False, task: str | None = None, form: str | None = None,
    revision: str | None = None, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Export a run (see export.export for `task` and `form`) and upload it to the model repository `repo_id`, which is made where there is none.

    yes: without it nothing leaves this machine, and what would is returned: {"to", "repo_id", "revision", "private", "message", "files": {path: bytes}, "bytes",
    "uploaded"}; after an upload also "commit", its address.

    Raises ConfigError for a bad repository name, where the hub is switched off (HF_HUB_OFFLINE), without a token, where the hub refuses it, and where --private was asked for and
    the repository is public; DataError where the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    _check_name(repo_id)
    if yes:
        _check_way()
    with tempfile.TemporaryDirectory(prefix="forgetless-push-") as temporary:
        folder = Path(temporary) / "export"
        found = export(source, folder, form, task, progress=progress)
        if "model_sha256" not in found:
            raise ConfigError(f"{source}: not a run's folder; only what a run has committed is pushed")
        _without_local_paths(folder)
        files = {path: (folder / path).stat().st_size for path in found["files"]}
        api = HfApi()
        plan = {
            "to": f"{api.endpoint}/{repo_id}", "repo_id": repo_id, "revision": revision or "main", "private": private,
            "message": f"forgetless: {found['task']} as {found['as']}, model_sha256 {found['model_sha256']}",
            "files": files, "bytes": sum(files.values()), "uploaded": False,
        }  # fmt: skip
        return plan | {"uploaded": True, "commit": _upload(api, folder, plan, revision)} if yes else plan


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"'{repo_id}' is no name of a repository ({' '.join(str(error).split())}); write OWNER/NAME") from None
    if "/" not in repo_id:
        raise ConfigError(f"'{repo_id}': whose repository? Write OWNER/NAME")


def _check_way() -> None:
    """What can be known before minutes are spent on the export."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "push: HF_HUB_OFFLINE is set, so nothing is sent to the hub. Unset it, or `forgetless export` the folder and upload it elsewhere"
        )
    if not get_token():
        raise ConfigError("push: there is no token for the hub. Run `hf auth login`, or set HF_TOKEN to one that may write")


def _without_local_paths(folder: Path) -> None:
    """Of a base model in a folder of this machine the name alone: its path is nobody's business, and nobody else has it."""
    for file in folder.rglob("*.json"):
        if file.name not in ("adapter_config.json", "export.json"):
            continue
        content = json.loads(file.read_text(encoding="utf-8"))
        named = {
            key: content[key] for key in BASE_KEYS if isinstance(content.get(key), str) and not content[key].startswith(".")
        }  # ../base: in this folder
        names = {key: base_model({"model": name}) or Path(name).name for key, name in named.items()}
        if names != named:
            file.write_text(json.dumps(content | names, indent=1), encoding="utf-8")


def _upload(api: Any, folder: Path, plan: dict[str, Any], revision: str | None) -> str:
    """The address of the commit."""
    from huggingface_hub.errors import HfHubHTTPError

    # of the HTTP library below the hub's, which has been another in each of its major versions
    transport = HfHubHTTPError.__mro__[1]
    repo_id = plan["repo_id"]
    try:
        api.create_repo(repo_id, repo_type="model", private=plan["private"], exist_ok=True)
        if plan["private"] and not api.repo_info(repo_id, repo_type="model").private:  # exist_ok leaves one that was there as it is
            raise ConfigError(
                f"{repo_id} is there already and public, and --private was asked for; nothing was uploaded. Make it private first, or name another"
            )
        if revision:
            api.create_branch(repo_id, branch=revision, repo_type="model", exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=str(folder), repo_type="model", revision=revision, commit_message=plan["message"])
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = " ".join(str(error).split())[:300]
        if status in (401, 403):
            raise ConfigError(f"push: the hub does not let this token write to {repo_id} (status {status}): {said}") from None
        raise DataError(
            f"push: the hub answered status {status}: {said}. Run the same command again; an upload is one commit, whole or not there"
        ) from None
    except (transport, OSError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"push: {plan['to']} cannot be reached ({said}). Run the same command again; an upload is one commit, whole or not there"
        ) from None
    return str(getattr(done, "commit_url", done))


def show(plan: dict[str, Any]) -> None:
    """What is uploaded, or would be, for people."""
    seen = "private" if plan["private"] else "public, unless the repository is there already and private"
    print(f"to      {plan['to']}, branch {plan['revision']}; {seen}")
    print(f"commit  {plan['message']}")
    width = len(f"{plan['bytes']:,}")
    for path, size in plan["files"].items():
        print(f"        {size:>{width},} {path}")
    print(f"total   {plan['bytes']:,} bytes in {len(plan['files'])} files")
    print(f"done    {plan['commit']}" if plan["uploaded"] else "nothing was uploaded: add --yes to upload exactly this")
