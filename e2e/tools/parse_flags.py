"""Parses command lines by the programs' own parsers; run it with the Python that has the program.

``python parse_flags.py engine|router < LISTS`` reads a JSON list of argument lists and prints a JSON list: null where
one parses, else what the parser said.
"""

import argparse
import contextlib
import io
import json
import sys


def _engine() -> argparse.ArgumentParser:
    # Where they live has moved between releases.
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))


def _router() -> argparse.ArgumentParser:
    from vllm_router.router_args import RouterArgs

    parser = argparse.ArgumentParser(prog="vllm-router")
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    return parser


def _try(parser: argparse.ArgumentParser, arguments: list[str]) -> str | None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser.parse_args(arguments)
    except (SystemExit, ValueError) as error:
        return f"{error}: {said.getvalue().strip()[-300:]}"
    return None


def main() -> None:
    """Parse what standard input holds."""
    lists = json.load(sys.stdin)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        parser = _engine() if sys.argv[1] == "engine" else _router()
        results = [_try(parser, arguments) for arguments in lists]
    json.dump(results, out)


main()
