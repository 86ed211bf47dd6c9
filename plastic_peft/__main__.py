"""`python -m plastic_peft`, which is also what `accelerate launch -m plastic_peft` starts."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
