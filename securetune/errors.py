"""Every error securetune raises on purpose; the command line prints these without a traceback."""


class SecuretuneError(Exception):
    """Base class: the message says what was wrong, the value, what is allowed and what to do."""


class ConfigError(SecuretuneError, ValueError):
    """A recipe, an option or a combination of options is not valid."""


class DataError(SecuretuneError, ValueError):
    """A data file or a record cannot be used."""


class PrivacyError(SecuretuneError):
    """The privacy guarantee cannot be given, or would be broken by going on."""


class CheckpointError(SecuretuneError):
    """A checkpoint is damaged, incomplete, unsafe or of an unknown version."""


class AccessDenied(CheckpointError):
    """The key or passphrase given does not open the checkpoint."""


class SignatureError(CheckpointError):
    """A signature is missing, or does not match the content or the expected key."""


class GateFailed(SecuretuneError):
    """The evidence does not meet the release gate of the recipe: nothing is published."""


class MachineError(SecuretuneError):
    """This machine lacks something the run needs: a device, a package, memory or disk space."""
