"""Commands for models and adapters on disk.

``python -m lora_shared_cache check``: whether they can share a cache, and what it takes.
``python -m lora_shared_cache report``: what sharing costs in quality.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .check import check
from .sharing import POLICIES, policy_arguments, sharing_report


def _named_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _policy(text: str) -> str:
    try:
        policy_arguments(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_shared_cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report", help="what sharing one cache costs your adapters on your text", description=sharing_report.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    report.add_argument("--model", required=True, help="path or id of the base model")
    report.add_argument(
        "--adapters", "--adapter", required=True, nargs="+", type=_named_path, metavar="NAME=PATH", help="PEFT adapters"
    )
    report.add_argument("--text", required=True, type=Path, help="a text file; it is cut into two turns per adapter")
    report.add_argument(
        "--policies", nargs="+", type=_policy, metavar="POLICY",
        help=f"of {', '.join(POLICIES)}, and base_shared+private:FIRST-LAST (layers private); default: all that apply",
    )  # fmt: skip
    report.add_argument("--max-tokens", type=int, default=2048, help="of the text; default %(default)s")
    report.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    report.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default %(default)s"
    )
    report.add_argument("--json", type=Path, help="write the numbers here")
    report.add_argument("--plot", type=Path, help="write a plot here (.png, .svg, ...)")
    check_command = commands.add_parser(
        "check", help="whether a model and its adapters can share a cache, from config and adapter files alone",
        description=check.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    check_command.add_argument("--model", required=True, help="path or id of the base model")
    check_command.add_argument(
        "--adapters", "--adapter", nargs="+", type=_named_path, default=[], metavar="NAME=PATH", help="PEFT adapters"
    )
    check_command.add_argument("--json", type=Path, help="write what was found here")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what can't be done ends the program with a message."""
    options = _parser().parse_args(arguments)
    if options.command == "check":
        _check(options)
        return
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(
            options.device
        )
        (name, path), *others = options.adapters
        model = PeftModel.from_pretrained(model, path, adapter_name=name)
        for name, path in others:
            model.load_adapter(path, adapter_name=name)
        ids = tokenizer(options.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids
        report = sharing_report(
            model.eval(), ids[:, : options.max_tokens], [name for name, _ in options.adapters], options.policies
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(report)
    if options.json:
        options.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if options.plot:
        report.plot().savefig(options.plot)


def _check(options: argparse.Namespace) -> None:
    try:
        result = check(options.model, dict(options.adapters))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(result)
    if options.json:
        options.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    if not result.possible:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
