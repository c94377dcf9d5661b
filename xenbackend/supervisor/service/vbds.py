"""The vbds in service, found by path, token, domain or name.

Must not call a vbd. A lookup costs the same however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from xenbackend.disks import parse_disk
from xenbackend.errors import ConfigError
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.xenstore.paths import VbdPath

_NAMED = 10  # disks in a sentence


class Vbds(Mapping[VbdPath, Vbd]):
    """The vbds by path; each path has one or none."""

    def __init__(self) -> None:
        self._by_path: dict[VbdPath, Vbd] = {}
        self._by_token: dict[str, Vbd] = {}
        self._by_domain: dict[int, dict[VbdPath, Vbd]] = {}

    def __getitem__(self, path: VbdPath) -> Vbd:
        return self._by_path[path]

    def __iter__(self) -> Iterator[VbdPath]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)

    def add(self, vbd: Vbd) -> None:
        """Add a vbd. Raises: ValueError, if there is one with that path."""
        if vbd.path in self._by_path:
            raise ValueError(f"{vbd.path} is already being served")
        self._by_path[vbd.path] = self._by_token[vbd.token] = vbd
        self._by_domain.setdefault(vbd.path.frontend_domid, {})[vbd.path] = vbd

    def remove(self, vbd: Vbd) -> bool:
        """Remove a vbd, and return whether it was there."""
        path = vbd.path
        if self._by_path.get(path) is not vbd:
            return False
        del self._by_path[path], self._by_token[vbd.token]
        siblings = self._by_domain[path.frontend_domid]
        del siblings[path]
        if not siblings:
            del self._by_domain[path.frontend_domid]
        return True

    def of_token(self, token: str) -> Vbd | None:
        """Return the vbd whose watch has this token."""
        return self._by_token.get(token)

    def of_domain(self, domid: int) -> list[Vbd]:
        """Return the vbds whose frontend is in a domain."""
        return list(self._by_domain.get(domid, {}).values())

    def find(self, text: str, name_of: Callable[[int], str | None]) -> Vbd:
        """Return the vbd that a text such as ``5/xvda`` or ``guest/xvda`` names.

        `name_of` returns the name of a domain's guest; it is called only if the text has a name. Raises: ConfigError.
        """
        wanted = parse_disk(text)
        if wanted.domid is not None:
            domids = [wanted.domid]
        else:
            domids = [each for each in self._by_domain if name_of(each) == wanted.domain]
        if len(domids) > 1:
            raise ConfigError(f"{len(domids)} guests are called {wanted.domain}; write the domain's number instead")
        for domid in domids:
            for path, vbd in self._by_domain.get(domid, {}).items():
                if wanted.devid == path.devid and wanted.kind in ("", path.kind):
                    return vbd
        raise ConfigError(f"there is no disk {text[:80]!r} in service; {self._what_there_is()}")

    def refuse_to_lose(self) -> None:
        """Raise ConfigError if the end of the service would lose what guests have written."""
        losing = [path.disk for path, vbd in sorted(self.items()) if vbd.handover.files.has_unnamed()]
        if losing:
            raise ConfigError(
                f"what the guests of {_listed(losing)} have written is in unnamed files, which are deleted when the "
                "service ends: detach these disks, or name the files with `xenbackend cow keep`; --force stops the "
                "service all the same, and those guests wait for their disks forever"
            )

    def _what_there_is(self) -> str:
        names = [path.disk for path in sorted(self)]
        return f"there are {_listed(names)}" if names else "none is"


def _listed(names: list[str]) -> str:
    """Return the first names for a sentence, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} others" if len(names) > _NAMED else "")
