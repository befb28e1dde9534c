"""A finished stage's model on the hub, private unless said otherwise, with its card."""

from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from grpo_lab.errors import SetupError, UsageError
from grpo_lab.finished import Finished, export
from grpo_lab.policy.adapter_files import base_of, is_adapter
from grpo_lab.tracking.folders import MANIFEST


@dataclass(frozen=True)
class Upload:
    """A folder with everything that goes to the hub."""

    folder: Path
    kind: str

    @property
    def files(self) -> dict[str, Path]:
        """What is sent, by its name in the repository. The manifest is this machine's and stays."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        return {path.relative_to(self.folder).as_posix(): path for path in found}


def prepared(of: Finished, folder: Path, *, merge: bool) -> Upload:
    """The stage's model, checked as `export` checks it, with its card, in a new folder.

    Raises:
        UsageError: an adapter whose base only this machine has.
    """
    if is_adapter(of.final) and not merge and Path(base_of(str(of.final))).is_absolute():
        raise UsageError(
            f"{of.final}: the adapter's base is a folder of this machine, so nobody could use it; add --merge"
        )
    found = export(of, folder, merge=merge, dtype=None)
    return Upload(folder, found["kind"])


def push(upload: Upload, repo: str, *, public: bool, message: str) -> str:
    """Send everything in one commit and return its address. The token is the environment's or the hub's own.

    Raises:
        UsageError: the repository is there and public, and that was not asked for. Nothing is sent.
        SetupError: the hub could not be reached, or refused.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise UsageError(f"--repo {repo}: is there and public; add --public to send to it, or name another")
        operations = [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SetupError(f"--repo {repo}: the hub said no: {first}") from error
