"""Finding pairs of releases: every two neighbouring ones of a package are tried, newest first."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from m1.sandbox.base import Backend
from m1.swe.builder import Built, Pair, Rejected, build_pair
from m1.swe.instance import Instance
from m1.swe.releases import PackageIndex, ReleaseError
from m1.swe.store import EnvironmentStore, SiteError

_FREE = re.compile(
    r"\b(?:MIT|BSD|Apache|ISC|Python Software Foundation|PSF|Unlicense|Zlib|0BSD|CC0)\b",
    re.IGNORECASE,
)
_RECIPROCAL = re.compile(r"\b(?:GPL|LGPL|AGPL|General Public|Proprietary)", re.IGNORECASE)


@dataclass(frozen=True)
class Attempt:
    """What became of one pair."""

    pair: Pair
    built: Built | None
    reason: str
    """Why there is no instance; empty when there is one."""

    @property
    def instance(self) -> Instance | None:
        """The instance, where the pair makes one."""
        return self.built.instance if self.built else None


def neighbours(package: str, index: PackageIndex, *, max_pairs: int) -> list[Pair]:
    """Pairs of consecutive final releases with a source archive, newest first.

    Raises:
        IndexUnreachable: The index does not answer.
        ReleaseError: It has no such package.
    """
    versions = index.versions(package)
    pairs = [
        Pair(package=package, base_version=old, fix_version=new)
        for old, new in itertools.pairwise(versions)
    ]
    return pairs[::-1][:max_pairs]


def find_instances(
    packages: Sequence[str],
    index: PackageIndex,
    store: EnvironmentStore,
    backend: Backend,
    *,
    max_pairs: int = 10,
    max_found: int = 3,
    known: Sequence[Pair] = (),
    test_seconds: float = 20.0,
) -> Iterator[Attempt]:
    """Try neighbouring releases of packages and tell the outcome of each.

    Args:
        packages: Names on the index.
        index: Where releases come from.
        store: Where environments are built.
        backend: What runs the tests.
        max_pairs: Pairs tried for each package.
        max_found: Instances after which a package is left.
        known: Pairs not to try again.
        test_seconds: After which a single test counts as failed.
    """
    done = {(p.package, p.base_version, p.fix_version) for p in known}
    for package in packages:
        found = 0
        try:
            pairs = neighbours(package, index, max_pairs=max_pairs)
        except ReleaseError as error:
            yield Attempt(Pair(package=package, base_version="", fix_version=""), None, str(error))
            continue
        for pair in pairs:
            if found >= max_found:
                break
            if (pair.package, pair.base_version, pair.fix_version) in done:
                continue
            attempt = try_pair(pair, index, store, backend, test_seconds=test_seconds)
            found += attempt.built is not None
            yield attempt


def try_pair(
    pair: Pair,
    index: PackageIndex,
    store: EnvironmentStore,
    backend: Backend,
    *,
    test_seconds: float = 20.0,
    is_free_only: bool = True,
) -> Attempt:
    """Build one pair; what cannot be built comes back with its reason."""
    try:
        built = build_pair(pair, index, store, backend, test_seconds=test_seconds)
        if is_free_only and not is_free(built.instance.license):
            named = built.instance.license or "unknown"
            raise Rejected(f"licence {named!r} is not a permissive one")
    except (Rejected, ReleaseError, SiteError) as error:
        return Attempt(pair, None, str(error))
    return Attempt(pair, built, "")


def is_free(license_text: str) -> bool:
    """Whether a licence lets anybody copy and change the code with little more than credit."""
    return bool(_FREE.search(license_text)) and not _RECIPROCAL.search(license_text)
