"""Command `maskdit-doctor` from a checkout, where a package that is missing is a line too."""

import sys

try:
    from maskdit_jax.doctor import main
except ModuleNotFoundError as error:
    sys.exit(f"FAILED  packages: {error.name} is not installed; pip install -e . in the repository")

if __name__ == "__main__":
    main()
