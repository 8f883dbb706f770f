"""The samples of etc/allowlist.d with the real programs: in the sandbox, from manifest to artifact."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.conftest import NodeFactory
from tests.node.harness import WAIT_S, Node, wait_final
from tools.mock.bootstrap.coordinator import MockCoordinator
from tools.mock.bootstrap.records import Job, State

pytestmark = pytest.mark.needs("bubblewrap", "time", "ffmpeg", "imagemagick")
SAMPLES = Path(__file__).parents[2] / "etc" / "allowlist.d"
CLIP = ["-f", "lavfi", "-i", "testsrc=duration=2:size=320x240:rate=10", "-c:v", "mpeg4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory with a video and a picture."""
    place = tmp_path_factory.mktemp("files")
    subprocess.run(["/usr/bin/ffmpeg", "-v", "error", *CLIP, str(place / "clip.mp4")], check=True)
    subprocess.run(["/usr/bin/convert", "-size", "64x48", "gradient:", str(place / "in.png")], check=True)
    return place


@pytest.fixture
def served(files: Path, tmp_path: Path) -> Iterator[MockCoordinator]:
    """Give a coordinator that serves these files."""
    with MockCoordinator(files_dir=files, out_dir=tmp_path / "taken") as mock:
        yield mock


@pytest.fixture
def node(served: MockCoordinator, node_factory: NodeFactory) -> Node:
    """Give a node with the samples, its jobs in the sandbox."""
    made = node_factory(base_url=served.url, sandbox={"mode": "required"})
    for sample in SAMPLES.glob("*.yaml"):
        shutil.copy2(sample, made.directory / "allowlist.d")
    made.start()
    return made


def job(mock: MockCoordinator, command: str, *args: str, name: str, **more: Any) -> Job:
    """Have a job done with one of the files."""
    root = mock.url.partition("/api")[0]
    manifest = {"runner": "cli", "command": command, "args": list(args), **more}
    job_id = mock.submit({**manifest, "input": {"urls": [f"{root}/files/{name}"]}})
    (done,) = wait_final(mock, [job_id], 2 * WAIT_S)
    return done


def delivered(done: Job, path: str) -> Path:
    assert done.state is State.DONE, done
    assert done.accepted is not None
    return next(artifact.file for artifact in done.accepted.artifacts if artifact.path == path)


def test_ffmpeg_converts_a_clip(node: Node, served: MockCoordinator) -> None:
    args = ["-ss", "0.5", "-i", "clip.mp4", "-t", "1", "-vf", "scale=160:120", "-c:v", "libx264", "-an"]
    done = job(served, "ffmpeg", *args, "../output/small.mkv", name="clip.mp4")
    probe = ["/usr/bin/ffprobe", "-v", "error", "-show_entries", "stream=codec_name,width", "-of", "csv=p=0"]
    said = subprocess.run(
        [*probe, str(delivered(done, "small.mkv"))], check=True, capture_output=True, text=True
    )
    assert said.stdout == "h264,160\n"
    # What is in work/ is delivered if the job has said so.
    done = job(
        served, "ffmpeg", "-i", "clip.mp4", "-c:v", "copy", "-an", "same.mkv",
        name="clip.mp4", artifacts=[{"path": "same.mkv"}],
    )  # fmt: skip
    assert delivered(done, "same.mkv").stat().st_size > 1000


def test_ffmpeg_fetches_nothing(node: Node, served: MockCoordinator) -> None:
    for name in ("http://127.0.0.1/clip.mp4", "/etc/passwd", "concat:clip.mp4", "../clip.mp4"):
        denied = job(served, "ffmpeg", "-i", name, "out.mkv", name="clip.mp4")
        assert denied.error_code == "E_DENY", denied
    # A playlist that calls itself a clip: what it names is an address, and ffmpeg may open files only.
    (served.out_dir.parent / "x").mkdir()
    playlist = "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n"
    manifest = {"runner": "cli", "command": "ffmpeg", "args": ["-i", "list.mp4", "out.mkv"]}
    job_id = served.submit({**manifest, "input": {"inline": {"list.mp4": playlist}}})
    (failed,) = wait_final(served, [job_id], 2 * WAIT_S)
    assert failed.error_code == "E_EXIT"


def test_imagemagick_resizes_a_picture(node: Node, served: MockCoordinator) -> None:
    args = ["in.png", "-resize", "32x32!", "-strip", "../output/small.jpg"]
    done = job(served, "convert", *args, name="in.png")
    said = subprocess.run(
        ["/usr/bin/identify", "-format", "%m %wx%h", str(delivered(done, "small.jpg"))],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout == "JPEG 32x32"
    denied = job(served, "convert", "in.png", "msl:x.png", name="in.png")
    assert denied.error_code == "E_DENY"


def test_sha256sum_and_gzip(node: Node, served: MockCoordinator, files: Path) -> None:
    done = job(served, "sha256sum", "in.png", name="in.png")
    log = delivered(done, "logs/exec.log").read_text()
    assert log.split() == [hashlib.sha256((files / "in.png").read_bytes()).hexdigest(), "in.png"]
    done = job(served, "gzip", "-9", "in.png", name="in.png", artifacts=[{"path": "in.png.gz"}])
    assert delivered(done, "in.png.gz").read_bytes()[:2] == b"\x1f\x8b"
