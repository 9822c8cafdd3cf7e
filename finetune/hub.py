"""Send a parcel to the Hub: private unless asked, checked before and after, again and again until it has arrived.

What is under way stands in the run's hub.json, so that no fault of the network loses anything. It decides nothing about
content (see parcel), never makes a private repository public, and writes or tells no token.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported without being listed
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from finetune import parcel, recipe, runs
from finetune.errors import UserError, refuse
from finetune.parcel import Item, Parcel, Wish
from finetune.runs import RunFolder
from finetune.tables import harmless

STATE = "hub.json"
_BUSY = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # another try may end otherwise
_REMEDIES = {
    401: "Run `hf auth login` again: the Hub does not know this token.",
    403: "Check the name after --to, and that the token may write there.",
    404: "Check the name after --to.",
}
_ELSE = "Mend that and push again."
_MOST_TOLD = 300  # characters of what a server says

_Found = TypeVar("_Found")
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Patience:
    """Seconds: before a second try, between tries at most, and in all before a step is given up for now."""

    first: float = 1.0
    most: float = 60.0
    total: float = 600.0


@dataclass(frozen=True)
class Sent:
    """A push that arrived. `files`: how many there are; `changed`: whether anything was new."""

    url: str
    commit: str
    private: bool
    files: int
    changed: bool


# --- the queue


def resumed(folder: RunFolder) -> Wish:
    """What is to be sent once more. Errors: UserError where nothing was ever begun."""
    told = _state(folder)
    if "wish" not in told:
        raise refuse("no push of this run was begun.", "sft push RUN --to user/name", folder.path)
    return Wish(**told["wish"])


def enqueue(folder: RunFolder, wish: Wish) -> None:
    """Write down that this is to be sent, before the network is asked."""
    known = _state(folder)
    runs.write_json(_path(folder), {**known, "state": "queued", "wish": asdict(wish)})


def _state(folder: RunFolder) -> dict[str, Any]:
    found = runs.read_json(_path(folder)) if _path(folder).is_file() else {}
    return found if isinstance(found, dict) else {}


def _path(folder: RunFolder) -> Path:
    return folder.path / STATE


# --- sending


def push(made: Parcel, tell: Tell, patience: Patience | None = None) -> Sent:
    """Send everything; returns once it is there and was looked at. Idempotent: what is there already is not sent again.

    Errors: UserError; what is queued stays queued.
    """
    folder = made.run.folder
    enqueue(folder, made.wish)
    courier = Courier(tell, patience or Patience())
    try:
        with _quietly():
            sent = _send(made, courier)
    except UserError as fault:
        runs.write_json(_path(folder), {**_state(folder), "fault": str(fault)})
        raise
    names = [item.name for item in made.items] + ["README.md"]
    done = {"state": "arrived", "wish": asdict(made.wish), "files": names, "url": sent.url, "commit": sent.commit}
    runs.write_json(_path(folder), done)
    return sent


def _send(made: Parcel, courier: Courier) -> Sent:
    wish = made.wish
    before = courier.repository(wish)
    kept = courier.metadata(wish.repo) if any(one.rfilename == "README.md" for one in before.siblings or ()) else {}
    items = [made.readme(kept), *made.items]
    ours = set(_state(made.run.folder).get("files", ())) - {item.name for item in items}
    commit = courier.commit(wish.repo, items, sorted(ours))
    courier.verify(wish.repo, items)
    return Sent(f"{constants.ENDPOINT}/{wish.repo}", commit, bool(before.private), len(items), commit != before.sha)


def after_run(folder: RunFolder, page: Callable[[], str], patience: Patience | None = None) -> str | None:
    """Send a finished run where its recipe says, and tell how that went; None where the recipe names no repository.

    Raises nothing: a finished run is finished whatever the network does, and --resume goes on. `page`: the report,
    written without training text.
    """
    try:
        if recipe.load_resolved(folder.recipe).hub.repo is None:
            return None
        wish = parcel.wish(folder, None, public=False, with_texts=False, anyway=False)
        parcel.allowed(folder, wish)
        enqueue(folder, wish)
        sent = push(parcel.make(folder, wish, page()), folder.note, patience)
    except UserError as fault:
        return f"Not sent to the Hub: {'  '.join(map(str, fault.problems))}"
    except Exception as fault:  # whatever it is, it came after the night's work; the log has it
        folder.note(traceback.format_exc())
        return f"Not sent to the Hub ({type(fault).__name__}); sft push {folder.path} --resume goes on."
    return f"Sent to {sent.url} ({'private' if sent.private else 'public'})."


class Courier:
    """Talks to the Hub, one step after the other, each tried until it succeeds, is refused, or patience ends."""

    def __init__(self, tell: Tell, patience: Patience) -> None:
        if constants.HF_HUB_OFFLINE:
            raise refuse("HF_HUB_OFFLINE is set.", "Unset it to push.")
        self._token = get_token()
        if not self._token:
            raise refuse("there is no token for the Hub.", "Run `hf auth login`, with a token that may write.")
        self._api, self._tell, self._patience = HfApi(token=self._token), tell, patience

    def repository(self, wish: Wish) -> Any:
        """Its state, made if it was not there. Refused where it is public and that was not asked for."""
        found = self._look(wish.repo)
        is_new = found is None
        if is_new:
            make = partial(self._api.create_repo, wish.repo, private=not wish.public, exist_ok=True)
            self._try(f"make {wish.repo}", make)
            found = self._look(wish.repo)
        if found is None:
            raise refuse(f"{wish.repo} was made and cannot be seen.", "May this token read what it writes?")
        if not found.private and not wish.public:
            made = "was made public by the Hub, though private was asked for" if is_new else "is public"
            raise refuse(f"{wish.repo} {made}: nothing was sent.", "Say --public, or make it private in its settings.")
        if found.private and wish.public:
            self._tell(f"{wish.repo} is private and stays so: only its settings page makes it public.")
        return found

    def metadata(self, repo: str) -> Mapping[str, Any]:
        """Of the card that is there; {} where it has none."""
        url = f"{constants.ENDPOINT}/{repo}/resolve/main/README.md"

        def fetch() -> str:
            answer = get_session().get(url, headers=build_hf_headers(token=self._token))
            hf_raise_for_status(answer)
            return str(answer.text)

        text = self._try("read the card", fetch)
        try:
            data: Any = ModelCard(text, ignore_metadata_errors=True).data
            return dict(data.to_dict())
        except Exception:  # somebody's own YAML: whatever is wrong with it, ours replaces it
            return {}

    def commit(self, repo: str, items: Sequence[Item], gone: Sequence[str]) -> str:
        """One commit with all that is new. Returns the newest commit's id."""
        first = _additions(items)
        self._try("send the files", lambda: self._api.preupload_lfs_files(repo, first, free_memory=False))
        additions = chain([first], (_additions(items) for _ in count()))

        def send() -> str:
            # A try whose reply was lost may have worked. What is there is asked anew: the client sends no file that did
            # not change, and nothing is deleted twice.
            here = {one.rfilename for one in self._api.model_info(repo).siblings or ()}
            less = [CommitOperationDelete(name) for name in gone if name in here]
            made = self._api.create_commit(repo, [*next(additions), *less], commit_message="Push with sft")
            return str(made.oid)

        if gone:
            self._tell(f"Taken out of the newest version: {', '.join(gone)}. Older versions still hold them.")
        return self._try("commit", send)

    def verify(self, repo: str, items: Sequence[Item]) -> None:
        """Errors: UserError where the Hub holds something else than was sent."""
        tree = self._try("look at what arrived", lambda: list(self._api.list_repo_tree(repo, recursive=True)))
        there = {one.path: one.lfs.sha256 if one.lfs else one.blob_id for one in tree if isinstance(one, RepoFile)}
        wrong = [item.name for item in items if there.get(item.name) not in item.hashes()]
        if wrong:
            raise refuse(f"{', '.join(wrong)} did not arrive whole.", "Push again: what arrived is not sent twice.")

    def _look(self, repo: str) -> Any:
        def ask() -> Any:
            try:
                return self._api.model_info(repo)
            except RepositoryNotFoundError as fault:
                if fault.response is not None and fault.response.status_code == 401 and not self._is_known():
                    raise refuse("the Hub does not know this token.", "Run `hf auth login` again.") from None
                return None

        return self._try(f"look at {repo}", ask)

    def _is_known(self) -> bool:
        """The Hub answers 401 to whoever it does not know, and for what it does not show."""
        try:
            self._api.whoami()
        except HfHubHTTPError as fault:
            if fault.response is not None and fault.response.status_code == 401:
                return False
            raise
        return True

    def _try(self, what: str, act: Callable[[], _Found]) -> _Found:
        """Do it, again after a fault that may pass. Errors: UserError."""
        waited, pause = 0.0, self._patience.first
        while True:
            try:
                return act()
            except UserError:
                raise
            except Exception as fault:  # the client raises a dozen kinds: sorted here, and raised if none of them
                said = self._words(fault)
                status = _status(_cause(fault))
                if not _passes(fault) and status is None:
                    raise
                if not _passes(fault):
                    raise refuse(f"the Hub refused to {what} ({said}).", _REMEDIES.get(status or 0, _ELSE)) from None
                if waited >= self._patience.total:
                    remedy = "Nothing is lost: go on with sft push RUN --resume."
                    raise refuse(f"the Hub could not be reached to {what} ({said}).", remedy) from None
                asked = min(_asked_to_wait(fault), self._patience.most)
            seconds = max(pause * random.uniform(0.5, 1.0), asked)
            self._tell(f"Could not {what} ({said}); again in {seconds:.0f} s.")
            time.sleep(seconds)
            waited, pause = waited + seconds, min(2 * pause, self._patience.most)

    def _words(self, fault: BaseException) -> str:
        """What went wrong on one line, whoever's fault it is; no token, nothing a terminal would obey."""
        cause = _cause(fault)
        text = f"{type(cause).__name__}: {cause}".replace(str(self._token), "[token]")
        return harmless(" ".join(text.split()))[:_MOST_TOLD]


