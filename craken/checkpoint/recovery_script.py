"""Leaves `zero_to_fp32.py` beside `latest`, where DeepSpeed's users look for it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

SCRIPT_NAME = "zero_to_fp32.py"
_TEXT = '''#!/usr/bin/env python3
"""Writes the weights of the checkpoints in this folder in fp32: python zero_to_fp32.py . OUTPUT_FOLDER [--tag TAG]"""

import sys

try:
    from craken.checkpoint.export.fp32 import (  # noqa: F401 - users import them from here too
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
        main,
    )
except ModuleNotFoundError as error:
    problem = f"{error} for {sys.executable}: run zero_to_fp32.py with the Python of an environment that has craken"
    if __name__ == "__main__":
        sys.exit(problem)
    raise ModuleNotFoundError(problem, name=error.name) from None

if __name__ == "__main__":
    sys.exit(main())
'''


def leave_script(folder: Path) -> None:
    """Write the script into `folder` unless it lies there as it should; it appears whole."""
    path = folder / SCRIPT_NAME
    if path.is_file() and path.read_bytes() == _TEXT.encode():
        return
    staged = folder / f".{SCRIPT_NAME}.tmp-{secrets.token_hex(8)}"
    try:
        staged.write_text(_TEXT, encoding="utf-8")
        os.chmod(staged, 0o755)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
