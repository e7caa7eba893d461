"""What a truth was made with: the modules that affect a number, and the versions of the libraries.

Truths, censuses and the field ledger have these in their cache keys. The libraries are not imported.
"""

from __future__ import annotations

import ast
import hashlib
import platform
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from candle_mi_parity.errors import OracleError
from candle_mi_parity.files.digest import digest_files
from candle_mi_parity.files.versions import version
from candle_mi_parity.spec.families import RECURRENT, transformers_type

PACKAGE = Path(__file__).parents[1]
MODULES = (
    *("compare/gate", "trace/truth", "trace/formats"),
    *("spec/counterfactual", "spec/edits", "spec/families", "spec/hook_points", "spec/recurrent"),
    *("models/checkpoint", "models/dequantize", "models/generate", "models/prepared_case", "models/sae"),
    *("models/saelens", "models/transcoder", "models/transformers_config", "models/transformers_private"),
    *("oracle/compute", "oracle/downstream", "oracle/gradients", "oracle/hooks", "oracle/interventions"),
    *("oracle/oracle", "oracle/recurrence", "oracle/remarks", "oracle/rounding", "oracle/rwkv_hooks"),
    *("oracle/streaming", "oracle/torch_sae", "oracle/torch_state", "oracle/variants"),
)
"""Every module of this package that affects a number of a truth."""
LIBRARIES = ("torch", "transformers", "numpy")


@cache
def rules_digest() -> str:
    """sha256 over the code of :data:`MODULES`; comments and docstrings do not count."""
    digest = hashlib.sha256()
    for name in MODULES:
        digest.update(f"{name}\n{code_of((PACKAGE / f'{name}.py').read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()


def code_of(source: str) -> str:
    """A module's syntax tree as text, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [child for child in node.body if not _is_docstring(child)]
    return ast.dump(tree)


def _is_docstring(node: ast.stmt) -> bool:
    """Whether a statement is a string literal: the docstring of a module, class, function or constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def library_versions() -> dict[str, str]:
    """The versions of the libraries that affect a number."""
    return {name: version(name) for name in LIBRARIES}


@cache
def made_with(model_type: str) -> dict[str, str]:
    """What affects the truths of a family besides the case: libraries, model code, this package, the processor.

    :raises OracleError: this transformers has no such family.
    """
    return {
        **library_versions(),
        "modeling": digest_files(modeling_files(model_type)),
        "rules": rules_digest(),
        "machine": platform.machine(),  # its kernels order the sums
    }


def modeling_files(model_type: str) -> list[Path]:
    """The source files of transformers for a family, with the rotary and mask helpers, or ours of a recurrent model.

    :raises OracleError: this transformers has no such family.
    """
    if model_type in RECURRENT:
        return [PACKAGE / "models" / f"{name}.py" for name in ("rwkv", "rwkv_auto", model_type)]
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise OracleError("transformers is not installed")
    root = Path(spec.origin).parent
    kind = transformers_type(model_type)
    family = root / "models" / kind
    files = [family / f"modeling_{kind}.py", family / f"configuration_{kind}.py"]
    files += [root / f"{name}.py" for name in ("modeling_rope_utils", "masking_utils", "activations")]
    if missing := [path for path in files if not path.is_file()]:
        raise OracleError(f"no source file of model_type {model_type!r} was found: {missing[0]} does not exist")
    return files
