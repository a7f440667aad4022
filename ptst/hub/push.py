"""Files into a model repository of the hub, in one commit on top of what is there.

Whatever goes wrong on the way is one sentence, and leaves the repository as it was: large files are sent first, each
once, and only the commit makes any of them a part of it. The token comes from HF_TOKEN or the login alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptst.errors import Setting, UserError
from ptst.hub.locate import HUB_ID
from ptst.progress import say

_AGAIN = "the repository is as it was; the same command goes on with what is missing"


@dataclass(frozen=True)
class Upload:
    """A file of the repository: its path there, and its bytes or where they are."""

    path: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Pushed:
    """`commit`: its id. `created`: the repository is new. `url`: of the commit."""

    repo: str
    commit: str
    url: str
    created: bool


def check_repo(repo: str) -> None:
    """Raise UserError for what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    found = HUB_ID.fullmatch(repo)
    try:
        validate_repo_id(repo)
    except HFValidationError:
        found = None
    if found is None or found[2]:
        remedy = ("give org/name or user/name; a branch is ", Setting("revision"))
        raise UserError((Setting("repo"), f" {repo!r} is no name of a repository"), remedy)


def push_files(
    repo: str, uploads: Sequence[Upload], message: str, *, revision: str | None = None, private: bool = True
) -> Pushed:
    """Commit files to a repository, which is made where there is none; files of other names in it stay. `private`: a
    new repository is, and an existing one must be. `revision`: a branch, made where there is none. Raises UserError
    where there is no token or no right to write, where somebody else commits meanwhile, and where the hub fails."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    token = get_token()
    if token is None or not token.isascii():
        cause = "there is no token for the hub" if token is None else "the token for the hub has letters that none has"
        raise UserError(cause, "set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi()
    with _told(repo):
        created = False
        try:
            info = api.repo_info(repo, revision=None)
        except RepositoryNotFoundError:
            say(f"making the {'private' if private else 'public'} repository {repo}")
            api.create_repo(repo, private=private, exist_ok=True)
            info, created = api.repo_info(repo), True
        if private and info.private is False:
            cause = f"the repository {repo} is public"
            raise UserError(cause, ("give another ", Setting("repo"), ", or agree to it with no-", Setting("private")))
        if revision is not None:
            try:
                info = api.repo_info(repo, revision=revision)
            except RevisionNotFoundError:
                say(f"making the branch {revision}")
                api.create_branch(repo, branch=revision, exist_ok=True)
                info = api.repo_info(repo, revision=revision)
        operations = [CommitOperationAdd(upload.path, upload.content) for upload in uploads]
        done = api.create_commit(
            repo, operations, commit_message=message, revision=revision, parent_commit=info.sha, num_threads=2
        )
    return Pushed(repo, str(done.oid), str(done.commit_url), created)


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Inside, what the hub or the network says becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the types of errors of the network depend on the library's version
        status = _status(error)
        reasons = {
            401: ("does not know the token", "set HF_TOKEN to a valid one, or log in with `hf auth login`"),
            403: (f"does not let this token write to {repo}", "use a token with the right to write, or another name"),
            404: (f"has no repository {repo} that this token may see", "check the name and the token"),
            409: (f"has another commit in {repo} since the upload began", _AGAIN),
            412: (f"has another commit in {repo} since the upload began", _AGAIN),
            429: ("takes no more requests for now", f"wait; {_AGAIN}"),
        }
        if status in reasons:
            what, remedy = reasons[status]
            raise UserError(f"the hub {what} (status {status})", remedy) from None
        if status is not None:
            raise UserError(f"the hub failed (status {status})", _AGAIN) from None
        if _is_network(error):
            raise UserError(f"the hub cannot be reached, or went away ({type(error).__name__})", _AGAIN) from None
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise UserError(f"the hub refuses the card: {' '.join(str(error).split())}", "mend README.md") from None
        raise


def _status(error: BaseException | None) -> int | None:
    """The status of the answer that an error, or its cause, is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _is_network(error: BaseException | None) -> bool:
    """Whether a connection failed, or an answer broke off."""
    while error is not None:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if isinstance(error, (OSError, EOFError)) or modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3"}:
            return True
        error = error.__cause__ or error.__context__
    return False
