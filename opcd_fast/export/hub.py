"""An exported folder on the Hugging Face Hub, in one commit: a push that fails leaves the repository as it was."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError

REPLACED = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "adapter_config.json", "config.json",
    "generation_config.json", "chat_template.jinja", "opcd_card.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
"""Files of an earlier push that go when the new one lacks them: an adapter among the files of a model is neither."""


def check_can_push(repo: str, private: bool) -> str:
    """Look, before anything is made, whether `repo` may be written to; returns its whole name "owner/name".

    Changes nothing on the Hub. Raises InputError: a bad name, no token or an invalid one, no right there, no network,
    or `private` for a repository that everybody can read.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
        raise InputError(f"push_to_hub={repo!r} is not a repository; give 'owner/name', or 'name' for your own")
    api = HfApi()
    with _one_line(repo):
        me: dict[str, Any] = api.whoami()
        name = repo if "/" in repo else f"{me['name']}/{repo}"
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise InputError("push_to_hub: the token may only read; make one that may write, and `hf auth login`")
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:  # none, or one that the token may not see
            return name
    if private and not found.private:
        raise InputError(
            f"private: the repository {name!r} exists and is public; make it private in its settings, or choose another"
        )
    return name


def refuse_local_base(folder: Path) -> None:
    """Raises InputError for an adapter whose base nobody else could find."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not is_hub_id(base):
        raise InputError(
            f"push_to_hub: the adapter names its base {base!r}, which only this machine has; give its hub id with "
            "--base-name, or push the model with --merged"
        )


def is_hub_id(name: str) -> bool:
    """Whether `name` means a repository of the Hub, and no folder here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def push(folder: Path, repo: str, private: bool) -> str:
    """Upload the files of `folder` to `repo` ("owner/name"), made if need be; returns the commit's address.

    One commit, which also removes what an earlier push left there and this one lacks (`REPLACED`); other files stay.
    private: of a new repository. Raises InputError: no right, no network, or the Hub's refusal; the repository is then
    as it was (or new and empty).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    refuse_local_base(folder)
    api = HfApi()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    with _one_line(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        there = api.list_repo_files(repo)
        gone = [
            name for name in there if name not in names and any(fnmatch.fnmatch(name, pattern) for pattern in REPLACED)
        ]
        # Not upload_folder, which divides large uploads into several commits.
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, str(path)) for name, path in zip(names, files)),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ],
            commit_message="Upload a model with a context in its weights (opcd export)",
        )
    return str(done.commit_url)


@contextlib.contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """What the Hub or the way there refuses, as one line with the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except InputError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError("push_to_hub: no token of the Hub is here; `hf auth login`, or set HF_TOKEN") from error
    except OfflineModeIsEnabled as error:
        raise InputError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = getattr(error, "server_message", None) or _first_line(error)
        if status == 401:
            raise InputError(f"push_to_hub: the Hub does not accept the token ({said}); `hf auth login`") from error
        if status in (403, 404):
            raise InputError(
                f"push_to_hub: the token has no right to write to {repo!r} ({said}); use one with the right to write, "
                "or a repository of your own"
            ) from error
        raise InputError(f"push_to_hub: the Hub refused ({status}: {said}); push again later") from error
    except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's for a file that did not arrive
        why = _first_line(error) + (f" {_first_line(error.__cause__)}" if error.__cause__ else "")
        raise InputError(f"push_to_hub: the upload failed ({why}); push again") from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        raise InputError(
            f"push_to_hub: the Hub cannot be reached ({_first_line(error)}); push again when the network is there"
        ) from error


def _of_the_network(error: Exception) -> bool:
    """By name: huggingface_hub has changed its HTTP library, and with it the class."""
    return any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
