"""An exported folder on the Hugging Face Hub, in one commit: a push that fails leaves the repository as it was."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opcd_fast.errors import InputError
from opcd_fast.models import first_line

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


def refuse_local_base(base: str) -> None:
    """Raises InputError for the base of an adapter that nobody else could find."""
    if not is_hub_id(base):
        raise InputError(
            f"push_to_hub: the adapter's base {base!r} is only on this machine; give its hub id with --base-name, or "
            "push the model with --merged"
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
    from huggingface_hub.utils import filter_repo_objects

    settings = folder / "adapter_config.json"
    if settings.is_file():
        refuse_local_base(json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"])
    api = HfApi()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise InputError(f"push_to_hub: {str(folder)!r} holds no files")
    with _one_line(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        replaced = filter_repo_objects(api.list_repo_files(repo), allow_patterns=list(REPLACED))
        changes: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        changes += [CommitOperationDelete(name, is_folder=False) for name in replaced if name not in files]
        # Not upload_folder: where hf_xet is installed that commits what has arrived every few minutes, and a push that
        # breaks off would leave half a model.
        message = "Upload a model with a context in its weights (opcd export)"
        done = api.create_commit(repo, changes, commit_message=message)
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
        said = getattr(error, "server_message", None) or first_line(error)
        no_right = (
            f"the token has no right to write to {repo!r} ({said}); use one with the right to write, or a repository "
            "of your own"
        )
        no_token = f"the Hub does not accept the token ({said}); `hf auth login`"
        known: dict[Any, str] = {401: no_token, 403: no_right, 404: no_right}
        refused = known.get(status, f"the Hub refused ({status}: {said}); push again later")
        raise InputError(f"push_to_hub: {refused}") from error
    except Exception as error:
        if not (isinstance(error, (OSError, ValueError, RuntimeError)) or _of_the_network(error)):
            raise  # a bug
        why = f"{first_line(error)} {first_line(error.__cause__) if error.__cause__ else ''}".strip()
        what = "the Hub cannot be reached, or a file did not arrive"
        raise InputError(f"push_to_hub: {what} ({why}); push again") from error


def _of_the_network(error: Exception) -> bool:
    """By name: huggingface_hub has changed its HTTP library, and with it the class."""
    return any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)
