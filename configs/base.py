"""Every option with its default: other configs start here, and state how they differ.

`python -m maskdit_jax.main --config=FILE --list_options` lists the options of a configuration, a line
each with value, unit and range. They are written beside the code that reads them: those of all methods in
maskdit_jax/config.py, a method's own in maskdit_jax/methods/.
"""

from maskdit_jax.config import ConfigDict, defaults


def get_config(method: str = "maskdit") -> ConfigDict:
    """The options that all methods share, and those of `method`: maskdit, maskdm, dit or mdt."""
    return defaults(method)
