"""Make the pictures of README: `python docs/gallery.py RUN`, of a trained run on the embedded data set.

It needs Chromium, and for the demo's picture .venv-demo/ (`make demo` makes it) or another --demo-python with Gradio.
docs/img/ gets report.png (light, its mistakes in dark), demo.png and predict.gif: look at them before they are kept.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.test_demo import Browser

IMAGES = ROOT / "docs" / "img"
COLOURS = 128  # of a picture: a third of the bytes, and nothing to be seen of it
WIDTH, HEIGHT = 1280, 1010  # px of the browser's window
SHOWN, GIF_WIDTH = 1100, 300  # px of a picture's width in README


def shot(browser: Browser, path: Path, scheme: str, element: str | None = None) -> Image.Image:
    """Return what the window shows, or would if it were scrolled to an element."""
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    top = browser.evaluate(f"{element}.getBoundingClientRect().top + scrollY") if element else 0
    browser.screenshot(path)
    with Image.open(path) as image:
        return image.convert("RGB").crop((0, round(top), WIDTH, min(round(top) + HEIGHT, image.height)))


def save(image: Image.Image, name: str) -> None:
    small = image.resize((SHOWN, round(SHOWN * image.height / image.width)), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.quantize(COLOURS, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    (IMAGES / name).write_bytes(content.getvalue())
    print(f"{IMAGES / name}: {len(content.getvalue()) / 1000:.0f} kB")


def draw_report(browser: Browser, run: Path, folder: Path) -> None:
    browser.call("Page.navigate", url=(run / "report.html").resolve().as_uri())
    browser.wait("document.querySelector('.sortable') !== null")
    light = shot(browser, folder / "light.png", "light")
    dark = shot(browser, folder / "dark.png", "dark", "document.querySelector('.sortable').closest('section')")
    both = Image.new("RGB", (WIDTH, light.height + 420))
    both.paste(light, (0, 0))
    both.paste(dark.crop((0, 0, WIDTH, 420)), (0, light.height))
    save(both, "report.png")


def draw_demo(browser: Browser, run: Path, python: Path, folder: Path) -> None:
    base = run.resolve().parents[1]  # the page names the run as it is called from there: logs/NAME
    name = str(run.resolve().relative_to(base))
    command = [str(python), str(ROOT / "scripts" / "demo.py"), "--checkpoint", name, "--window", "20", "--port", "7879"]
    server = subprocess.Popen(command, cwd=base, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        while not (line := server.stdout.readline()).startswith("http"):
            assert line, "the demo did not start"
        browser.call("Page.navigate", url=line.split()[0])
        browser.wait("document.querySelector('button.gallery-item') !== null")
        browser.evaluate("document.querySelector('button.gallery-item').click()")
        browser.wait("document.querySelectorAll('.strip img').length > 3")
        browser.wait("[...document.querySelectorAll('video')].some(video => video.readyState === 4)")
        save(shot(browser, folder / "demo.png", "light").crop((60, 0, WIDTH, HEIGHT)), "demo.png")
    finally:
        server.terminate()
        server.communicate()


def draw_prediction(run: Path, folder: Path) -> None:
    faces = (
        "scripts/make_faces.py",
        "--out",
        str(folder / "faces"),
        "--size",
        "0.005",
        "--video",
        "h264",
        "--seed",
        "5",
    )
    subprocess.run([sys.executable, *faces], cwd=ROOT, check=True)
    video = folder / "faces" / "videos_h264" / "00003.mp4"
    predict = ("scripts/predict.py", str(video), "--checkpoint", str(run), "--window", "20", "--annotate", "gif")
    subprocess.run([sys.executable, *predict, "--out", str(folder / "out")], cwd=ROOT, check=True)
    shrink(folder / "out" / "00003.gif", IMAGES / "predict.gif")
    print(f"{IMAGES / 'predict.gif'}: {(IMAGES / 'predict.gif').stat().st_size / 1000:.0f} kB")


def shrink(source: Path, target: Path) -> None:
    """Write every second frame of a GIF, small and of few colours, which are the same in all."""
    with Image.open(source) as gif:
        frames, lasting = [], []
        for number in range(0, gif.n_frames, 2):
            gif.seek(number)
            frames.append(gif.convert("RGB").resize((GIF_WIDTH, round(GIF_WIDTH * gif.height / gif.width)), 1))
            lasting.append(2 * gif.info["duration"])
    palette = frames[0].quantize(32, dither=Image.Dither.NONE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(target, save_all=True, append_images=frames[1:], duration=lasting, loop=0, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--demo-python", type=Path, default=ROOT / ".venv-demo" / "bin" / "python")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        draw_prediction(args.run, Path(name))
        browser = Browser("chromium", Path(name) / "profile")
        browser.resize(WIDTH, HEIGHT)
        draw_report(browser, args.run, Path(name))
        draw_demo(browser, args.run, args.demo_python, Path(name))
        browser.close()
