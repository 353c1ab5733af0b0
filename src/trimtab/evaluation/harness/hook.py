"""Makes plain `lm_eval --model trimtab` work with a harness that knows no plugins, where that is asked for.

Later versions of the harness find trimtab by its entry point. Versions without that look names up before they
import anything of others, so the only way in is Python's own start: two files in `site-packages`, put there
and taken away by

    python -m trimtab.evaluation.harness.hook install
    python -m trimtab.evaluation.harness.hook remove

The files import nothing but `sys`. They do nothing until a program imports `lm_eval.models`; then they add
the name, and trimtab itself is imported when that name is used.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

from trimtab.errors import OutputError

MODULE = "_trimtab_lm_eval"
SOURCE = '''\
"""Names trimtab to lm-evaluation-harness; `python -m trimtab.evaluation.harness.hook remove` removes it."""

import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "lm_eval.models":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                try:
                    from lm_eval.api.registry import model_registry

                    where = "trimtab.evaluation.harness.model:TrimtabLM"
                    if "trimtab" not in model_registry:
                        model_registry.register("trimtab", target=where)
                except Exception as error:
                    print(f"trimtab could not be named to lm_eval: {error}", file=sys.stderr)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
'''


def install(folder: Path) -> list[Path]:
    """Write the two files into `folder`, a folder whose `.pth` files Python reads at its start."""
    files = [folder / f"{MODULE}.py", folder / f"{MODULE}.pth"]
    try:
        # The module first, so that the line that imports it is never there alone.
        files[0].write_text(SOURCE, encoding="utf-8")
        files[1].write_text(f"import {MODULE}\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write into {folder}: {error.strerror}") from None
    return files


def remove(folder: Path) -> list[Path]:
    """Delete what `install` wrote into `folder`; returns what was there."""
    files = [folder / f"{MODULE}.pth", folder / f"{MODULE}.py"]
    there = [file for file in files if file.exists()]
    try:
        for file in there:
            file.unlink()
    except OSError as error:
        raise OutputError(f"cannot delete from {folder}: {error.strerror}") from None
    return there


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trimtab.evaluation.harness.hook", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("install", "remove"))
    what = parser.parse_args().what
    folder = Path(sysconfig.get_path("purelib"))
    try:
        files = install(folder) if what == "install" else remove(folder)
    except OutputError as error:
        parser.exit(2, f"error: {error}\n")
    done = "wrote" if what == "install" else "deleted"
    print("\n".join(f"{done} {file}" for file in files) or f"nothing to delete in {folder}")


if __name__ == "__main__":
    main()