def _additions(items: Sequence[Item]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(one.name, one.of if isinstance(one.of, bytes) else str(one.of)) for one in items]


def _cause(fault: BaseException) -> BaseException:
    """The client wraps what happens to one large file."""
    return fault.__cause__ if isinstance(fault, RuntimeError) and fault.__cause__ else fault


def _status(fault: BaseException) -> int | None:
    response = fault.response if isinstance(fault, HfHubHTTPError | httpx2.HTTPStatusError) else None
    return None if response is None else int(response.status_code)


def _passes(fault: BaseException) -> bool:
    """Whether waiting may help: a busy server, a broken line, half a reply."""
    cause = _cause(fault)
    if (status := _status(cause)) is not None:
        return status in _BUSY
    return isinstance(cause, httpx2.TransportError | json.JSONDecodeError | ConnectionError | TimeoutError) and not (
        isinstance(cause, OfflineModeIsEnabled)
    )


def _asked_to_wait(fault: BaseException) -> float:
    """Seconds a busy server names; 0 where it names none."""
    cause = _cause(fault)
    if not isinstance(cause, HfHubHTTPError) or cause.response is None:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(cause.response.headers.get("Retry-After", "0")))
    return 0.0


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What the client says of its own tries is said by us."""
    talk = logging.getLogger("huggingface_hub")
    before = talk.level
    talk.setLevel(logging.ERROR)
    try:
        yield
    finally:
        talk.setLevel(before)
