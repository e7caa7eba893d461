"""One exception class per thing that can be wrong before a verdict exists; one that ends a run has exit code 2."""

from __future__ import annotations


class ParityError(Exception):
    """A fault of the set-up, input or machine, never a divergence: one clear line, exit code 2."""


class CaseTableError(ParityError):
    """``fixtures/cases.toml`` does not say what a case must say."""


class ModelError(ParityError):
    """A model directory is missing, incomplete or not what the case asks for."""


class HubError(ParityError):
    """The hub does not give a model or an SAE, or not as it declares it: of a run's case, UNMEASURED and no ERROR."""


class SaeError(ParityError):
    """SAE weights are missing, incomplete or do not fit the model."""


class NoTruthError(SaeError):
    """An SAE of a kind whose truth this suite does not compute; candle-mi can be asked for it all the same."""


class OracleError(ParityError):
    """The truth cannot be computed as promised (an op without a noise rule, a float32 result, …)."""


class LibraryError(OracleError):
    """An installed library is older than what a case needs: of a run, that case is not run."""


class OutOfRangeError(OracleError):
    """A weight is beyond the case's format, so that there is no truth in it: of a run's case, UNMEASURED."""


class DeviceError(ParityError):
    """An accelerator has too little memory, or cannot be made to round as float32 does."""


class TraceError(ParityError):
    """A trace, or a tensor in it, is not what the contract says."""


class ExplanationError(ParityError):
    """An explanation is malformed, applies to nothing, explains nothing, or overlaps another."""


class CensusError(ParityError):
    """The auto-config census cannot be made, or a stored one is not valid."""


class Stopped(BaseException):
    """Ctrl-C, SIGTERM, or the terminal was closed. Nothing that catches exceptions may take it for one of its own."""
