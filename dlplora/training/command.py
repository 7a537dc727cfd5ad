"""Run a training command and return its exit code. User errors and interruptions are one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dlplora.errors import DLPLoRAError, one_line
from dlplora.interruption import DISK_ERRORS, TERMINATED, exit_code, raising_on_sigterm


def main(arguments: Sequence[str], *, disk_failed: int = 2) -> int:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        arguments: The command and its options.
        disk_failed: Exit code if a file cannot be read or written, a full disk above all.

    Returns:
        Exit code: 0 done, 2 bad configuration, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with raising_on_sigterm():
        try:
            # imported here, so that a signal during the seconds this takes is handled, too
            from lightning.pytorch.utilities.exceptions import SIGTERMException

            from dlplora.training.launch import run

            try:
                return run(arguments)
            except SIGTERMException:
                return _interrupted(TERMINATED)
            except SystemExit as error:  # Lightning ends with code 1 after Ctrl-C
                if not isinstance(error.__context__, KeyboardInterrupt):
                    raise
                return _interrupted(exit_code(error.__context__))
        except DLPLoRAError as error:
            _say(f"error: {one_line(error)}")
            return disk_failed if _of_the_disk(error.__cause__) else 2
        except OSError as error:  # a full disk, above all; what TensorBoard raises names no file
            where = error.filename2 or error.filename or "a file of the run, under trainer.default_root_dir"
            _say(f"error: {one_line(f'{error.strerror or error}: {where}')}")
            return disk_failed if _of_the_disk(error) else 2
        except KeyboardInterrupt as error:
            return _interrupted(exit_code(error))


def _of_the_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _interrupted(code: int) -> int:
    _say("interrupted; --ckpt_path last continues from the newest checkpoint.")
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
