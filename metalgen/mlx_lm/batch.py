"""Answers to many prompts at once: the program of ``metalgen lm batch``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from metalgen.errors import ArgumentError
from metalgen.mlx_lm.caches import make_prompt_cache


def main() -> None:
    """Read ``sys.argv``, generate, and write one JSON object for each prompt, in their order."""
    parser = argparse.ArgumentParser(description="Generate answers to many prompts at once")
    parser.add_argument("--model", required=True, help="folder or repository of the model")
    parser.add_argument("--adapter-path", help="folder of trained adapters")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        help='file of prompts: one a line, or JSON objects with "prompt" (.jsonl)',
    )
    parser.add_argument("--output", type=Path, help="file of answers; default: standard output")
    parser.add_argument("--max-tokens", "-m", type=int, default=256, help="of each answer")
    parser.add_argument(
        "--kv-bits",
        type=one_or_both,
        help="4 or 8: quantize the caches; 8,4: keys and values apart",
    )
    parser.add_argument(
        "--kv-group-size", type=one_or_both, default=64, help="32, 64 or 128, or a pair as above"
    )
    parser.add_argument("--completion-batch-size", type=int, default=32)
    parser.add_argument("--prefill-batch-size", type=int, default=8)
    parser.add_argument("--ignore-chat-template", action="store_true")
    arguments = parser.parse_args()
    if arguments.max_tokens < 1:
        raise ArgumentError("--max-tokens", "a positive number", arguments.max_tokens)
    prompts = read_prompts(arguments.prompts)
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise ArgumentError("--output", "a file in a folder that exists", str(arguments.output))
    lines = [json.dumps(row, ensure_ascii=False) for row in _answers(arguments, prompts)]
    if arguments.output is None:
        print("\n".join(lines))
        return
    part = arguments.output.with_name(f".{arguments.output.name}.part")
    part.write_text("\n".join(lines) + "\n", "utf-8")
    part.replace(arguments.output)
    print(f"{len(lines)} answers in {arguments.output}")


def one_or_both(text: str) -> int | tuple[int, int]:
    """A number for keys and values alike, or two with a comma between; raises `ValueError`."""
    keys, comma, values = text.partition(",")
    return (int(keys), int(values)) if comma else int(keys)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; empty lines are left out.

    Raises:
        ArgumentError: no such file, no prompt in it, or a line that is none.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("--prompts", f"a file of prompts ({error})", str(path)) from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines):
            try:
                lines[number] = json.loads(line)["prompt"]
            except (ValueError, TypeError, KeyError):
                lines[number] = ""
            if not isinstance(lines[number], str) or not lines[number]:
                expected = f'an object with "prompt", a text, as number {number + 1}'
                raise ArgumentError("--prompts", expected, line)
    if not lines:
        raise ArgumentError("--prompts", "at least one prompt", str(path))
    return lines


def _answers(arguments: argparse.Namespace, prompts: list[str]) -> list[dict[str, Any]]:
    utils: Any = importlib.import_module("mlx_lm.utils")
    generate: Any = importlib.import_module("mlx_lm.generate")
    model, tokenizer = utils.load(arguments.model, adapter_path=arguments.adapter_path)
    tokens = []
    for prompt in prompts:
        if tokenizer.has_chat_template and not arguments.ignore_chat_template:
            messages = [{"role": "user", "content": prompt}]
            tokens.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        else:
            tokens.append(tokenizer.encode(prompt))
    held = None
    if arguments.kv_bits is not None:
        held = [
            make_prompt_cache(model, kv_bits=arguments.kv_bits, group_size=arguments.kv_group_size)
            for _ in prompts
        ]
    batch = generate.BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=arguments.completion_batch_size,
        prefill_batch_size=arguments.prefill_batch_size,
    )
    found: dict[int, list[int]] = {}
    try:
        uids = batch.insert(tokens, [arguments.max_tokens] * len(tokens), caches=held)
        found = {uid: [] for uid in uids}
        ended = 0
        with batch.stats() as figures:
            while responses := batch.next_generated():
                for response in responses:
                    if response.finish_reason != "stop":
                        found[response.uid].append(response.token)
                    if response.finish_reason is not None:
                        ended += 1
                        _progress(ended, len(prompts))
    finally:
        batch.close()
    print(
        f"Prompt: {figures.prompt_tokens} tokens, {figures.prompt_tps:.3f} tokens-per-sec\n"
        f"Generation: {figures.generation_tokens} tokens, "
        f"{figures.generation_tps:.3f} tokens-per-sec",
        file=sys.stderr,
    )
    return [
        {"prompt": prompt, "answer": tokenizer.decode(found[uid]), "tokens": len(found[uid])}
        for prompt, uid in zip(prompts, uids, strict=True)
    ]


def _progress(ended: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{ended} of {count} answers", end="" if ended < count else "\n", file=sys.stderr)
